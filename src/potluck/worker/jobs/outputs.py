"""Which files did a job leave behind, with which hashes?

The folder belongs to the job, so nothing in it is trusted: no symbolic link is followed and no device or pipe opened, each
folder is opened from the one above (a link that appears meanwhile leads nowhere), names must be ones that every system
and every terminal can bear, sizes and numbers are bounded. What is left out is said in `Tree.skipped`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from potluck.domain.tree import check_path
from potluck.protocol import Blob, Tree, TreeFile
from potluck.telemetry import clean
from potluck.worker.jobs.walking import walk

LIMIT_BYTES = 10_000_000_000
LIMIT_FILES = 20_000
_MAX_DEPTH = 40  # folders; each open one costs a descriptor
_MAX_NOTES = 500
_MAX_LOOKED_AT = 200_000  # entries, taken or not
_CHUNK = 1 << 20
_TRIES = 3  # for a file that changes while it is read
OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class Entry:
    """A plain file with a good name. `folder` is open only while the iteration stands here."""

    path: str  # relative, with /
    name: str
    folder: int | None  # its folder's descriptor; None where the system cannot open relative to one
    full: str
    stat: os.stat_result

    def open(self) -> int:
        return os.open(self.full if self.folder is None else self.name, OPEN, dir_fd=self.folder)


def fingerprint(found: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when the file does."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Notes:
    """What was left out and why, not without end."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._more = 0

    def add(self, path: str, why: str) -> None:
        if len(self._notes) < _MAX_NOTES:
            shown = path.encode("utf-8", "backslashreplace").decode()
            self._notes.append(f"{clean(shown, limit=200)}: {why}")
        else:
            self._more += 1

    def lines(self) -> list[str]:
        return [*self._notes, *([f"… and {self._more} more"] if self._more else [])]


def files_below(folder: Path, notes: Notes) -> Iterator[Entry]:
    """Every plain file below, folder by folder in order; the rest goes to `notes`. A link in place of it is empty."""
    looked_at = 0

    def unreadable(path: str, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            notes.add(path or folder.name, f"it cannot be read ({error.strerror})")

    for front, folders, files, handle in walk(folder, unreadable=unreadable):
        folders.sort()
        if front.count("/") >= _MAX_DEPTH:
            for name in folders:
                notes.add(f"{front}{name}", f"deeper than {_MAX_DEPTH} folders")
            folders.clear()
        for name in sorted(files):
            path = front + name
            looked_at += 1
            if looked_at > _MAX_LOOKED_AT:
                notes.add(path, f"and all after it: more than {_MAX_LOOKED_AT} files")
                return
            full = os.path.join(folder, front, name)
            try:
                found = os.stat(name if handle is not None else full, dir_fd=handle, follow_symlinks=False)
            except OSError:
                continue  # it is gone
            why = _why_not(path, found)
            if why:
                notes.add(path, why)
            else:
                yield Entry(path, name, handle, full, found)


def _why_not(path: str, found: os.stat_result) -> str:
    if stat.S_ISLNK(found.st_mode):
        return "a symbolic link"
    if not stat.S_ISREG(found.st_mode):
        return "a device, pipe or socket"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    wrong = check_path(path)
    return f"its path {clean(wrong, limit=300)}" if wrong else ""


def collect(
    folder: Path, *, limit_bytes: int = LIMIT_BYTES, limit_files: int = LIMIT_FILES, into: Path | None = None
) -> Tree:
    """The files below `folder`, hashed while they are read, in the order of their paths; `into`: copied there, too.

    A file that changes while it is read is tried again, and left out if it goes on changing.
    """
    notes, size = Notes(), 0
    files: list[TreeFile] = []
    for entry in files_below(folder, notes):
        if len(files) >= limit_files:
            notes.add(entry.path, f"more than {limit_files} files")
        elif size + entry.stat.st_size > limit_bytes:
            notes.add(entry.path, f"{_amount(entry.stat.st_size)}: with it, more than {_amount(limit_bytes)} in all")
        else:
            blob = _take(entry, into / entry.path if into is not None else None, limit_bytes - size)
            if isinstance(blob, str):
                notes.add(entry.path, blob)
            else:
                size += blob.size_bytes
                files.append(TreeFile(entry.path, blob, bool(entry.stat.st_mode & 0o100)))
    return Tree(sorted(files, key=lambda file: file.path), notes.lines())


def _take(entry: Entry, copy: Path | None, limit_bytes: int) -> Blob | str:
    """The file's blob, or why it is left out."""
    for _ in range(_TRIES):
        try:
            with os.fdopen(entry.open(), "rb", buffering=0) as file:
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode):
                    return "it became something else while it was read"
                if before.st_size > limit_bytes:
                    return f"it grew to {_amount(before.st_size)} while it was read"
                blob = _read(file, before.st_size, copy)
                if fingerprint(os.fstat(file.fileno())) == fingerprint(before) and blob.size_bytes == before.st_size:
                    return blob
        except _CopyFailed as error:
            raise error.cause from None
        except FileNotFoundError:
            return "it went away while it was read"
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
    return "it changed each time while it was read"


class _CopyFailed(Exception):
    """Our own disk is at fault, not the job's file."""

    def __init__(self, cause: OSError) -> None:
        self.cause = cause


def _read(file: FileIO, size: int, copy: Path | None) -> Blob:
    """Hash, and copy, up to one byte more than `size`: a file that grows must neither pass nor keep us."""
    digest, left = hashlib.sha256(), size + 1
    with _copying(copy) as write:
        while left and (piece := file.read(min(left, _CHUNK))):
            digest.update(piece)
            write(piece)
            left -= len(piece)
    return Blob(digest.hexdigest(), size + 1 - left)


@contextmanager
def _copying(copy: Path | None) -> Iterator[Callable[[bytes], object]]:
    if copy is None:
        yield lambda piece: None
        return
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        target = copy.open("wb")
    except OSError as error:
        raise _CopyFailed(error) from error

    def write(piece: bytes) -> None:
        try:
            target.write(piece)
        except OSError as error:
            raise _CopyFailed(error) from error

    with target:
        yield write


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
