"""How is a job submitted, looked at, stopped and tried again?

Everybody with a credential sees that a job is there. What is in it belongs to its owner and to admins.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

from potluck.domain import job as job_
from potluck.domain.job import ENDED, STATES, JobSpec
from potluck.domain.names import clean_name
from potluck.domain.outcome import Ending
from potluck.domain.placement import Waiting
from potluck.domain.resources import Demand, describe, read
from potluck.errors import BadInput, Conflict, NotAllowed, NotFound
from potluck.hub.commands import attempts, gangs, placing, secrets, trees
from potluck.hub.commands.desk import Caller, Desk, as_blob, as_json, as_type, iso, new_run_id, note, pass_on, spread
from potluck.hub.store import CHANNEL, Rows, Transaction
from potluck.protocol import AttemptView, GitState, JobRequest, JobView, Outlook, QueueMove, Usage, Why

MOST_OPEN = 10_000
"""Jobs of one person that are not over: a loop gone wild must not make the line too long for everybody."""
NOBODY = Caller("nobody", "", "")
"""Who looks when nobody says so: sees no more than a stranger."""
_NEW = "job-that-is-not-submitted"


# --- asking ---------------------------------------------------------------------------------------------------------


async def submit(desk: Desk, caller: Caller, request: JobRequest, *, key: str | None = None) -> JobView:
    """Queue a job. The same idempotency key again is the same job."""
    # another person's key is another key
    own_key = f"job {caller.subject} {key}" if key else None
    if own_key:
        async with desk.ledger.transaction() as tx:
            if old := await tx.row("run_by_key", key=own_key):
                return await _view(tx, caller, old["id"])
    spec = request.spec
    if spec.gang is not None:
        raise BadInput("this is a gang, several machines that train together: POST it to /api/v1/gangs")
    demand = await check(desk, caller, spec)
    tree = await trees.check(desk, request.project)
    # Relaxed: a NOTIFY lets one transaction commit after the other, and they would all wait for the disk in a row.
    async with desk.ledger.transaction(relaxed=True) as tx:
        open_ = await tx.row("count_open_jobs_of", owner=caller.subject)
        if open_ is not None and open_["count"] >= MOST_OPEN:
            raise Conflict(f"you have {MOST_OPEN:,} jobs that are not over: stop some, or wait until some have ended")
        await trees.keep_tree(tx, request.project, tree)
        if request.git is not None and request.git.diff is not None:
            await trees.keep(tx, [request.git.diff], what="the diff of the uncommitted changes")
        run_id = await new_run_id(tx, spec.name, "job")
        added = await tx.row(
            "add_job",
            id=run_id,
            name=clean_name(spec.name, run_id),
            created_by=caller.name,
            key=own_key,
            owner=caller.subject,
            spec=as_json(spec),
            needs=as_json(demand),
            project=as_json(request.project),
            git=None if request.git is None else as_json(_clean_git(request.git)),
            priority=spec.priority,
            retries_left=spec.retries,
            text=f"{caller.name} submitted {run_id}: {describe(demand)}",
            channel=CHANNEL,
        )
        if added is None:  # the same request, at the same moment
            old = await tx.row("run_by_key", key=own_key)
            assert old is not None
            run_id = old["id"]
        view = await _view(tx, caller, run_id)
    await desk.ledger.flush()
    _tell(desk, run_id)
    return view


async def outlook(desk: Desk, caller: Caller, request: JobRequest) -> Outlook:
    """Where the job would go if it were submitted now. Nothing is stored."""
    spec = request.spec
    demand = await check(desk, caller, spec)
    made = await placing.forecast(desk)
    one = Waiting(
        job=_NEW,
        name=clean_name(spec.name, "this job"),
        owner=caller.subject,
        demand=demand,
        priority=spec.priority,
        queued_at=made.facts.now,
        timeout_s=spec.timeout_s,
    )
    found = await placing.try_out(desk, one)
    return Outlook("", found.position, found.would_run_on, found.reason, found.advice, found.near)


async def check(desk: Desk, caller: Caller, spec: JobSpec) -> Demand:
    """Refuse what could never run: a wrong word, a secret that is not there, more than any machine of this hub has."""
    job_.check(spec)
    demand = read(spec.resources, image=spec.image)
    if spec.secrets:
        async with desk.ledger.transaction() as tx:
            await secrets.check_there(tx, caller.subject, spec.secrets)
    await placing.check_possible(desk, demand)
    return demand


def _clean_git(git: GitState) -> GitState:
    commit = git.commit if re.fullmatch(r"[0-9a-f]{7,64}", git.commit) else ""
    remote = re.sub(r"//[^/@]*@", "//", git.remote)  # a credential in an address is none of our business
    return GitState(
        commit, clean_name(git.branch, ""), git.dirty, git.diff, "".join(filter(str.isprintable, remote))[:300]
    )


# --- finding --------------------------------------------------------------------------------------------------------


async def find(tx: Transaction, ref: str, caller: Caller) -> str:
    """By id, by name, by a front of the id that fits only one, or `last`; the caller's own first, then the newest."""
    if row := await tx.row("job_by_id", ref=ref):
        return str(row["id"])
    rows = await tx.rows("find_job", ref=ref, owner=caller.subject)
    return chosen(rows, ref, none=f"there is no job `{ref}`: `potluck ps` shows them")


def chosen(rows: Rows, ref: str, *, none: str) -> str:
    """The id that `ref` means, of those that it fits, the best first."""
    if not rows:
        raise NotFound(none)
    if len(rows) > 1 and not rows[0]["sure"]:
        fits = ", ".join(row["id"] for row in rows)
        raise BadInput(f"`{ref}` could be {fits}: give more letters")
    return str(rows[0]["id"])


def may(caller: Caller, owner: str) -> bool:
    """Whether the caller may see what is in a job, and say what becomes of it."""
    return caller.role == "admin" or (caller.role == "member" and caller.subject == owner)


async def _own(tx: Transaction, ref: str, caller: Caller) -> dict[str, Any]:
    """The job, locked, if the caller may steer it."""
    job = await tx.row("lock_job", run_id=await find(tx, ref, caller))
    assert job is not None
    if not may(caller, job["owner"]):
        raise NotAllowed(f"{job['id']} is somebody else's: only its owner and admins may do this")
    return job


# --- steering -------------------------------------------------------------------------------------------------------


async def stop(desk: Desk, caller: Caller, ref: str) -> JobView:
    """It is cancelled at once and stays so. Where it runs it is ended; its place is free when that is reported."""
    async with desk.ledger.transaction() as tx:
        job = await _own(tx, ref, caller)
        if job["state"] == "cancelled":
            return await _view(tx, caller, job["id"])
        if job["state"] in ENDED:
            raise Conflict(
                f"{job['id']} has ended already: it {'was' if job['state'] == 'lost' else 'has'} {job['state']}"
            )
        held = await tx.row("lock_live_lease_of_job", run_id=job["id"])
        reason = f"stopped by {caller.name}"
        await tx.run(
            "stop_job",
            run_id=job["id"],
            task_id=job["task_id"],
            reason=reason,
            by=caller.name,
            finished=held is None,
        )
        await note(tx, "job.cancelled", job["id"], f"{job['id']} was {reason}", run_id=job["id"], actor=caller.name)
        await gangs.touch(tx, job)
        if held is not None and held["agent"] == "":  # it never arrived there: nothing has to end
            after = {**job, "state": "cancelled", "reason": reason, "cancelled_by": caller.name}
            ending = Ending("cancelled", "", reason="it was stopped before it was there")
            await attempts.close(tx, after, held["id"], ending, actor=caller.name)
        if held is not None:
            await spread(tx, "orders", [held["worker_id"]])
        await spread(tx, "job", [job["id"]])
        view = await _view(tx, caller, job["id"])
    if held is not None:
        pass_on(desk, "orders", [held["worker_id"]])
    _tell(desk, job["id"])
    return view


async def stop_all_of(desk: Desk, owner: str, *, actor: str) -> None:
    """Stop whatever this person has in the line or at work: they have to leave."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("open_jobs_of", owner=owner)
    for row in rows:
        with contextlib.suppress(Conflict):  # it ended by itself meanwhile
            await stop(desk, Caller("admin", "", actor), row["id"])


async def retry(desk: Desk, caller: Caller, ref: str) -> JobView:
    """Into the line again, at its end, with all its retries. One that succeeded begins anew, else at its checkpoint."""
    async with desk.ledger.transaction() as tx:
        job = await _own(tx, ref, caller)
        if job["state"] not in ENDED:
            raise Conflict(f"{job['id']} is {job['state']}: only a job that has ended can be tried again")
        if not job["finished"]:
            raise Conflict(f"{job['id']} is still being ended where it ran: try again in a moment")
        await gangs.check_retry(tx, job)
        spec = as_type(job["spec"], JobSpec)
        await secrets.check_there(tx, job["owner"], spec.secrets)
        reason = f"tried again by {caller.name}"
        await tx.run(
            "retry_job",
            run_id=job["id"],
            task_id=job["task_id"],
            reason=reason,
            retries_left=spec.retries,
            fresh=job["state"] == "succeeded",
        )
        await note(tx, "job.queued", job["id"], f"{job['id']} is {reason}", run_id=job["id"], actor=caller.name)
        await gangs.touch(tx, job)
        await spread(tx, "job", [job["id"]])
        view = await _view(tx, caller, job["id"])
    _tell(desk, job["id"])
    return view


async def move(desk: Desk, caller: Caller, request: QueueMove) -> list[Outlook]:
    """Change the line: an admin's right, whoever owns the jobs."""
    async with desk.ledger.transaction() as tx:
        job = await find(tx, request.job, caller)
        before = await find(tx, request.before, caller) if request.before else ""
    return await placing.move(desk, request, job, before, actor=caller.name)


def _tell(desk: Desk, run_id: str) -> None:
    desk.news.tell("place")
    pass_on(desk, "job", [run_id])
    desk.news.tell("change")


# --- looking --------------------------------------------------------------------------------------------------------


async def show(desk: Desk, caller: Caller, ref: str) -> JobView:
    async with desk.ledger.transaction() as tx:
        return await _view(tx, caller, await find(tx, ref, caller))


async def list_jobs(desk: Desk, caller: Caller, *, limit: int = 100, state: str = "all") -> list[JobView]:
    """The newest first, without their attempts: `show` has those. `state`: open or all."""
    if state not in ("open", "all"):
        raise BadInput(f"state is `{state[:40]}`: it must be open or all")
    async with desk.ledger.transaction() as tx:
        ids = [row["id"] for row in await tx.rows("job_ids", limit=limit, open=state == "open")]
        found = {row["id"]: row for row in await tx.rows("job_views", ids=ids)}
    return [_as_view(found[id_], caller, []) for id_ in ids]


async def wait(desk: Desk, caller: Caller, ref: str, state: str, wait_s: float) -> JobView:
    """The job as soon as its state is another than `state`, or as it is after `wait_s`."""
    if state and state not in STATES:
        raise BadInput(f"`{state[:40]}` is no state of a job: there are {', '.join(STATES)}")
    async with desk.ledger.transaction() as tx:
        run_id = await find(tx, ref, caller)
    await wait_for_change(desk, run_id, state, wait_s)
    async with desk.ledger.transaction() as tx:
        return await _view(tx, caller, run_id)


async def wait_for_change(desk: Desk, run_id: str, state: str, wait_s: float) -> None:
    """Return as soon as the state of a job or gang is another than `state`, or after `wait_s`."""
    clock = asyncio.get_running_loop().time
    end = clock() + min(max(wait_s, 0.0), 30.0)
    while True:
        ticket = desk.news.ticket(f"job:{run_id}")
        async with desk.ledger.transaction() as tx:
            row = await tx.row("job_state", run_id=run_id)
        left = end - clock()
        if row is None or row["state"] != state or left <= 0 or desk.news.closed:
            return
        await desk.news.wait(ticket, left)


async def why(desk: Desk, caller: Caller, run_id: str) -> Why:
    """One sentence about a job, and what would help."""
    async with desk.ledger.transaction() as tx:
        view = await _view(tx, caller, run_id)
    match view.state:
        case "queued":
            found = await placing.outlook_of(desk, run_id)
            if found is None:
                return Why(run_id, f"{run_id} was queued a moment ago")
            before = f" ({view.reason})" if view.reason else ""
            near = "; ".join(f"{each.worker} {each.lacks}" for each in found.near[:3])
            advice = ". ".join(filter(None, [found.advice, f"Nearest: {near}" if near else ""]))
            return Why(run_id, f"{run_id} waits{before}: {found.reason}", advice)
        case "placed" | "preparing" | "running":
            verb = {"placed": "goes to", "preparing": "is being prepared on", "running": "runs on"}[view.state]
            return Why(run_id, f"{run_id} {verb} {view.worker}" + (f": {view.reason}" if view.reason else ""))
    what = {"succeeded": "succeeded", "failed": "failed"}.get(view.state, f"was {view.state}")
    advice = f"potluck logs {run_id}; potluck retry {run_id}" if view.mine and view.state in ("failed", "lost") else ""
    return Why(run_id, f"{run_id} {what}" + (f": {view.reason}" if view.reason else ""), advice)


async def _view(tx: Transaction, caller: Caller, run_id: str) -> JobView:
    row = await tx.row("job_views", ids=[run_id])
    assert row is not None
    rows = await tx.rows("attempts_of", run_id=run_id) if may(caller, row["owner"]) else []
    return _as_view(row, caller, rows)


def _as_view(row: dict[str, Any], caller: Caller, attempts_: list[dict[str, Any]]) -> JobView:
    mine = may(caller, row["owner"])
    return JobView(
        id=row["id"],
        name=row["name"],
        owner=row["owner_name"],
        state=row["state"],
        reason=row["reason"] if mine else "",
        mine=mine,
        priority=row["priority"],
        needs=describe(as_type(row["needs"], Demand)),
        created_at=row["created_at"].isoformat(),
        started_at=iso(row["started_at"]),
        ended_at=iso(row["ended_at"]),
        worker=row["worker"] or "",
        exit_code=row["exit_code"] if row["state"] in ENDED else None,
        retries_left=row["retries_left"],
        spec=as_type(row["spec"], JobSpec) if mine else None,
        project=as_blob(row["project"]) if mine else None,
        git=as_type(row["git"], GitState) if mine and row["git"] is not None else None,
        attempts=[_attempt(each) for each in attempts_],
        gang=row["gang"] or "",
        member=row["member"],
    )


def _attempt(row: dict[str, Any]) -> AttemptView:
    return AttemptView(
        number=row["number"],
        worker=row["worker"],
        worker_id=row["worker_id"],
        state=row["state"],
        reason=row["reason"],
        executor=row["executor"],
        environment=row["environment"],
        placed_at=row["placed_at"].isoformat(),
        started_at=iso(row["started_at"]),
        ended_at=iso(row["ended_at"]),
        exit_code=row["exit_code"],
        signal=row["signal"],
        usage=as_type(row["usage"], Usage),
        log_bytes=row["log_bytes"],
        outputs=as_blob(row["outputs"]),
        checkpoint=as_blob(row["checkpoint"]),
    )
