"""How is an archive from a stranger opened, so that it can do nothing but be a folder?

Nothing is ever written to a path that the archive names: its files become blobs. What is refused, by name and reason:
paths that lead out, links and devices, names twice, encryption, odd compression; and more bytes than a project may have,
or than such an archive could honestly hold, whether it says so or only turns out so when it is read.
"""

from __future__ import annotations

import io
import re
import secrets
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from potluck.blobs import BlobStore
from potluck.errors import BadInput
from potluck.protocol import Blob

MAX_FILES = 100_000
MAX_LIST_BYTES = 12 << 20
"""Of the archive's own list of files, which is read at once."""
HONEST_RATIO = 100
"""Source code shrinks to a tenth. A bomb grows to a thousandfold."""
FREE_BYTES = 50_000_000
"""Below this much, no ratio matters."""
_CHUNK = 1 << 20
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class Entry:
    path: str
    size_bytes: int
    executable: bool
    info: zipfile.ZipInfo


class _Bounded(io.BufferedReader):
    """A file that nobody reads by the hundred megabytes at once: zipfile would, if the archive tells it to."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_LIST_BYTES:
            raise BadInput("the archive's list of files is too long: pack only the project's own folder")
        return super().read(size)


class Archive:
    """A zip file: its checked list of files, then their bytes. A context manager; everything here blocks."""

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._packed = path.stat().st_size
        self._left = limit_bytes
        self._file = _Bounded(io.FileIO(path))
        try:
            self._zip = zipfile.ZipFile(self._file)
            self.entries = self._check()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError) as error:
            self._file.close()
            raise BadInput(f"this is not a zip file that can be opened: {error}") from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._file.close()

    def _check(self) -> list[Entry]:
        infos = self._zip.infolist()
        if len(infos) > MAX_FILES:
            raise BadInput(f"the archive has {len(infos):,} files: pack only the project's own folder")
        entries = [entry for info in infos if (entry := _entry(info))]
        total = sum(entry.size_bytes for entry in entries)
        if total > self._limit:
            raise BadInput(
                f"unpacked, the archive is {total / 1e9:.2f} GB large: at most {self._limit / 1e9:.0f} GB are taken"
            )
        if total > FREE_BYTES and total > HONEST_RATIO * self._packed:
            raise BadInput(
                f"the archive would grow from {self._packed / 1e6:.1f} MB to {total / 1e6:,.0f} MB: no project does that"
            )
        seen: set[str] = set()
        for entry in entries:
            if entry.path in seen:
                raise BadInput(f"{entry.path[:200]!r} is in the archive twice")
            seen.add(entry.path)
        return _without_top(entries)

    def text(self, entry: Entry) -> str:
        """A small file's text."""
        return b"".join(self._read(entry)).decode("utf-8", "replace")

    def store(self, entry: Entry, blobs: BlobStore) -> tuple[Blob, bool]:
        """Make the entry a blob; and whether it is to be executable."""
        if entry.size_bytes <= 8 * _CHUNK:
            content = b"".join(self._read(entry))
            return blobs.add_bytes(content), entry.executable or content.startswith(b"#!")
        part, offset, first = secrets.token_hex(32), 0, b""
        try:
            for piece in self._read(entry):
                first = first or piece[:2]
                offset = blobs.append(part, offset, piece)
            return blobs.add_file(blobs.part(part)), entry.executable or first == b"#!"
        finally:
            with suppress(FileNotFoundError):
                blobs.part(part).unlink()

    def _read(self, entry: Entry) -> Iterator[bytes]:
        """What is really there, never more than was said: then it is no honest archive."""
        try:
            with self._zip.open(entry.info) as file:
                while piece := file.read(_CHUNK):
                    self._left -= len(piece)
                    if self._left < 0:
                        raise BadInput(f"unpacked, the archive has more than {self._limit / 1e9:.0f} GB")
                    yield piece
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise BadInput(f"{entry.path[:200]} in the archive is damaged: {error}") from None


def _entry(info: zipfile.ZipInfo) -> Entry | None:
    """The file that a line of the list is; None for a folder. Raises for what has no place in a project."""
    name = info.filename.replace("\\", "/")
    shown = repr(info.filename[:200])
    mode = info.external_attr >> 16
    if name.startswith("/") or _DRIVE.match(name):
        raise BadInput(f"the archive has the absolute path {shown}: pack the project's folder by its own name")
    parts = name.rstrip("/").split("/")
    if any(part == ".." for part in parts):
        raise BadInput(f"the archive has the path {shown}, which leads out of its folder: pack it without `..`")
    if stat.S_ISLNK(mode):
        raise BadInput(f"the archive has the symbolic link {shown}: pack the file itself, or leave it out")
    if info.is_dir() or name.endswith("/"):
        return None
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise BadInput(f"the archive has {shown}, which is not a plain file: leave it out")
    parts = [part for part in parts if part not in ("", ".")]
    if not parts or any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise BadInput(f"the archive has the name {shown}, which is not plain text")
    if info.flag_bits & 1:
        raise BadInput(f"the archive is encrypted ({shown}): pack it without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadInput(f"{shown} is compressed in a way that is not taken: pack it as an ordinary zip")
    return Entry("/".join(parts), info.file_size, bool(mode & stat.S_IXUSR), info)


def _without_top(entries: list[Entry]) -> list[Entry]:
    """Without the one folder that everything is in, if there is one: `project/train.py` is `train.py`."""
    own = [entry for entry in entries if not entry.path.startswith("__MACOSX/")]
    tops = {entry.path.partition("/")[0] for entry in own}
    if len(tops) != 1 or any("/" not in entry.path for entry in own):
        return own
    return [Entry(entry.path.partition("/")[2], entry.size_bytes, entry.executable, entry.info) for entry in own]
