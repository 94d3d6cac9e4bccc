"""How do thousands of small blobs come and go without a request for each?

a bundle:  [{"hash": …, "size_bytes": …}, …] in one line, a line break, and their bytes one after the other
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from potluck.blobs import check_hash, hash_bytes
from potluck.errors import BadInput
from potluck.hub.commands.desk import Desk, as_json
from potluck.hub.commands.files import check_size
from potluck.protocol import Blob, Missing

MAX_BUNDLE_BYTES = 8 << 20
MAX_BLOBS = 1000  # in one bundle
MAX_ASKED = 5000  # whether they are here


async def missing(desk: Desk, blobs: Sequence[Blob]) -> Missing:
    """Those that are not here whole, each once."""
    if len(blobs) > MAX_ASKED:
        raise BadInput(f"{len(blobs):,} blobs at once: ask about at most {MAX_ASKED:,}")
    wanted = {_checked(blob).hash: blob for blob in blobs}
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("blobs_known", hashes=list(wanted))
    known = {row["hash"]: row["size_bytes"] for row in rows}

    def look() -> list[str]:
        return [hash_ for hash_ in wanted if hash_ not in known or not desk.blobs.has(hash_)]

    found = await asyncio.to_thread(look)
    for hash_, blob in wanted.items():
        if hash_ in known and known[hash_] != blob.size_bytes:
            raise BadInput(f"the blob {hash_[:12]}… has {known[hash_]:,} bytes, not {blob.size_bytes:,}")
    return Missing(found)


async def take(desk: Desk, content: bytes) -> None:
    """Store every blob of a bundle, or none if one of them is not what it says."""
    blobs = await asyncio.to_thread(_take, desk, content)
    async with desk.ledger.transaction() as tx:
        await tx.run("put_blobs", blobs=as_json(blobs))


def _take(desk: Desk, content: bytes) -> list[Blob]:
    if len(content) > MAX_BUNDLE_BYTES:
        raise BadInput(f"a bundle may have at most {MAX_BUNDLE_BYTES:,} bytes: send several")
    head, line_break, _ = content.partition(b"\n")
    try:
        blobs = msgspec.json.decode(head, type=list[Blob])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"a bundle begins with a line of JSON that lists its blobs: {error}") from None
    if len(blobs) > MAX_BLOBS:
        raise BadInput(f"{len(blobs):,} blobs in a bundle: at most {MAX_BLOBS:,}")
    said = sum(_checked(blob).size_bytes for blob in blobs)
    place = len(head) + len(line_break)
    if said != len(content) - place:
        raise BadInput(f"the bundle lists {said:,} bytes and holds {len(content) - place:,}: nothing of it was kept")
    pieces: list[bytes] = []
    for blob in blobs:
        pieces.append(content[place : place + blob.size_bytes])
        place += blob.size_bytes
        if hash_bytes(pieces[-1]).hash != blob.hash:
            raise BadInput(
                f"bytes in the bundle do not have the hash {blob.hash[:12]}…: they were damaged on the way, "
                "or the file changed; nothing of the bundle was kept"
            )
    for piece in pieces:
        desk.blobs.add_bytes(piece)
    return list({blob.hash: blob for blob in blobs}.values())


async def give(desk: Desk, hashes: Sequence[str]) -> bytes:
    """The bundle of these blobs, in this order."""
    if len(hashes) > MAX_BLOBS:
        raise BadInput(f"{len(hashes):,} blobs at once: ask for at most {MAX_BLOBS:,}")

    def read() -> bytes:
        blobs = [desk.blobs.blob(hash_) for hash_ in hashes]
        total = sum(blob.size_bytes for blob in blobs)
        if total > MAX_BUNDLE_BYTES:
            raise BadInput(f"these blobs have {total:,} bytes: ask for at most {MAX_BUNDLE_BYTES:,} at once")
        return b"".join([msgspec.json.encode(blobs), b"\n", *(desk.blobs.read(blob.hash) for blob in blobs)])

    return await asyncio.to_thread(read)


def _checked(blob: Blob) -> Blob:
    check_hash(blob.hash)
    check_size(blob.size_bytes)
    return blob
