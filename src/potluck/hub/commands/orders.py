"""What shall a worker do about jobs, and is it still there?

A worker always has one request waiting here. Its arrival is the sign of life of the worker's jobs; the answer brings new
leases and says what to end. While it waits nothing is asked of the ledger: whoever has something for the worker tells the
news `orders:<worker>`. If its connection ends instead, its agent is dead or about to ask again: upkeep gives it ten seconds
(attempts.HUNG_UP).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from potluck.domain.job import JobSpec
from potluck.domain.names import clean_name
from potluck.domain.outcome import Ending
from potluck.domain.resources import Grant
from potluck.errors import BadInput, Conflict, LedgerError, NotKnown
from potluck.hub.commands import attempts, gangs, secrets
from potluck.hub.commands.desk import Caller, Desk, as_blob, as_json, as_type
from potluck.hub.commands.forms import MOST_BYTES, amount, count
from potluck.hub.store import Rows
from potluck.protocol import Blob, End, GpuNow, JobLease, MachineNow, OrdersAnswer, OrdersRequest, Rules
from potluck.telemetry import logger

log = logger("hub.orders")
Gone = Callable[[], Awaitable[None]]
"""Returns when the caller has hung up."""

MOST_WAIT_S = 30.0
GRACE_S = 10.0
"""Who stops a job does not wait longer than that for it, whatever the job says."""
TOLD_FOR_S = 3.0
"""What a worker was told a moment ago is no reason to answer at once: it is about it."""
MOST_HELD = 256
_GB = 10**9


@dataclass(frozen=True)
class Arrival:
    """A request that is here, and what it found."""

    request: OrdersRequest  # cleaned; what it says of gangs is cleaned where it is used
    holding: frozenset[uuid.UUID]
    strange: list[str]  # in `holding`, and no id at all
    ordered_at: Any
    draining: bool


@dataclass(frozen=True)
class Seen:
    """What the ledger has for a worker."""

    name: str
    draining: bool
    must_knock: bool
    owner: str  # whose the machine is
    leases: Rows  # all that are live, with their jobs


async def orders(
    desk: Desk, caller: Caller, request: OrdersRequest, wait_s: float, *, gone: Gone | None = None
) -> OrdersAnswer:
    """What to do, as soon as there is something; an empty answer after `wait_s`."""
    clock = asyncio.get_running_loop().time
    begun = clock()
    ticket = desk.news.ticket(f"orders:{caller.subject}")
    arrival, seen = await _arrive(desk, caller, request)
    hung_up = asyncio.ensure_future(gone()) if gone is not None else None
    try:
        while True:
            answer, urgent, ttl_s = await _judge(desk, caller, arrival, seen)
            # Renewed only when it asks: so it must ask often enough for the least patient of its jobs.
            end = begun + min(max(wait_s, 0.0), MOST_WAIT_S, ttl_s / 3)
            if not urgent:
                end = min(end, begun + TOLD_FOR_S) if answer.end or answer.drop or answer.meet else end
            if urgent or end <= clock() or desk.news.closed:
                _remember(desk, caller, answer, clock())
                return answer
            news = await _news(desk, ticket, end - clock(), hung_up)
            if hung_up is not None and hung_up.done():
                if not desk.news.closed:  # when the hub itself hangs up, that says nothing of the agent
                    await _mark(desk, caller, arrival)
                return OrdersAnswer()
            if not news:
                _remember(desk, caller, answer, clock())
                return answer
            ticket = desk.news.ticket(ticket[0])
            seen = await _look(desk, caller)
    finally:
        if hung_up is not None:
            hung_up.cancel()


async def _news(desk: Desk, ticket: tuple[str, int], timeout_s: float, hung_up: asyncio.Future[None] | None) -> bool:
    """Wait for news (True), for the time to be over, or for the caller to hang up."""
    if hung_up is None:
        return await desk.news.wait(ticket, timeout_s)
    news = asyncio.ensure_future(desk.news.wait(ticket, timeout_s))
    both: set[asyncio.Future[Any]] = {news, hung_up}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return news.done() and news.result()
    finally:
        news.cancel()


async def _mark(desk: Desk, caller: Caller, arrival: Arrival) -> None:
    async with desk.ledger.transaction(relaxed=True) as tx:
        await tx.run("hang_up", worker_id=caller.subject, ordered_at=arrival.ordered_at)


async def _arrive(desk: Desk, caller: Caller, request: OrdersRequest) -> tuple[Arrival, Seen]:
    """Write down that it was here, and what its machine has; renew what it holds; look what there is for it."""
    clean = _clean(request)
    ids, strange = _ids(request.holding)
    rows = await desk.ledger.shared(
        "orders_arrive",
        apart=caller.subject,
        worker_id=caller.subject,
        agent=clean.agent,
        machine=as_json(clean.now),
        rules=as_json(clean.rules),
        executors=as_json(clean.executors),
        labels=as_json(clean.labels),
    )
    if not rows:
        await _look(desk, caller)  # is it there at all?
        raise Conflict(
            f"another agent works as {caller.name} at this moment, from a copy of this folder perhaps: one credential "
            "is for one machine. Stop the other one, or join here with a link of its own (potluck join LINK --home DIR)"
        )
    row = rows[0]
    await gangs.hear(desk, caller, clean, before=row)
    if ids:
        await desk.ledger.shared(
            "renew_commands",
            apart=caller.subject,
            worker_id=caller.subject,
            agent=clean.agent,
            ids=as_json(ids),
        )
    seen = await _look(desk, caller)
    same = (clean.rules, clean.executors, clean.labels) == (
        as_type(row["rules"], Rules),
        row["executors"],
        row["labels"],
    )
    if not same or not row["was_present"] or _rough(clean.now) != _rough(as_type(row["machine"], MachineNow)):
        desk.news.tell("place")
        desk.news.tell("change")
    return Arrival(clean, frozenset(ids), strange, row["ordered_at"], row["draining"]), seen


async def _look(desk: Desk, caller: Caller) -> Seen:
    rows = await desk.ledger.shared("orders_look", worker_id=caller.subject)
    if not rows:
        raise NotKnown("this hub does not know this worker any more: join again with a fresh link")
    if rows[0]["revoked"]:
        raise NotKnown("this worker was revoked: end what it does, and ask whoever runs this hub")
    leases = [row for row in rows if row["id"] is not None]
    first = rows[0]
    return Seen(first["worker_name"], first["draining"], first["must_knock"], first["worker_owner"], leases)


async def _judge(desk: Desk, caller: Caller, arrival: Arrival, seen: Seen) -> tuple[OrdersAnswer, bool, float]:
    """What there is to say, whether it is worth an answer at once, and the shortest patience of what is live here."""
    rows = seen.leases
    agent = arrival.request.agent
    live = {row["id"] for row in rows}
    give, end = [], []
    for row in rows:
        if row["id"] in arrival.holding:
            if row["cancelled_by"] is not None:
                grace_s = min(max(as_type(row["spec"], JobSpec).grace_s, 0.0), GRACE_S)
                end.append(End(str(row["id"]), f"stopped by {row['cancelled_by']}", grace_s))
        elif row["agent"] not in ("", agent):
            ending = ("lost", "its agent was restarted")
            await attempts.give_up(desk, row["run_id"], row["id"], _if_agent_is_not(agent, ending))
        elif row["cancelled_by"] is not None:
            # It has not heard of it, or lost it: there is nothing to end.
            await attempts.give_up(desk, row["run_id"], row["id"], _if_stopped(agent))
        else:
            give.append(row)
    leases = await _deliver(desk, caller, arrival, give, seen) if give else []
    knock, meet, gang_urgent = await gangs.say(desk, caller, arrival.request, rows, must_knock=seen.must_knock)
    drop = sorted(str(id_) for id_ in arrival.holding - live) + arrival.strange
    now = asyncio.get_running_loop().time()
    told = desk.memory.told
    said = [*(each.lease_id for each in end), *drop]
    fresh = [id_ for id_ in said if now - told.get((caller.subject, id_), -TOLD_FOR_S) >= TOLD_FOR_S]
    urgent = bool(leases or fresh or gang_urgent or seen.draining != arrival.draining)
    ttl_s = min((float(row["ttl_s"]) for row in rows), default=MOST_WAIT_S * 3)
    if any(row["gang"] is not None for row in rows):
        ttl_s = min(ttl_s, gangs.ASK_EVERY_S * 3)
    return OrdersAnswer(leases, end, drop, seen.draining, knock, meet), urgent, ttl_s


def _remember(desk: Desk, caller: Caller, answer: OrdersAnswer, now: float) -> None:
    told = desk.memory.told
    for id_ in (*(each.lease_id for each in answer.end), *answer.drop):
        told[caller.subject, id_] = now
    if len(told) > 10_000:
        for key in [key for key, at in told.items() if now - at > TOLD_FOR_S]:
            del told[key]


def _if_agent_is_not(agent: str, what: tuple[str, str]) -> Callable[[dict[str, Any]], Ending | None]:
    def judge(held: dict[str, Any]) -> Ending | None:
        if held["agent"] in ("", agent):
            return None
        return Ending(what[0], held["worker"], reason=what[1], ran=bool(held["ran"]))

    return judge


def _if_stopped(agent: str) -> Callable[[dict[str, Any]], Ending | None]:
    def judge(held: dict[str, Any]) -> Ending | None:
        if held["agent"] not in ("", agent):
            return None
        return Ending("cancelled", held["worker"], reason="it was stopped before it was there")

    return judge


# --- giving ---------------------------------------------------------------------------------------------------------


async def _deliver(
    desk: Desk, caller: Caller, arrival: Arrival, rows: list[dict[str, Any]], seen: Seen
) -> list[JobLease]:
    """Leases with their secrets, and from now on this agent has them. Not those that ended this very moment."""
    given: dict[uuid.UUID, JobLease] = {}
    for row in rows:
        try:
            given[row["id"]] = await _lease(desk, row, seen)
        except Conflict as error:
            why = str(error)
            log.warning("lease.unusable", run=row["run_id"], reason=why)
            await attempts.give_up(desk, row["run_id"], row["id"], _failed(why))
    held = await desk.ledger.shared(
        "give_commands", worker_id=caller.subject, agent=arrival.request.agent, ids=as_json(list(given))
    )
    return [given[row["id"]] for row in held]


def _failed(why: str) -> Callable[[dict[str, Any]], Ending | None]:
    return lambda held: Ending("failed", held["worker"], reason=why)


async def _lease(desk: Desk, row: dict[str, Any], seen: Seen) -> JobLease:
    spec = as_type(row["spec"], JobSpec)
    grant = as_type(row["granted"], Grant)
    values: dict[str, str] = {}
    if spec.secrets:
        try:
            async with desk.ledger.transaction() as tx:
                values = await secrets.values(desk, tx, row["owner"], spec.secrets)
        except LedgerError as error:  # the key is gone
            raise Conflict(str(error)) from error
        if missing := sorted(set(spec.secrets) - set(values)):
            raise Conflict(f"the secret {', '.join(missing)} was removed after the job was submitted")
    member = None
    if row["gang"] is not None:
        async with desk.ledger.transaction() as tx:
            member = await gangs.membership(tx, row, seen.name)
    return JobLease(
        id=str(row["id"]),
        task_id=row["task_id"],
        run_id=row["run_id"],
        name=row["name"],
        attempt=row["number"],
        owner=row["owner"],
        owner_name=row["owner_name"],
        owns_worker=row["owner"] == seen.owner,
        ttl_s=float(row["ttl_s"]),
        spec=spec,
        project=as_type(row["project"], Blob),
        gpus=list(grant.gpus),
        vram_bytes=grant.vram,
        cpu=grant.cpu,
        memory_bytes=grant.memory,
        disk_bytes=grant.disk,
        secrets=values,
        resume_from=as_blob(row["checkpoint"]),
        gang=member,
    )


# --- forms ----------------------------------------------------------------------------------------------------------


def _ids(holding: list[str]) -> tuple[list[uuid.UUID], list[str]]:
    """The ids of leases; what is none is only good for being dropped."""
    ids, strange = [], []
    for text in holding[:MOST_HELD]:
        try:
            ids.append(uuid.UUID(text))
        except ValueError:
            strange.append(text[:100])
    return sorted(set(ids)), strange


def _clean(request: OrdersRequest) -> OrdersRequest:
    """What a worker may say of itself: bounded, in one line, without nonsense."""
    agent = clean_name(request.agent, "")
    if not agent or agent != request.agent:
        raise BadInput("agent must be a word of at most 40 plain characters, a new one at each start")
    rules = request.rules
    for name, value, allowed in (
        ("accept", rules.accept, ("pool", "jobs", "all")),
        ("whose", rules.whose, ("me", "hub")),
        ("runtime", rules.runtime, ("container", "any")),
    ):
        if value not in allowed:
            raise BadInput(f"the rule {name} is `{value[:40]}`: it must be {' or '.join(allowed)}")
    if not 0 <= rules.max_tasks <= MOST_HELD:
        raise BadInput(f"max_tasks is {rules.max_tasks}: it must lie between 0 and {MOST_HELD}")
    if len(request.holding) > MOST_HELD:
        raise BadInput(f"{len(request.holding)} leases at once: a worker holds at most {MOST_HELD}")
    now = request.now
    machine = MachineNow(
        count(now.cpu_cores, MOST_BYTES),
        count(now.memory_bytes, MOST_BYTES),
        count(now.memory_free_bytes, MOST_BYTES),
        count(now.disk_free_bytes, MOST_BYTES),
        amount(now.load),
        [_gpu(gpu) for gpu in now.gpus[:64]],
        clean_name(now.os, "")[:20],
        clean_name(now.arch, "")[:20],
        sorted({clean_name(each, "") for each in now.engines[:10]} - {""}),
    )
    executors = sorted({clean_name(each, "") for each in request.executors[:20]} - {""})
    return replace(
        request, holding=[], now=machine, rules=rules, executors=executors, labels=clean_labels(request.labels)
    )


def clean_labels(labels: dict[str, str]) -> dict[str, str]:
    if len(labels) > 64:
        raise BadInput(f"{len(labels)} labels: at most 64 are taken")
    for key, value in labels.items():
        if not key or clean_name(key, "") != key or (value and clean_name(value, "") != value):
            raise BadInput(
                f"the label {key[:60]!r}={value[:60]!r} must be a name and a value of at most 40 plain characters"
            )
    return dict(labels)


def _gpu(gpu: GpuNow) -> GpuNow:
    celsius = gpu.temperature_c
    if celsius is not None and not -300 < celsius < 3000:
        celsius = None
    return GpuNow(
        count(gpu.index, MOST_BYTES),
        clean_name(gpu.name, "a GPU"),
        count(gpu.memory_bytes, MOST_BYTES),
        count(gpu.free_bytes, MOST_BYTES),
        min(amount(gpu.busy), 1.0),
        celsius,
    )


def _rough(now: MachineNow) -> tuple[Any, ...]:
    """What of a machine is worth another look at the line, when it changes."""
    gpus = tuple((gpu.index, gpu.name, gpu.memory_bytes, gpu.free_bytes // (_GB // 2)) for gpu in now.gpus)
    sizes = (now.memory_bytes, now.memory_free_bytes // _GB, now.disk_free_bytes // (10 * _GB))
    return (now.cpu_cores, *sizes, gpus, now.os, now.arch, tuple(now.engines))
