"""Which figures and pictures has a job recorded since we last looked?

Two sources: the lines that `potluck.log` appends (potluck/job.py), and TensorBoard event files that appear below the
job's folders. Both are written by the job, so nothing in them is believed: lines, names, pictures and totals are
bounded, no symbolic link is followed, and what makes no sense is left out. Each point gets the next `seq`.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from potluck import job, telemetry
from potluck.protocol import Blob, Point
from potluck.worker.jobs.outputs import OPEN
from potluck.worker.jobs.tfevents import EventFile, Scalars
from potluck.worker.jobs.walking import walk

MAX_LINE_BYTES = 256_000
MAX_POINTS = 200_000  # of an attempt: a curve of more has no reader
MAX_PICTURES = 1_000
MAX_PICTURE_BYTES = 500_000_000  # of an attempt, together
MAX_STEP = 1 << 53  # beyond it, a step is no exact number in a browser
_AT_ONCE_BYTES = 2_000_000  # of the file of lines in one reading
_SCAN_S = 5.0  # between two searches for new event files
_MAX_ENTRIES = 20_000  # looked at in one search
_MAX_EVENT_FILES = 100
_PASSED_OVER = {".git", ".venv", "venv", "node_modules", "__pycache__", "site-packages"}
_PNG = b"\x89PNG\r\n\x1a\n"


class Points:
    """The points of one attempt. Make it before the command starts: event files that are there already are not its own.

    `keep` puts the bytes of a PNG where the caller can upload them from. Not for several threads at once.
    """

    def __init__(
        self,
        metrics: Path,
        *,
        folders: Sequence[Path] = (),
        keep: Callable[[bytes], Blob],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep = keep
        self._say = say
        self._clock = clock
        self._scanned_at = clock()
        self._lines = _Lines(metrics)
        self._metrics = metrics
        self._events = _EventFiles(folders)
        self._waiting: list[Point] = []
        self._seq = self._pictures = self._picture_bytes = 0
        self._said: set[str] = set()

    def read(self, limit: int = 500) -> list[Point]:
        """Up to `limit` new points; none: that was all for now."""
        if len(self._waiting) < limit:
            self._add(self._logged(self._lines.read()))
        if len(self._waiting) < limit:
            if self._clock() - self._scanned_at >= _SCAN_S:
                self._scan()
            self._add(self._from_events())
        batch, self._waiting = self._waiting[:limit], self._waiting[limit:]
        return batch

    def finish(self, limit: int = 500) -> Iterator[list[Point]]:
        """What is left, in batches, once the command has ended: also a last line that lacks its end."""
        self._scan()
        while (batch := self.read(limit)) or self._lines.behind or self._events.behind:
            if batch:
                yield batch
        self._add(self._logged(self._lines.last()))
        if self._waiting:
            yield self.read(limit)

    def _scan(self) -> None:
        self._scanned_at = self._clock()
        self._events.scan()

    def _add(self, points: Iterable[Point]) -> None:
        for point in points:
            if self._seq >= MAX_POINTS:
                self._tell(f"The job has recorded {MAX_POINTS} points: later ones are left out. Log less often.")
                continue
            self._waiting.append(replace(point, seq=self._seq))
            self._seq += 1

    def _logged(self, calls: Iterable[_Call]) -> Iterator[Point]:
        for call in calls:
            images = {}
            for name, file in itertools.islice(call.images.items(), job.MAX_VALUES):
                blob = self._picture(take_picture(self._metrics, file))
                if blob is not None:
                    images[name] = blob
            yield from _points(call.step, call.at, call.values, images)

    def _from_events(self) -> Iterator[Point]:
        for event in self._events.read():
            images = {name: blob for name, png in event.images.items() if (blob := self._picture(png)) is not None}
            yield from _points(event.step, event.at, event.values, images)

    def _picture(self, png: bytes) -> Blob | None:
        if png[:8] != _PNG or len(png) > job.MAX_PNG_BYTES:
            return None
        if self._pictures >= MAX_PICTURES or self._picture_bytes + len(png) > MAX_PICTURE_BYTES:
            self._tell(
                f"The job may record {MAX_PICTURES} pictures with {MAX_PICTURE_BYTES // 10**6} MB: later ones are "
                "left out. Log pictures less often, or write them to POTLUCK_OUTPUT_DIR."
            )
            return None
        self._pictures += 1
        self._picture_bytes += len(png)
        return self._keep(png)

    def _tell(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._say(sentence)


def _points(step: int, at: float, values: Mapping[str, float], images: Mapping[str, Blob]) -> Iterator[Point]:
    """The point, if it makes sense: clean names, finite figures, a step that a browser can count."""
    figures = {
        _name(name): value
        for name, value in itertools.islice(values.items(), job.MAX_VALUES)
        if math.isfinite(value) and _name(name)
    }
    pictures = {_name(name): blob for name, blob in images.items() if _name(name)}
    if (figures or pictures) and abs(step) < MAX_STEP:
        yield Point(step, at if 0 <= at < 1e11 else 0.0, figures, pictures)


def _name(name: str) -> str:
    return telemetry.clean(name, limit=job.MAX_NAME).strip()


# --- potluck.log ----------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One call of `potluck.log`, as its line says it."""

    step: int
    at: float
    values: dict[str, float] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)  # name → file in the folder of pictures


class _Lines:
    """The file of lines, read on from where the last reading ended."""

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics
        self._offset = 0
        self._rest = b""
        self._passing = False  # in the middle of a line that is too long
        self._decoder = msgspec.json.Decoder(_Call)
        self.behind = False  # the last reading stopped before the end

    def read(self) -> Iterator[_Call]:
        piece, size = _read_below(self._metrics, (job.LINES,), offset=self._offset, limit=_AT_ONCE_BYTES)
        self._offset += len(piece)
        self.behind = self._offset < size and bool(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if self._passing and lines:
            lines, self._passing = lines[1:], False  # that was the end of the long one
        if self._passing or len(self._rest) > MAX_LINE_BYTES:
            self._rest, self._passing = b"", True
        return self._calls(lines)

    def last(self) -> Iterator[_Call]:
        """A line that never got its end: the job was killed, or wrote it itself."""
        rest, self._rest = self._rest, b""
        return self._calls([rest])

    def _calls(self, lines: Sequence[bytes]) -> Iterator[_Call]:
        for line in lines:
            if line and len(line) <= MAX_LINE_BYTES:
                try:
                    yield self._decoder.decode(line)
                except (ValueError, RecursionError):  # msgspec's own errors are ValueErrors
                    continue  # on a full disk two processes may garble a line; the others are whole


def take_picture(metrics: Path, file: str) -> bytes:
    """The bytes of a picture that `potluck.log` wrote. The file goes: its folder must not grow. Empty: there is none."""
    if not file.endswith(".png") or len(file) > 200 or {"/", "\\", "\0", ":"} & set(file):
        return b""
    png, _ = _read_below(metrics, (job.PICTURES, file), limit=job.MAX_PNG_BYTES + 1, remove=True)
    return png


def _read_below(
    root: Path, names: tuple[str, ...], *, offset: int = 0, limit: int, remove: bool = False
) -> tuple[bytes, int]:
    """Up to `limit` bytes of a plain file below `root`, and its size; nothing if it is anything else, or not there.

    Each folder on the way is opened from the one above, so that no link can lead out, not even one just made.
    """
    opened: list[int] = []
    by_folder = os.open in os.supports_dir_fd
    try:
        at: int | None = None
        path = str(root)
        for name in names:
            if by_folder:
                at = os.open(path, OPEN | os.O_DIRECTORY, dir_fd=at)
                opened.append(at)
                path = name
            else:
                path = os.path.join(path, name)
        file = os.open(path, OPEN, dir_fd=at)
        opened.append(file)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            return b"", 0
        os.lseek(file, offset, os.SEEK_SET)
        pieces = []
        while limit > 0 and (piece := os.read(file, min(limit, 1 << 20))):
            pieces.append(piece)
            limit -= len(piece)
        if remove and by_folder:
            os.unlink(path, dir_fd=at)
    except OSError:
        return b"", 0
    finally:
        for handle in opened:
            os.close(handle)
    return b"".join(pieces), found.st_size


# --- TensorBoard ----------------------------------------------------------------------------------------------------


class _EventFiles:
    """The event files that have appeared below some folders.

    The first folder with event files gives the names as they are; those of another run beside or below it (TensorBoard
    draws them as further lines) get its path in front: `val/loss`.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._first: Path | None = None
        self._files: dict[Path, tuple[EventFile, str]] = {}
        self._old = {path for _, path in self._find()}

    @property
    def behind(self) -> bool:
        return any(file.behind for file, _ in self._files.values())

    def scan(self) -> None:
        for top, path in self._find():
            if path in self._files or path in self._old or len(self._files) >= _MAX_EVENT_FILES:
                continue
            if self._first is None:
                self._first = path.parent
            self._files[path] = EventFile(top, path.relative_to(top).as_posix()), self._prefix(path.parent)

    def read(self) -> Iterator[Scalars]:
        for file, prefix in self._files.values():
            point: Scalars | None = None
            for event in file.read():
                named = Scalars(
                    event.step,
                    event.at,
                    {prefix + name: value for name, value in event.values.items()},
                    {prefix + name: png for name, png in event.images.items()},
                )
                if point is not None and point.step == named.step and not point.values.keys() & named.values.keys():
                    point.values.update(named.values)  # a writer has one event for each figure
                    point.images.update(named.images)
                    continue
                if point is not None:
                    yield point
                point = named
            if point is not None:
                yield point

    def _prefix(self, folder: Path) -> str:
        assert self._first is not None
        if folder == self._first:
            return ""
        below = folder.relative_to(self._first) if folder.is_relative_to(self._first) else Path(folder.name)
        return below.as_posix() + "/"

    def _find(self) -> Iterator[tuple[Path, Path]]:
        """Each with the folder that it was found below."""
        entries = 0
        for top in self._folders:
            for path, folders, files, _ in walk(top):
                folders[:] = sorted(name for name in folders if name not in _PASSED_OVER)
                yield from ((top, top / path / name) for name in sorted(files) if "tfevents" in name)
                entries += len(files) + len(folders)
                if entries > _MAX_ENTRIES:
                    return
