"""What does the placement know of a machine, of a job that waits, and what does it answer?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from potluck.domain.resources import Demand, Grant

CONTAINERS = frozenset({"podman", "docker", "apptainer"})
"""Executors that can run an image."""
SANDBOXES = CONTAINERS | {"bubblewrap"}
"""Executors that may hold other people's code."""


@dataclass(frozen=True, slots=True)
class Gpu:
    index: int
    name: str
    memory: int  # bytes
    free: int  # bytes, measured: what nobody uses, inside Potluck or outside


@dataclass(frozen=True, slots=True)
class Held:
    """A job that has its place on a machine: from the moment it was placed until its lease is over."""

    job: str
    owner: str
    grant: Grant
    ends_at: float | None = None  # when it ends at the latest, seconds since 1970; None: nobody knows
    used_memory: int | None = None  # bytes in use now; None: not known. 0 for a job whose process has not started
    used_vram: int | None = None  # the same, of each of its GPUs
    name: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """A worker, as its newest `POST /orders` and its leases show it. What is not known of it is empty or 0."""

    id: str
    name: str
    owner: str = ""  # a person's id; empty: nobody's
    cores: float = 0.0
    memory: int = 0
    memory_free: int = 0  # bytes, measured: what nobody uses, inside Potluck or outside
    disk_free: int = 0
    gpus: tuple[Gpu, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    os: str = ""
    arch: str = ""
    accept: str = "all"  # pool | jobs | all
    whose: str = "hub"  # me: only its owner's jobs | hub: everybody's
    runtime: str = "container"  # container: foreign code only in a sandbox | any
    max_tasks: int = 1
    executors: frozenset[str] = frozenset()
    present: bool = True
    draining: bool = False
    held: tuple[Held, ...] = ()
    engines: frozenset[str] = frozenset()  # of gangs, in its own Python
    has_door: bool = False  # other workers can try to reach it


@dataclass(frozen=True, slots=True)
class GangPlace:
    """A job that is a member of a gang: it goes where it reaches the others, to a machine of its own."""

    gang: str
    member: int  # from 1
    needed: int  # so many members must be placed in one pass, or none; 1: the gang is formed, each may come when it can
    on: frozenset[str] = frozenset()  # machines (ids) that have a member already
    engine: str = "auto"  # auto: no matter, the gang is not formed; else only machines that have it


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits for a machine."""

    job: str
    name: str
    owner: str
    demand: Demand
    priority: int = 0
    rank: float | None = None  # an admin moved it: before all that have none, smallest first
    queued_at: float = 0.0  # seconds since 1970
    timeout_s: float | None = None  # how long it runs at most
    avoid: frozenset[str] = frozenset()  # machines (ids) that gave it back a moment ago
    gang: GangPlace | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What one person may use (None: no limit), and uses already."""

    running: int | None = None  # jobs at once
    gpu_hours: float | None = None  # in the last seven days
    cpu_hours: float | None = None
    running_now: int = 0  # jobs that have a place
    gpu_hours_used: float = 0.0
    cpu_hours_used: float = 0.0
    name: str = ""  # the person's, for the sentences


@dataclass(frozen=True, slots=True)
class Placed:
    job: str
    worker: str  # a machine's id
    grant: Grant
    reason: str
    address: str = ""  # of a gang's member: how the others reach its machine


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place that is kept for the first job in line that finds none, or for a member of the first gang."""

    job: str
    name: str
    worker: str
    starts_at: float | None  # when it fits there at the latest; None: nobody knows
    after: frozenset[str]  # the jobs that must end before
    gang: str = ""  # it is for a member of this one; all its places begin when the last is free


@dataclass(frozen=True, slots=True)
class Plan:
    """What one pass decides. Deterministic: the same facts give the same plan."""

    placed: tuple[Placed, ...] = ()
    waits: Mapping[str, str] = field(default_factory=dict)  # job → why, one short sentence
    order: tuple[str, ...] = ()  # every job, in the order in which it had its turn
    kept: tuple[Reservation, ...] = ()  # all for one job or gang, the soonest first
    placed_by: Mapping[str, int] = field(default_factory=dict)  # owner → jobs placed
    knocks: tuple[tuple[str, str], ...] = ()  # (from, to): machines that a gang would use, and nobody knows of the way

    @property
    def reserved(self) -> Reservation | None:
        return self.kept[0] if self.kept else None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a job waits, or where it goes."""

    reason: str  # one sentence
    advice: str = ""  # what would help; empty: nothing to do
    near: tuple[tuple[str, str], ...] = ()  # (machine's name, what it lacks), the nearest first
    worker: str = ""  # the id of the machine that takes it in this pass
    worker_name: str = ""
    position: int = 0  # in the line of those that wait, from 1; 0: it does not wait
