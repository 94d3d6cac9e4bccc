"""Which machines have room for this demand?

Ten thousand jobs and a thousand machines must not mean ten million questions. Room only shrinks during a pass, so:

    a machine that has no room for a demand will have none later in the pass: each demand walks the machines once;
    jobs with equal demands walk together, whoever owns them: machines are sorted into those that take anybody's jobs
    and the few that a person owns;
    a demand that is larger in everything than one that found no room is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from potluck.domain.placement.room import FREE_VRAM, Room, is_kind
from potluck.domain.resources import Demand


class Shelf:
    """The machines of one kind, the smallest first."""

    __slots__ = ("_cores", "_gpus", "_memory", "_too_much", "_vram", "rooms")

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


class Kind:
    """The machines of one kind, as they are now and as they will be when all their jobs have ended."""

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._rooms = rooms
        self.now = Shelf([room for room in rooms if room.slots > 0])

    @cached_property
    def empty(self) -> Shelf:
        return Shelf([room.emptied() for room in self._rooms])


class Shelves:
    """Machines by the kind that a job may ask for."""

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._rooms = rooms
        self._by_kind: dict[tuple[object, ...], Kind] = {}

    def of(self, demand: Demand) -> Kind:
        models = demand.models if demand.gpus_min else None
        key = (demand.os, demand.arch, demand.labels, demand.image, models)
        kind = self._by_kind.get(key)
        if kind is None:
            kind = Kind([room for room in self._rooms if is_kind(room.machine, demand)])
            self._by_kind[key] = kind
        return kind


class Search:
    """One demand's walk along its shelf. A machine that it has left behind has no room for it in this pass."""

    __slots__ = ("_at", "_demand", "_idle_only", "_shelf", "_way", "over")

    def __init__(self, shelf: Shelf, demand: Demand) -> None:
        self._shelf = shelf
        self._demand = demand
        self.over = shelf.is_hopeless(demand)  # no machine has room, kept ones included if `kept` was empty all along
        self._way: Iterator[Room] = _NOWHERE if self.over else shelf.fitting(demand)
        self._at: Room | None = None
        # Nothing keeps two jobs that name no cores from sharing one, so they go first to machines that do nothing else.
        self._idle_only = not demand.cpu

    def find(self, kept: Mapping[str, object]) -> Room | None:
        """A machine with room that is not `kept` for somebody."""
        if self.over:
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
            self.over = True
            if not kept:
                self._shelf.give_up(self._demand)
        return at


_NOWHERE: Iterator[Room] = iter(())


def _gpus(demand: Demand) -> tuple[object, ...]:
    return demand.gpus_min, demand.vram_min, demand.vram_slice
