"""Where do bytes live that never change, and how do they get there whole?

    <root>/ab/cd/abcd…    a blob: its name is the SHA-256 of its bytes, so it is either whole and right, or not there
    <root>/parts/abcd….part   an upload or download under way; its size is the offset to go on from
    <root>/tmp/               files on their way in

Hub, worker and command line use the same store. A path is only ever made of 64 checked hex digits, never of a name
that somebody sent. Bytes reach the disk (fsync) before the name appears (rename), so a crash leaves a part, and never
a wrong blob.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from potluck.errors import BadInput, DiskFull, NotFound
from potluck.protocol import Blob

_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_CHUNK = 1 << 20
_STALE_S = 24 * 3600  # seconds: a part that nobody went on with is rubbish after a day


def check_hash(text: str) -> str:
    """`text`, if it is a SHA-256 in 64 lower-case hex digits."""
    if not _HASH.fullmatch(text):
        raise BadInput(f"`{text[:80]!s}` is not a blob's hash: that is 64 hexadecimal digits (SHA-256)")
    return text


def hash_file(path: Path) -> Blob:
    """The blob that the file's bytes are."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Blob(digest, file.tell())


def hash_bytes(content: bytes) -> Blob:
    return Blob(hashlib.sha256(content).hexdigest(), len(content))


class BlobStore:
    """A folder of blobs. Safe to share between threads and processes: the only step that shows is a rename."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, hash_: str) -> Path:
        """Where the blob is, or would be."""
        check_hash(hash_)
        return self.root / hash_[:2] / hash_[2:4] / hash_

    def has(self, hash_: str) -> bool:
        return self.path(hash_).is_file()

    def blob(self, hash_: str) -> Blob:
        """The blob with its size; `NotFound` if it is not here."""
        try:
            return Blob(hash_, self.path(hash_).stat().st_size)
        except FileNotFoundError:
            raise NotFound(f"no blob {hash_[:12]}… is stored here: it was never uploaded, or was swept") from None

    def touch(self, hash_: str) -> Path:
        """The blob's path, marked as just used, so that `evict` takes others first."""
        path = self.path(hash_)
        try:
            os.utime(path)
        except FileNotFoundError:
            raise NotFound(f"no blob {hash_[:12]}… is stored here") from None
        return path

    def read(self, hash_: str) -> bytes:
        try:
            return self.touch(hash_).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"no blob {hash_[:12]}… is stored here") from None

    def add_bytes(self, content: bytes) -> Blob:
        blob = hash_bytes(content)
        if not self.has(blob.hash):
            temporary = self._temporary()
            with disk_errors(temporary), _or_nothing(temporary):
                with temporary.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                self._name(temporary, blob.hash)
        return blob

    def add_file(self, path: Path) -> Blob:
        """Copy a file in. Its bytes are hashed as they are copied, so a file that changes meanwhile does no harm."""
        temporary = self._temporary()
        digest, size = hashlib.sha256(), 0
        with disk_errors(temporary), _or_nothing(temporary):
            with path.open("rb") as source, temporary.open("xb") as file:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            blob = Blob(digest.hexdigest(), size)
            if self.has(blob.hash):
                temporary.unlink()
            else:
                self._name(temporary, blob.hash)
        return blob

    def part(self, hash_: str) -> Path:
        """The file of a blob that is under way. Its size, 0 if it is not there, is the offset to go on from."""
        return self.root / "parts" / f"{check_hash(hash_)}.part"

    def part_size(self, hash_: str) -> int:
        try:
            return self.part(hash_).stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, hash_: str, offset: int, piece: bytes) -> int:
        """Add `piece`, which starts at `offset`; the part's new size. At a wrong offset nothing is written."""
        path = self.part(hash_)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:  # nothing may be left to write after a failure
                have = file.seek(0, os.SEEK_END)
                if have != offset:
                    return have
                rest = memoryview(piece)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    with suppress(OSError):
                        os.ftruncate(file.fileno(), have)  # half a piece would shift everything after it
                    raise
        return have + len(piece)

    def commit(self, hash_: str) -> Path:
        """Make a whole part a blob. Bytes that do not have this hash are thrown away, and `BadInput` says so."""
        final, part = self.path(hash_), self.part(hash_)
        try:
            found = hash_file(part)
        except FileNotFoundError:
            if final.is_file():
                return final  # somebody else was quicker
            raise NotFound(f"no bytes of blob {hash_[:12]}… have arrived") from None
        if found.hash != hash_:
            part.unlink(missing_ok=True)
            raise BadInput(
                f"the {found.size_bytes} bytes received have the hash {found.hash[:12]}…, not {hash_[:12]}…: "
                "they were damaged on the way, so send them again"
            )
        with disk_errors(part):
            try:
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                self._name(part, hash_)
            except FileNotFoundError:
                if not final.is_file():
                    raise
        return final

    @contextmanager
    def alone(self, hash_: str) -> Iterator[None]:
        """Only one thread of one process at a time works on this blob's part."""
        lock = self.part(hash_).with_suffix(".lock")
        with disk_errors(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("ab")
        with file:
            if os.name != "nt":  # there, two downloads of one blob at once end in one of them starting again
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    def remove(self, hash_: str) -> None:
        self.path(hash_).unlink(missing_ok=True)

    def hashes(self) -> Iterator[str]:
        """Every blob here, in no order."""
        for path in self.root.glob("??/??/*"):
            if _HASH.fullmatch(path.name):
                yield path.name

    def evict(self, keep_bytes: int, keep: Collection[str] = ()) -> int:
        """Remove the blobs that were not used for longest until at most `keep_bytes` are left; the bytes freed.

        Only for caches. Blobs in `keep` stay; what `forget_stale` removes goes too.
        """
        found = []
        for hash_ in self.hashes():
            try:
                stat = self.path(hash_).stat()
            except FileNotFoundError:
                continue
            found.append((max(stat.st_mtime, stat.st_atime), stat.st_size, hash_))
        excess = sum(size for _, size, _ in found) - keep_bytes
        freed = 0
        for _, size, hash_ in sorted(found):
            if freed >= excess:
                break
            if hash_ not in keep:
                self.remove(hash_)
                freed += size
        self.forget_stale()
        return freed

    def forget_stale(self) -> int:
        """Remove parts and temporary files that nobody touched for a day; how many there were."""
        count = 0
        for path in [*self.root.glob("parts/*"), *self.root.glob("tmp/*")]:
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
                    count += 1
        return count

    def _temporary(self) -> Path:
        folder = self.root / "tmp"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder / secrets.token_hex(8)

    def _name(self, temporary: Path, hash_: str) -> None:
        final = self.path(hash_)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, final)
        sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can do that."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say "the disk is full" in a sentence, with where and how much is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = next((p for p in [path, *path.parents] if p.is_dir()), Path("/"))
        free = shutil.disk_usage(folder).free
        raise DiskFull(
            f"the disk is full: writing below {folder} failed with {free / 1e6:.1f} MB free. "
            "Free some space, or move Potluck's folder with POTLUCK_HOME"
        ) from error


@contextmanager
def _or_nothing(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
