"""Jobs, machines and passes in a few words, for the tests of the placement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from potluck.domain.job import Resources
from potluck.domain.placement import Gpu, Grant, Held, Machine, Plan, Waiting, place
from potluck.domain.resources import read

GB = 10**9
NOW = 1_000_000_000.0
HOUR = 3600.0


def machine(name: str = "m", gpus: Sequence[int | Gpu] = (), **more: object) -> Machine:
    """8 cores, 16 GB, bubblewrap; `gpus`: their gigabytes, all free."""
    cards = tuple(gpu if isinstance(gpu, Gpu) else Gpu(n, "RTX 3060", gpu * GB, gpu * GB) for n, gpu in enumerate(gpus))
    usual = Machine(
        id=f"w-{name}",
        name=name,
        cores=8,
        memory=16 * GB,
        memory_free=16 * GB,
        disk_free=100 * GB,
        gpus=cards,
        os="linux",
        arch="x86_64",
        max_tasks=4,
        executors=frozenset({"bubblewrap", "process"}),
    )
    return replace(usual, **more)  # type: ignore[arg-type]


def job(name: str, owner: str = "ann", image: str = "", **more: object) -> Waiting:
    """Words of `Resources` make its demand; the rest are its own."""
    asked = {key: more.pop(key) for key in list(more) if key in Resources.__dataclass_fields__}
    demand = read(Resources(**asked), image=image)  # type: ignore[arg-type]
    usual = Waiting(f"j-{name}", name, owner, demand, queued_at=NOW - 10)
    return replace(usual, **more)  # type: ignore[arg-type]


def held(name: str, ends_at: float | None = None, owner: str = "bob", used: int | None = None, **grant: object) -> Held:
    return Held(f"j-{name}", owner, Grant(**grant), ends_at, used, used, name)  # type: ignore[arg-type]


def decide(jobs: Iterable[Waiting], machines: Iterable[Machine], **more: object) -> Plan:
    given = {"usage": {}, "limits": {}, "now": NOW} | more
    return place(list(jobs), list(machines), **given)  # type: ignore[arg-type]


def where(plan: Plan) -> dict[str, str]:
    return {placed.job.removeprefix("j-"): placed.worker.removeprefix("w-") for placed in plan.placed}


def order(plan: Plan) -> str:
    return " ".join(job.removeprefix("j-") for job in plan.order)
