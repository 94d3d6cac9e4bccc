"""How is a gang submitted, looked at and stopped?

Its members are jobs: what they print and leave is asked of them. Everybody with a credential sees that a gang is there;
what is in it belongs to its owner and to admins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from potluck.domain.gangspec import GANG_USUAL
from potluck.domain.job import GangSpec, JobSpec
from potluck.domain.names import MAX_NAME, clean_name
from potluck.domain.resources import describe
from potluck.errors import BadInput, Conflict, NotAllowed
from potluck.hub.commands import gang_upkeep, placing
from potluck.hub.commands.desk import Caller, Desk, as_json, as_type, iso, new_run_id, note, pass_on, spread
from potluck.hub.commands.jobs import MOST_OPEN, check, chosen, may, wait_for_change
from potluck.hub.commands.trees import read_tree
from potluck.hub.store import Rows, Transaction
from potluck.protocol import GangRequest, GangView, MemberView

STATES = ("queued", "running", "succeeded", "failed", "cancelled")


# --- asking ---------------------------------------------------------------------------------------------------------


async def submit(desk: Desk, caller: Caller, request: GangRequest, *, key: str | None = None) -> GangView:
    """Queue a gang: all its members at once. The same idempotency key again is the same gang."""
    own_key = f"gang {caller.subject} {key}" if key else None
    if own_key:
        async with desk.ledger.transaction() as tx:
            if old := await tx.row("run_by_key", key=own_key):
                return await _view(tx, caller, old["id"])
    spec, gang = _completed(request.spec)
    demand = await check(desk, caller, spec)  # how many machines there are may still change
    async with desk.ledger.transaction() as tx:
        open_ = await tx.row("count_open_jobs_of", owner=caller.subject)
    if open_ is not None and open_["count"] + gang.most > MOST_OPEN:
        raise Conflict(f"you have {open_['count']:,} jobs that are not over: stop some, or wait until some have ended")
    await read_tree(desk, request.project)
    async with desk.ledger.transaction() as tx:
        run_id = await new_run_id(tx, spec.name, "gang")
        name = clean_name(spec.name, run_id)
        numbers = range(1, gang.most + 1)
        added = await tx.row(
            "add_gang",
            id=run_id,
            name=name,
            created_by=caller.name,
            key=own_key,
            owner=caller.subject,
            spec=as_json(spec),
            needs=as_json(demand),
            project=as_json(request.project),
            least=gang.least,
            most=gang.most,
            compat=gang.compat,
            priority=spec.priority,
            retries_left=spec.retries,
            # behind the number, so that the front of the gang's id names nothing but the gang
            members=[f"m{number}-{run_id}" for number in numbers],
            names=[_member_name(name, number) for number in numbers],
        )
        if added is None:  # the same request, at the same moment
            old = await tx.row("run_by_key", key=own_key)
            assert old is not None
            return await _view(tx, caller, old["id"])
        many = f"{gang.least}" if gang.least == gang.most else f"{gang.least} to {gang.most}"
        text = f"{caller.name} submitted {run_id}: {many} members, each with {describe(demand)}"
        await note(tx, "gang.queued", run_id, text, run_id=run_id, actor=caller.name)
        view = await _view(tx, caller, run_id)
    desk.news.tell("place")
    desk.news.tell("change")
    return view


def _completed(spec: JobSpec) -> tuple[JobSpec, GangSpec]:
    """With what a gang's members have if nothing else is said: the others train on, so coming back costs nobody anything."""
    if spec.gang is None:
        raise BadInput("spec.gang is missing: say how many machines, or submit it as a job")
    usual = JobSpec(spec.command)
    if (spec.retries, spec.retry_on) == (usual.retries, usual.retry_on):
        spec = replace(spec, **GANG_USUAL)
    return spec, spec.gang or GangSpec()


def _member_name(gang: str, number: int) -> str:
    tail = f"·{number}"
    return gang[: MAX_NAME - len(tail)] + tail


async def stop(desk: Desk, caller: Caller, ref: str) -> GangView:
    """It is cancelled at once and stays so; all its members are stopped."""
    async with desk.ledger.transaction() as tx:
        gang = await find(tx, ref, caller)
        await tx.rows("lock_members", gang=gang)
        row = await tx.row("lock_gang", gang=gang, late=gang_upkeep.LATE)
        assert row is not None
        if not may(caller, row["owner"]):
            raise NotAllowed(f"{gang} is somebody else's: only its owner and admins may do this")
        if row["state"] == "cancelled":
            return await _view(tx, caller, gang)
        if row["finished"]:
            raise Conflict(f"{gang} has ended already: it has {row['state']}")
        reason = f"stopped by {caller.name}"
        await tx.run("stop_gang", gang=gang, by=caller.name, reason=reason)
        await note(tx, "gang.cancelled", gang, f"{gang} was {reason}", run_id=gang, actor=caller.name)
        await spread(tx, "job", [gang])
    pass_on(desk, "job", [gang])
    await gang_upkeep.settle(desk, gang)
    return await show(desk, caller, gang)


# --- finding and looking --------------------------------------------------------------------------------------------


async def find(tx: Transaction, ref: str, caller: Caller) -> str:
    """By id, by name, by a front of the id that fits only one, or `last`; the caller's own first, then the newest."""
    if row := await tx.row("gang_by_id", ref=ref):
        return str(row["id"])
    rows = await tx.rows("find_gang", ref=ref, owner=caller.subject)
    return chosen(rows, ref, none=f"there is no gang `{ref}`: `potluck gang ls` shows them")


async def show(desk: Desk, caller: Caller, ref: str) -> GangView:
    async with desk.ledger.transaction() as tx:
        view = await _view(tx, caller, await find(tx, ref, caller))
    return await _with_outlook(desk, view)


async def list_gangs(desk: Desk, caller: Caller, *, limit: int = 100, state: str = "all") -> list[GangView]:
    """The newest first. `state`: open or all."""
    if state not in ("open", "all"):
        raise BadInput(f"state is `{state[:40]}`: it must be open or all")
    async with desk.ledger.transaction() as tx:
        ids = [row["id"] for row in await tx.rows("gang_ids", limit=limit, open=state == "open")]
        views = await _views(tx, caller, ids)
    return [await _with_outlook(desk, view) for view in views]


async def wait(desk: Desk, caller: Caller, ref: str, state: str, wait_s: float) -> GangView:
    """The gang as soon as its state is another than `state`, or as it is after `wait_s`."""
    if state and state not in STATES:
        raise BadInput(f"`{state[:40]}` is no state of a gang: there are {', '.join(STATES)}")
    async with desk.ledger.transaction() as tx:
        gang = await find(tx, ref, caller)
    await wait_for_change(desk, gang, state, wait_s)
    return await show(desk, caller, gang)


async def _with_outlook(desk: Desk, view: GangView) -> GangView:
    """What the placement says of the members that wait, which is newer than what the ledger says of them."""
    waiting = [each for each in view.members if each.state == "queued"]
    if not view.mine or not waiting:
        return view
    says = (await placing.forecast(desk)).plan.waits
    members = [
        replace(each, reason=says.get(each.job, each.reason)) if each.state == "queued" else each
        for each in view.members
    ]
    everybody = view.state == "queued" and len(waiting) == len(members)
    return replace(view, members=members, reason=says.get(waiting[0].job, view.reason) if everybody else view.reason)


async def _view(tx: Transaction, caller: Caller, gang: str) -> GangView:
    (view,) = await _views(tx, caller, [gang])
    return view


async def _views(tx: Transaction, caller: Caller, ids: list[str]) -> list[GangView]:
    found = {row["id"]: row for row in await tx.rows("gang_views", ids=ids)}
    members: defaultdict[str, Rows] = defaultdict(list)
    for row in await tx.rows("member_views", ids=ids):
        members[row["gang"]].append(row)
    return [_as_view(found[id_], members[id_], caller) for id_ in ids]


def _as_view(row: Mapping[str, Any], members: Rows, caller: Caller) -> GangView:
    mine = may(caller, row["owner"])
    return GangView(
        id=row["id"],
        name=row["name"],
        owner=row["owner_name"],
        state=row["state"],
        reason=row["reason"] if mine else "",
        mine=mine,
        least=row["least"],
        most=row["most"],
        engine=row["engine"],
        created_at=row["created_at"].isoformat(),
        started_at=iso(row["started_at"]),
        ended_at=iso(row["ended_at"]),
        exit_code=row["exit_code"],
        host=row["host"],
        members=[_member(each, mine) for each in members],
        spec=as_type(row["spec"], JobSpec) if mine else None,
    )


def _member(row: Mapping[str, Any], mine: bool) -> MemberView:
    figures: Mapping[str, float] = row["figures"] or {}
    return MemberView(
        job=row["id"],
        member=row["member"],
        state=row["state"],
        reason=row["reason"] if mine else "",
        worker=row["worker"],
        address=row["address"] if mine else "",
        rank=int(figures.get("gang/rank", -1)),
        share=int(figures.get("gang/share", 0)),
        samples_per_s=figures.get("gang/samples_per_s", 0.0),
        alone_per_s=figures.get("gang/alone_per_s", 0.0),
    )
