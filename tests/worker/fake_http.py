"""The HTTP below the tests' hub: requests that fail, are cut in the middle, or answered as by something that is no hub."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import msgspec

from potluck.blobs import BlobStore
from potluck.protocol import Problem

TITLES = {
    401: "not_known",
    403: "not_allowed",
    404: "not_found",
    409: "conflict",
    426: "version_mismatch",
    503: "try_later",
}


class Troubles(Protocol):
    """What a hub has for its requests."""

    blobs: BlobStore
    calls: list[tuple[str, str]]
    fail: dict[str, list[int]]
    cut: dict[str, int]
    bare: bool


class Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lines: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.lines.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.lines.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        for line in list(self.lines):
            self.shutdown_request(line)

    def handle_error(self, request: Any, client_address: Any) -> None:
        return


class Refusal(Exception):
    def __init__(self, status: int, detail: str) -> None:
        self.status, self.detail = status, detail


class Requests(BaseHTTPRequestHandler):
    hub: Troubles
    protocol_version = "HTTP/1.1"

    def route(self, path: str, body: bytes) -> None:
        """Answer it."""
        raise NotImplementedError

    def log_message(self, *args: Any) -> None:
        return

    def handle_any(self) -> None:
        hub = self.hub
        url = urlsplit(self.path)
        path = url.path.removeprefix("/api/v1")
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        hub.calls.append((self.command, path))
        for prefix, count in hub.cut.items():
            if path.startswith(prefix) and count and self.command in ("PATCH", "GET"):
                hub.cut[prefix] -= 1
                self.cut(path, length)
                return
        body = self.rfile.read(length)
        if hub.bare:
            self.answer(200, b"<html>It works!</html>", {"Content-Type": "text/html"}, header=False)
            return
        for prefix, statuses in hub.fail.items():
            if path.startswith(prefix) and statuses:
                self.problem(statuses.pop(0), "made to fail")
                return
        try:
            self.route(path, body)
        except Refusal as problem:
            self.problem(problem.status, problem.detail)
        except msgspec.MsgspecError as error:
            self.problem(422, str(error))

    do_GET = do_POST = do_PATCH = do_DELETE = do_HEAD = handle_any  # noqa: N815

    def cut(self, path: str, length: int) -> None:
        """Take or give half of the bytes, then hang up."""
        if self.command == "PATCH":
            half = self.rfile.read(length // 2)
            self.hub.blobs.append(path.split("/")[2].split("-")[0], int(self.query["offset"]), half)
        else:
            content = self.hub.blobs.read(path.split("/")[2])
            self.send_response(200)
            self.send_header("Potluck-Protocol", "1")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, header: bool = True) -> None:
        self.send_response(status)
        if header:
            self.send_header("Potluck-Protocol", "1")
        for name, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != 204 and self.command != "HEAD":
            self.wfile.write(body)

    def say(self, value: Any, status: int = 200) -> None:
        self.answer(status, msgspec.json.encode(value))

    def problem(self, status: int, detail: str) -> None:
        code = TITLES.get(status, "bad_input" if status == 422 else "internal")
        body = msgspec.json.encode(Problem(f"https://potluck/{code}", code, status, detail, code))
        self.answer(status, body, {"Content-Type": "application/problem+json"})
