"""Jobs, machines and passes in a few words, for the tests of the placement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from potluck.domain.job import Resources
from potluck.domain.placement import GangPlace, Gpu, Grant, Held, Machine, Plan, Waiting, place
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


def gang(name: str, members: int, needed: int = 0, owner: str = "ann", **more: object) -> list[Waiting]:
    """`members` of a gang that wait; `needed`: at once, all of them if it is not given. `on`, `engine` are the place's."""
    its = {key: more.pop(key) for key in ("on", "engine") if key in more}
    place = GangPlace(name, 0, needed or members, **its)  # type: ignore[arg-type]
    return [replace(job(f"{name}{n}", owner, **more), gang=replace(place, member=n)) for n in range(1, members + 1)]  # type: ignore[arg-type]


def all_reach(*names: str, except_for: Iterable[tuple[str, str]] = ()) -> dict[str, dict[str, str]]:
    """Each reaches each at its own address, but not these."""
    shut = set(except_for)
    return {
        f"w-{one}": {f"w-{other}": "" if (one, other) in shut else f"ip-{other}" for other in names if other != one}
        for one in names
    }


def room(*names: str, **more: object) -> list[Machine]:
    """Machines with doors and engines, as gangs want them."""
    usual: dict[str, object] = {"has_door": True, "engines": frozenset({"plain", "torchft"})}
    return [machine(name, **usual | more) for name in names]  # type: ignore[arg-type]
