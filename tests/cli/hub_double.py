"""A hub of forty lines that answers over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from potluck.blobs import hash_bytes
from potluck.domain.job import GangSpec, JobSpec
from potluck.protocol import (
    AttemptView,
    Blob,
    Contribution,
    Dataset,
    Fates,
    GangView,
    Hardware,
    HubInfo,
    JobView,
    Link,
    LogPiece,
    MemberView,
    Missing,
    RecipeRef,
    RunView,
    Tree,
    TreeFile,
    UploadAnswer,
    Usage,
    WorkerView,
)

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


def make_attempt(number: int = 1, **changes: Any) -> AttemptView:
    values: dict[str, Any] = {
        "number": number,
        "worker": "lab-1",
        "worker_id": "w-1",
        "state": "succeeded",
        "reason": "exit code 0",
        "executor": "bubblewrap",
        "environment": {"python": "3.11.2", "packages": ["torch==2.13.0", "numpy==2.0"]},
        "placed_at": "2026-01-01T10:00:01+00:00",
        "started_at": "2026-01-01T10:00:02+00:00",
        "ended_at": "2026-01-01T10:01:02+00:00",
        "exit_code": 0,
        "signal": "",
        "usage": Usage(60.0, 55.0, 512_000_000),
        "log_bytes": 0,
        "outputs": None,
        "checkpoint": None,
    }
    return AttemptView(**(values | changes))


def make_job(name: str = "tiny", id_: str = "tiny-k3f2", **changes: Any) -> JobView:
    values: dict[str, Any] = {
        "id": id_,
        "name": name,
        "owner": "ada",
        "state": "succeeded",
        "reason": "exit code 0",
        "mine": True,
        "priority": 0,
        "needs": "1 core, 2 GB of memory",
        "created_at": "2026-01-01T10:00:00+00:00",
        "started_at": "2026-01-01T10:00:02+00:00",
        "ended_at": "2026-01-01T10:01:02+00:00",
        "worker": "lab-1",
        "exit_code": 0,
        "retries_left": 2,
        "spec": JobSpec(["python", "train.py", "--epochs", "3"], name=name),
        "attempts": [make_attempt()],
    }
    return JobView(**(values | changes))


def make_member(number: int = 1, gang: str = "faces-g1", **changes: Any) -> MemberView:
    values: dict[str, Any] = {
        "job": f"{gang}-{number}",
        "member": number,
        "state": "running",
        "reason": "",
        "worker": f"lab-{number}",
        "address": f"10.0.0.{number}",
    }
    return MemberView(**(values | changes))


def make_gang(name: str = "faces", id_: str = "faces-g1", **changes: Any) -> GangView:
    """Of two to three machines, two of which train."""
    values: dict[str, Any] = {
        "id": id_,
        "name": name,
        "owner": "ada",
        "state": "running",
        "reason": "2 machines",
        "mine": True,
        "least": 2,
        "most": 3,
        "engine": "plain",
        "created_at": "2026-01-01T11:00:00+00:00",
        "started_at": "2026-01-01T11:00:02+00:00",
        "ended_at": None,
        "exit_code": None,
        "host": "lab-1",
        "members": [
            make_member(1, id_, rank=0, share=48, samples_per_s=75.0, alone_per_s=80.0),
            make_member(2, id_, rank=1, share=16, samples_per_s=25.0, alone_per_s=30.0),
            make_member(3, id_, state="queued", reason="no machine is free", worker="", address=""),
        ],
        "spec": JobSpec(["python", "train.py"], name=name, gang=GangSpec(2, 3, batch=64)),
    }
    return GangView(**(values | changes))


def make_link(source: str, target: str, address: str = "10.0.0.9", reason: str = "", **changes: Any) -> Link:
    values: dict[str, Any] = {"rtt_s": 0.0004, "bytes_per_s": 112e6, "seconds_ago": 12.0}
    return Link(**({"source": source, "target": target, "address": address, "reason": reason} | values | changes))


def make_worker(name: str = "lab-1", **changes: Any) -> WorkerView:
    values: dict[str, Any] = {
        "id": f"w-{name}",
        "name": name,
        "state": "idle",
        "device": "cpu",
        "share": 1.0,
        "trusted": False,
        "hardware": msgspec.convert({}, Hardware),
        "joined_at": "2026-01-01T10:00:00+00:00",
        "last_seen": "2026-01-01T10:00:00+00:00",
        "doing": "",
        "samples_per_s": 0.0,
        "fates": Fates(),
        "units": 0,
    }
    return WorkerView(**(values | changes))


def job_of(gang: GangView, member: MemberView) -> JobView:
    began = [make_attempt(worker=member.worker, state=member.state, reason=member.reason)] if member.worker else []
    return make_job(
        f"{gang.name}·{member.member}",
        member.job,
        state=member.state,
        reason=member.reason,
        worker=member.worker,
        gang=gang.id,
        member=member.member,
        attempts=began,
        created_at=gang.created_at,
    )


class HubDouble:
    """Answers by (method, path); what is not in `routes` is a 404 problem. Notes what it was asked."""

    def __init__(self) -> None:
        self.routes: dict[tuple[str, str], Answer] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.tokens: list[str] = []
        self.queries: list[dict[str, str]] = []  # of each request, as in `asked`
        self.blobs: dict[str, bytes] = {}
        self.any_patch: Answer | None = None  # of an upload
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                address, _, query = self.path.partition("?")
                path = address.removeprefix("/api/v1")
                is_json = "json" in self.headers.get("Content-Type", "")
                sent = (json.loads(body) if is_json else body) if body else None
                double.queries.append(dict(parse_qsl(query)))
                double.asked.append((self.command, path, sent))
                double.tokens.append(self.headers.get("Authorization", ""))
                status, kind = 200, "application/json"
                route = double.routes.get((self.command, path))
                if self.command == "PATCH" and path.startswith("/uploads/") and route is None:
                    route = double.any_patch
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

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        for path in ("/runs", "/jobs", "/gangs", "/links"):
            self.routes["GET", path] = lambda _: []
        self.routes["GET", "/hub"] = lambda _: HubInfo("Lab", "0.1.0", 1, 1, "2026-01-01T10:00:00+00:00")

    def knows(self, *runs: RunView) -> None:
        self.routes["GET", "/runs"] = lambda _: list(runs)
        for run in runs:
            self.routes["GET", f"/runs/{run.id}"] = lambda _, run=run: run
            self.routes["GET", f"/runs/{run.id}/contributions"] = lambda _: [make_contribution("ada")]

    def knows_jobs(self, *jobs: JobView) -> None:
        """They are listed, and found by id and name; `last` is the first of them."""
        self.routes["GET", "/jobs"] = lambda _: list(jobs)
        for job in reversed(jobs):
            for ref in (job.id, job.name, "last"):
                self.routes["GET", f"/jobs/{ref}"] = lambda _, job=job: job
            self.routes["GET", f"/runs/{job.id}/events"] = lambda _: []

    def knows_gangs(self, *gangs: GangView) -> None:
        """They are listed, and found by id and name; `last` is the first of them. Their members are jobs."""
        self.routes["GET", "/gangs"] = lambda _: list(gangs)
        for gang in reversed(gangs):
            for ref in (gang.id, gang.name, "last"):
                self.routes["GET", f"/gangs/{ref}"] = lambda _, gang=gang: gang
            self.routes["GET", f"/gangs/{gang.id}/wait"] = lambda _, gang=gang: gang
            self.routes["GET", f"/runs/{gang.id}/events"] = lambda _: []
            for member in gang.members:
                job = job_of(gang, member)
                self.routes["GET", f"/jobs/{job.id}"] = lambda _, job=job: job

    def prints(self, job: JobView, attempt: int, text: str) -> None:
        """The attempt has ended and printed this; it comes in the pieces that were asked for."""
        before = self.routes.get(("GET", f"/jobs/{job.id}/log"))

        def piece(body: Any) -> Any:
            query = self.queries[-1]
            if int(query["attempt"]) != attempt:
                return before(body) if before else (404, "not_found", f"no attempt {query['attempt']}")
            content, offset = text.encode(), int(query["offset"])
            part = content[offset : offset + int(query["limit"])]
            end = offset + len(part)
            return LogPiece(attempt, offset, end, part.decode("utf-8", "replace"), end >= len(content))

        self.routes["GET", f"/jobs/{job.id}/log"] = piece

    def takes_projects(self) -> None:
        """It keeps blobs, and knows which of them it misses."""

        def batch(body: bytes) -> bytes:
            head, _, rest = body.partition(b"\n")
            for blob in msgspec.json.decode(head, type=list[Blob]):
                content, rest = rest[: blob.size_bytes], rest[blob.size_bytes :]
                self.blobs[blob.hash] = content
            return b""

        def upload(body: Any) -> UploadAnswer:
            return UploadAnswer(body["blob"]["hash"], 0, body["blob"]["hash"] in self.blobs)

        def missing(body: Any) -> Missing:
            return Missing([one["hash"] for one in body if one["hash"] not in self.blobs])

        def patch(body: bytes) -> UploadAnswer:
            blob = self.add_blob(body)
            return UploadAnswer(blob.hash, blob.size_bytes, True)

        self.routes["POST", "/blobs/missing"] = missing
        self.routes["POST", "/blobs/batch"] = batch
        self.routes["POST", "/uploads"] = upload
        self.any_patch = patch

    def add_blob(self, content: bytes) -> Blob:
        blob = hash_bytes(content)
        self.blobs[blob.hash] = content
        return blob

    def gives_tree(self, job: JobView, files: dict[str, bytes], what: str = "outputs") -> Tree:
        """The job left these files, and they can be fetched."""
        tree = Tree([TreeFile(path, self.add_blob(content)) for path, content in sorted(files.items())])

        def many(body: Any) -> bytes:
            blobs = [hash_bytes(self.blobs[hash_]) for hash_ in body]
            return msgspec.json.encode(blobs) + b"\n" + b"".join(self.blobs[hash_] for hash_ in body)

        self.routes["GET", f"/jobs/{job.id}/tree"] = lambda _: (
            tree if self.queries[-1]["what"] == what else (404, "not_found", "there is none")
        )
        self.routes["POST", "/blobs/many"] = many
        return tree

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
