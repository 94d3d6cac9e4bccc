"""Is a tree that somebody names really a folder that we have all of?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from potluck.domain.tree import MAX_FILES, MAX_TREE_BYTES, PROJECT_BYTES, check_tree
from potluck.errors import BadInput, NotFound
from potluck.hub.commands.desk import Desk
from potluck.hub.store import Transaction
from potluck.protocol import Blob, Tree

OUTPUT_BYTES = 10_000_000_000


async def read_tree(desk: Desk, blob: Blob, *, limit_bytes: int = PROJECT_BYTES) -> Tree:
    """The tree that `blob` is, with every path checked and every file here; none of it is ever swept from now on.

    Raises `BadInput` that names the path: at submit, and when a worker hands in outputs or a checkpoint.
    """
    tree = await check(desk, blob, limit_bytes=limit_bytes)
    async with desk.ledger.transaction() as tx:
        await keep_tree(tx, blob, tree)
    return tree


async def check(desk: Desk, blob: Blob, *, limit_bytes: int = PROJECT_BYTES) -> Tree:
    """The first half of `read_tree`: the paths and sizes. Whether the files are here, `keep_tree` finds out."""
    tree = await load(desk, blob)
    if len(tree.files) > MAX_FILES:
        raise BadInput(f"the folder has {len(tree.files):,} files: at most {MAX_FILES:,} are taken")
    if why := check_tree(file.path for file in tree.files):
        raise BadInput(why)
    if tree.size_bytes > limit_bytes:
        largest = max(tree.files, key=lambda file: file.blob.size_bytes)
        raise BadInput(
            f"the folder is {tree.size_bytes / 1e9:.2f} GB large, and at most {limit_bytes / 1e9:.2f} GB are taken: "
            f"the largest file is {largest.path}"
        )
    return tree


async def keep_tree(tx: Transaction, blob: Blob, tree: Tree) -> None:
    """Let no sweep take the tree and its files. `BadInput` if one is not here."""
    names = ["the list of files", *(file.path for file in tree.files)]
    await keep(tx, [blob, *(file.blob for file in tree.files)], names)


async def load(desk: Desk, blob: Blob) -> Tree:
    """The tree that `blob` is. Only for one that was read by `read_tree` before: its paths are not checked again."""

    def read() -> Tree:
        try:
            here = desk.blobs.blob(blob.hash)
        except NotFound:
            raise BadInput(f"the list of files {blob.hash[:12]}… is not here: upload it first") from None
        if here.size_bytes != blob.size_bytes or here.size_bytes > MAX_TREE_BYTES:
            raise BadInput(f"the list of files {blob.hash[:12]}… has {here.size_bytes:,} bytes: that cannot be right")
        try:
            return msgspec.json.decode(desk.blobs.read(blob.hash), type=Tree)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput(f"the blob {blob.hash[:12]}… is not a list of files: {error}") from None

    return await asyncio.to_thread(read)


async def keep(tx: Transaction, blobs: Sequence[Blob], names: Sequence[str] = (), *, what: str = "") -> None:
    """Let no sweep take these blobs. `BadInput` if one is not here, or has another size than is said."""
    if not blobs:
        return
    hashes = sorted({blob.hash for blob in blobs})
    await tx.run("keep_blobs", hashes=hashes)
    known = {row["hash"]: row["size_bytes"] for row in await tx.rows("blobs_known", hashes=hashes)}
    for number, blob in enumerate(blobs):
        if known.get(blob.hash) != blob.size_bytes:
            name = names[number] if names else what
            there = known.get(blob.hash)
            why = "are not here: upload them first" if there is None else f"are {there:,}, not {blob.size_bytes:,}"
            raise BadInput(f"{name}: its bytes ({blob.hash[:12]}…) {why}")
