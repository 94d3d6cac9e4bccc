"""How does the agent go through, measure and remove folders that a job has made, whatever the job made of them?

Each folder is opened from the one above and only as a folder: a link, or a pipe that would keep us waiting, which is put
in its place at the last moment, leads nowhere (os.fwalk would open the pipe). No way goes deeper than `DEEPEST`: every
step of it costs a descriptor, and a job can nest folders by the hundred thousand.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

DEEPEST = 60
BY_HANDLE = os.scandir in os.supports_fd and os.open in os.supports_dir_fd
"""Not on Windows. There, names are checked and then used."""
_ROUNDS = 8  # of removing; each opens up folders without permissions that were inside others


def walk(
    top: Path, *, deepest: int = DEEPEST, unreadable: Callable[[str, OSError], None] = lambda path, error: None
) -> Iterator[tuple[str, list[str], list[str], int | None]]:
    """Each folder: its path below `top` ("" or "a/b/"), its folders, all else in it, and its handle (None on Windows).

    What the caller takes out of the list of folders is not gone into. `unreadable` hears what cannot be opened.
    """
    if not BY_HANDLE:
        yield from _by_path(top, deepest)
        return
    try:
        handle = _open(top, None)
    except OSError as error:
        unreadable("", error)
        return
    yield from _below(handle, "", deepest, unreadable)


def _below(
    handle: int, path: str, deepest: int, unreadable: Callable[[str, OSError], None]
) -> Iterator[tuple[str, list[str], list[str], int | None]]:
    try:
        folders: list[str] = []
        others: list[str] = []
        try:
            with os.scandir(handle) as entries:
                for entry in entries:
                    (folders if entry.is_dir(follow_symlinks=False) else others).append(entry.name)
        except OSError as error:
            unreadable(path, error)
            return
        yield path, folders, others, handle
        for name in folders if deepest > 0 else ():
            try:
                below = _open(name, handle)
            except OSError as error:
                unreadable(path + name, error)
            else:
                yield from _below(below, f"{path}{name}/", deepest - 1, unreadable)
    finally:
        os.close(handle)


def _open(path: str | Path, at: int | None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)


def _by_path(top: Path, deepest: int) -> Iterator[tuple[str, list[str], list[str], int | None]]:
    for root, folders, files in () if top.is_symlink() else os.walk(top):
        below = os.path.relpath(root, top)
        path = "" if below == os.curdir else below.replace(os.sep, "/") + "/"
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        folders[:] = [name for name in folders if name not in links] if path.count("/") < deepest else []
        yield path, folders, [*files, *links], None


def size_of(folder: Path) -> int:
    """The bytes of all files below."""
    total = 0
    for path, _, names, at in walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                place = name if at is not None else str(folder / path / name)
                total += os.stat(place, dir_fd=at, follow_symlinks=False).st_size
    return total


def remove_tree(folder: Path) -> bool:
    """Remove the folder with all that is in it, also what was made unwritable or endlessly deep. Is it gone?"""
    for _ in range(_ROUNDS):
        with contextlib.suppress(OSError, RecursionError):
            _flatten(folder)
            shutil.rmtree(folder, onerror=_open_up)
        if not os.path.lexists(folder):
            return True
    return False


def _flatten(folder: Path) -> None:
    """Move what lies too deep for rmtree, which keeps a descriptor for each floor, to the first floor."""
    if not BY_HANDLE:
        return
    first = _open(folder, None)
    try:
        ahead = [""]
        while ahead:
            for path, folders, _, at in walk(folder / ahead.pop()):
                if path.count("/") < DEEPEST:
                    continue
                for name in folders:
                    moved = f"deep-{secrets.token_hex(8)}"
                    os.rename(name, moved, src_dir_fd=at, dst_dir_fd=first)
                    ahead.append(moved)
    finally:
        os.close(first)


def _open_up(_function: object, path: str, _error: object) -> None:
    """Make the folder that was in the way writable, for the next round. No link is followed: rmtree walks none."""
    with contextlib.suppress(OSError):
        os.chmod(os.path.dirname(path), 0o700)
        if not os.path.islink(path):
            os.chmod(path, 0o700)
