"""How do blobs travel to and from a hub over a line that may break at any byte?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

from potluck.blobs import BlobStore, disk_errors, hash_bytes, hash_file, sync_folder
from potluck.client.line import API, Line, path_part
from potluck.client.reach import Patience
from potluck.errors import BadInput, Conflict, HubUnreachable, LedgerError, NotAHub, NotFound, TryLater
from potluck.protocol import Blob, UploadAnswer, UploadRequest

PIECE_BYTES = 4 << 20
"""Uploads go in pieces of this size; the hub takes at most 8 MiB at once."""
PATIENCE_S = 120.0
"""An upload or download gives up after so many seconds without any progress."""


class Blobs(Line):
    """Bytes by their hash. These calls go on trying while there is progress; all others are made once."""

    def upload(
        self,
        source: Path | bytes | BufferedReader,
        *,
        patience_s: float = PATIENCE_S,
        give_up: Callable[[], bool] = bool,
    ) -> Blob:
        """Give the hub a file, an open file or bytes. Skips what it has, goes on where a broken line stopped.

        Raises the last error after `patience_s` without progress, or as soon as `give_up()` is true.
        """
        blob = _blob(source)
        patience = Patience(patience_s, give_up)
        answer: UploadAnswer | None = None
        while True:
            try:
                if answer is None:
                    answer = self._json("POST", "/uploads", UploadAnswer, body=UploadRequest(blob))
                    patience.progressed(answer.offset)
                while not answer.done:
                    piece = _piece(source, answer.offset)
                    if not piece and blob.size_bytes:
                        raise NotAHub(
                            f"{self.address} has all {blob.size_bytes} bytes of an upload and does not finish it"
                        )
                    answer = self._json(
                        "PATCH",
                        f"/uploads/{path_part(answer.upload_id)}",
                        UploadAnswer,
                        params={"offset": str(answer.offset)},
                        content=piece,
                    )
                    patience.progressed(answer.offset)
                return blob
            except (HubUnreachable, LedgerError, TryLater, Conflict, NotFound) as error:
                # Conflict: the hub has another offset. NotFound: it forgot the upload. Both: ask where to go on.
                patience.or_raise(error)
                answer = None

    def fetch(
        self,
        blob: Blob,
        store: BlobStore,
        *,
        patience_s: float = PATIENCE_S,
        give_up: Callable[[], bool] = bool,
    ) -> Path:
        """The blob's path in `store`, downloaded into it unless it is there. The bytes have the hash, or it raises."""
        if store.has(blob.hash):
            return store.touch(blob.hash)
        with store.alone(blob.hash):
            if store.has(blob.hash):  # another thread was at it
                return store.touch(blob.hash)
            self._pull(blob, store.part(blob.hash), Patience(patience_s, give_up))
            try:
                return store.commit(blob.hash)
            except BadInput:  # damaged, perhaps by an older part: once more from the start
                self._pull(blob, store.part(blob.hash), Patience(patience_s, give_up))
                return store.commit(blob.hash)

    def download(self, blob: Blob, to: Path, *, patience_s: float = PATIENCE_S) -> Path:
        """Write the blob to the file `to` in one step, verified. Goes on with `<to>.part` from an earlier try."""
        part = to.with_name(to.name + ".part")
        self._pull(blob, part, Patience(patience_s, bool))
        found = hash_file(part)
        if found.hash != blob.hash:
            part.unlink()
            raise BadInput(f"{to.name}: the bytes received do not have the hash {blob.hash[:12]}…: try again")
        with disk_errors(to):
            part.replace(to)
            sync_folder(to.parent)
        return to

    def _pull(self, blob: Blob, part: Path, patience: Patience) -> None:
        """Bring `part` to the blob's full length."""
        with disk_errors(part):
            part.parent.mkdir(parents=True, exist_ok=True)
        while True:
            offset = part.stat().st_size if part.exists() else 0
            if offset > blob.size_bytes:
                part.unlink()
                offset = 0
            if part.exists() and offset == blob.size_bytes:
                return
            patience.progressed(offset)
            try:
                self._pull_once(blob, part, offset)
            except (HubUnreachable, LedgerError, TryLater) as error:
                patience.or_raise(error)

    def _pull_once(self, blob: Blob, part: Path, offset: int) -> None:
        headers = self._headers({"Range": f"bytes={offset}-"} if offset else {})
        with (
            self._translated(),
            self._http().stream("GET", f"{API}/blobs/{path_part(blob.hash)}", headers=headers) as answer,
        ):
            if answer.status_code not in (200, 206):
                answer.read()
            self._check(answer)
            resumed = answer.status_code == 206
            with disk_errors(part), part.open("ab" if resumed else "wb") as file:
                size = offset if resumed else 0
                for chunk in answer.iter_bytes(1 << 18):
                    size += len(chunk)
                    self._count(down=len(chunk))
                    if size > blob.size_bytes:
                        raise NotAHub(
                            f"{self.address} sends more than the {blob.size_bytes} bytes of {blob.hash[:12]}…"
                        )
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        if size < blob.size_bytes:
            raise HubUnreachable(f"{self.address} stopped after {size} of {blob.size_bytes} bytes")


def _blob(source: Path | bytes | BufferedReader) -> Blob:
    if isinstance(source, bytes):
        return hash_bytes(source)
    if isinstance(source, Path):
        return hash_file(source)
    source.seek(0)
    return Blob(hashlib.file_digest(source, "sha256").hexdigest(), source.tell())


def _piece(source: Path | bytes | BufferedReader, offset: int) -> bytes:
    if isinstance(source, bytes):
        return source[offset : offset + PIECE_BYTES]
    if not isinstance(source, Path):
        source.seek(offset)
        return source.read(PIECE_BYTES)
    with source.open("rb") as file:
        file.seek(offset)
        return file.read(PIECE_BYTES)
