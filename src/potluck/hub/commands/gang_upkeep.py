"""Who looks after gangs when something happened to a member, or to the machine that keeps the meeting place?

Whatever ends an attempt marks its gang as due (gangs.after_close) and tells the news `gangs`. `settle` looks at the whole
gang under locks, lets domain/gang_life.py decide, writes that, and then does what needs transactions of its own:
taking leases back, stopping jobs. Each of those makes the gang due again, until nothing is left to do. A hub that dies in
between leaves a gang that is due; several copies that settle the same gang come to the same end.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from potluck.domain.gang_life import Mate, Standing, Step, decide
from potluck.domain.outcome import Ending
from potluck.errors import Conflict, PotluckError
from potluck.hub.commands import attempts, jobs
from potluck.hub.commands.desk import Caller, Desk, note, pass_on, spread
from potluck.hub.store import Transaction
from potluck.telemetry import logger

log = logger("hub.gangs")
HUNG_UP = timedelta(seconds=3)
"""So long may the connection of the host's agent be away before another member keeps the meeting place."""
SILENT = timedelta(seconds=15)
"""The same for one that says nothing, though it asks every `gangs.ASK_EVERY_S`."""
LATE = timedelta(seconds=20)
"""So long may a host take to say where the place is: torchft's lighthouse takes three seconds on a slow machine."""
MOST_ROUNDS = 5


async def tend(desk: Desk, *, silent: timedelta = SILENT) -> int:
    """Look at every gang that needs it. Returns how many. `silent`: longer when the hub itself was away."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("gangs_to_tend", hung_up=HUNG_UP, silent=silent, late=LATE)
    for row in rows:
        try:
            await settle(desk, row["run_id"], silent=silent)
        except PotluckError as error:  # one gang's trouble is not the others'
            log.warning("gang.waits", run=row["run_id"], reason=str(error))
    return len(rows)


async def settle(desk: Desk, gang: str, *, silent: timedelta = SILENT) -> None:
    """Do what follows from how the gang stands, until nothing follows."""
    for _ in range(MOST_ROUNDS):
        step, leases, by = await _advance(desk, gang, silent)
        for job in step.part:
            await attempts.give_up(desk, job, leases[job], _taken_back(step.reason))
        for job in step.stop:
            with contextlib.suppress(Conflict):  # it ended by itself meanwhile
                await jobs.stop(desk, Caller("admin", "", by), job)
        if not step.part and not step.stop:
            return


def _taken_back(reason: str) -> Callable[[dict[str, Any]], Ending | None]:
    return lambda held: Ending("withdrawn", held["worker"], reason=reason, ran=bool(held["ran"]))


async def _advance(desk: Desk, gang: str, silent: timedelta) -> tuple[Step, dict[str, uuid.UUID], str]:
    """Decide and write the next step; the live leases by job, and who stopped the gang."""
    async with desk.ledger.transaction() as tx:
        await tx.rows("lock_members", gang=gang)
        row = await tx.row("lock_gang", gang=gang, late=LATE)
        if row is None or row["finished"]:
            return Step(), {}, ""
        rows = await tx.rows("members", gang=gang, hung_up=HUNG_UP, silent=silent)
        step = decide(_standing(row, rows))
        woken = await _write(tx, row, rows, step)
    leases = {each["id"]: each["lease_id"] for each in rows if each["live"]}
    if step.cancel or step.end or step.unform:
        desk.news.tell("place")
        desk.news.tell("change")
    pass_on(desk, "job", [*step.cancel, gang])
    pass_on(desk, "orders", woken)
    return step, leases, row["cancelled_by"] or ""


def _standing(row: dict[str, Any], rows: list[dict[str, Any]]) -> Standing:
    mates = [
        Mate(
            number=each["member"],
            job=each["id"],
            state=each["state"],
            worker=each["worker"],
            lease=str(each["lease_id"]) if each["live"] else "",
            delivered=each["delivered"],
            sound=each["sound"],
            exit_code=each["exit_code"],
            said=each["said"] or "" if not each["live"] else "",
        )
        for each in rows
    ]
    return Standing(
        least=row["least"],
        mates=mates,
        compat=row["compat"],
        formed=row["formed"],
        cancelled_by=row["cancelled_by"] or "",
        own_failures=row["own_failures"],
        misfortunes=row["misfortunes"],
        hurt_s=row["hurt_s"],
        host="" if row["host"] is None else str(row["host"]),
        late=bool(row["late"]) and row["address"] == "",
    )


async def _write(tx: Transaction, row: dict[str, Any], rows: list[dict[str, Any]], step: Step) -> list[str]:
    """Write the step; the workers that must hear of it. Everything is locked."""
    gang = row["id"]
    woken: list[str] = []
    if step.cancel:
        await tx.run("cancel_members", ids=list(step.cancel), reason=step.says_goodbye)
        texts = [f"{job} was cancelled: {step.says_goodbye}" for job in step.cancel]
        await tx.run("add_events", kind="job.cancelled", actor="", runs=list(step.cancel), texts=texts)
    if step.end:
        # A gang that was stopped says so with the words of whoever stopped it.
        reason = row["reason"] if row["state"] == "cancelled" else step.reason
        await tx.run("end_gang", gang=gang, state=step.end, reason=reason, exit_code=step.exit_code)
        if row["state"] != step.end:
            verb = "was" if step.end == "cancelled" else "has"
            await note(tx, f"gang.{step.end}", gang, f"{gang} {verb} {step.end}", run_id=gang)
    elif step.unform:
        await tx.run("unform_gang", gang=gang, reason=step.reason)
        await note(tx, "gang.queued", gang, f"{gang} waits: {step.reason}", run_id=gang)
    elif step.host is not None:
        host = next((each for each in rows if each["live"] and str(each["lease_id"]) == step.host), None)
        await tx.run("host_gang", gang=gang, host=None if host is None else host["lease_id"])
        woken = [each["worker_id"] for each in rows if each["live"]]
        if host is not None:
            await note(tx, "gang.meets", gang, f"{gang} meets at {host['worker']}", run_id=gang)
    if not step.end:
        await tx.run("tended_gang", gang=gang, due=bool(step.again or step.part or step.stop))
    await spread(tx, "job", [*step.cancel, gang])
    await spread(tx, "orders", woken)
    return woken
