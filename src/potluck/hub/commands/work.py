"""Who gets which task of a pool run, and who is still at work?"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from potluck.domain.pool import (
    STRIKES,
    PoolSettings,
    next_tick_s,
    unit_size,
)
from potluck.hub.commands import attempts
from potluck.hub.commands.desk import Caller, Desk, as_type, fair_share, note
from potluck.hub.commands.forms import amount, as_uuid, count
from potluck.hub.store.positions import to_positions
from potluck.protocol import (
    Dataset,
    HeartbeatAnswer,
    HeartbeatRequest,
    Layout,
    Lease,
    LeaseRequest,
    MergeSpec,
    RecipeRef,
    TasteSpec,
    UnitSpec,
)

MAX_ATTEMPTS = 4
"""So many leases of one merge or taste may be lost or fail before the hub gives it up."""
UNITS_AT_ONCE = 2
"""The one at work and the next, leased early so that its data is there in time."""
UNMERGED_AT_MOST = 3
"""Updates and units of one worker that are not in a version yet. Where units are shorter than merges, a worker would
otherwise run ever further ahead of the model, and its work would be superseded."""


async def lease(
    desk: Desk,
    caller: Caller,
    request: LeaseRequest,
    wait_s: float,
    *,
    gone: Callable[[], Awaitable[bool]] | None = None,
) -> Lease | None:
    """The most useful task for this worker, or None after `wait_s` without one.

    `gone` tells whether the caller hung up meanwhile: a lease granted to nobody would sleep until it lapses.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + min(max(wait_s, 0.0), 30.0)
    while True:
        ticket = desk.news.ticket("work")
        granted = await _grant(desk, caller, request)
        if granted is not None:
            return granted
        left = end - clock()
        if left <= 0:
            return None
        # The news may come from another hub copy that we do not hear; so look again now and then anyway.
        await desk.news.wait(ticket, min(left, 5.0))
        if desk.news.closed or (gone is not None and await gone()) or await _has_left(desk, caller):
            return None


async def _has_left(desk: Desk, caller: Caller) -> bool:
    async with desk.ledger.transaction() as tx:
        row = await tx.row("worker_left", worker_id=caller.subject)
    return row is None or bool(row["away"])


async def _grant(desk: Desk, caller: Caller, request: LeaseRequest) -> Lease | None:
    lease_id = uuid.uuid4()
    ttl = timedelta(seconds=desk.lease_ttl_s)
    kinds = [kind for kind in request.kinds if kind in ("init", "merge", "taste")] if caller.trusted else []
    if kinds:
        async with desk.ledger.transaction() as tx:
            row = await tx.row("lease_task", kinds=kinds, lease_id=lease_id, worker_id=caller.subject, ttl=ttl)
            if row is not None:
                run = await tx.row("run", run_id=row["run_id"])
                assert run is not None
                return _task_lease(desk, str(lease_id), row, run)
    if "unit" not in request.kinds:
        return None
    async with desk.ledger.transaction(relaxed=True) as tx:
        await tx.run(
            "update_worker",
            id=caller.subject,
            device=request.device[:20],
            share=fair_share(request.share),
        )
        if caller.trusted:
            others = await tx.row("other_workers_live", worker_id=caller.subject)
            if others and others["live"]:
                return None  # the house worker trains only while it is alone
        runs = await tx.rows("leasable_runs", worker_id=caller.subject, strikes=STRIKES)
    for run in runs:
        if run["id"] in request.except_runs or run["struck"]:
            continue
        if run["mine"] >= UNITS_AT_ONCE or run["mine"] + run["unmerged"] > UNMERGED_AT_MOST:
            continue
        settings = as_type(run["settings"], PoolSettings)
        row = await desk.ledger.once(
            "lease_unit",
            run_id=run["id"],
            want=unit_size(settings, request.samples_per_s.get(run["id"])),
            lease_id=lease_id,
            worker_id=caller.subject,
            ttl=ttl,
        )
        if row is not None:
            return _unit_lease(desk, str(lease_id), row, run, settings)
    return None


def _unit_lease(desk: Desk, lease_id: str, row: dict[str, Any], run: dict[str, Any], settings: PoolSettings) -> Lease:
    spec = UnitSpec(
        positions=to_positions(row["positions"]),
        box_s=settings.unit_s,
        next_tick_s=next_tick_s(settings, run["elapsed_s"]),
        overlap_s=settings.overlap * settings.unit_s if settings.strategy == "local" else 0.0,
        codec=settings.codec,
        strategy=settings.strategy,
        seed=run["seed"],
    )
    return Lease(
        id=lease_id,
        task_id=row["task_id"],
        kind="unit",
        run_id=run["id"],
        ttl_s=desk.lease_ttl_s,
        recipe=as_type(run["recipe"], RecipeRef),
        dataset=as_type(run["dataset"], Dataset),
        layout=as_type(run["layout"], Layout),
        seed=run["seed"],
        unit=spec,
    )


def _task_lease(desk: Desk, lease_id: str, row: dict[str, Any], run: dict[str, Any]) -> Lease:
    return Lease(
        id=lease_id,
        task_id=row["task_id"],
        kind=row["kind"],
        run_id=run["id"],
        ttl_s=desk.lease_ttl_s,
        recipe=as_type(run["recipe"], RecipeRef),
        dataset=as_type(run["dataset"], Dataset),
        layout=as_type(run["layout"], Layout) if run["layout"] else None,
        seed=run["seed"],
        merge=as_type(row["spec"], MergeSpec) if row["kind"] in ("merge", "init") else None,
        taste=as_type(row["spec"], TasteSpec) if row["kind"] == "taste" else None,
    )


# --- heartbeats -----------------------------------------------------------------------------------------------------


async def heartbeat(desk: Desk, caller: Caller, request: HeartbeatRequest) -> HeartbeatAnswer:
    """Renew the leases that are still this worker's; say which are not, and which to finish now."""
    beats = sorted(request.leases[:64], key=lambda beat: beat.lease_id)  # locked in the order of ids, as everywhere
    ids = [as_uuid(beat.lease_id) for beat in beats]
    async with desk.ledger.transaction(relaxed=True) as tx:
        await tx.run(
            "touch_worker",
            worker_id=caller.subject,
            state=request.state if request.state in _STATES else None,
        )
        if ids:
            await tx.run(
                "renew",
                ids=ids,
                steps=[count(beat.steps) for beat in beats],
                samples=[count(beat.samples) for beat in beats],
                rates=[amount(beat.samples_per_s) for beat in beats],
                worker_id=caller.subject,
                ttl=timedelta(seconds=desk.lease_ttl_s),
            )
        fates = {row["id"]: row for row in await tx.rows("fate_of_leases", ids=ids, worker_id=caller.subject)}
        credit = await tx.row("credit_of_worker", worker_id=caller.subject)
    drop = [str(id_) for id_ in ids if id_ not in fates or fates[id_]["ended"]]
    hand_in = [str(id_) for id_, row in fates.items() if not row["ended"] and row["kind"] == "unit" and _is_over(row)]
    desk.news.tell("change")
    return HeartbeatAnswer(drop=drop, hand_in=hand_in, samples_applied=credit["applied"] if credit else 0)


_STATES = ("idle", "working", "leaving")


def _is_over(row: dict[str, Any]) -> bool:
    timed_out = row["duration_s"] is not None and row["elapsed_s"] is not None and row["elapsed_s"] >= row["duration_s"]
    return timed_out or row["run_state"] in ("paused", "finishing")


async def leave(desk: Desk, caller: Caller) -> None:
    """The worker goes: what it still holds is free at once."""
    async with desk.ledger.transaction() as tx:
        await tx.run("touch_worker", worker_id=caller.subject, state="left")  # locked before leases, as in a heartbeat
        for lease in await tx.rows("live_leases_of_worker", worker_id=caller.subject):
            await tx.run(
                "give_back",
                lease_id=lease["id"],
                worker_id=caller.subject,
                only_if_late=False,
                outcome="returned",
                reason="the worker left",
                max_attempts=MAX_ATTEMPTS,
            )
        await note(tx, "worker.left", caller.subject, f"{caller.name} left", actor=caller.name)
        await tx.notify("work")
    await attempts.take_back(desk, caller.subject, "its worker left")
    desk.news.tell("place")
    desk.news.tell("change")


async def expire(desk: Desk) -> int:
    """Give back every lease whose worker fell silent. Returns how many."""
    async with desk.ledger.transaction() as tx:
        late = await tx.rows("late_leases")
    for row in late:
        async with desk.ledger.transaction(relaxed=True) as tx:
            ended = await tx.row(
                "give_back",
                lease_id=row["id"],
                worker_id=None,
                only_if_late=True,
                outcome="lost",
                reason=f"no sign of life for {desk.lease_ttl_s:g} s",
                max_attempts=MAX_ATTEMPTS,
            )
            if ended is None or not ended["was_live"]:
                continue
            text = (
                f"{row['kind']} {row['task_id']} was lost: its worker fell silent for {desk.lease_ttl_s:g} s; "
                "somebody else gets it"
            )
            await note(tx, row["kind"] + ".lost", str(row["task_id"]), text, run_id=row["run_id"])
            await tx.notify("work")
        desk.news.tell("rounds")
    return len(late)
