"""What does the placement look at? One reading of the ledger, as the domain's records.

The rows are fetched by `gather`; `build` is plain work on them, so that a long line can be read in a thread.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from potluck.domain import fairness
from potluck.domain.placement import GangPlace, Gpu, Held, Limits, Machine, Plan, Waiting, place
from potluck.domain.resources import Demand, Grant
from potluck.hub.store import Rows, Transaction
from potluck.protocol import MachineNow, Rules


@dataclass(frozen=True)
class Raw:
    """The rows, as they came."""

    now: float
    waiting: Rows
    machines: Rows
    held: Rows
    usages: Rows
    quotas: Rows
    gangs: Rows = field(default_factory=list)  # whose members wait
    ways: Rows = field(default_factory=list)  # between workers; only read when a gang waits

    @property
    def size(self) -> int:
        return len(self.waiting) + len(self.machines)


@dataclass(frozen=True)
class Gang:
    """What placing one of its members must know."""

    formed: bool
    needed: int  # members that must be placed in one pass, or none
    engine: str  # what a machine must have: torchft | plain; auto: nothing
    choice: str  # compat | torchft | plain: how it is carried when it is formed; auto: torchft where all have it


@dataclass(frozen=True)
class Facts:
    """All jobs that wait, all machines, and what people used."""

    now: float  # seconds since 1970, the ledger's clock
    waiting: list[Waiting]
    machines: list[Machine]
    usage: dict[str, float]
    limits: dict[str, Limits]
    reach: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """From worker to worker, the address that works; "": none does. What is not in it is not known."""
    gangs: Mapping[str, Gang] = field(default_factory=dict)  # whose members are in `waiting`
    resting: int = 0  # members of gangs that wait, and are not looked at in this pass

    def plan(self) -> Plan:
        return place(self.waiting, self.machines, usage=self.usage, limits=self.limits, now=self.now, reach=self.reach)

    def having(self, one: Waiting) -> Facts:
        """The same with one more that waits."""
        return replace(self, waiting=[*self.waiting, one])


@dataclass
class Forecast:
    """The newest plan of this hub copy, for those who ask why a job waits. Made again when it is out of date."""

    facts: Facts
    plan: Plan
    made_at: float  # the loop's clock
    took_s: float
    ticket: tuple[str, int]  # of the news at that time


async def gather(tx: Transaction) -> Raw:
    """A few statements for everything, never one for each job."""
    clock = await tx.row("clock")
    assert clock is not None
    waiting = await tx.rows("waiting_jobs")
    gangs = sorted({row["gang"] for row in waiting} - {None})
    return Raw(
        clock["now"],
        waiting,
        await tx.rows("machines"),
        await tx.rows("held_places"),
        await tx.rows("usages"),
        await tx.rows("quota_use"),
        await tx.rows("gangs_to_place", ids=gangs) if gangs else [],
        await tx.rows("ways") if gangs else [],
    )


async def machines(tx: Transaction) -> list[Machine]:
    """All machines, as if nothing ran there."""
    return [_machine(row, []) for row in await tx.rows("machines")]


def build(raw: Raw) -> Facts:
    held: defaultdict[str, list[Held]] = defaultdict(list)
    on: defaultdict[str, set[str]] = defaultdict(set)  # by gang: machines that have a member
    usage = {row["owner"]: fairness.decay(row["amount"], row["age_s"]) for row in raw.usages}
    running: Counter[str] = Counter()
    for row in raw.held:
        grant = msgspec.convert(row["granted"], Grant)
        held[row["worker_id"]].append(_held(row, grant))
        running[row["owner"]] += 1
        if row["gang"] is not None:
            on[row["gang"]].add(row["worker_id"])
        # What runs counts from its first second, not only when it ends: else the longest job would be free.
        so_far = fairness.charge(grant, raw.now - row["placed_at"])
        usage[row["owner"]] = usage.get(row["owner"], 0.0) + so_far
    demands: dict[str, Demand] = {}  # many jobs ask for the same
    gangs = {row["run_id"]: _gang(row) for row in raw.gangs if _has_its_turn(row, on)}
    waiting = [
        _waiting(row, demands, raw.now, _place(row, gangs, on))
        for row in raw.waiting
        if row["gang"] is None or (row["gang"] in gangs and not row["held_back"])
    ]
    reach: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for row in raw.ways:
        reach[row["source"]][row["target"]] = row["address"]
    return Facts(
        raw.now,
        waiting,
        [_machine(row, held[row["id"]]) for row in raw.machines],
        usage,
        {row["owner"]: _limits(row, running[row["owner"]]) for row in raw.quotas},
        reach,
        gangs,
        len(raw.waiting) - len(waiting),
    )


def _has_its_turn(row: dict[str, Any], on: Mapping[str, set[str]]) -> bool:
    """Whether members of this gang may be placed now. Else somebody has to look at the gang first (gang_upkeep.settle)."""
    if row["due"]:
        return False
    # Formed and nobody there: it is about to be taken apart. Members of a compat gang only ever come together.
    return not row["formed"] or (bool(on[row["run_id"]]) and not row["compat"])


def _gang(row: dict[str, Any]) -> Gang:
    """A job that brings its own Python is not asked whether the machine's has an engine."""
    formed, brings, asked = row["formed"], row["brings"], row["asked"]
    if row["compat"]:
        choice = "compat"
    else:
        choice = row["engine"] or ("plain" if brings and asked == "auto" else asked)
    # What is to carry the gang in the end needs torch at least, which is what `plain` says of a machine.
    engine = "auto" if brings else "plain" if choice in ("auto", "compat") else choice
    needed = 1 if formed else row["most"] if row["compat"] else row["least"]
    return Gang(formed, needed, engine, choice)


def _place(row: dict[str, Any], gangs: Mapping[str, Gang], on: Mapping[str, set[str]]) -> GangPlace | None:
    if row["gang"] is None:
        return None
    gang = gangs[row["gang"]]
    return GangPlace(row["gang"], row["member"], gang.needed, frozenset(on[row["gang"]]), gang.engine)


def _held(row: dict[str, Any], grant: Grant) -> Held:
    started, timeout_s = row["started_at"], row["timeout_s"]
    return Held(
        job=row["run_id"],
        owner=row["owner"],
        grant=grant,
        ends_at=(started or row["placed_at"]) + timeout_s if timeout_s else None,
        # before its process runs, nothing of what it reserved is missing in what the machine measures as free
        used_memory=None if started else 0,
        used_vram=None if started else 0,
        name=row["name"],
    )


def _waiting(row: dict[str, Any], demands: dict[str, Demand], now: float, gang: GangPlace | None) -> Waiting:
    needs = row["needs"]
    if (demand := demands.get(needs)) is None:
        demand = demands[needs] = msgspec.json.decode(needs, type=Demand)
    avoid = row["avoid"]
    return Waiting(
        job=row["id"],
        name=row["name"],
        owner=row["owner"],
        demand=demand,
        priority=row["priority"],
        rank=row["rank"],
        queued_at=row["queued_at"],
        timeout_s=row["timeout_s"],
        avoid=frozenset(worker for worker, until in avoid.items() if until > now) if avoid else frozenset(),
        gang=gang,
    )


def _machine(row: dict[str, Any], held: list[Held]) -> Machine:
    has = msgspec.convert(row["machine"], MachineNow)
    rules = msgspec.convert(row["rules"], Rules)
    return Machine(
        id=row["id"],
        name=row["name"],
        owner=row["owner"],
        cores=float(has.cpu_cores),
        memory=has.memory_bytes,
        memory_free=has.memory_free_bytes,
        disk_free=has.disk_free_bytes,
        gpus=tuple(Gpu(gpu.index, gpu.name, gpu.memory_bytes, gpu.free_bytes) for gpu in has.gpus),
        labels={"worker": row["name"], "worker_id": row["id"], **row["labels"]},  # so that one can be asked for
        os=has.os,
        arch=has.arch,
        accept=rules.accept,
        whose=rules.whose,
        runtime=rules.runtime,
        max_tasks=rules.max_tasks,
        executors=frozenset(row["executors"]),
        present=bool(row["present"]),
        draining=row["draining"],
        held=tuple(held),
        engines=frozenset(has.engines),
        has_door=row["has_door"],
    )


def _limits(row: dict[str, Any], running: int) -> Limits:
    return Limits(
        running=row["running"],
        gpu_hours=row["gpu_hours"],
        cpu_hours=row["cpu_hours"],
        running_now=running,
        gpu_hours_used=row["gpu_hours_used"],
        cpu_hours_used=row["cpu_hours_used"],
        name=row["name"],
    )
