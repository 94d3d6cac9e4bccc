"""How do two hundred viewers see the same change without two hundred renderings?

    desk.news "change" ─► every viewer wakes ─► Channel.frame: the first renders, the others wait for it and share it

A `Channel` is one page that is being looked at: the overview, one run, the queue. It keeps the newest `Frame`, in it the
message, ready as bytes, that takes a viewer from an earlier frame to this one: only the regions that differ. A channel
rests at least `PAUSE_S` between frames, and five times as long as a frame took to make, so that no crowd and no long
history can take the hub away from its workers.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
from markupsafe import Markup

from potluck.errors import PotluckError, TryLater
from potluck.hub.commands.desk import Desk
from potluck.hub.dashboard import views
from potluck.telemetry import logger

log = logger("hub.dashboard")
PAUSE_S = 0.5
"""Seconds between two frames, at least."""
RENDER_SHARE = 0.2
"""Part of the time that drawing one page may take, most of it waiting for the ledger."""
STALE_S = 5.0
"""A frame is drawn anew after this long even without news: silence, too, changes what there is to see."""
HEARTBEAT_S = 15.0
RECHECK_S = 5.0
"""About how often a stream asks whether its viewer is still welcome; not all of them at the same moment."""
RETRY_MS = 2000
MOST_CHANNELS = 32


@dataclass(frozen=True)
class Frame:
    """A page at one moment."""

    id: str  # "<channel's random word>-<number>": a browser that comes back says it
    number: int
    regions: dict[str, Markup]
    changed: dict[str, int]  # the number of the frame in which a region became what it is
    news: int  # how much news it knows
    at: float
    _messages: dict[int, bytes] = field(default_factory=dict)

    def message(self, after: int) -> bytes:
        """The event that takes a viewer from frame number `after` to this one; empty when nothing changed."""
        if after not in self._messages:
            new = {f"r-{name}": str(html) for name, html in self.regions.items() if self.changed[name] > after}
            body = msgspec.json.encode(new)
            self._messages[after] = b"event: page\nid: %s\ndata: %s\n\n" % (self.id.encode(), body) if new else b""
        return self._messages[after]


class Channel:
    """One page and its newest frame."""

    def __init__(self, desk: Desk, key: str) -> None:
        self.desk, self.view = desk, views.make(key)
        self.renders = 0
        self._word = secrets.token_hex(4)
        self._frame: Frame | None = None
        self._is_spoiled = False
        self._trouble: tuple[float, str] | None = None
        self._pause_s = PAUSE_S
        self._lock = asyncio.Lock()

    async def now(self) -> Frame:
        """A frame for somebody who has just come: at most a pause old, and without waiting for one."""
        async with self._lock:
            if self._frame is None or self._is_spoiled or _clock() - self._frame.at > self._pause_s:
                await self._draw()
            assert self._frame is not None
            return self._frame

    def spoil(self) -> None:
        """Whoever comes next has just changed something, and wants to see that it did."""
        self._is_spoiled = True

    async def frame(self, news: int) -> Frame:
        """A frame that knows of `news`, as soon as the pause since the last one is over."""
        async with self._lock:
            old = self._frame
            if old is not None and old.news >= news and _clock() - old.at < STALE_S:
                return old
            if old is not None:
                await asyncio.sleep(max(0.0, old.at + self._pause_s - _clock()))
            return await self._draw()

    def number_of(self, frame_id: str) -> int:
        """Which frame a returning browser has; -1 if it is not one of ours, so that it gets everything."""
        word, _, number = frame_id.partition("-")
        return int(number) if word == self._word and number.isascii() and number.isdecimal() else -1

    def news(self) -> int:
        """How much has been told so far about what this page shows."""
        return sum(self.desk.news.ticket(topic)[1] for topic in self.view.topics)

    async def wait(self, news: int, timeout_s: float) -> None:
        """Until there is more than that, or the time is over."""
        tickets = [self.desk.news.ticket(topic) for topic in self.view.topics]
        if sum(number for _, number in tickets) == news:
            await self.desk.news.wait_any(tickets, timeout_s)

    async def _draw(self) -> Frame:
        began = _clock()
        if self._trouble and began - self._trouble[0] < 2:
            raise TryLater(self._trouble[1])  # one viewer's failed attempt is an answer for all
        news = self.news()
        self._is_spoiled = False
        try:
            drawn = await self.view.draw(self.desk)
        except TryLater as error:
            self._trouble = (_clock(), str(error))
            raise
        old, self.renders = self._frame, self.renders + 1
        number = self.renders
        changed = {
            name: old.changed[name] if old and old.regions[name] == html else number for name, html in drawn.items()
        }
        self._trouble = None
        self._frame = Frame(f"{self._word}-{number}", number, drawn, changed, news, _clock())
        self._pause_s = max(PAUSE_S, (_clock() - began) / RENDER_SHARE)
        return self._frame


class Board:
    """The channels that somebody looks at, or did lately."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._channels: OrderedDict[str, Channel] = OrderedDict()

    def channel(self, key: str) -> Channel:
        """`key` is one that views.py makes: "" for the overview, a run's id, and others."""
        found = self._channels.get(key) or self._channels.setdefault(key, Channel(self.desk, key))
        self._channels.move_to_end(key)
        if len(self._channels) > MOST_CHANNELS:
            self._channels.popitem(last=False)
        return found

    def spoil(self) -> None:
        """Somebody pressed something: the next page that is asked for is drawn anew."""
        for channel in self._channels.values():
            channel.spoil()


async def stream(channel: Channel, have: str, welcome: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
    """Server-sent events for one viewer, from frame `have` on, until they leave, are sent away, or the hub stops."""
    news = channel.desk.news
    number = channel.number_of(have)
    said = checked = _clock()
    recheck_s = RECHECK_S * random.uniform(0.7, 1.3)
    yield b"retry: %d\n\n" % RETRY_MS
    while not news.closed:
        known = channel.news()
        try:
            if _clock() - checked >= recheck_s:
                checked = _clock()
                if not await welcome():
                    yield b"event: bye\ndata: {}\n\n"
                    return
            frame = await channel.frame(known)
            if message := frame.message(number):
                said = _clock()
                yield message
            number = frame.number
        except PotluckError as error:
            log.warning("page.waits", reason=str(error))
        if _clock() - said >= HEARTBEAT_S:
            said = _clock()
            yield b": still here\n\n"
        if not news.closed:  # it may have closed while we drew
            await channel.wait(known, STALE_S)


def _clock() -> float:
    return asyncio.get_running_loop().time()
