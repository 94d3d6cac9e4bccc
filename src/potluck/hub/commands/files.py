"""How do bytes come in, piece by piece, and who may know that they are there?"""

from __future__ import annotations

import asyncio

from potluck.errors import BadInput, Conflict, NotFound
from potluck.hub.commands.desk import Desk
from potluck.protocol import Blob, UploadAnswer

MAX_BLOB_BYTES = 4 << 30
MAX_PIECE_BYTES = 8 << 20


async def begin(desk: Desk, blob: Blob) -> UploadAnswer:
    """Where to go on. A blob that is here already is `done`."""
    check_size(blob.size_bytes)
    return await status(desk, f"{blob.hash}-{blob.size_bytes}")


def check_size(size_bytes: int) -> None:
    if not 0 <= size_bytes <= MAX_BLOB_BYTES:
        raise BadInput(f"a blob of {size_bytes:,} bytes: at most {MAX_BLOB_BYTES:,} are taken")


def _parse(upload_id: str) -> Blob:
    hash_, _, size = upload_id.partition("-")
    if len(hash_) != 64 or not size.isdecimal() or len(size) > 19:
        raise NotFound(f"there is no upload {upload_id[:80]}")
    check_size(int(size))  # again: an upload's id can be made up without a beginning
    return Blob(hash_, int(size))


async def status(desk: Desk, upload_id: str) -> UploadAnswer:
    """An upload's id is its blob's name and size, so any hub copy can go on with it after a restart."""
    blob = _parse(upload_id)
    if desk.blobs.has(blob.hash):
        await _record(desk, Blob(blob.hash, desk.blobs.path(blob.hash).stat().st_size))
        return UploadAnswer(upload_id, blob.size_bytes, True)
    return UploadAnswer(upload_id, desk.blobs.part_size(blob.hash), False)


async def append(desk: Desk, upload_id: str, offset: int, piece: bytes) -> UploadAnswer:
    """Add a piece at `offset`; the last one is verified against the hash and published."""
    blob = _parse(upload_id)
    if desk.blobs.has(blob.hash):
        return UploadAnswer(upload_id, blob.size_bytes, True)
    if offset + len(piece) > blob.size_bytes:
        raise BadInput(
            f"this piece would make the blob longer than the {blob.size_bytes:,} bytes it was announced with"
        )
    have = await asyncio.to_thread(desk.blobs.append, blob.hash, offset, piece)
    if have != offset + len(piece):
        raise Conflict(f"go on at offset {have}")
    if have < blob.size_bytes:
        return UploadAnswer(upload_id, have, False)
    await asyncio.to_thread(desk.blobs.commit, blob.hash)
    await _record(desk, blob)
    return UploadAnswer(upload_id, have, True)


async def _record(desk: Desk, blob: Blob) -> None:
    async with desk.ledger.transaction() as tx:
        await tx.run("put_blob", hash=blob.hash, size_bytes=blob.size_bytes)


async def sweep(desk: Desk) -> int:
    """Free the bytes that the model has taken in: merged updates, outer states and snapshots of old versions.

    And those of uploads that nobody went on with for a day. What a job has (`kept`) stays, with its log and its points.
    """
    async with desk.ledger.transaction() as tx:
        hashes = [row["hash"] for name in ("sweep_updates", "sweep_versions") for row in await tx.rows(name)]
    for hash_ in hashes:  # after the commit: a crash in between leaves bytes, never a name without bytes
        await asyncio.to_thread(desk.blobs.remove, hash_)
    return len(hashes) + await asyncio.to_thread(desk.blobs.forget_stale)
