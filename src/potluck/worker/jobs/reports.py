"""How does the end of a job survive a hub that is away, and an agent that is killed before it could tell?

    <home>/jobs/<lease>/report.json     written (fsync) when the command has ended, before anything is sent
                        log.rest        output that the hub does not have
                        output/ …       what the job left; goes when the hub has answered

A job folder without a report is of a job that died with its agent: the next agent clears it away.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from potluck.blobs import disk_errors, sync_folder
from potluck.protocol import JobReport
from potluck.worker.jobs.walking import remove_tree

_REPORT = "report.json"
_REST = "log.rest"


@dataclass(frozen=True)
class Kept:
    """An attempt that has ended and that the hub has not answered for."""

    lease_id: str
    worker_id: str
    run_id: str
    name: str
    report: JobReport  # without the outputs, which are below the folder
    log_sent: int = 0


def keep(folder: Path, kept: Kept, rest: bytes = b"") -> None:
    """Make the end durable. `DiskFull` if there is no room for it."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if rest:
            _write(folder / _REST, rest)
        _write(folder / _REPORT, msgspec.json.encode(kept))
        sync_folder(folder)
        sync_folder(folder.parent)


def rest_of(folder: Path) -> bytes:
    try:
        return (folder / _REST).read_bytes()
    except OSError:
        return b""


def left_behind(root: Path) -> tuple[list[tuple[Path, Kept]], list[Path]]:
    """What an earlier agent left: ends that the hub may not know, and folders of jobs that died with it."""
    ended, dead = [], []
    for folder in sorted(root.glob("*")):
        try:
            ended.append((folder, msgspec.json.decode((folder / _REPORT).read_bytes(), type=Kept)))
        except (OSError, msgspec.MsgspecError):
            dead.append(folder)
    return ended, dead


def remove(folder: Path) -> None:
    """The folder with all that is in it, whatever the job made of it. First its report: half a folder is no end."""
    with contextlib.suppress(OSError):
        (folder / _REPORT).unlink(missing_ok=True)
    remove_tree(folder)


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
