"""Which pictures are in a folder or a zip, and which classes do their folders name?

Nothing of a zip is written to disk, and every entry is looked at before the first is read. Hidden files and
files that are no pictures are counted and left alone; a file that should be a picture and cannot be read is
counted as skipped when the source is packed.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
import threading
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from potluck.errors import DataError
from potluck.train.images import MAX_FILE_BYTES, SUFFIXES, ImageFormat, Pixels, Unreadable, decode
from potluck.train.packing import Source, disk_full_explained

SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
MAX_ENTRIES = 5_000_000
BOMB_BYTES = 1 << 30  # only archives that would unfold beyond this ...
BOMB_RATIO = 100  # ... and to so many times their own size are refused; pictures hardly compress at all


def folder(root: Path, images: ImageFormat) -> Source:
    """All pictures below `root`."""
    try:
        with os.scandir(root) as entries:
            next(entries, None)
    except OSError as error:
        raise DataError(f"the folder {root} cannot be read: {error.strerror}") from error
    found: list[Path] = []
    others: list[Path] = []
    for path in _walk(root):
        (found if path.suffix.lower() in SUFFIXES else others).append(path)
    if not found:
        raise DataError(f"there are no pictures in the folder {root}: {_what_else(root, others)}")
    return replace(pictures(root, found, images), ignored=len(others), origin="a folder")


def pictures(root: Path, paths: Sequence[Path], images: ImageFormat) -> Source:
    """The pictures at `paths`, all of them below `root`. Their order does not matter."""
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    y, labels = classes([name for name, _ in named])

    def read(number: int) -> Pixels:
        name, path = named[number]
        try:
            with path.open("rb") as file:
                encoded = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise Unreadable(f"{name}: {error.strerror}") from error
        return _decode(encoded, name, images)

    return Source(name=root.resolve().name or str(root), images=images, read=read, count=len(named), y=y, labels=labels)


def archive(path: Path, images: ImageFormat) -> Source:
    """All pictures in the zip at `path`, read straight out of it."""
    try:
        unzipped = zipfile.ZipFile(path)
        entries = unzipped.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} is not a zip file that can be read: {error}") from error
    try:
        chosen, ignored = _checked(path, entries)
    except DataError:
        unzipped.close()
        raise
    names = [info.filename for info in chosen]
    y, labels = classes(names)

    def read(number: int) -> Pixels:
        info = chosen[number]
        if info.file_size > MAX_FILE_BYTES:
            raise Unreadable(f"{info.filename} would be {info.file_size} bytes")
        try:
            encoded = unzipped.read(info)
        except Exception as error:  # zlib, lzma and zipfile each have their own word for damage
            raise Unreadable(f"{info.filename}: {error}") from error
        return _decode(encoded, info.filename, images)

    return Source(
        name=path.stem,
        images=images,
        read=read,
        count=len(chosen),
        y=y,
        labels=labels,
        ignored=ignored,
        origin="a zip file",
        close=unzipped.close,
    )


def classes(names: Sequence[str]) -> tuple[list[int] | None, list[str]]:
    """Each picture's class by its top folder, if every picture lies in one and there are two or more.

    Folders that all pictures share (the root of a zip), and a level that only says train or test, are looked
    through.
    """
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    while folders and all(folders):
        tops = sorted({parts[0] for parts in folders})
        if len(tops) > 1 and not SPLITS.issuperset(top.lower() for top in tops):
            number = {top: i for i, top in enumerate(tops)}
            return [number[parts[0]] for parts in folders], tops
        folders = [parts[1:] for parts in folders]
    return None, []


class Spill:
    """Encoded pictures in one temporary file, to be read again in any order."""

    def __init__(self, cache_dir: Path) -> None:
        with disk_full_explained(cache_dir):
            cache_dir.mkdir(parents=True, exist_ok=True)
        self._cache_dir = cache_dir
        self._file = tempfile.TemporaryFile(dir=cache_dir)  # noqa: SIM115 (closed by `close`)
        self._ends = array("q", [0])
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, encoded: bytes) -> None:
        with disk_full_explained(self._cache_dir):
            self._file.write(encoded)
        self._ends.append(self._ends[-1] + len(encoded))

    def __getitem__(self, number: int) -> bytes:
        start, end = self._ends[number], self._ends[number + 1]
        with self._lock:
            self._file.seek(start)
            return self._file.read(end - start)

    def close(self) -> None:
        self._file.close()


def _decode(encoded: bytes, name: str, images: ImageFormat) -> Pixels:
    if len(encoded) > MAX_FILE_BYTES:
        raise Unreadable(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        return decode(encoded, images)
    except Unreadable as reason:
        raise Unreadable(f"{name}: {reason}") from reason


def _walk(root: Path) -> Iterator[Path]:
    """Files below `root` that are not hidden. Linked folders are followed, each real folder once."""
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(root, followlinks=True):
        try:
            status = os.stat(here)
        except OSError:
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in files:
            if not _hidden(name):
                yield Path(here, name)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _what_else(root: Path, others: list[Path]) -> str:
    if not others:
        return "it is empty. Give a folder with .png, .jpg or .webp files, in sub-folders or not"
    arrays = [path for path in others if path.suffix.lower() in (".zip", ".npz", ".safetensors", ".parquet")]
    if arrays:
        return f"but there is {arrays[0].name}. To train on that, give its path: {arrays[0]}"
    other = f"{len(others)} other files, such as {others[0].relative_to(root)}"
    return f"it holds {other}. Pictures end in .png, .jpg, .webp ..."


def _checked(path: Path, entries: list[zipfile.ZipInfo]) -> tuple[list[zipfile.ZipInfo], int]:
    """The entries that should be pictures, by name, and how many others there are. Refuses what is dangerous."""
    if len(entries) > MAX_ENTRIES:
        raise DataError(f"{path} has {len(entries)} entries; more than {MAX_ENTRIES} are refused")
    pictures: list[zipfile.ZipInfo] = []
    ignored = 0
    for info in entries:
        name = info.filename.replace("\\", "/")
        parts = PurePosixPath(name).parts
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in parts:
            raise DataError(
                f"{path} has an entry whose path climbs out of the archive: {info.filename!r}. "
                "Such a zip is either broken or hostile; make it again from a folder."
            )
        if info.is_dir():
            continue
        linked = stat.S_ISLNK(info.external_attr >> 16)
        hidden = any(_hidden(part) for part in parts)
        if linked or hidden or PurePosixPath(name).suffix.lower() not in SUFFIXES:
            ignored += 1
            continue
        if info.flag_bits & 0x1:
            raise DataError(f"{path} is encrypted ({info.filename!r}): unpack it with its password first")
        info.filename = name  # both spellings of a path sort and group alike
        pictures.append(info)
    if not pictures:
        raise DataError(f"there are no pictures in {path}: it holds {ignored} other files")
    unfolded = sum(info.file_size for info in entries)
    if unfolded > max(BOMB_BYTES, BOMB_RATIO * path.stat().st_size):
        raise DataError(
            f"{path} would unfold from {path.stat().st_size} to {unfolded} bytes, as a zip bomb does: it is refused. "
            "If it is what you want to train on, unpack it and give the folder."
        )
    return sorted(pictures, key=lambda info: info.filename), ignored
