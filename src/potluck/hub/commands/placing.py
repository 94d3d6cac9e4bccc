"""Which waiting job goes where, and what does the line look like?

One pass: read everything (`facts`), decide (domain/placement.py, pure), write all of it in one transaction. Only one hub
copy is in a pass at a time. What changed since the reading is looked at again under locks: a job that was stopped stays
stopped, and a worker that was revoked gets nothing.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from potluck.domain import fairness
from potluck.domain.placement import Explanation, Placed, Plan, Waiting, explain, impossible
from potluck.domain.resources import Demand
from potluck.errors import BadInput, NotFound
from potluck.hub.commands import facts as facts_
from potluck.hub.commands import reaches
from potluck.hub.commands.desk import Desk, as_json, note, pass_on, spread
from potluck.hub.commands.facts import Facts, Forecast
from potluck.hub.store import Transaction
from potluck.protocol import Near, Outlook, QueueMove

AT_ONCE = 200
"""So many placements go into one statement."""
LONG = 300
"""So many jobs and machines are too many to think about while requests wait: a thread does it."""
SLOW_S = 0.2
"""A plan that took longer is good for as long as it took, whatever happens meanwhile."""
SHOWN = 1000
"""So many jobs of the line are listed at most."""


@dataclass(frozen=True)
class Pass:
    """What a pass did."""

    placed: int = 0
    waiting: int = 0  # that are left
    mine: bool = True  # False: another hub copy is placing
    took_s: float = 0.0


async def run_pass(desk: Desk) -> Pass:
    """Place what can be placed now."""
    clock = asyncio.get_running_loop().time
    begun = clock()
    ticket = desk.news.ticket("place")
    async with desk.ledger.transaction() as tx:
        waits = await tx.row("anything_waits")
        if waits is None or not waits["waits"]:
            return Pass()
        lock = await tx.row("placement_lock")
        if lock is None or not lock["mine"]:
            return Pass(mine=False)
        facts, plan = await _decide(await facts_.gather(tx))
        done = await _write(tx, facts, plan)
    if plan.knocks:
        await reaches.want(desk, plan.knocks)
    took_s = clock() - begun
    desk.memory.forecast = Forecast(facts, plan, clock(), took_s, ticket)
    pass_on(desk, "orders", (placed.worker for placed in done))
    pass_on(desk, "job", (placed.job for placed in done))
    if done:
        desk.news.tell("change")
    return Pass(len(done), len(facts.waiting) + facts.resting - len(done), took_s=took_s)


async def _decide(raw: facts_.Raw) -> tuple[Facts, Plan]:
    def think() -> tuple[Facts, Plan]:
        facts = facts_.build(raw)
        return facts, facts.plan()

    return await asyncio.to_thread(think) if raw.size > LONG else think()


async def _write(tx: Transaction, facts: Facts, plan: Plan) -> list[Placed]:
    """Those of the plan that still hold. Workers are locked first, then runs, both in the order of their ids."""
    if not plan.placed:
        return []
    workers = await tx.rows("lock_workers_to_place", ids=sorted({placed.worker for placed in plan.placed}))
    names = {row["id"]: row["name"] for row in workers}
    rows = await tx.rows("lock_jobs_to_place", ids=sorted(placed.job for placed in plan.placed))
    jobs = {row["id"]: row for row in rows}
    fit = [placed for placed in plan.placed if placed.worker in names and placed.job in jobs]
    if gangs := sorted({row["gang"] for row in rows} - {None}):
        fit = await _whole_gangs(tx, facts, fit, jobs, gangs)
    fees: dict[str, float] = {}
    for start in range(0, len(fit), AT_ONCE):
        part = fit[start : start + AT_ONCE]
        texts = [f"{placed.job} goes to {names[placed.worker]}: {placed.reason}" for placed in part]
        await tx.run(
            "place_jobs",
            runs=[placed.job for placed in part],
            tasks=[jobs[placed.job]["task_id"] for placed in part],
            leases=[uuid.uuid4() for _ in part],
            workers=[placed.worker for placed in part],
            grants=[as_json(placed.grant) for placed in part],
            patience=[jobs[placed.job]["patience_s"] for placed in part],
            reasons=[placed.reason for placed in part],
            addresses=[placed.address for placed in part],
        )
        await tx.run("add_events", kind="job.placed", actor="", runs=[placed.job for placed in part], texts=texts)
        for placed in part:
            owner = jobs[placed.job]["owner"]
            fees[owner] = fees.get(owner, 0.0) + fairness.entry_fee(placed.grant)
    if gangs:
        await _form(tx, facts, {placed.job: placed for placed in fit}, jobs, names)
    if fees:
        await charge(tx, fees)
    await spread(tx, "orders", (placed.worker for placed in fit))
    await spread(tx, "job", (placed.job for placed in fit))
    return fit


async def _whole_gangs(
    tx: Transaction, facts: Facts, fit: list[Placed], jobs: dict[str, dict[str, Any]], gangs: list[str]
) -> list[Placed]:
    """Without the members of gangs of which too few are left: they are placed together, or not at all."""
    stand = {row["run_id"] for row in await tx.rows("lock_gangs_to_place", ids=gangs)}
    count = Counter(jobs[placed.job]["gang"] for placed in fit)
    whole = {gang for gang in stand if gang in facts.gangs and count[gang] >= facts.gangs[gang].needed}
    return [placed for placed in fit if jobs[placed.job]["gang"] in whole | {None}]


async def _form(
    tx: Transaction, facts: Facts, fit: dict[str, Placed], jobs: dict[str, dict[str, Any]], names: dict[str, str]
) -> None:
    """Gangs whose first members have just got their places are formed, and it is decided what carries them."""
    members: defaultdict[str, list[str]] = defaultdict(list)  # by gang: workers
    for id_, placed in fit.items():
        if (gang := jobs[id_]["gang"]) is not None:
            members[gang].append(placed.worker)
    engines = {machine.id: machine.engines for machine in facts.machines}
    for gang, workers in sorted(members.items()):
        if facts.gangs[gang].formed:
            continue
        choice = facts.gangs[gang].choice
        if choice == "auto":
            choice = "torchft" if all("torchft" in engines[worker] for worker in workers) else "plain"
        where = ", ".join(sorted(names[worker] for worker in workers))
        await tx.run("form_gang", gang=gang, engine=choice, reason=f"formed of {where}")
        await note(tx, "gang.formed", gang, f"{gang} is formed of {where} ({choice})", run_id=gang)
    await spread(tx, "job", members)


async def charge(tx: Transaction, amounts: dict[str, float]) -> None:
    """Add core-seconds to what people have used; the rest fades."""
    await tx.run(
        "charge",
        owners=list(amounts),
        amounts=list(amounts.values()),
        half_life_s=fairness.HALF_LIFE_S,
    )


# --- looking --------------------------------------------------------------------------------------------------------


async def forecast(desk: Desk) -> Forecast:
    """The newest plan, made now if the last one is out of date. Writes nothing."""
    clock = asyncio.get_running_loop().time
    ticket, begun = desk.news.ticket("place"), clock()
    last = desk.memory.forecast
    if last is not None:
        # A long line moves all the time, and is not read again for each who asks.
        good_for_s = 2.0 if last.ticket == ticket else last.took_s if last.took_s > SLOW_S else 0.0
        if begun - last.made_at < good_for_s:
            return last
    async with desk.ledger.transaction() as tx:
        raw = await facts_.gather(tx)
    facts, plan = await _decide(raw)
    made = Forecast(facts, plan, clock(), clock() - begun, ticket)
    desk.memory.forecast = made
    return made


async def check_possible(desk: Desk, demand: Demand) -> None:
    """Raise `BadInput` for more than any machine of this hub has, even an empty one.

    The machines of the newest plan are enough for a yes, however old it is; a no is looked up.
    """
    last = desk.memory.forecast
    if last is not None and last.facts.machines and not impossible(demand, last.facts.machines):
        return
    async with desk.ledger.transaction() as tx:
        machines = await facts_.machines(tx)
    if why := impossible(demand, machines):
        raise BadInput(why)


async def queue(desk: Desk) -> list[Outlook]:
    """The jobs that wait, in their order, each with one sentence."""
    made = await forecast(desk)
    names = {machine.id: machine.name for machine in made.facts.machines}
    goes = {placed.job: placed for placed in made.plan.placed}
    async with desk.ledger.transaction() as tx:
        still = {row["id"] for row in await tx.rows("waiting_ids")}
    found: list[Outlook] = []
    for job in [job for job in made.plan.order if job in still][:SHOWN]:
        placed = goes.get(job)
        reason = placed.reason if placed else made.plan.waits.get(job, "it has just been submitted")
        where = names.get(placed.worker, "") if placed else ""
        found.append(Outlook(job, len(found) + 1, where, reason))
    return found


async def outlook_of(desk: Desk, job: str) -> Outlook | None:
    """Why this job waits, the nearest machines and what would help. None: it does not wait (any more)."""
    one = None
    for _ in range(2):
        made = await forecast(desk)
        one = next((waiting for waiting in made.facts.waiting if waiting.job == job), None)
        if one is not None:
            break
        desk.memory.forecast = None  # older than the job, perhaps
    return None if one is None else _explain(one, made.facts, made.plan)


async def try_out(desk: Desk, one: Waiting) -> Outlook:
    """What would become of a job that nobody submitted."""
    made = await forecast(desk)
    facts = made.facts.having(one)
    plan = await asyncio.to_thread(facts.plan)
    return _explain(one, facts, plan)


def _explain(one: Waiting, facts: Facts, plan: Plan) -> Outlook:
    said: Explanation = explain(one, facts.machines, plan=plan, limits=facts.limits, now=facts.now)
    near = [Near(worker, lacks) for worker, lacks in said.near]
    return Outlook(one.job, said.position, said.worker_name, said.reason, said.advice, near)


# --- changing the order ---------------------------------------------------------------------------------------------


async def move(desk: Desk, request: QueueMove, job: str, before: str, *, actor: str) -> list[Outlook]:
    """Put a waiting job right before another one, or to the front; what stands before it keeps its place."""
    desk.memory.forecast = None
    made = await forecast(desk)
    order = list(made.plan.order)
    if job not in order:
        raise NotFound(f"`{request.job}` does not wait: `potluck queue` shows those that do")
    if before and before not in order:
        raise NotFound(f"`{request.before}` does not wait: `potluck queue` shows those that do")
    if before == job:
        raise BadInput(f"`{request.job}` cannot stand before itself")
    ranked = {waiting.job for waiting in made.facts.waiting if waiting.rank is not None} | {job}
    order.remove(job)
    order.insert(order.index(before) if before else 0, job)
    last = max(place for place, id_ in enumerate(order) if id_ in ranked)
    front = order[: last + 1]
    async with desk.ledger.transaction() as tx:
        await tx.run("set_ranks", ids=front, ranks=[float(place) for place in range(len(front))])
        where = f"right before {before}" if before else "to the front of the line"
        text = f"{actor} moved {job} {where}"
        await tx.run("add_events", kind="job.queued", actor=actor, runs=[job], texts=[text])
    desk.memory.forecast = None
    desk.news.tell("place")
    desk.news.tell("change")
    return await queue(desk)
