"""How does finished work survive a crash of this machine before the hub has it?

    <home>/spool/<time>-<key>/update.safetensors …   the files
    <home>/spool/<time>-<key>/entry.json             written last: an entry without it never became one

An entry is on the disk (fsync) before its upload begins and goes only when the hub has answered.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from potluck.blobs import disk_errors, sync_folder
from potluck.protocol import Report

_ENTRY = "entry.json"


@dataclass(frozen=True)
class Entry:
    """One finished task that the hub has not answered for."""

    lease_id: str
    worker_id: str
    kind: str
    run_id: str
    report: Report  # without the blobs of `files`
    files: dict[str, str] = field(default_factory=dict)  # field of the report → file name in the entry's folder


class Spool:
    """Entries in the order in which they were finished."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, entry: Entry, files: dict[str, str]) -> Path:
        """Move `files` (field → path) in and make the entry durable; its folder."""
        key = hashlib.sha256(entry.lease_id.encode()).hexdigest()[:16]
        folder = self.root / f"{time.time_ns():020d}-{key}"
        names = {}
        with disk_errors(folder):
            folder.mkdir(parents=True)
            for index, (name, path) in enumerate(sorted(files.items())):
                names[name] = f"{index}{Path(path).suffix[:16]}"
                shutil.move(path, folder / names[name])
                _sync(folder / names[name])
            part = folder / "entry.part"
            part.write_bytes(msgspec.json.encode(replace(entry, files=names)))
            _sync(part)
            part.replace(folder / _ENTRY)
            sync_folder(folder)
            sync_folder(self.root)
        return folder

    def entries(self) -> list[tuple[Path, Entry]]:
        """What waits, oldest first. Halves of entries from a crash are cleared away."""
        found = []
        for folder in sorted(self.root.glob("*")):
            try:
                found.append((folder, read(folder)))
            except (OSError, msgspec.MsgspecError):
                self.remove(folder)
        return found

    def remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)


def read(folder: Path) -> Entry:
    return msgspec.json.decode((folder / _ENTRY).read_bytes(), type=Entry)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
