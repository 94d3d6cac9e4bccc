"""How does an attempt go on, and how does it end?

Every end goes through `_close`: the worker's own word, a silence that lasted longer than the job's patience, an agent that
vanished, a worker that left or was revoked. What becomes of the job is decided in domain/outcome.py. Rows are locked in
one order: the run, its lease, and last what the owner has used. Each attempt ends in a transaction of its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import msgspec

from potluck.domain import fairness
from potluck.domain.job import JobSpec
from potluck.domain.names import clean_name
from potluck.domain.outcome import OUTCOMES, Ending, Standing, Verdict, settle
from potluck.domain.resources import Grant
from potluck.errors import BadInput, Fenced
from potluck.hub.commands import gangs
from potluck.hub.commands.desk import Caller, Desk, as_json, as_type, note, pass_on, spread
from potluck.hub.commands.forms import MOST_BYTES, amount, as_uuid, count, one_line
from potluck.hub.commands.trees import OUTPUT_BYTES, read_tree
from potluck.hub.store import CHANNEL, Transaction
from potluck.protocol import Blob, CheckpointReport, JobProgress, JobReport, Json, ReportAnswer, Usage

HUNG_UP = timedelta(seconds=10)
"""So long may a worker whose connection ended take to ask again. Then its agent is dead, and its jobs with it."""
OVERDUE = timedelta(minutes=15)
"""So long after a stop may a worker take to end the job, collect what it left, and say so. One that does not is not
waited for: the job would be neither over nor to be tried again."""
AVOID_FOR = timedelta(minutes=10)
"""A worker that gave a job back is not tried again for so long."""
MAX_NOTES_BYTES = 256 << 10
"""Of what a worker says about the environment of a job."""
_STAGES = ("placed", "preparing", "running")


@dataclass(frozen=True)
class Facts:
    """What a worker says of an attempt that ended, cleaned; empty when the hub itself ends it."""

    usage: Usage = field(default_factory=Usage)
    outputs: Blob | None = None
    environment: dict[str, Json] = field(default_factory=dict)
    executor: str = ""
    log_bytes: int = 0
    code: str = ""


# --- what a worker says ---------------------------------------------------------------------------------------------


async def progress(desk: Desk, caller: Caller, lease_id: str, said: JobProgress) -> None:
    """The attempt prepares itself, or its command runs. An attempt never goes back."""
    if said.state not in ("preparing", "running"):
        raise BadInput(f"an attempt cannot become `{said.state[:40]}`: it is preparing or running")
    environment, executor = _notes(said.environment), clean_name(said.executor, "")
    id_ = as_uuid(lease_id)
    run_id = await _theirs(desk, caller, id_)
    async with desk.ledger.transaction(relaxed=True) as tx:
        job, held = await _lock(tx, run_id, id_)
        stage = max(said.state, held["state"], key=_STAGES.index)
        await tx.run(
            "progress_of_job",
            run_id=job["id"],
            number=held["number"],
            state=stage,
            cancelled=job["cancelled_by"] is not None,
            executor=executor,
            environment=as_json(environment),
        )
        await gangs.after_progress(tx, job, stage)
        moved = stage != held["state"]
        what = one_line(said.text)
        if moved or what:
            verb = "runs" if said.state == "running" else "is prepared"
            text = f"{job['id']} {verb} on {held['worker']}" + (f": {what}" if what else "")
            await note(tx, f"job.{said.state}", job["id"], text, run_id=job["id"], actor=caller.name)
            await spread(tx, "job", [job["id"]])
    await desk.ledger.flush()
    _tell(desk, job["id"])


async def checkpoint(desk: Desk, caller: Caller, lease_id: str, report: CheckpointReport) -> None:
    """From here the next attempt goes on."""
    id_ = as_uuid(lease_id)
    run_id = await _theirs(desk, caller, id_)  # nothing is read, and no blob kept, for a stranger
    await read_tree(desk, report.tree, limit_bytes=OUTPUT_BYTES)
    async with desk.ledger.transaction() as tx:
        job, held = await _lock(tx, run_id, id_)
        await tx.run("keep_checkpoint", run_id=job["id"], number=held["number"], checkpoint=as_json(report.tree))
    _tell(desk, job["id"])


async def end(desk: Desk, caller: Caller, lease_id: str, report: JobReport) -> ReportAnswer:
    """Take an outcome once. The same report again is answered the same; one that comes too late changes nothing."""
    if report.outcome not in OUTCOMES:
        raise BadInput(f"outcome is `{report.outcome[:40]}`: it must be one of {', '.join(OUTCOMES)}")
    if report.outcome == "exited" and report.exit_code is None and not report.signal:
        raise BadInput("a command that exited has an exit code or a signal: send one of them")
    reason = one_line(report.reason)
    facts = Facts(
        Usage(
            amount(report.usage.wall_s), amount(report.usage.cpu_s), count(report.usage.max_memory_bytes, MOST_BYTES)
        ),
        report.outputs,
        _notes(report.environment),
        clean_name(report.executor, ""),
        count(report.log_bytes, MOST_BYTES),
        clean_name(report.code, ""),
    )
    id_ = as_uuid(lease_id)
    found = await _lease(desk, id_)
    if found is None:
        return ReportAnswer(False, "this hub never gave this lease, or forgot it in a crash: the job is free again")
    if found["worker_id"] != caller.subject:
        return ReportAnswer(False, "this lease belongs to another worker")
    if report.outputs is not None and not found["ended"]:
        try:
            await read_tree(desk, report.outputs, limit_bytes=OUTPUT_BYTES)
        except BadInput as error:  # that it ended counts all the same: nothing may hang on bytes that never come
            facts = replace(facts, outputs=None)
            reason = f"{reason}; its outputs are lost: {error}".lstrip("; ")
    code = None if report.exit_code is None else min(max(report.exit_code, -(1 << 31)), (1 << 31) - 1)
    signal = clean_name(report.signal, "")[:20]
    async with desk.ledger.transaction(relaxed=True) as tx:
        job, held = await _both(tx, found["run_id"], id_)
        if held["ended_at"] is not None:
            if (held["outcome"], held["exit_code"], held["signal"]) == (report.outcome, code, signal):
                await desk.ledger.flush()  # whoever accepted it may still be waiting for the disk
                return ReportAnswer(True, "accepted before")
            if held["outcome"] in OUTCOMES:
                return ReportAnswer(False, "its end was reported before, otherwise")
            return ReportAnswer(False, f"too late: the lease was {held['outcome']} ({held['said']})")
        ending = Ending(report.outcome, held["worker"], code, signal, reason, bool(held["ran"]))
        verdict = await _close(tx, job, held, ending, facts, actor=caller.name)
    # Only now wait for the disk: a NOTIFY lets one transaction commit after the other.
    await desk.ledger.flush()
    _told(desk, job["id"], held["worker_id"])
    return ReportAnswer(True, f"{job['id']} is {verdict.job}")


# --- what the hub sees ----------------------------------------------------------------------------------------------


async def expire(desk: Desk) -> int:
    """Jobs of workers that fell silent, or whose agent ended, go back into the line. Returns how many."""
    async with desk.ledger.transaction() as tx:
        gone = await tx.rows("gone_commands", hung_up=HUNG_UP, overdue=OVERDUE)
    return sum([await give_up(desk, row["run_id"], row["id"], _is_gone) for row in gone])


def _is_gone(held: dict[str, Any]) -> Ending | None:
    """Looked at once more when the lease is locked: it may have been renewed since."""
    delivered = held["agent"] != ""
    if held["hung_up"]:
        reason = f"its agent ended: the connection was closed, and nobody asked again for {HUNG_UP.seconds} s"
    elif held["late"]:
        patience = held["ttl"].total_seconds()
        reason = f"no sign of life for {patience:g} s" if delivered else "the job did not reach it within a minute"
    elif held["overdue"]:
        reason = f"it was told to end, and did not say that it has for {OVERDUE.seconds // 60} minutes"
    else:
        return None
    return Ending("lost" if delivered else "withdrawn", held["worker"], reason=reason, ran=bool(held["ran"]))


async def take_back(desk: Desk, worker_id: str, reason: str) -> None:
    """The worker left, or was sent away: its jobs are free at once, and no retry is counted."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("commands_of_worker", worker_id=worker_id)

    def ending(held: dict[str, Any]) -> Ending:
        return Ending("withdrawn", held["worker"], reason=reason, ran=bool(held["ran"]))

    for row in rows:
        await give_up(desk, row["run_id"], row["id"], ending)


async def give_up(
    desk: Desk, run_id: str, lease_id: uuid.UUID, judge: Callable[[dict[str, Any]], Ending | None]
) -> bool:
    """End an attempt that its worker does not report, if `judge` still says so when its lease is locked."""
    async with desk.ledger.transaction() as tx:
        job, held = await _both(tx, run_id, lease_id)
        ending = judge(held) if held["ended_at"] is None else None
        if ending is None:
            return False
        await _close(tx, job, held, ending, Facts())
    _told(desk, run_id, held["worker_id"])
    return True


async def close(tx: Transaction, job: dict[str, Any], lease_id: uuid.UUID, ending: Ending, *, actor: str) -> None:
    """End an attempt in a transaction that holds its run already."""
    held = await tx.row("lock_command", lease_id=lease_id, hung_up=HUNG_UP, overdue=OVERDUE)
    assert held is not None
    await _close(tx, job, held, ending, Facts(), actor=actor)


# --- the end of an attempt ------------------------------------------------------------------------------------------


async def _close(
    tx: Transaction, job: dict[str, Any], held: dict[str, Any], ending: Ending, facts: Facts, *, actor: str = ""
) -> Verdict:
    spec = as_type(job["spec"], JobSpec)
    retry_on = gangs.retry_on(job, spec.retry_on, ending, facts.code)
    standing = Standing(held["number"], job["cancelled_by"], job["retries_left"], retry_on, job["returns"])
    verdict = settle(ending, standing)
    await gangs.after_close(tx, job, ending, facts.code)
    # A job that was stopped says so with the words of whoever stopped it.
    reason = job["reason"] if job["state"] == "cancelled" else verdict.reason
    if verdict.job == "queued":
        text = f"{job['id']} waits again: {reason}"
    elif job["state"] == "cancelled":
        text = f"{job['id']} has ended on {held['worker']}: {verdict.attempt_reason}"
    else:
        text = f"{job['id']} {'was ' if verdict.job in ('cancelled', 'lost') else ''}{verdict.job}: {reason}"
    done = {"cancelled": "cancelled", "queued": "queued", "succeeded": "done", "lost": "lost"}
    await tx.run(
        "settle_attempt",
        lease_id=held["id"],
        task_id=job["task_id"],
        run_id=job["id"],
        number=held["number"],
        outcome={"withdrawn": "revoked"}.get(ending.kind, ending.kind),
        task_state=done.get(verdict.job, "failed"),
        attempt_state=verdict.attempt,
        attempt_reason=verdict.attempt_reason,
        exit_code=ending.exit_code,
        signal=ending.signal,
        usage=as_json(facts.usage),
        outputs=None if facts.outputs is None else as_json(facts.outputs),
        log_bytes=facts.log_bytes,
        executor=facts.executor,
        environment=as_json(facts.environment),
        state=verdict.job,
        reason=reason,
        final=verdict.final,
        retries_left=verdict.retries_left,
        returns=verdict.returns,
        avoid=held["worker_id"] if verdict.avoid else "",
        avoid_for=AVOID_FOR,
        actor=actor,
        text=text,
        owner=job["owner"],
        used=fairness.charge(as_type(held["granted"], Grant), held["seconds"]),
        half_life_s=fairness.HALF_LIFE_S,
        channel=CHANNEL,
    )
    return verdict


async def _both(tx: Transaction, run_id: str, lease_id: uuid.UUID) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job and the lease, locked in this order."""
    job = await tx.row("lock_job", run_id=run_id)
    held = await tx.row("lock_command", lease_id=lease_id, hung_up=HUNG_UP, overdue=OVERDUE)
    assert job is not None and held is not None
    return job, held


async def _lock(tx: Transaction, run_id: str, lease_id: uuid.UUID) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for a worker that says something of a live lease of its own; else it is fenced off."""
    job, held = await _both(tx, run_id, lease_id)
    if held["ended_at"] is not None:
        raise Fenced(f"the lease was {held['outcome']} ({held['said']}): end the job, the hub has moved on")
    return job, held


async def _theirs(desk: Desk, caller: Caller, lease_id: uuid.UUID) -> str:
    """The job of a lease that is this worker's, live or not; else it is fenced off."""
    found = await _lease(desk, lease_id)
    if found is None or found["worker_id"] != caller.subject:
        raise Fenced("this is no lease of yours: end the job, the hub has given it to nobody or to somebody else")
    return str(found["run_id"])


async def _lease(desk: Desk, lease_id: uuid.UUID) -> dict[str, Any] | None:
    """What of a job's lease never changes, and whether it is over."""
    rows = await desk.ledger.shared("command_lease", lease_id=lease_id)
    return rows[0] if rows and rows[0]["kind"] == "command" else None


def _tell(desk: Desk, run_id: str) -> None:
    pass_on(desk, "job", [run_id])
    desk.news.tell("change")


def _told(desk: Desk, run_id: str, worker_id: str) -> None:
    """A place is free, and perhaps a job waits again."""
    _tell(desk, run_id)
    desk.news.tell("place")
    desk.news.tell(f"orders:{worker_id}")  # if another agent believes to have it: drop


# --- forms ----------------------------------------------------------------------------------------------------------


def _notes(environment: dict[str, Json]) -> dict[str, Json]:
    """What the ledger can hold of them. That an attempt ended must not fail on what its worker says beside it."""
    try:
        text = msgspec.json.encode(environment)
    except ValueError:
        return {"note": "no text, left out"}
    if len(text) > MAX_NOTES_BYTES:
        return {"note": f"more than {MAX_NOTES_BYTES:,} bytes, left out"}
    if rb"\u0000" in text:
        return {"note": "zero bytes in it, left out"}
    return environment
