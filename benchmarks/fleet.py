"""A thousand workers in one process: each holds its `POST /orders` open, and says of every job that it has succeeded.

They speak HTTP/1.1 by hand over plain sockets, because client and hub share two cores here, and a comfortable client
would take more of them than the hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from potluck.protocol import (
    Hardware,
    JobReport,
    JoinRequest,
    Json,
    MachineNow,
    OrdersAnswer,
    OrdersRequest,
    Rules,
)

GB = 10**9
MACHINE = MachineNow(
    cpu_cores=4, memory_bytes=16 * GB, memory_free_bytes=12 * GB, disk_free_bytes=100 * GB, os="linux", arch="x86_64"
)
DONE = msgspec.json.encode(JobReport("exited", exit_code=0, executor="process"))


class Wire:
    """One keep-alive connection."""

    def __init__(self, address: str, token: str) -> None:
        place = urlsplit(address)
        self._host, self._port = place.hostname or "", place.port or 80
        self._head = f"Host: {place.netloc}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        head = f"{method} /api/v1{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        length = next((int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:")), 0)
        return int(lines[0].split()[1]), await self._reader.readexactly(length)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


@dataclass
class Fleet:
    """`size` workers of the hub at `address`; `got` says when which job came to somebody (seconds since 1970)."""

    address: str
    code: str  # of a link with enough uses
    size: int
    wait_s: float = 10.0
    got: dict[str, float] = field(default_factory=dict)
    ended: int = 0
    polls: int = 0
    tokens: list[str] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def join(self) -> None:
        wire = Wire(self.address, "")
        for number in range(self.size):
            token = "potluck_worker_" + secrets.token_urlsafe(32)
            known = hashlib.sha256(token.encode()).hexdigest()
            request = JoinRequest(self.code, f"sim-{number}", known, Hardware(cpu_cores=4))
            status, answer = await wire.ask("POST", "/join", msgspec.json.encode(request))
            if status != 200:
                raise SystemExit(f"join: {status} {answer[:300]!r}")
            self.tokens.append(token)
        wire.close()

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._work(token, n)) for n, token in enumerate(self.tokens)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, token: str, number: int) -> None:
        await asyncio.sleep(self.wait_s * number / self.size)  # they did not all start in the same instant
        wire, agent = Wire(self.address, token), secrets.token_hex(8)
        request = OrdersRequest(agent, [], MACHINE, Rules(runtime="any"), ["process"])
        body = msgspec.json.encode(request)
        try:
            while True:
                status, answer = await wire.ask("POST", f"/orders?wait={self.wait_s:g}", body)
                self.polls += 1
                if status != 200:
                    await asyncio.sleep(0.5)
                    continue
                for lease in msgspec.json.decode(answer, type=OrdersAnswer).leases:
                    self.got.setdefault(lease.run_id, time.time())
                    status, _ = await wire.ask("POST", f"/leases/{lease.id}/end", DONE)
                    self.ended += status == 200
        finally:
            with contextlib.suppress(Exception):
                wire.close()


def decode(answer: bytes) -> Json:
    return msgspec.json.decode(answer)
