"""Which waiting jobs go where, now?

Ten thousand jobs and a thousand machines must not mean ten million questions. Room only shrinks during a pass, so:

    a machine that has no room for a demand will have none later in the pass: each demand walks the machines once;
    jobs with equal demands walk together, whoever owns them: machines are sorted into those that take anybody's jobs
    and the few that a person owns;
    a demand that is larger in everything than one that found no room is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import nsmallest

from potluck.domain import fairness
from potluck.domain.placement.line import Line
from potluck.domain.placement.records import Held, Limits, Machine, Placed, Plan, Reservation, Waiting
from potluck.domain.placement.room import FREE_VRAM, Room, is_kind, is_open, takes_foreign
from potluck.domain.quantity import say_count, say_duration
from potluck.domain.resources import Demand, describe, wants_gpu


def place(
    waiting: Sequence[Waiting],
    machines: Sequence[Machine],
    *,
    usage: Mapping[str, float],
    limits: Mapping[str, Limits],
    now: float,
) -> Plan:
    """Decide one pass. `usage` by owner is in core-seconds, decayed to `now`; who is not in `limits` has none."""
    return _Pass(machines, limits, now).run(waiting, usage)


def over_limit(one: Waiting, limits: Limits, *, placed: int = 0) -> str:
    """Which limit of its owner keeps the job waiting, "" if none. `placed`: jobs of the owner placed in this pass."""
    who = f"`{limits.name or one.owner}`"
    running = limits.running_now + placed
    if limits.running is not None and running >= limits.running:
        return f"{who} may run {say_count(limits.running, 'job')} at once, and {running} run"
    week = "in seven days, and that is used up"
    if wants_gpu(one.demand) and limits.gpu_hours is not None and limits.gpu_hours_used >= limits.gpu_hours:
        return f"{who} may use {say_count(limits.gpu_hours, 'GPU hour')} {week}"
    if limits.cpu_hours is not None and limits.cpu_hours_used >= limits.cpu_hours:
        return f"{who} may use {say_count(limits.cpu_hours, 'core hour')} {week}"
    return ""


def soonest(room: Room, demand: Demand, now: float) -> tuple[int, float, frozenset[str]]:
    """When a machine that is large enough has room: (how many jobs of unknown end, the time, the jobs that end before)."""
    later = room.copy()
    ended: list[str] = []
    unknown, at = 0, now
    for held in sorted(later.held, key=lambda held: (held.ends_at is None, held.ends_at or 0.0, held.job)):
        if later.fits(demand):
            break
        later.release(held)
        ended.append(held.job)
        if held.ends_at is None:
            unknown += 1
        else:
            at = max(at, held.ends_at)
    return unknown, at, frozenset(ended)


class _Shelf:
    """The machines of one kind, the smallest first."""

    def __init__(self, rooms: Sequence[Room]) -> None:
        self.rooms = rooms
        self._too_much: dict[tuple[object, ...], list[tuple[int, int, int]]] = {}  # by GPUs: cores, memory, disk
        self._cores = max((room.cores for room in rooms), default=-1)
        self._memory = max((room.memory for room in rooms), default=-1)
        self._gpus = max((room.spare_gpus for room in rooms), default=0)
        self._vram = max((room.spare_vram for room in rooms), default=0)

    def is_hopeless(self, demand: Demand) -> bool:
        """Whether no machine has so much of one thing, or a demand that is nowhere larger has found no room."""
        cores, memory, disk = round(demand.cpu * 1000), demand.memory, demand.disk
        if cores > self._cores or memory > self._memory:
            return True
        if demand.gpus_min and not demand.vram_slice and demand.gpus_min > self._gpus:
            return True
        if demand.gpus_min and FREE_VRAM * demand.vram_min > self._vram:
            return True
        return any(c <= cores and m <= memory and d <= disk for c, m, d in self._too_much.get(_gpus(demand), ()))

    def give_up(self, demand: Demand) -> None:
        """No machine here has room for it."""
        known = self._too_much.setdefault(_gpus(demand), [])
        if len(known) < 32:  # a few say nearly all; more would cost more than they save
            known.append((round(demand.cpu * 1000), demand.memory, demand.disk))

    def fitting(self, demand: Demand) -> Iterator[Room]:
        """Those that have room when they are asked for."""
        cores, memory, disk = round(demand.cpu * 1000), demand.memory, demand.disk
        if not demand.gpus_min:
            return (
                room
                for room in self.rooms
                if room.slots > 0 and room.cores >= cores and room.memory >= memory and room.disk >= disk
            )
        gpus, vram = (0 if demand.vram_slice else demand.gpus_min), FREE_VRAM * demand.vram_min
        return (
            room
            for room in self.rooms
            if room.slots > 0
            and room.spare_gpus >= gpus
            and room.spare_vram >= vram
            and room.cores >= cores
            and room.memory >= memory
            and room.disk >= disk
            and room.fits(demand)
        )


class _Kind:
    """The machines of one kind, as they are now and as they will be when all their jobs have ended."""

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._rooms = rooms
        self.now = _Shelf([room for room in rooms if room.slots > 0])

    @cached_property
    def empty(self) -> _Shelf:
        return _Shelf([room.emptied() for room in self._rooms])


class _Shelves:
    """Machines by the kind that a job may ask for."""

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._rooms = rooms
        self._by_kind: dict[tuple[object, ...], _Kind] = {}

    def of(self, demand: Demand) -> _Kind:
        gpu = (demand.models, True) if demand.gpus_min else ((), False)
        key = (demand.os, demand.arch, demand.labels, demand.image, gpu)
        kind = self._by_kind.get(key)
        if kind is None:
            kind = _Kind([room for room in self._rooms if is_kind(room.machine, demand)])
            self._by_kind[key] = kind
        return kind


class _Search:
    """One demand's walk along its shelf. A machine that it has left behind has no room for it in this pass."""

    def __init__(self, shelf: _Shelf, demand: Demand) -> None:
        self._shelf = shelf
        self._demand = demand
        self._over = shelf.is_hopeless(demand)
        self._way: Iterator[Room] = iter(()) if self._over else shelf.fitting(demand)
        self._at: Room | None = None
        # Nothing keeps two jobs that name no cores from sharing one, so they go first to machines that do nothing else.
        self._idle_only = not demand.cpu

    def find(self, kept: Mapping[str, object]) -> Room | None:
        """A machine with room that is not `kept` for somebody."""
        if self._over:
            return None
        at = self._at
        if at is not None and at.machine.id not in kept and not (self._idle_only and at.held) and at.fits(self._demand):
            return at
        if self._idle_only:
            at = next((room for room in self._way if room.machine.id not in kept and not room.held), None)
            if at is None:
                self._idle_only = False
                self._way = self._shelf.fitting(self._demand)
        if not self._idle_only:
            at = next((room for room in self._way if room.machine.id not in kept), None)
        self._at = at
        if at is None:
            self._over = True
            if not kept:
                self._shelf.give_up(self._demand)
        return at


@dataclass(slots=True)
class _Group:
    """The jobs with one demand: what was found out for one of them holds for all."""

    demand: Demand
    search: _Search
    own: dict[str, _Search] = field(default_factory=dict)  # by owner, on the owner's machines
    hopeless: bool = False  # no machine that takes everybody's jobs could hold it at the moment, even empty
    delays: set[str] = field(default_factory=set)  # machines that are kept, on which it would be in the way
    why: str = ""


class _Pass:
    """The state of one pass: what is left of each machine, and what was decided."""

    def __init__(self, machines: Sequence[Machine], limits: Mapping[str, Limits], now: float) -> None:
        rooms = [Room(machine) for machine in sorted(machines, key=_size) if is_open(machine)]
        foreign = [room for room in rooms if takes_foreign(room.machine)]
        own: dict[str, list[Room]] = {}
        for room in rooms:
            if room.machine.owner:
                own.setdefault(room.machine.owner, []).append(room)
        self._busy = {held.owner for machine in machines for held in machine.held}
        self._limits = limits
        self._now = now
        self._room = {room.machine.id: room for room in rooms}
        self._everybodys = _Shelves(foreign)
        self._owned = {owner: _Shelves(theirs) for owner, theirs in own.items()}
        self._groups: dict[Demand, _Group] = {}
        self._placed: dict[str, int] = {}  # by owner
        self._kept: dict[str, Reservation] = {}  # by machine, the soonest first; all for one job
        self._kept_for = Demand()

    def run(self, waiting: Sequence[Waiting], usage: Mapping[str, float]) -> Plan:
        placed: list[Placed] = []
        waits: dict[str, str] = {}
        order: list[str] = []
        line = Line(waiting, usage=usage, busy=self._busy, now=self._now)
        for job in line:
            order.append(job.job)
            limits = self._limits.get(job.owner)
            if limits and (limit := over_limit(job, limits, placed=self._placed.get(job.owner, 0))):
                waits[job.job] = limit
                continue
            group = self._group(job.demand)
            found = self._find(job, group)
            if found is None:
                if not self._kept:
                    self._reserve(job, group)
                waits[job.job] = self._reason(job, group)
                continue
            one = self._take(job, *found)
            placed.append(one)
            line.charge(job.owner, fairness.entry_fee(one.grant))
            self._placed[job.owner] = self._placed.get(job.owner, 0) + 1
        return Plan(tuple(placed), waits, tuple(order), tuple(self._kept.values()), self._placed)

    def _group(self, demand: Demand) -> _Group:
        group = self._groups.get(demand)
        if group is None:
            group = _Group(demand, _Search(self._everybodys.of(demand).now, demand))
            self._groups[demand] = group
        return group

    def _find(self, job: Waiting, group: _Group) -> tuple[Room, str] | None:
        demand = job.demand
        owned = self._owned.get(job.owner)
        if owned and (room := self._search(job, group, owned)):
            return room, f"`{room.machine.name}` is its owner's own machine, and it has room"
        if room := self._search(job, group, None):
            if not demand.cpu and not room.held:
                return room, f"`{room.machine.name}` has room, and no other job"
            return room, f"`{room.machine.name}` is the smallest machine that has room"
        for kept in self._kept.values():
            if kept.worker not in job.avoid and self._fills_in(job, group, kept):
                room = self._room[kept.worker]
                return room, f"`{room.machine.name}` has room, and `{kept.name}`, for which it is kept, is not delayed"
        return None

    def _search(self, job: Waiting, group: _Group, owned: _Shelves | None) -> Room | None:
        """A machine with room: one of those that the job's owner owns, or (None) of those that take everybody's jobs."""
        if job.avoid:
            way = (owned or self._everybodys).of(job.demand).now.fitting(job.demand)
            taboo = job.avoid | self._kept.keys()
            return next((room for room in way if room.machine.id not in taboo), None)
        if owned is None:
            return group.search.find(self._kept)
        search = group.own.get(job.owner)
        if search is None:
            search = group.own[job.owner] = _Search(owned.of(job.demand).now, job.demand)
        return search.find(self._kept)

    def _take(self, job: Waiting, room: Room, reason: str) -> Placed:
        grant = room.grant(job.demand)
        ends_at = None if job.timeout_s is None else self._now + job.timeout_s
        room.take(Held(job.job, job.owner, grant, ends_at, used_memory=0, used_vram=0, name=job.name))
        kept = self._kept.get(room.machine.id)
        if kept and self._ends_in_time(job, kept):
            self._kept[kept.worker] = replace(kept, after=kept.after | {job.job})
        return Placed(job.job, room.machine.id, grant, reason)

    # --- the reservation ---

    def _reserve(self, job: Waiting, group: _Group) -> None:
        """Keep the machine for `job` where it fits soonest, if there is any that could hold it.

        After each day of waiting one more is kept: it must not wait for ever for one job that never ends.
        """
        able: list[Room] = []
        if owned := self._owned.get(job.owner):
            able += self._large_enough(owned.of(job.demand).empty, job.demand)
        if not group.hopeless:
            foreign = self._large_enough(self._everybodys.of(job.demand).empty, job.demand)
            group.hopeless = not foreign
            able += foreign
        found = {
            room.machine.id: soonest(room, job.demand, self._now) for room in able if room.machine.id not in job.avoid
        }
        many = 1 + int(max(0.0, self._now - job.queued_at) // fairness.OVERDUE_S)
        for worker, (unknown, at, after) in nsmallest(many, found.items(), key=lambda item: item[1][:2]):
            self._kept[worker] = Reservation(job.job, job.name, worker, None if unknown else at, after)
        self._kept_for = job.demand

    def _large_enough(self, shelf: _Shelf, demand: Demand) -> list[Room]:
        if shelf.is_hopeless(demand):
            return []
        able = [self._room[room.machine.id] for room in shelf.fitting(demand)]
        if not able:
            shelf.give_up(demand)
        return able

    def _ends_in_time(self, job: Waiting, kept: Reservation) -> bool:
        return kept.starts_at is not None and job.timeout_s is not None and self._now + job.timeout_s <= kept.starts_at

    def _fills_in(self, job: Waiting, group: _Group, kept: Reservation) -> bool:
        """Whether `job` may have a place on a machine that is kept for another job, without delaying that one."""
        room, demand = self._room[kept.worker], job.demand
        owns = bool(room.machine.owner) and room.machine.owner == job.owner
        if not owns and not takes_foreign(room.machine):
            return False
        if not room.fits(demand) or not is_kind(room.machine, demand):
            return False
        if self._ends_in_time(job, kept):
            return True
        if kept.worker in group.delays:
            return False
        later = room.copy()
        later.take(Held(job.job, job.owner, later.grant(demand), None, 0, 0))
        for held in list(later.held):
            if held.job in kept.after:
                later.release(held)
        if later.fits(self._kept_for):
            return True
        group.delays.add(kept.worker)
        return False

    # --- reasons ---

    def _reason(self, job: Waiting, group: _Group) -> str:
        """One short sentence, the same for all jobs with this demand; `explain` says more."""
        kept = next(iter(self._kept.values()), None)
        if kept and kept.job == job.job:
            name, wants = self._room[kept.worker].machine.name, describe(job.demand)
            if kept.starts_at is None:
                return f"`{name}` is kept for it as soon as it is free: it wants {wants}"
            when = say_duration(kept.starts_at - self._now)
            return f"`{name}` is kept for it, free in {when} at the latest: it wants {wants}"
        if not group.why:
            group.why = (
                f"no machine is free that has what it wants: {describe(job.demand)}"
                if self._room
                else "no machine takes jobs at the moment"
            )
        return group.why


def _size(machine: Machine) -> tuple[int, int, int, float, str]:
    most = max((gpu.memory for gpu in machine.gpus), default=0)
    return len(machine.gpus), most, machine.memory, machine.cores, machine.id


def _gpus(demand: Demand) -> tuple[object, ...]:
    return demand.gpus_min, demand.vram_min, demand.vram_slice
