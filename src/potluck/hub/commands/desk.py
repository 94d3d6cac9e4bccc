"""What does every use case need at hand, and how does one request wake another?"""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from potluck.blobs import BlobStore
from potluck.hub.commands.facts import Forecast
from potluck.hub.store import Ledger, Transaction
from potluck.hub.store.logs import LogStore
from potluck.hub.store.secrets import SecretBox
from potluck.protocol import Blob, Json

T = TypeVar("T")


class News:
    """Who waits for what, inside this process. Subscribe (`ticket`), look, then wait: nothing is missed in between."""

    MOST_TOPICS = 20_000

    def __init__(self) -> None:
        self._told = 0  # so often was anything told
        self._forgotten = 0  # what was told before this is not known any more
        self._last: dict[str, int] = {}  # topic → when it was told last
        self._waiting: dict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self.closed = False

    def close(self) -> None:
        """The hub stops: whoever waits is woken, and should end instead of waiting again."""
        self.closed = True
        self.tell("")

    def ticket(self, topic: str) -> tuple[str, int]:
        return topic, self._last.get(topic, self._forgotten)

    def tell(self, topic: str) -> None:
        """Wake everybody who waits for `topic`; "" wakes all."""
        topics = [topic] if topic else list(self._waiting)
        for each in topics:
            self._told += 1
            self._last[each] = self._told
            for future in self._waiting.pop(each, ()):
                if not future.done():
                    future.set_result(None)
        if len(self._last) > self.MOST_TOPICS:
            # Every job and worker that ever was has topics of its own. Who holds a ticket now is woken for nothing, once.
            self._last.clear()
            self._forgotten = self._told

    async def wait(self, ticket: tuple[str, int], timeout_s: float) -> bool:
        """True when there was news since the ticket was taken, False after `timeout_s`."""
        return await self.wait_any((ticket,), timeout_s)

    async def wait_any(self, tickets: Sequence[tuple[str, int]], timeout_s: float) -> bool:
        """Like `wait`, for whichever of several topics has news first."""
        if any(self.ticket(topic)[1] != seen for topic, seen in tickets):
            return True
        future = asyncio.get_running_loop().create_future()
        for topic, _ in tickets:
            self._waiting[topic].add(future)
        try:
            async with asyncio.timeout(timeout_s):  # wait_for would swallow a cancel that comes with the news
                await future
        except TimeoutError:
            return False
        finally:
            for topic, _ in tickets:
                self._waiting[topic].discard(future)
                if not self._waiting[topic]:
                    del self._waiting[topic]
        return True


@dataclass
class Memory:
    """What a hub process remembers and could forget at any moment without harm."""

    forecast: Forecast | None = None
    told: dict[tuple[str, str], float] = field(default_factory=dict)
    """(worker, lease) → when it was told to end or drop it, by the loop's clock: not again at every breath."""
    unpacking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    """Large archives are opened in threads for minutes; logs, blobs and placements need those too."""


@dataclass(frozen=True)
class Desk:
    """One hub process: its ledger, its blobs, its jobs' logs, the key to its secrets, its news."""

    ledger: Ledger
    blobs: BlobStore
    name: str = "potluck"
    public_url: str = "http://127.0.0.1:8470"
    fingerprint: str = ""
    lease_ttl_s: float = 15.0
    news: News = field(default_factory=News)
    memory: Memory = field(default_factory=Memory)

    def move(self, public_url: str) -> None:
        """From now on the hub is found there. The only thing about a desk that ever changes: a tunnel was opened anew."""
        object.__setattr__(self, "public_url", public_url)

    @cached_property
    def logs(self) -> LogStore:
        """What jobs print; beside the blobs."""
        return LogStore(self.blobs.root.parent / "logs")

    @cached_property
    def keys(self) -> SecretBox:
        """What people's secrets are sealed with; its key is beside the blobs, not in the ledger."""
        return SecretBox(self.blobs.root.parent / "secrets.key")


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


def iso(at: datetime | None) -> str | None:
    """A time of the ledger as the API says it."""
    return None if at is None else at.isoformat()


def fair_share(claimed: float) -> float:
    """The part of its machine that a worker gives, between a hundredth and all; all, if it sent nonsense."""
    return min(max(claimed, 0.01), 1.0) if claimed == claimed else 1.0


def new_id(length: int = 5) -> str:
    """A short random id of letters that are hard to confuse."""
    return base64.b32encode(secrets.token_bytes(length)).decode().lower().rstrip("=")[:length]


async def new_run_id(tx: Transaction, name: str, otherwise: str) -> str:
    """`name` as an address takes it, and some letters; short, because people type it, and not in use yet."""
    # an id goes into addresses and commands: letters, digits and hyphens only
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower())[:20].strip("-") or otherwise
    while await tx.row("run", run_id=(run_id := f"{stem}-{new_id()}")) is not None:
        pass  # among ten thousand ids of five letters two are the same now and then
    return run_id


async def note(
    tx: Transaction, kind: str, subject: str, text: str, *, run_id: str | None = None, actor: str = ""
) -> None:
    """Write an event: one sentence that the page and `potluck why` show."""
    await tx.run("add_event", kind=kind, subject=subject, run_id=run_id, actor=actor, text=text)


async def spread(tx: Transaction, topic: str, ids: Iterable[str]) -> None:
    """Tell other hub copies `topic:id` for each id when this transaction commits; many ids in one notification."""
    rest = sorted(set(ids))
    while rest:  # PostgreSQL takes 8,000 bytes in one
        await tx.notify(f"{topic}:{','.join(rest[:200])}")
        rest = rest[200:]


def pass_on(desk: Desk, topic: str, ids: Iterable[str]) -> None:
    """The same inside this process, at once."""
    for id_ in set(ids):
        desk.news.tell(f"{topic}:{id_}")
