"""What must the paths of ordinary jobs do for those that are members of a gang?

    hear          a worker asks for orders: its door, what its knocks found, where the meeting place is that it keeps
    say           what it is told of gangs: whom to knock at, where its members meet
    membership    what a member's lease says of its gang
    retry_on      a member killed by a signal, or that hung, comes back whatever its spec says
    after_close   an attempt has ended      }  in the transaction that writes it, while its run is locked,
    after_progress  an attempt moves on     }  and before what its owner used is charged (the order of locks)
    touch         a job was stopped or retried  }  the same
    check_retry   a member of a gang that has ended is not tried again

All of them return at once for a job that is in no gang; `hear` and `say` ask the ledger nothing for a worker without any
news. What follows from an ending is decided afterwards, in a transaction of its own (gang_upkeep.settle): these only mark
the gang as due and tell the news `gangs` when they commit. Rows are locked in one order: members' runs by id, then the
gang, and last what people have used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from potluck.domain.outcome import Ending
from potluck.errors import Conflict
from potluck.hub.commands import reaches
from potluck.hub.commands.desk import Caller, Desk, as_type, note, pass_on, spread
from potluck.hub.store import Transaction
from potluck.protocol import Door, Knock, Meeting, MeetOrder, Membership, OrdersRequest

ASK_EVERY_S = 5.0
"""So often must a worker with a gang's member ask at least: one that is silent does not keep the meeting place."""
TOLD_FOR_S = 3.0
"""What a worker was told a moment ago is no reason to answer at once."""
MOST_MEETINGS = 256
_MEETING = re.compile(r"(?:http://)?(?:\[([0-9a-fA-F:.]+)\]|([0-9a-fA-F:.]+)):(\d{1,5})", re.ASCII)


# --- a worker asks for orders ---------------------------------------------------------------------------------------


async def hear(desk: Desk, caller: Caller, request: OrdersRequest, *, before: Mapping[str, Any]) -> None:
    """Keep what a worker says of doors, knocks and meetings. `before`: the row of `orders_arrive`.

    After `orders_arrive` and in no transaction. What has changed wakes the placement, and the members of a gang whose
    meeting place is known now.
    """
    door = reaches.clean_door(request.door)
    moved = door != (None if before["door"] is None else as_type(before["door"], Door))
    came = door is not None and (moved or not before["was_present"])
    hosted = [each for each in request.meetings[:MOST_MEETINGS] if each.host and each.address]
    if not (moved or came or hosted or request.reached):
        return
    woken: set[str] = set()
    gangs: set[str] = set()
    new = moved
    async with desk.ledger.transaction(relaxed=True) as tx:
        if moved:
            await reaches.open_door(tx, caller.subject, door)
        if request.reached:
            new |= await reaches.found(tx, caller.subject, request.reached)
        for meeting in hosted:
            for row in await _meet_at(tx, caller, meeting):
                woken.add(row["worker_id"])
                gangs.add(row["gang"])
        await spread(tx, "orders", woken)
    if came:
        await reaches.meet_neighbours(desk, caller.subject)
    pass_on(desk, "orders", woken)
    if new:
        desk.news.tell("place")
    if gangs:
        desk.news.tell("change")


async def _meet_at(tx: Transaction, caller: Caller, meeting: Meeting) -> list[dict[str, Any]]:
    """The host of a gang says where all meet: on its own machine, by the address that the others reach."""
    parts = _MEETING.fullmatch(meeting.address)
    if parts is None or not 0 < int(parts[3]) < 1 << 16 or not 0 < meeting.turn < 1 << 31:
        return []
    try:
        lease_id, ip = uuid.UUID(meeting.lease_id), str(ipaddress.ip_address(parts[1] or parts[2]))
    except ValueError:
        return []
    return await tx.rows(
        "meet_at", lease_id=lease_id, turn=meeting.turn, address=meeting.address, worker_id=caller.subject, ip=ip
    )


async def say(
    desk: Desk,
    caller: Caller,
    request: OrdersRequest,
    rows: Sequence[Mapping[str, Any]],
    *,
    must_knock: bool,
) -> tuple[list[Knock], list[MeetOrder], bool]:
    """What to tell a worker now, and whether it is worth an answer at once.

    `rows` and `must_knock` are of `orders_look`. An order to meet is repeated until the
    worker's `meetings` say the same: an answer that has one must not wait longer than `TOLD_FOR_S` though it is not urgent.
    """
    here = [row for row in rows if row["gang"] is not None and row["agent"] == request.agent]
    if not here and not must_knock:
        return [], [], False
    knocks = await reaches.knocks(desk, caller.subject) if must_knock else []
    orders = await _orders(desk, request, here) if here else []
    now = asyncio.get_running_loop().time()
    told = desk.memory.told
    keys = [(caller.subject, f"meet {each.lease_id} {each.turn} {each.address}") for each in orders]
    fresh = [key for key in keys if now - told.get(key, -TOLD_FOR_S) >= TOLD_FOR_S]
    urgent = bool(knocks or fresh)
    if urgent:
        told.update(dict.fromkeys(keys, now))
    return knocks, orders, urgent


async def _orders(desk: Desk, request: OrdersRequest, rows: Sequence[Mapping[str, Any]]) -> list[MeetOrder]:
    """Of each member here that does not yet know where its gang meets, or that it shall keep the place."""
    async with desk.ledger.transaction() as tx:
        found = {row["run_id"]: row for row in await tx.rows("meetings", ids=sorted({row["gang"] for row in rows}))}
    known = {each.lease_id: each for each in request.meetings}
    orders: list[MeetOrder] = []
    for row in rows:
        gang, lease_id = found[row["gang"]], str(row["id"])
        if gang["host"] is None:
            # It has only just arrived here, or the host has gone: somebody has to be chosen.
            desk.news.tell("gangs")
            continue
        knows = known.get(lease_id, Meeting(lease_id))
        hosts = gang["host"] == row["id"]
        if hosts:
            news = not knows.host or knows.turn != gang["turn"]
        else:
            news = knows.host or (
                gang["address"] != "" and (knows.turn, knows.address) != (gang["turn"], gang["address"])
            )
        if news:
            orders.append(MeetOrder(lease_id, hosts, gang["address"], gang["turn"]))
    return orders


async def membership(tx: Transaction, row: Mapping[str, Any], worker_name: str) -> Membership | None:
    """A member's place in its gang, for its lease; `row` is one of `orders_look`. None: it is in no gang."""
    if row["gang"] is None:
        return None
    gang = await tx.row("membership", gang=row["gang"])
    assert gang is not None
    engine = "" if gang["engine"] == "compat" else gang["engine"]
    return Membership(gang["gang"], gang["gang_name"], row["member"], worker_name, row["address"], engine)


# --- an attempt goes on, or ends ------------------------------------------------------------------------------------


def retry_on(job: Mapping[str, Any], asked: str, ending: Ending, code: str) -> str:
    """Which failures bring the job back. A member of a gang does not fail because its machine does."""
    return "any" if job["gang"] is not None and (ending.signal or code == "hung") else asked


async def after_close(tx: Transaction, job: Mapping[str, Any], ending: Ending, code: str = "") -> None:
    """An attempt of `job` (a row of lock_job) has ended; `code` is the report's. Call it before usage is charged."""
    if job["gang"] is None:
        return
    own = _is_own(ending, code)
    done = ending.kind == "exited" and not ending.signal and ending.exit_code == 0
    stopped = job["cancelled_by"] is not None
    await tx.run(
        "member_ended",
        gang=job["gang"],
        run_id=job["id"],
        own=int(own and not stopped),
        misfortune=int(not own and not done and not stopped),
    )
    await tx.notify("gangs")


def _is_own(ending: Ending, code: str) -> bool:
    """Whether the command failed by itself, or could not be started; not by a signal, a hang or with its machine."""
    if ending.signal or code == "hung":
        return False
    return ending.kind == "failed" or (ending.kind == "exited" and ending.exit_code != 0)


async def after_progress(tx: Transaction, job: Mapping[str, Any], state: str) -> None:
    """An attempt of `job` (a row of lock_job) is in this state now: with its first running member a gang runs."""
    if job["gang"] is None or state != "running":
        return
    if await tx.run("start_gang", gang=job["gang"]):
        await note(tx, "gang.running", job["gang"], f"{job['gang']} trains", run_id=job["gang"])
        await spread(tx, "job", [job["gang"]])


async def touch(tx: Transaction, job: Mapping[str, Any]) -> None:
    """Something else happened to `job` (a row of lock_job): somebody stopped it, or wants it again."""
    if job["gang"] is None:
        return
    await tx.run("touch_gang", gang=job["gang"])
    await tx.notify("gangs")


async def check_retry(tx: Transaction, job: Mapping[str, Any]) -> None:
    """Raise `Conflict` if `job` is a member of a gang that has ended: it would wait for the others for ever."""
    if job["gang"] is None:
        return
    gang = await tx.row("gang_is_open", gang=job["gang"])
    if gang is None or not gang["open"]:
        raise Conflict(f"{job['id']} is a member of {job['gang']}, which has ended: submit the gang again")
