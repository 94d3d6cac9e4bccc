"""How does a folder get to the hub and back, sending only what is not there yet?

    pack (client/project.py)  ──►  Tree of hashes  ──►  missing?  ──►  small ones together, big ones piece by piece

A tree is a blob of JSON, so that one hash names the whole folder. What comes from a hub is not believed: every path is
checked, every byte is hashed, and nothing is written through a symbolic link (client/places.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from potluck.blobs import BlobStore, hash_bytes
from potluck.client import places
from potluck.client.blobs import PATIENCE_S, Blobs
from potluck.client.reach import Patience
from potluck.domain.tree import MAX_TREE_BYTES
from potluck.errors import BadInput, Conflict, HubUnreachable, LedgerError, NotAHub, TryLater
from potluck.protocol import Blob, Missing, Tree, TreeFile

R = TypeVar("R")
SMALL_BYTES = 256 << 10
"""A smaller blob travels together with others."""
BATCH_BYTES = 7 << 20  # the hub takes 8 MiB, the list of hashes included
BATCH_BLOBS = 1000
ASK_BLOBS = 5000  # in one `missing` call
PARTS = ".potluck-parts"
"""The folder in which `fetch_tree` without a store keeps what is under way, so that it can go on."""


class Trees(Blobs):
    """Folders by their hash."""

    def missing(self, blobs: list[Blob]) -> list[str]:
        """The hashes of those that the hub does not have."""
        found: list[str] = []
        for part in _pieces(blobs, ASK_BLOBS):
            found += self._json("POST", "/blobs/missing", Missing, body=part).hashes
        return found

    def upload_tree(
        self,
        folder: Path,
        tree: Tree,
        *,
        patience_s: float = PATIENCE_S,
        give_up: Callable[[], bool] = bool,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Blob:
        """Upload the tree's files that the hub does not have, then the tree itself; the tree's own blob.

        `progress` hears how many bytes of how many are sent.
        """
        content = msgspec.json.encode(tree)
        if len(content) > MAX_TREE_BYTES:
            raise BadInput(
                f"the list of {len(tree.files):,} files is {len(content) / 1e6:.0f} MB long, and at most "
                f"{MAX_TREE_BYTES / 1e6:.0f} MB are taken: leave some out with .potluckignore"
            )
        by_hash = {file.blob.hash: file for file in tree.files}
        wanted = set(self._patiently(lambda: self.missing([f.blob for f in by_hash.values()]), patience_s, give_up))
        todo = [file for hash_, file in by_hash.items() if hash_ in wanted]
        total, done = sum(file.blob.size_bytes for file in todo), 0
        small = [file for file in todo if file.blob.size_bytes < SMALL_BYTES]
        for group in _batches(small):
            pieces = [_read(folder, file) for file in group]
            body = b"".join([msgspec.json.encode([file.blob for file in group]), b"\n", *pieces])
            self._patiently(lambda body=body: self._send("POST", "/blobs/batch", content=body), patience_s, give_up)  # type: ignore[misc]
            done += sum(file.blob.size_bytes for file in group)
            progress(done, total)
        for file in todo:
            if file.blob.size_bytes >= SMALL_BYTES:
                with places.open_below(folder, file.path) as source:
                    sent = self.upload(source, patience_s=patience_s, give_up=give_up)
                if sent != file.blob:
                    raise _changed(file)
                done += file.blob.size_bytes
                progress(done, total)
        return self.upload(content, patience_s=patience_s, give_up=give_up)

    def read_tree(self, blob: Blob, *, patience_s: float = PATIENCE_S, give_up: Callable[[], bool] = bool) -> Tree:
        """The tree that the blob is."""
        if blob.size_bytes > MAX_TREE_BYTES:
            raise BadInput(f"a list of files of {blob.size_bytes:,} bytes: at most {MAX_TREE_BYTES:,} are read")
        path = f"/blobs/{blob.hash}"
        content = self._patiently(lambda: self._send("GET", path), patience_s, give_up).content
        if hash_bytes(content).hash != blob.hash:
            raise BadInput(f"the bytes received do not have the hash {blob.hash[:12]}…: try again")
        try:
            return msgspec.json.decode(content, type=Tree)
        except msgspec.MsgspecError as error:
            raise BadInput(f"the blob {blob.hash[:12]}… is not a list of files: {error}") from None

    def fetch_tree(
        self,
        tree: Tree,
        folder: Path,
        store: BlobStore | None = None,
        *,
        patience_s: float = PATIENCE_S,
        give_up: Callable[[], bool] = bool,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Make `folder` hold the tree's files. What is there already with the right bytes is not fetched again.

        With a `store` the blobs are kept there, for the next time. Files that are not in the tree are left alone.
        """
        places.check(tree)
        with places.Place(folder) as place:
            todo = [file for file in tree.files if not place.holds(file)]
            if any(file.path.split("/")[0] == PARTS for file in tree.files):
                raise BadInput(f"the files hold a folder {PARTS}, which is where files on their way are kept")
            own = store is None
            cache = store or BlobStore(place.private(PARTS))
            by_hash: dict[str, list[TreeFile]] = {}
            for file in todo:
                by_hash.setdefault(file.blob.hash, []).append(file)
            total, done = sum(files[0].blob.size_bytes for files in by_hash.values()), 0
            firsts = [files[0] for files in by_hash.values()]
            small = [f for f in firsts if f.blob.size_bytes < SMALL_BYTES and not cache.has(f.blob.hash)]
            for group in _batches(small):
                self._many([file.blob for file in group], cache, patience_s, give_up)
                done += self._put(place, cache, [f for first in group for f in by_hash.pop(first.blob.hash)], own)
                progress(done, total)
            for files in list(by_hash.values()):
                self.fetch(files[0].blob, cache, patience_s=patience_s, give_up=give_up)
                done += self._put(place, cache, files, own)
                progress(done, total)
            if own:
                place.remove_private(PARTS)

    def _put(self, place: places.Place, cache: BlobStore, files: Iterable[TreeFile], own: bool) -> int:
        """Copy blobs to where they belong; a store of our own is emptied on the way."""
        seen: dict[str, int] = {}
        for file in files:
            with cache.path(file.blob.hash).open("rb") as source:
                place.put(file, source)
            seen[file.blob.hash] = file.blob.size_bytes
        if own:
            for hash_ in seen:
                cache.remove(hash_)
        return sum(seen.values())

    def _many(self, blobs: list[Blob], store: BlobStore, patience_s: float, give_up: Callable[[], bool]) -> None:
        """Fetch small blobs together. Each is hashed before it is kept."""
        hashes = [blob.hash for blob in blobs]
        content = self._patiently(lambda: self._send("POST", "/blobs/many", body=hashes), patience_s, give_up).content
        head, _, rest = content.partition(b"\n")
        try:
            found = msgspec.json.decode(head, type=list[Blob])
        except msgspec.MsgspecError as error:
            raise NotAHub(f"{self.address} sent blobs that this Potluck cannot read ({error})") from None
        if [b.hash for b in found] != hashes or sum(b.size_bytes for b in found) != len(rest):
            raise NotAHub(f"{self.address} sent other blobs than those that it was asked for")
        offset = 0
        for blob in found:
            piece = rest[offset : offset + blob.size_bytes]
            offset += blob.size_bytes
            if hash_bytes(piece).hash != blob.hash:
                raise BadInput(f"the bytes received do not have the hash {blob.hash[:12]}…: try again")
            store.add_bytes(piece)

    def _patiently(self, call: Callable[[], R], patience_s: float, give_up: Callable[[], bool]) -> R:
        patience = Patience(patience_s, give_up)
        while True:
            try:
                return call()
            except (HubUnreachable, LedgerError, TryLater) as error:
                patience.or_raise(error)


def _read(folder: Path, file: TreeFile) -> bytes:
    with places.open_below(folder, file.path) as source:
        content = source.read(file.blob.size_bytes + 1)
    if hash_bytes(content) != file.blob:
        raise _changed(file)
    return content


def _changed(file: TreeFile) -> Conflict:
    return Conflict(f"{file.path} changed while it was being uploaded: try again when nothing writes to it")


def _batches(files: Iterable[TreeFile]) -> Iterator[list[TreeFile]]:
    group: list[TreeFile] = []
    size = 0
    for file in files:
        if group and (size + file.blob.size_bytes > BATCH_BYTES or len(group) >= BATCH_BLOBS):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.blob.size_bytes
    if group:
        yield group


def _pieces(blobs: list[Blob], count: int) -> Iterator[list[Blob]]:
    for start in range(0, len(blobs), count):
        yield blobs[start : start + count]
