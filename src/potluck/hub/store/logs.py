"""Where does the output of jobs live, so that it can be read while it is written, and never fills the disk?

    <root>/<run>/<attempt>/0000000000000000000.log   a segment: its name is the offset of its first byte in the stream
                           0000000000008388608.log   …the next one. The oldest go when all are more than 64 MB

Offsets count the bytes of the whole stream, also of what was rotated away, so a reader can go on where it was. Nothing is
kept in memory: any hub copy on the same folder can append and read. Not synced to the disk: output that a power cut takes
is not worth a write-through for each line, and the worker still has it.

Everything here blocks; the hub calls it in a thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from potluck.blobs import disk_errors
from potluck.errors import BadInput

SEGMENT_BYTES = 8 << 20
KEEP_BYTES = 64 << 20
MAX_SEGMENTS = 64
"""Each gap begins another one: a worker that skips and skips must not fill the disk with names."""
MAX_OFFSET = 1 << 60
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_SEGMENT = re.compile(r"([0-9]{19})\.log", re.ASCII)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a stream."""

    offset: int  # of its first byte; later than asked for if that was rotated away
    content: bytes
    end: int  # of the whole stream, now

    @property
    def next_offset(self) -> int:
        return self.offset + len(self.content)


class LogStore:
    """A folder of streams, one for each attempt of each job."""

    def __init__(self, root: Path, *, segment_bytes: int = SEGMENT_BYTES, keep_bytes: int = KEEP_BYTES) -> None:
        self.root = root
        self._segment_bytes = segment_bytes
        self._keep_bytes = keep_bytes

    def append(self, run_id: str, attempt: int, offset: int, piece: bytes, *, skip: bool = False) -> int:
        """Add `piece`, which begins at `offset` of the stream; the stream's end afterwards.

        Bytes that are there already are not written twice. If some are missing before `offset`, nothing is written and
        the end is less than `offset` — unless `skip` says that nobody has them any more.
        """
        if not 0 <= offset <= MAX_OFFSET:
            raise BadInput(f"{offset} is not an offset of a log")
        folder = self._folder(run_id, attempt)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), disk_errors(folder):
            starts, end = self._state(folder)
            if offset > end:
                if not skip:
                    return end
                starts, end = [*starts, offset], offset  # a gap: the next segment begins behind it
            rest = memoryview(piece)[end - offset :]
            while rest:
                if not starts or end - starts[-1] >= self._segment_bytes:
                    starts.append(end)
                room = self._segment_bytes - (end - starts[-1])
                _write(_segment(folder, starts[-1]), rest[:room])
                end += len(rest[:room])
                rest = rest[room:]
            self._rotate(folder, starts, end)
        return end

    def read(self, run_id: str, attempt: int, offset: int, limit: int) -> Stretch:
        """At most `limit` bytes from `offset` on, or from the oldest byte that is still there."""
        folder = self._folder(run_id, attempt)
        while True:
            starts, end = self._state(folder)
            if not starts or offset >= end:
                return Stretch(end, b"", end)
            start = max((s for s in starts if s <= offset), default=starts[0])
            offset = max(offset, start)
            try:
                with _segment(folder, start).open("rb") as file:
                    file.seek(offset - start)
                    content = file.read(min(limit, end - offset))
            except FileNotFoundError:
                continue  # rotated away since we looked: the next look begins later
            if content:
                return Stretch(offset, content, end)
            offset = min(s for s in (*starts, end) if s > start)  # in a gap

    def end(self, run_id: str, attempt: int) -> int:
        """How many bytes there ever were."""
        return self._state(self._folder(run_id, attempt))[1]

    def _folder(self, run_id: str, attempt: int) -> Path:
        if not _RUN.fullmatch(run_id) or not 0 < attempt < 1_000_000:
            raise BadInput(f"`{run_id[:80]}` attempt {attempt} is not an attempt of a job")
        return self.root / run_id / str(attempt)

    def _state(self, folder: Path) -> tuple[list[int], int]:
        """Where the segments begin, and the end of the stream."""
        while True:
            try:
                names = os.listdir(folder)
            except FileNotFoundError:
                return [], 0
            starts = sorted(int(match[1]) for name in names if (match := _SEGMENT.fullmatch(name)))
            if not starts:
                return [], 0
            with suppress(FileNotFoundError):  # rotated away since we looked
                return starts, starts[-1] + _segment(folder, starts[-1]).stat().st_size

    def _rotate(self, folder: Path, starts: list[int], end: int) -> None:
        while len(starts) > 1 and (end - starts[1] >= self._keep_bytes or len(starts) > MAX_SEGMENTS):
            _segment(folder, starts.pop(0)).unlink(missing_ok=True)


def _segment(folder: Path, start: int) -> Path:
    return folder / f"{start:019}.log"


def _write(path: Path, piece: memoryview) -> None:
    """All of it or nothing: half a piece would shift everything after it."""
    with FileIO(path, "a") as file:
        have = file.seek(0, os.SEEK_END)
        try:
            rest = piece
            while rest:
                rest = rest[file.write(rest) or 0 :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), have)
            raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer at a time: a request that was given up may still be writing when it is sent again."""
    with (folder / "lock").open("ab") as file:
        if os.name != "nt":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
