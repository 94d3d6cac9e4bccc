"""How do files with names from elsewhere get into a folder, and nowhere else?

Every path is walked one name at a time from the folder's own handle, and no symbolic link is followed: not one that was
there before, and not one that somebody puts there meanwhile. A file appears under its name whole, or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Self

from potluck.blobs import disk_errors
from potluck.domain.tree import check_path, check_tree, clashes
from potluck.errors import BadInput, NotFound
from potluck.protocol import Tree, TreeFile

_CHUNK = 1 << 20
_BY_HANDLE = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
"""Not on Windows. There, names are checked and then used; whoever shares the folder with an enemy is not safe."""
_NOT_ON_WINDOWS = frozenset('<>:"|?*\\')
_RESERVED = frozenset({"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(1, 10))})


def check(tree: Tree) -> None:
    """Raise `BadInput` if the tree has a path that leads elsewhere, or that this machine cannot keep apart."""
    if why := check_tree(file.path for file in tree.files):
        raise BadInput(why)
    if sys.platform in ("win32", "darwin") and (pairs := clashes(file.path for file in tree.files)):
        one, other = pairs[0]
        raise BadInput(f"`{one}` and `{other}` are two files, and this machine can only have one of them: rename one")


@contextmanager
def open_below(folder: Path, path: str) -> Iterator[BufferedReader]:
    """The plain file `path` in `folder`, open for reading; `BadInput` if a link or anything special is in the way."""
    with Place(folder, make=False) as place, place.open(path) as file:
        yield file


class Place:
    """A folder, held by its handle. A context manager."""

    def __init__(self, folder: Path, *, make: bool = True) -> None:
        self.folder = folder
        self._make = make
        self._root = -1

    def __enter__(self) -> Self:
        if self._make:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        if _BY_HANDLE:
            self._root = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    @contextmanager
    def open(self, path: str) -> Iterator[BufferedReader]:
        """The plain file, open for reading. `NotFound` if it is not there."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with self._parent(path, make=False) as (parent, name), _explained(path):
            handle = self._open(parent, name, flags)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BadInput(f"{path} is not a plain file")
            yield file

    def holds(self, file: TreeFile) -> bool:
        """Is the file there with these very bytes? If so, it is also made executable or not, as the tree says."""
        try:
            with self.open(file.path) as found:
                if os.fstat(found.fileno()).st_size != file.blob.size_bytes:
                    return False
                if hashlib.file_digest(found, "sha256").hexdigest() != file.blob.hash:
                    return False
                _mark(found.fileno(), file.executable)
        except (NotFound, BadInput):
            return False
        return True

    def put(self, file: TreeFile, source: BufferedReader) -> None:
        """Copy `source` to the file's path in one step, hashing on the way. What was there is replaced."""
        temporary = f".potluck-{secrets.token_hex(6)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with self._parent(file.path, make=True) as (parent, name), disk_errors(self.folder), _explained(file.path):
            handle = self._open(parent, temporary, flags)
            try:
                with os.fdopen(handle, "wb") as out:
                    digest = hashlib.sha256()
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
                    _mark(out.fileno(), file.executable)
                if digest.hexdigest() != file.blob.hash:
                    raise BadInput(
                        f"{file.path} does not have the bytes that it should have: it changed, or was damaged"
                    )
                self._rename(parent, temporary, name)
            except BaseException:
                self._forget(parent, temporary)
                raise

    def private(self, name: str) -> Path:
        """A folder of our own in here, only for us."""
        path = self.folder / name
        with disk_errors(path):
            path.mkdir(mode=0o700, exist_ok=True)
        if path.is_symlink() or not path.is_dir():
            raise BadInput(f"{path} is a symbolic link: remove it, files on their way are kept there")
        return path

    def remove_private(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)

    # --- by handle, or by path where there are none

    @contextmanager
    def _parent(self, path: str, *, make: bool) -> Iterator[tuple[int | Path, str]]:
        """The folder that the path's last name is in, made where it is missing."""
        if why := check_path(path):
            raise BadInput(f"the path {path[:200]!r} {why}")
        *above, name = path.split("/")
        if not _BY_HANDLE:
            yield self._parent_by_path(above, name, path, make=make), name
            return
        handle = os.dup(self._root)
        try:
            with _explained(path):
                for part in above:
                    if make:
                        with suppress(FileExistsError):
                            os.mkdir(part, dir_fd=handle)
                    below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
                    os.close(handle)
                    handle = below
            yield handle, name
        finally:
            os.close(handle)

    def _parent_by_path(self, above: list[str], name: str, path: str, *, make: bool) -> Path:
        for part in (*above, name):
            if _NOT_ON_WINDOWS & set(part) or part[-1] in ". " or part.partition(".")[0].lower() in _RESERVED:
                raise BadInput(f"{path}: this machine cannot have a file called `{part}`")
        parent = self.folder
        for part in above:
            parent = parent / part
            if make:
                parent.mkdir(exist_ok=True)
            if parent.is_symlink() or not parent.resolve().is_relative_to(self.folder.resolve()):
                raise _link(path)
        if (parent / name).is_symlink():
            raise _link(path)
        return parent

    def _open(self, parent: int | Path, name: str, flags: int) -> int:
        if isinstance(parent, int):
            return os.open(name, flags | os.O_CLOEXEC, 0o644, dir_fd=parent)
        return os.open(parent / name, flags, 0o644)

    def _rename(self, parent: int | Path, old: str, new: str) -> None:
        if isinstance(parent, int):
            os.replace(old, new, src_dir_fd=parent, dst_dir_fd=parent)  # a link of this name is replaced, not followed
        else:
            os.replace(parent / old, parent / new)

    def _forget(self, parent: int | Path, name: str) -> None:
        with suppress(FileNotFoundError):
            if isinstance(parent, int):
                os.unlink(name, dir_fd=parent)
            else:
                (parent / name).unlink()


def _mark(handle: int, executable: bool) -> None:
    if os.name == "nt":
        return
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    wanted = mode | 0o111 & (mode >> 2 | 0o100) if executable else mode & ~0o111
    if wanted != mode:
        os.fchmod(handle, wanted)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise BadInput(f"{path} cannot be written: one of its names is a file, a folder or a link there") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _link(path) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise BadInput(f"{path} may not be read or written by this user: change its permissions") from error
        if error.errno == errno.ENAMETOOLONG:
            raise BadInput(f"{path[:80]}… is too long a name for this machine") from error
        raise


def _link(path: str) -> BadInput:
    return BadInput(f"{path} would go through a symbolic link, and links are never followed")
