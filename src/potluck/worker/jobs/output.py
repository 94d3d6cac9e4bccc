"""How does a job's output reach the hub within a second, without ever keeping the job or the network waiting?

    pipe ─► masks ─► <job>/output.log (the newest 16 MB, for the person at this machine)
                └──► a queue in memory ─► pieces of at most 256 KiB, one every 0.2 s or 2 MB/s, to the hub

`write` never waits for the network. If more than 4 MB wait, everything but the newest is left out and a line in the output
says how much. Offsets are those of what was sent: the hub sees one stream without gaps.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path

from potluck.errors import Conflict, NotFound, PotluckError
from potluck.worker.jobs.masks import Masks
from potluck.worker.line import GivenUp

PIECE_BYTES = 256 << 10
GAP_S = 0.2
BYTES_PER_S = 2_000_000
MOST_WAITING_BYTES = 4_000_000
KEPT_ON_SKIP_BYTES = 64 << 10
FILE_BYTES = 8_000_000  # of the file and of the one before it
AGAIN_BYTES = 1 << 20
"""So much of what was sent is remembered, for a hub that lost its newest."""

Send = Callable[[int, bytes, bool], int]
"""(offset, piece, skip) → the offset to go on from. Raises `GivenUp` or an error when there is no sense in more."""


class Output:
    """One attempt's output. `write` is called by whoever reads the pipe; a thread of this object sends."""

    def __init__(
        self,
        file: Path,
        send: Send | None,
        *,
        secrets: Iterable[str] = (),
        show: Callable[[bytes], None] | None = None,
        said: Callable[[str], None] | None = None,
    ) -> None:
        self._masks = Masks(secrets)
        self._file = _Rotated(file)
        self._send = send
        self._show = show
        self._said = said
        self._waiting: deque[bytes] = deque()
        self._size = 0  # of what waits
        self._flying = b""  # on its way to the hub
        self._left_out = 0
        self._changed = threading.Condition()
        self._closing = False
        self._done = threading.Event()
        self.sent = 0  # bytes that the hub has
        if send is None:
            self._done.set()
        else:
            threading.Thread(target=self._send_all, name="job-log", daemon=True).start()

    def write(self, piece: bytes) -> None:
        """From the job. Never blocks for longer than a write to the disk takes."""
        self._take(self._masks.feed(piece))

    def say(self, text: str) -> None:
        """A line of our own among the job's output, for the person who reads it."""
        if self._said is not None:
            self._said(text)
            return
        self._take(f"potluck: {text}\n".encode())

    def close(self) -> None:
        """Nothing more comes."""
        self._take(self._masks.flush())
        self._file.close()
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def wait_sent(self, timeout_s: float | None = None) -> bool:
        """After `close`: has everything arrived, or nobody wants it?"""
        return self._done.wait(timeout_s)

    def unsent(self) -> tuple[int, bytes]:
        """Up to where the hub has it for certain, and all that comes after, for a spool."""
        with self._changed:
            return self.sent, b"".join([self._flying, *self._waiting])

    def _take(self, piece: bytes) -> None:
        if not piece:
            return
        self._file.write(piece)
        if self._show is not None:
            self._show(piece)
        if self._send is None or self._done.is_set():
            return
        with self._changed:
            self._waiting.append(piece)
            self._size += len(piece)
            if self._size > MOST_WAITING_BYTES:
                self._skip()
            self._changed.notify_all()

    def _skip(self) -> None:
        """Keep the newest, from the beginning of a line on."""
        tail = b""
        while self._waiting and len(tail) < KEPT_ON_SKIP_BYTES:
            tail = self._waiting.pop() + tail
        tail = tail[-KEPT_ON_SKIP_BYTES:]
        tail = tail[tail.find(b"\n") + 1 :]
        self._left_out += self._size - len(tail)
        self._waiting = deque([tail])
        self._size = len(tail)

    def _next(self) -> bytes | None:
        """The next piece as soon as there is one; None at the end."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if self._left_out:
                note = f"\npotluck: … {self._left_out / 1e6:.1f} MB of output left out: it came too fast …\n".encode()
                self._left_out = 0
                self._waiting.appendleft(note)
                self._size += len(note)
            piece = b""
            while self._waiting and len(piece) < PIECE_BYTES:
                piece += self._waiting.popleft()
            if len(piece) > PIECE_BYTES:
                self._waiting.appendleft(piece[PIECE_BYTES:])
                piece = piece[:PIECE_BYTES]
            self._size -= len(piece)
            self._flying = piece
        return piece or None

    def _send_all(self) -> None:
        again = b""  # the end of what was sent
        next_at = 0.0
        try:
            while (piece := self._next()) is not None:
                with self._changed:
                    while not self._closing and (left := next_at - time.monotonic()) > 0:
                        self._changed.wait(left)
                if len(piece) < PIECE_BYTES // 2 and (more := self._more(PIECE_BYTES - len(piece))):
                    piece += more
                try:
                    again = self._deliver(piece, again)
                except (GivenUp, PotluckError):
                    return
                next_at = time.monotonic() + max(GAP_S, len(piece) / BYTES_PER_S)
        finally:
            self._done.set()

    def _more(self, room: int) -> bytes:
        """What came while we waited, as far as it fits into the same piece."""
        with self._changed:
            more = b""
            while not self._left_out and self._waiting and len(more) + len(self._waiting[0]) <= room:
                more += self._waiting.popleft()
            self._size -= len(more)
            self._flying += more
        return more

    def _deliver(self, piece: bytes, again: bytes) -> bytes:
        """Send until the hub has all of `piece`; the new end of what was sent."""
        assert self._send is not None
        known = again + piece
        end = self.sent + len(piece)
        at = self.sent
        while at < end:
            start = len(known) - (end - at)
            if start < 0:  # the hub lost more than we remember
                at, start = end - len(known), 0
                answer = self._send(at, known[:PIECE_BYTES], True)
            else:
                answer = self._send(at, known[start : start + PIECE_BYTES], False)
            if answer == at:
                raise Conflict(f"the hub does not take the output from byte {at} on")
            at = answer
        with self._changed:
            self.sent, self._flying = end, b""
        return known[-AGAIN_BYTES:]


def send_rest(send: Send, offset: int, rest: bytes) -> int:
    """Send what an earlier agent could not; the offset after it. What cannot be sent is not worth more than a result."""
    with contextlib.suppress(Conflict, NotFound):
        while rest:
            send(offset, rest[:PIECE_BYTES], True)
            offset, rest = offset + len(rest[:PIECE_BYTES]), rest[PIECE_BYTES:]
    return offset


class _Rotated:
    """A file and the one before it. A full disk must not stop the job: then the copy here has a hole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._size = 0

    def write(self, piece: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._file is not None and self._size > FILE_BYTES:
                self._file.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._file = None
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file, self._size = self._path.open("ab", buffering=0), 0
            self._size += self._file.write(piece) or 0

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
