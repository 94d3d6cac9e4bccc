"""How much room has a machine, and what would a job get of it?

    cores     what the machine has, less what its jobs reserved
    memory    the smaller of two: what the machine has, less what its jobs reserved; and what is free by measurement, less
              what they reserved and do not use yet. The first keeps the jobs from one another, the second from the
              programs of the machine's owner. Of a job whose use is not known (`used_memory` None) all that it reserved
              counts as in use: else its memory would be taken off twice as soon as it uses it.
    a GPU     the same, for each. A GPU with a whole-GPU job is taken; one with slices may take more slices. A whole GPU
              is free for a job if nobody of ours is on it and the rest of the world has left (nearly) all of it
    disk      what is free by measurement, less all that the jobs reserved: how much of it they wrote is not known

So what is granted never exceeds what there is, and a machine whose owner plays a game takes less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from potluck.domain.placement.records import CONTAINERS, SANDBOXES, Gpu, Held, Machine
from potluck.domain.resources import Demand, Grant, is_model, wants_gpu

NAMED_VRAM = 0.94
"""A "24 GB" card shows a few per cent less to its programs; it counts as one all the same."""
FREE_VRAM = 0.9
"""A whole GPU counts as free if so much of what was asked for is: a desktop always has a little of it."""
IDLE_VRAM = 0.5
"""The same if no size was asked for."""


@dataclass(slots=True)
class GpuRoom:
    gpu: Gpu
    free: int  # bytes that a slice may still have
    users: int = 0  # jobs of ours
    whole: bool = False  # one of them has all of it

    def fits(self, demand: Demand) -> bool:
        if demand.vram_slice:
            return not self.whole and self.free >= demand.vram_min
        if self.users or self.gpu.memory < NAMED_VRAM * demand.vram_min:
            return False
        return self.free >= (FREE_VRAM * demand.vram_min or IDLE_VRAM * self.gpu.memory)


class Room:
    """What is left of one machine while a pass goes on."""

    __slots__ = ("cores", "disk", "gpus", "held", "machine", "memory", "slots", "spare_gpus", "spare_vram")

    def __init__(self, machine: Machine, held: Iterable[Held] | None = None) -> None:
        self.machine = machine
        self.cores = round(machine.cores * 1000)  # thousandths: sums of fractions stay exact
        self.memory = min(machine.memory, machine.memory_free)
        self.disk = machine.disk_free
        self.slots = machine.max_tasks
        self.gpus = [GpuRoom(gpu, min(gpu.memory, gpu.free)) for gpu in machine.gpus]
        self.held = list(machine.held if held is None else held)
        self.spare_gpus = 0  # GPUs without a job of ours
        self.spare_vram = 0  # the most free memory of one GPU
        reserved = unused = 0
        by_index = {room.gpu.index: room for room in self.gpus}
        sliced: dict[int, tuple[int, int]] = {}
        for one in self.held:
            self.cores -= round(one.grant.cpu * 1000)
            self.disk -= one.grant.disk
            self.slots -= 1
            reserved += one.grant.memory
            unused += _unused(one.grant.memory, one.used_memory)
            for index in one.grant.gpus:
                if (room := by_index.get(index)) is None:
                    continue  # the machine lost it; its job will find out
                room.users += 1
                if one.grant.vram:
                    before = sliced.get(index, (0, 0))
                    vram = one.grant.vram
                    sliced[index] = before[0] + vram, before[1] + _unused(vram, one.used_vram)
                else:
                    room.whole = True
        self.memory = min(machine.memory - reserved, machine.memory_free - unused)
        for index, (slices, idle) in sliced.items():
            room = by_index[index]
            room.free = min(room.gpu.memory - slices, room.gpu.free - idle)
        self._look()

    def _look(self) -> None:
        if self.gpus:
            self.spare_gpus = sum(not room.users for room in self.gpus)
            self.spare_vram = max((room.free for room in self.gpus if not room.whole), default=0)

    def fits(self, demand: Demand) -> bool:
        """Whether there is room for it now. Nothing is said of the machine's kind and rules: see `is_kind` and `is_open`."""
        return (
            self.slots > 0
            and self.cores >= round(demand.cpu * 1000)
            and self.memory >= demand.memory
            and self.disk >= demand.disk
            and (not demand.gpus_min or len(self.gpus_for(demand)) >= demand.gpus_min)
        )

    def gpus_for(self, demand: Demand) -> list[GpuRoom]:
        """The GPUs that could serve it now."""
        return [room for room in self.gpus if room.fits(demand) and is_model(room.gpu.name, demand.models)]

    def grant(self, demand: Demand) -> Grant:
        """What a job that fits gets: the smallest GPUs that do, and of a range as much as is free."""
        cpu = demand.cpu
        if demand.cpu_max > cpu:
            cpu = min(demand.cpu_max, self.cores / 1000)
        if not wants_gpu(demand):
            return Grant((), 0, cpu, demand.memory, demand.disk)
        able = sorted(self.gpus_for(demand), key=_least_first)[: demand.gpus_max]
        vram = 0
        if demand.vram_slice and able:
            vram = min(demand.vram_max or 0, *(room.free for room in able))
        return Grant(tuple(sorted(room.gpu.index for room in able)), vram, cpu, demand.memory, demand.disk)

    def take(self, held: Held) -> None:
        """A job that uses nothing yet takes its place."""
        self._move(held.grant, 1)
        self.held.append(held)

    def release(self, held: Held) -> None:
        """A job has ended: what it reserved, and what it used of that, is free again."""
        self.held.remove(held)
        self._move(held.grant, -1)

    def _move(self, grant: Grant, sign: int) -> None:
        self.slots -= sign
        self.cores -= sign * round(grant.cpu * 1000)
        self.memory -= sign * grant.memory
        self.disk -= sign * grant.disk
        if not grant.gpus:
            return
        for room in self.gpus:
            if room.gpu.index in grant.gpus:
                room.users += sign
                room.free -= sign * grant.vram
                if not grant.vram:
                    room.whole = sign > 0
                    if sign < 0:
                        room.free = room.gpu.memory  # what is measured while the job runs is mostly its own use
        self._look()

    def copy(self) -> Room:
        twin = Room.__new__(Room)
        twin.machine, twin.cores, twin.memory, twin.disk = self.machine, self.cores, self.memory, self.disk
        twin.slots, twin.held = self.slots, list(self.held)
        twin.gpus = [GpuRoom(room.gpu, room.free, room.users, room.whole) for room in self.gpus]
        twin.spare_gpus, twin.spare_vram = self.spare_gpus, self.spare_vram
        return twin

    def emptied(self) -> Room:
        """This machine when all its jobs have ended."""
        empty = self.copy()
        for held in self.held:
            empty.release(held)
        return empty


def _unused(reserved: int, used: int | None) -> int:
    return 0 if used is None else max(0, reserved - used)


def _least_first(room: GpuRoom) -> tuple[int, int, int]:
    return room.free, room.gpu.memory, room.gpu.index


# --- the machine's kind and its owner's rules -----------------------------------------------------------------------


def is_kind(machine: Machine, demand: Demand) -> bool:
    """Whether the machine is of the kind that the job needs, whatever is free."""
    return (
        (not demand.os or machine.os == demand.os)
        and (not demand.arch or machine.arch == demand.arch)
        and all(machine.labels.get(key) == value for key, value in demand.labels)
        and (not demand.image or not machine.executors.isdisjoint(CONTAINERS))
        and (not demand.gpus_min or any(is_model(gpu.name, demand.models) for gpu in machine.gpus))
    )


def is_open(machine: Machine) -> bool:
    """Whether the machine takes jobs at all."""
    return machine.present and not machine.draining and machine.accept != "pool" and bool(machine.executors)


def takes_foreign(machine: Machine) -> bool:
    """Whether it takes jobs of people who do not own it."""
    return machine.whose != "me" and (machine.runtime == "any" or not machine.executors.isdisjoint(SANDBOXES))


def has_engine(machine: Machine, engine: str) -> bool:
    """Whether it has the engine that was asked for; any will do, and a compat gang brings its own."""
    return engine in ("", "auto", "compat") or engine in machine.engines


def large_enough(machine: Machine, demand: Demand) -> list[Gpu]:
    """The GPUs that could serve it if nobody used them."""
    least = demand.vram_min if demand.vram_slice else NAMED_VRAM * demand.vram_min
    return [gpu for gpu in machine.gpus if gpu.memory >= least and is_model(gpu.name, demand.models)]
