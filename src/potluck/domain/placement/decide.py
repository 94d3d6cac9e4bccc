"""Which waiting jobs go where, now?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest

from potluck.domain import fairness
from potluck.domain.placement.gang import Circle, Gangs, Reach, say_names
from potluck.domain.placement.line import Line
from potluck.domain.placement.records import GangPlace, Held, Limits, Machine, Placed, Plan, Reservation, Waiting
from potluck.domain.placement.room import Room, is_kind, is_open, takes_foreign
from potluck.domain.placement.shelves import Kind, Search, Shelf, Shelves
from potluck.domain.quantity import say_count, say_duration
from potluck.domain.resources import Demand, describe, wants_gpu

MOST_KNOCKS = 4096
"""So many are asked for in one pass; the rest in the next."""


def place(
    waiting: Sequence[Waiting],
    machines: Sequence[Machine],
    *,
    usage: Mapping[str, float],
    limits: Mapping[str, Limits],
    now: float,
    reach: Reach | None = None,
) -> Plan:
    """Decide one pass. `usage` by owner is in core-seconds, decayed to `now`; who is not in `limits` has none.

    `reach`: from → to → the address that works; "" if none does; absent: nobody knows, and `Plan.knocks` asks if a gang
    needs to know.
    """
    return _Pass(machines, limits, reach, now).run(waiting, usage)


def over_limit(one: Waiting, limits: Limits, *, placed: int = 0) -> str:
    """Which limit of its owner keeps the job waiting, "" if none. `placed`: jobs of the owner placed in this pass."""
    who = f"`{limits.name or one.owner}`"
    running = limits.running_now + placed
    needed = one.gang.needed if one.gang else 1
    if limits.running is not None and running + max(1, needed) > limits.running:
        more = f": its gang begins with {needed} at once" if needed > 1 else ""
        return f"{who} may run {say_count(limits.running, 'job')} at once, and {running} run{more}"
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


class _Waits(Mapping[str, str]):
    """job → why it waits. Of a long line few sentences are read, so they are written when they are."""

    def __init__(self, whys: Mapping[str, str | Demand], *, nobody: bool) -> None:
        self._whys = whys
        self._nobody = nobody

    def __getitem__(self, job: str) -> str:
        why = self._whys[job]
        if isinstance(why, str):
            return why
        if self._nobody:
            return "no machine takes jobs at the moment"
        return f"no machine is free that has what it wants: {describe(why)}"

    def __contains__(self, job: object) -> bool:
        return job in self._whys

    def __iter__(self) -> Iterator[str]:
        return iter(self._whys)

    def __len__(self) -> int:
        return len(self._whys)

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass(slots=True)
class _Group:
    """The jobs with one demand: what was found out for one of them holds for all."""

    demand: Demand
    kind: Kind  # the machines that take everybody's jobs
    search: Search
    own: dict[str, Search] | None = None  # by owner, on the owner's machines
    hopeless: bool = False  # no machine that takes everybody's jobs could hold it at the moment, even empty
    delays: set[str] | None = None  # machines that are kept, on which it would be in the way


class _Pass:
    """The state of one pass: what is left of each machine, and what was decided."""

    def __init__(
        self, machines: Sequence[Machine], limits: Mapping[str, Limits], reach: Reach | None, now: float
    ) -> None:
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
        self._everybodys = Shelves(foreign)
        self._owned = {owner: Shelves(theirs) for owner, theirs in own.items()}
        # How many jobs their own machines still take: most owners soon have none, and need no search of their own.
        self._own_slots = {owner: sum(max(0, room.slots) for room in theirs) for owner, theirs in own.items()}
        self._groups: dict[Demand, _Group] = {}
        self._placed: list[Placed] = []
        self._placed_by: dict[str, int] = {}  # by owner
        self._whys: dict[str, str | Demand] = {}
        self._kept: dict[str, Reservation] = {}  # by machine, the soonest first; all for one job, or for one gang
        self._kept_for = Demand()
        self._gangs = Gangs(machines, reach)

    def run(self, waiting: Sequence[Waiting], usage: Mapping[str, float]) -> Plan:
        whys, limited, kept = self._whys, self._limits, self._kept
        order: list[str] = []
        self._gangs.listen(waiting)
        self._line = Line(waiting, usage=usage, busy=self._busy, now=self._now)
        for job in self._line:
            order.append(job.job)
            if job.gang is not None:
                self._take_turn_of_gang(job, job.gang)
                continue
            limits = limited.get(job.owner)
            if limits and (limit := over_limit(job, limits, placed=self._placed_by.get(job.owner, 0))):
                whys[job.job] = limit
                continue
            group = self._groups.get(job.demand) or self._group(job.demand)
            if group.hopeless and group.search.over and not kept and job.owner not in self._owned:
                whys[job.job] = job.demand
                continue
            found = self._find(job, group)
            if found is not None:
                self._put(job, *found)
                continue
            if not kept:
                self._reserve(job, group)
            whys[job.job] = self._reason(job)
        knocks = tuple(self._gangs.knocks)[:MOST_KNOCKS]
        waits = _Waits(whys, nobody=not self._room)
        return Plan(tuple(self._placed), waits, tuple(order), tuple(kept.values()), self._placed_by, knocks)

    def _put(self, job: Waiting, room: Room, reason: str, address: str = "") -> None:
        grant = room.grant(job.demand)
        ends_at = None if job.timeout_s is None else self._now + job.timeout_s
        room.take(Held(job.job, job.owner, grant, ends_at, used_memory=0, used_vram=0, name=job.name))
        if room.machine.owner:
            self._own_slots[room.machine.owner] -= 1
        kept = self._kept.get(room.machine.id)
        if kept and self._ends_in_time(job, kept):
            self._kept[kept.worker] = replace(kept, after=kept.after | {job.job})
        self._placed.append(Placed(job.job, room.machine.id, grant, reason, address))
        self._line.charge(job.owner, fairness.entry_fee(grant))
        self._placed_by[job.owner] = self._placed_by.get(job.owner, 0) + 1

    # --- a machine ---

    def _group(self, demand: Demand) -> _Group:
        group = self._groups.get(demand)
        if group is None:
            kind = self._everybodys.of(demand)
            group = self._groups[demand] = _Group(demand, kind, Search(kind.now, demand))
        return group

    def _find(self, job: Waiting, group: _Group) -> tuple[Room, str] | None:
        demand = job.demand
        owned = self._owned[job.owner] if self._own_slots.get(job.owner) else None
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

    def _search(self, job: Waiting, group: _Group, owned: Shelves | None) -> Room | None:
        """A machine with room: one of those that the job's owner owns, or (None) of those that take everybody's jobs."""
        if job.avoid:
            kind = owned.of(job.demand) if owned else group.kind
            taboo = job.avoid | self._kept.keys()
            return next((room for room in kind.now.fitting(job.demand) if room.machine.id not in taboo), None)
        if owned is None:
            return group.search.find(self._kept)
        if group.own is None:
            group.own = {}
        search = group.own.get(job.owner)
        if search is None:
            search = group.own[job.owner] = Search(owned.of(job.demand).now, job.demand)
        return search.find(self._kept)

    # --- a gang ---

    def _take_turn_of_gang(self, job: Waiting, place: GangPlace) -> None:
        """All who wait of a gang that is not formed are placed together, or none; of one that is, whose turn it is."""
        if job.job in self._gangs.settled:
            return
        on = self._gangs.on(place)
        members = [job] if on and place.needed <= 1 else self._gangs.members[place.gang]
        self._gangs.settled.update(member.job for member in members)
        needed, want = max(1, place.needed), len(members)
        if limits := self._limits.get(job.owner):
            placed = self._placed_by.get(job.owner, 0)
            if limit := over_limit(job, limits, placed=placed):
                self._whys.update((member.job, limit) for member in members)
                return
            if limits.running is not None:
                want = min(want, limits.running - limits.running_now - placed)
        circle, why = self._form(job, place, members, needed, want)
        workers = [worker for worker in circle if worker not in on]
        if workers:
            self._gangs.joined[place.gang] = on | set(workers)
        for member, worker in zip(members, workers, strict=False):
            room = self._room[worker]
            others = [other for other in circle if other != worker]
            with_whom = f"reaches {say_names(others, self._gangs.names)}" if others else "begins the gang"
            self._put(member, room, f"`{room.machine.name}` has room, and {with_whom}", circle[worker])
        for member in members[len(workers) :]:
            self._whys[member.job] = (
                why or "its gang begins without it: no other machine has room and reaches all of them"
            )

    def _form(
        self, job: Waiting, place: GangPlace, members: Sequence[Waiting], needed: int, want: int
    ) -> tuple[Circle, str]:
        """The machines of the gang, those that it has already included; or none, and why."""
        if len(members) < needed:
            return {}, f"its gang begins with {needed} at once, and only {len(members)} of its members wait"
        on = self._gangs.on(place)
        avoid = frozenset[str]().union(*(member.avoid for member in members))
        owner = job.owner if job.owner in self._owned else ""
        key = (job.demand, owner, place.engine, needed, on, avoid)
        why = self._gangs.failed.get(key, "")  # room only shrinks: who asks for the same finds no more
        if not why:
            taboo = on | avoid
            group = self._group(job.demand)
            ready = self._ready(job, group, place, taboo)
            circle, maybe, why = self._gangs.form(ready, on, needed=needed, want=want, demand=job.demand)
            if circle:
                return circle, ""
            self._gangs.failed[key] = why
            if not self._kept:
                fit = self._gangs.suitable(place.engine) - taboo
                able = [room for room in self._able(job, group) if room.machine.id in fit]
                self._keep_for_gang(job, able, on, needed=needed, maybe=maybe)
        kept = [one for one in self._kept.values() if one.gang == place.gang]
        if not kept:
            return {}, why
        is_kept = "is kept for it" if len(kept) == 1 else "are kept for it"
        when = "as soon as they are free"
        if (ends := [one.starts_at for one in kept if one.starts_at is not None]) and len(ends) == len(kept):
            left = max(ends) - self._now
            when = f"free in {say_duration(left)} at the latest" if left > 0 else "free now"
        return {}, f"{why}; {say_names((one.worker for one in kept), self._gangs.names)} {is_kept}, {when}"

    def _ready(self, job: Waiting, group: _Group, place: GangPlace, taboo: frozenset[str]) -> list[str]:
        """The machines that have room for a member now, the best first: own ones, idle ones, the smallest."""
        fit = self._gangs.suitable(place.engine) - taboo
        free: list[Room] = []
        owned = self._owned[job.owner] if self._own_slots.get(job.owner) else None
        for shelf in (owned and owned.of(job.demand).now, group.kind.now):
            if shelf:
                may = fit - self._kept.keys() - {room.machine.id for room in free}
                free += [room for room in shelf.fitting(job.demand) if room.machine.id in may]
        if not job.demand.cpu:
            free.sort(key=lambda room: (not job.owner or room.machine.owner != job.owner, bool(room.held)))
        free.sort(key=lambda room: not room.machine.engines)  # its own Python has no torch: the job may bring its own
        fills = [kept.worker for kept in self._kept.values() if kept.worker in fit and self._fills_in(job, group, kept)]
        return [room.machine.id for room in free] + fills

    # --- the reservation ---

    def _reserve(self, job: Waiting, group: _Group) -> None:
        """Keep the machine for `job` where it fits soonest, if there is any that could hold it.

        After each day of waiting one more is kept: it must not wait for ever for one job that never ends.
        """
        able = self._able(job, group)
        if not able:
            return
        found = {
            room.machine.id: soonest(room, job.demand, self._now) for room in able if room.machine.id not in job.avoid
        }
        many = 1 + self._days(job)
        for worker, (unknown, at, after) in nsmallest(many, found.items(), key=lambda item: item[1][:2]):
            self._kept[worker] = Reservation(job.job, job.name, worker, None if unknown else at, after)
        self._kept_for = job.demand

    def _keep_for_gang(
        self, job: Waiting, able: Sequence[Room], on: frozenset[str], *, needed: int, maybe: Sequence[str]
    ) -> None:
        """Keep the machines where the gang fits soonest, all of them until the last is free.

        `maybe`: machines that are free, and would do if they reach each other, which will be known in a moment. After each
        day of waiting there is a second way to begin, without the machine that was last.
        """
        name = job.gang.gang if job.gang else ""
        soon = {room.machine.id: soonest(room, job.demand, self._now) for room in able}
        order = sorted(soon, key=lambda one: soon[one][:2])
        for worker in maybe:
            self._kept[worker] = Reservation(job.job, job.name, worker, self._now, frozenset(), name)
        for chosen in self._gangs.chances(order, on, needed=needed, many=1 + self._days(job)):
            at = max(soon[worker][1] for worker in chosen)
            for worker in chosen:
                unknown, _, after = soon[worker]
                kept = Reservation(job.job, job.name, worker, None if unknown else at, after, name)
                self._kept.setdefault(worker, kept)
        self._kept_for = job.demand

    def _days(self, job: Waiting) -> int:
        """So many days it has waited."""
        return int(max(0.0, self._now - job.queued_at) // fairness.OVERDUE_S)

    def _able(self, job: Waiting, group: _Group) -> list[Room]:
        """The machines that could hold it if all their jobs ended; one of the owner's may be in it twice."""
        able: list[Room] = []
        if owned := self._owned.get(job.owner):
            able += self._large_enough(owned.of(job.demand).empty, job.demand)
        if not group.hopeless:
            foreign = self._large_enough(group.kind.empty, job.demand)
            group.hopeless = not foreign
            able += foreign
        return able

    def _large_enough(self, shelf: Shelf, demand: Demand) -> list[Room]:
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
        if not room.fits(demand) or not is_kind(room.machine, demand):
            return False
        owns = bool(room.machine.owner) and room.machine.owner == job.owner
        if not owns and not takes_foreign(room.machine):
            return False
        if self._ends_in_time(job, kept):
            return True
        if group.delays and kept.worker in group.delays:
            return False
        later = room.copy()
        later.take(Held(job.job, job.owner, later.grant(demand), None, 0, 0))
        for held in list(later.held):
            if held.job in kept.after:
                later.release(held)
        if later.fits(self._kept_for):
            return True
        group.delays = (group.delays or set()) | {kept.worker}
        return False

    # --- reasons ---

    def _reason(self, job: Waiting) -> str | Demand:
        """One short sentence, the same for all jobs with this demand; `explain` says more."""
        kept = next(iter(self._kept.values()), None)
        if not kept or kept.job != job.job:
            return job.demand
        name, wants = self._room[kept.worker].machine.name, describe(job.demand)
        if kept.starts_at is None:
            return f"`{name}` is kept for it as soon as it is free: it wants {wants}"
        when = say_duration(kept.starts_at - self._now)
        return f"`{name}` is kept for it, free in {when} at the latest: it wants {wants}"


def _size(machine: Machine) -> tuple[int, int, int, float, str]:
    most = max((gpu.memory for gpu in machine.gpus), default=0)
    return len(machine.gpus), most, machine.memory, machine.cores, machine.id
