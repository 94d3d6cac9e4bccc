"""What does a job leave behind, and who may see it?

    worker  ── log, points, by a live lease ──►  desk.logs, the ledger  ──►  owner and admins, as it comes

Who writes is fenced: an attempt that is no longer the worker's takes nothing more. Who reads waits for news of this
process, and looks again every two seconds, because with several hub copies the writer may be at another one.
"""

from __future__ import annotations

import asyncio
import codecs
import math
import unicodedata
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from uuid import UUID

from potluck.errors import BadInput, Conflict, Fenced, NotAllowed, NotFound
from potluck.hub.commands import jobs, trees
from potluck.hub.commands.desk import Caller, Desk, as_blob, as_json, as_type, note
from potluck.hub.store import Transaction
from potluck.protocol import Blob, LogPiece, Point, Tree

T = TypeVar("T")
MAX_PIECE_BYTES = 1 << 20
MAX_POINTS = 100_000  # of one attempt
MAX_POINTS_AT_ONCE = 1000
MAX_VALUES = 1000  # of one point
MAX_IMAGES = 64
MAX_IMAGE_BYTES = 4 << 20
MAX_NAME = 100
MAX_ANSWER_BYTES = 4 << 20
"""Of points in one answer: ten thousand may be asked for, and each may have a thousand values."""
_LOOK_AGAIN_S = 2.0


async def readable(tx: Transaction, caller: Caller, ref: str) -> dict[str, Any]:
    """The job, if the caller may see what is in it: its owner and admins may."""
    job = await tx.row("keeping_job", run_id=await jobs.find(tx, ref, caller))
    assert job is not None
    if not jobs.may(caller, job["owner"]):
        raise NotAllowed(f"{job['id']} is somebody else's: only its owner and admins see what is in it")
    return job


async def _written_by(tx: Transaction, caller: Caller, lease_id: str) -> tuple[str, int]:
    """The attempt that this worker may write to: it holds the lease, and the lease is live."""
    try:
        row = await tx.row("attempt_of_lease", lease_id=UUID(lease_id))
    except ValueError:
        row = None
    if row is None:
        raise NotFound(f"there is no attempt with the lease {lease_id[:40]}")
    if row["worker_id"] != caller.subject:
        raise Fenced("this attempt belongs to another worker")
    if row["ended"]:
        raise Fenced("this attempt has ended: the hub takes nothing more of it")
    return str(row["run_id"]), int(row["number"])


async def _look_until(
    desk: Desk, topics: tuple[str, ...], wait_s: float, look: Callable[[], Awaitable[tuple[T, bool]]]
) -> T:
    """What `look` finds, as soon as it says that it is worth an answer, at the latest after `wait_s`."""
    clock = asyncio.get_running_loop().time
    until = clock() + wait_s
    while True:
        tickets = [desk.news.ticket(topic) for topic in topics]
        found, enough = await look()
        left = until - clock()
        if enough or left <= 0 or desk.news.closed:
            return found
        await desk.news.wait_any(tickets, min(left, _LOOK_AGAIN_S))


# --- logs


async def add_log(
    desk: Desk, caller: Caller, lease_id: str, offset: int, piece: bytes, *, skip: bool = False
) -> dict[str, int]:
    """Append what a job printed. Sent twice, it is there once; after a gap, `Conflict` names the offset to go on from."""
    if len(piece) > MAX_PIECE_BYTES:
        raise BadInput(f"a piece of a log may have at most {MAX_PIECE_BYTES:,} bytes: send it in several")
    async with desk.ledger.transaction() as tx:
        run_id, attempt = await _written_by(tx, caller, lease_id)
    end = await asyncio.to_thread(desk.logs.append, run_id, attempt, offset, piece, skip=skip)
    if end < offset:
        raise Conflict(f"bytes before this piece are missing: go on at offset {end}")
    if piece:
        desk.news.tell(f"log:{run_id}")
    return {"offset": end}


async def log(
    desk: Desk, caller: Caller, ref: str, *, attempt: int = 0, offset: int = 0, wait_s: float = 0.0, limit: int = 65536
) -> LogPiece:
    """A job's output from `offset` on. Waits while there is nothing new and more may come.

    Attempt 0 is the newest. One that has not begun yet may be asked for too, and is waited for.
    """
    async with desk.ledger.transaction() as tx:
        run_id = (await readable(tx, caller, ref))["id"]

    async def look() -> tuple[LogPiece, bool]:
        async with desk.ledger.transaction() as tx:
            row = await tx.row("attempt_to_read", run_id=run_id, attempt=attempt)
        assert row is not None
        if row["number"] is None:
            if attempt > row["newest"] + 1:
                raise NotFound(f"{ref} has no attempt {attempt}: the newest is {row['newest']}")
            return LogPiece(attempt, 0, 0, "", row["finished"]), row["finished"]
        # The state was read before the bytes: an attempt that had ended then has written all that it ever will.
        stretch = await asyncio.to_thread(desk.logs.read, run_id, row["number"], offset, limit)
        last = row["ended"] and stretch.next_offset == stretch.end
        text, taken = _text(stretch.content, whole=last)
        piece = LogPiece(row["number"], stretch.offset, stretch.offset + taken, text, last)
        return piece, bool(text) or last

    return await _look_until(desk, (f"log:{run_id}", f"job:{run_id}"), wait_s, look)


def _text(content: bytes, *, whole: bool) -> tuple[str, int]:
    """UTF-8 as far as its last whole character, and how many bytes that took. Bytes that are none are replaced."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(content, final=whole)
    return text, len(content) - len(decoder.getstate()[0])


# --- points


async def add_points(desk: Desk, caller: Caller, lease_id: str, points: list[Point]) -> None:
    """Keep figures and pictures. A point whose `seq` is there already is left as it is."""
    for point in points[: MAX_POINTS_AT_ONCE + 1]:
        _check_point(point)
    if len(points) > MAX_POINTS_AT_ONCE:
        raise BadInput(f"{len(points):,} points at once: at most {MAX_POINTS_AT_ONCE:,} are taken")
    kept = [point for point in points if point.seq < MAX_POINTS]
    images = {image.hash: image for point in kept for image in point.images.values()}
    rows = [
        {
            "seq": point.seq,
            "step": point.step,
            "at": point.at,
            "values": {name: value for name, value in point.values.items() if math.isfinite(value)},
            "images": point.images,
        }
        for point in kept
    ]
    async with desk.ledger.transaction() as tx:
        run_id, attempt = await _written_by(tx, caller, lease_id)
        await trees.keep(tx, list(images.values()), what="a picture")
        added = await tx.run("add_points", run_id=run_id, attempt=attempt, points=as_json(rows))
        if any(point.seq == MAX_POINTS for point in points):
            text = f"attempt {attempt} logged more than {MAX_POINTS:,} points: those after them are not kept"
            await note(tx, "job.points", run_id, text, run_id=run_id, actor=caller.name)
    if added:
        desk.news.tell(f"points:{run_id}")


def _check_point(point: Point) -> None:
    if not 0 <= point.seq < 1 << 62 or not -(1 << 62) < point.step < 1 << 62 or not math.isfinite(point.at):
        raise BadInput(f"point {point.seq} at step {point.step}: a number is out of range")
    if len(point.values) > MAX_VALUES or len(point.images) > MAX_IMAGES:
        raise BadInput(
            f"a point has at most {MAX_VALUES:,} values and {MAX_IMAGES} images: log fewer at step {point.step}"
        )
    for name in (*point.values, *point.images):
        if not 0 < len(name) <= MAX_NAME or any(unicodedata.category(c)[0] == "C" for c in name):
            raise BadInput(f"{name[:MAX_NAME]!r} is not a name of a value: at most {MAX_NAME} plain characters")
    for name, image in point.images.items():
        if not 0 < image.size_bytes <= MAX_IMAGE_BYTES:
            raise BadInput(f"the image {name} has {image.size_bytes:,} bytes: at most {MAX_IMAGE_BYTES:,} are taken")


async def points(
    desk: Desk,
    caller: Caller,
    ref: str,
    *,
    after_seq: int = -1,
    attempt: int = 0,
    wait_s: float = 0.0,
    limit: int = 1000,
) -> list[Point]:
    """What an attempt (0: the newest) logged after its point `after_seq`, oldest first. Waits while there is nothing.

    Fewer than `limit` do not mean that these were all: only none means that.
    """
    async with desk.ledger.transaction() as tx:
        run_id = (await readable(tx, caller, ref))["id"]

    async def look() -> tuple[list[Point], bool]:
        async with desk.ledger.transaction() as tx:
            row = await tx.row("attempt_to_read", run_id=run_id, attempt=attempt)
            assert row is not None
            if row["number"] is None:
                return [], row["finished"]
            found = await tx.rows(
                "points",
                run_id=run_id,
                attempt=row["number"],
                after_seq=after_seq,
                limit=limit,
                most_bytes=MAX_ANSWER_BYTES,
            )
        return [as_type(each, Point) for each in found], bool(found) or row["ended"]

    return await _look_until(desk, (f"points:{run_id}", f"job:{run_id}"), wait_s, look)


# --- trees


async def tree(desk: Desk, caller: Caller, ref: str, what: str, attempt: int = 0) -> Tree:
    """The files of a job: its project, or the outputs or checkpoint of an attempt (0: the newest that has any)."""
    async with desk.ledger.transaction() as tx:
        job = await readable(tx, caller, ref)
        blob: Blob | None = None
        if what == "project":
            blob = as_blob(job["project"])
        elif what in ("outputs", "checkpoint"):
            row = await tx.row("tree_of_attempt", run_id=job["id"], what=what, attempt=attempt)
            blob = as_blob(row["tree"]) if row else None
        else:
            raise BadInput(f"`{what[:40]}` is nothing that a job has: choose outputs, project or checkpoint")
    if blob is None:
        which = f"attempt {attempt} of {job['id']}" if attempt else job["id"]
        where = {"outputs": "POTLUCK_OUTPUT_DIR", "checkpoint": "POTLUCK_CHECKPOINT_DIR"}[what]
        raise NotFound(f"{which} has left no {what} so far: a job writes them to the folder that {where} names")
    return await trees.load(desk, blob)
