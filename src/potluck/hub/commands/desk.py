"""What does every use case need at hand, and how does one request wake another?"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from potluck.blobs import BlobStore
from potluck.hub.store import Ledger, Transaction
from potluck.protocol import Blob, Json

T = TypeVar("T")


class News:
    """Who waits for what, inside this process. Subscribe (`ticket`), look, then wait: nothing is missed in between."""

    def __init__(self) -> None:
        self._count: dict[str, int] = defaultdict(int)
        self._waiting: dict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self.closed = False

    def close(self) -> None:
        """The hub stops: whoever waits is woken, and should end instead of waiting again."""
        self.closed = True
        self.tell("")

    def ticket(self, topic: str) -> tuple[str, int]:
        return topic, self._count[topic]

    def tell(self, topic: str) -> None:
        """Wake everybody who waits for `topic`; "" wakes all."""
        topics = [topic] if topic else list(self._waiting)
        for each in topics:
            self._count[each] += 1
            for future in self._waiting.pop(each, ()):
                if not future.done():
                    future.set_result(None)

    async def wait(self, ticket: tuple[str, int], timeout_s: float) -> bool:
        """True when there was news since the ticket was taken, False after `timeout_s`."""
        topic, seen = ticket
        if self._count[topic] != seen:
            return True
        future = asyncio.get_running_loop().create_future()
        self._waiting[topic].add(future)
        try:
            async with asyncio.timeout(timeout_s):  # wait_for would swallow a cancel that comes with the news
                await future
        except TimeoutError:
            return False
        finally:
            self._waiting[topic].discard(future)
            if not self._waiting[topic]:
                del self._waiting[topic]
        return True


@dataclass(frozen=True)
class Desk:
    """One hub process: its ledger, its blobs, its news."""

    ledger: Ledger
    blobs: BlobStore
    name: str = "potluck"
    public_url: str = "http://127.0.0.1:8470"
    fingerprint: str = ""
    lease_ttl_s: float = 15.0
    news: News = field(default_factory=News)


@dataclass(frozen=True)
class Caller:
    """Who is asking."""

    role: str
    subject: str
    name: str
    trusted: bool = False


def as_type(value: Json, kind: type[T]) -> T:
    """A record out of the ledger's JSON."""
    return msgspec.convert(value, kind, strict=False)


def as_json(value: Any) -> str:
    """A record for a jsonb column."""
    return msgspec.json.encode(value).decode()


def as_blob(value: Json | None) -> Blob | None:
    return None if value is None else as_type(value, Blob)


def fair_share(claimed: float) -> float:
    """The part of its machine that a worker gives, between a hundredth and all; all, if it sent nonsense."""
    return min(max(claimed, 0.01), 1.0) if claimed == claimed else 1.0


def new_id(length: int = 5) -> str:
    """A short random id of letters that are hard to confuse."""
    return base64.b32encode(secrets.token_bytes(length)).decode().lower().rstrip("=")[:length]


async def note(
    tx: Transaction, kind: str, subject: str, text: str, *, run_id: str | None = None, actor: str = ""
) -> None:
    """Write an event: one sentence that the page and `potluck why` show."""
    await tx.run("add_event", kind=kind, subject=subject, run_id=run_id, actor=actor, text=text)
