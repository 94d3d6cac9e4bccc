"""A hub of forty lines that answers over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from potluck.protocol import Contribution, Dataset, Fates, HubInfo, RecipeRef, RunView

Answer = Callable[[Any], Any]


def make_run(name: str = "faces", id_: str = "dcgan-aaaa", **changes: Any) -> RunView:
    values: dict[str, Any] = {
        "id": id_,
        "name": name,
        "mode": "pool",
        "recipe": RecipeRef("dcgan", {"lr": 0.0002}),
        "dataset": Dataset("emoji", 1000, [], [3, 32, 32]),
        "state": "running",
        "reason": "",
        "version": 12,
        "created_at": "2026-01-01T10:00:00+00:00",
        "started_at": "2026-01-01T10:00:05+00:00",
        "ended_at": None,
        "target_samples": 2000,
        "duration_s": None,
        "elapsed_s": 65.0,
        "fates": Fates(handed_out=700, applied=450, late=50, lost=100, pending=100),
        "epoch": 0.5,
        "active_workers": 2,
        "samples_per_s": 12.5,
        "losses": {"d_loss": 0.71},
        "metrics": {"distance": 4.0},
        "first_metrics": {"distance": 9.5},
        "settings": {"unit_s": 10.0},
    }
    return RunView(**(values | changes))


def make_contribution(worker: str) -> Contribution:
    fates = Fates(handed_out=500, applied=400, late=50, lost=50)
    return Contribution(worker, "w-1", "cpu", 0.5, 9, fates, 33.0, 13.6, "2026-01-01", "2026-01-01", 1000, 2000)


class HubDouble:
    """Answers by (method, path); what is not in `routes` is a 404 problem. Notes what it was asked."""

    def __init__(self) -> None:
        self.routes: dict[tuple[str, str], Answer] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.tokens: list[str] = []
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0].removeprefix("/api/v1")
                sent = json.loads(body) if body else None
                double.asked.append((self.command, path, sent))
                double.tokens.append(self.headers.get("Authorization", ""))
                status, kind = 200, "application/json"
                route = double.routes.get((self.command, path))
                value = route(sent) if route else (404, "not_found", f"there is nothing at {path}")
                if isinstance(value, tuple):
                    status, code, detail = value
                    kind = "application/problem+json"
                    value = {"type": "", "title": "", "status": status, "detail": detail, "code": code}
                raw = value if isinstance(value, bytes) else json.dumps(msgspec.to_builtins(value)).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(raw)))
                self.send_header("Potluck-Protocol", "1")
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_PATCH = do_DELETE = do_HEAD = answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.routes["GET", "/hub"] = lambda _: HubInfo("Lab", "0.1.0", 1, 1, "2026-01-01T10:00:00+00:00")

    def knows(self, *runs: RunView) -> None:
        self.routes["GET", "/runs"] = lambda _: list(runs)
        for run in runs:
            self.routes["GET", f"/runs/{run.id}"] = lambda _, run=run: run
            self.routes["GET", f"/runs/{run.id}/contributions"] = lambda _: [make_contribution("ada")]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
