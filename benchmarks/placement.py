"""How long does one placement pass take?

    python benchmarks/placement.py [--json]

10,000 waiting jobs of 100 people and 1,000 machines, in one process, on one core:

    full_s         every machine has all the jobs its owner allows
    nothing_fits_s every machine has a slot, and none has what any of 200 different demands wants
    every_other_s  the same, and all 10,000 demands differ
    gpus_taken_s   200 GPU demands, and every GPU has a job already: each could be waited for, one is kept
    places_s       an idle hub: 1,000 jobs of 200 demands are placed, the rest waits
    owners_s       the same, each machine has an owner who waits too, and half take only their owner's jobs
    one_owner_s    the same, one person owns all the machines
    gangs_s        an idle hub: each tenth of the 10,000 is of one of 100 gangs of 2..10, and rooms of 20 reach each other
    placed         jobs that `places_s` placed
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace

from machine import facts
from potluck.domain.placement import Demand, GangPlace, Gpu, Grant, Held, Machine, Waiting, place

JOBS, MACHINES, OWNERS, DEMANDS = 10_000, 1_000, 100, 200
GB = 10**9
NOW = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    wanted = parser.parse_args()
    figures = placement_pass()
    if wanted.json:
        print(json.dumps({"figures": figures, **facts()}))
        return
    for name, value in figures.items():
        print(f"{name:16} {value:10.4g}")
    for name, text in facts().items():
        print(f"{name:16} {text}")


def placement_pass() -> dict[str, float]:
    """Seconds of one pass in each case; `placement_pass_s` is the slowest of those without gangs."""
    random.seed(1)
    idle = [machine(n) for n in range(MACHINES)]
    full = [busy(one, memory=0, whole=False, tasks=one.max_tasks) for one in idle]
    taken = [busy(one, memory=4 * GB, whole=True, tasks=1) for one in idle]
    owned = [replace(one, owner=f"p-{n % OWNERS}", whose="me" if n % 2 else "hub") for n, one in enumerate(idle)]
    mine = [replace(one, owner="p-0") for one in idle]
    small = demands(range(1, 9))
    huge = demands(range(1000, 1009))
    gpus = [Demand(gpus_min=1 + n % 2, gpus_max=1 + n % 2, vram_min=n * 10**8, cpu=1) for n in range(DEMANDS)]
    different = [Demand(cpu=random.uniform(100, 200), memory=random.randrange(500, 900) * GB) for _ in range(JOBS)]
    cases = {
        "full_s": (small, full),
        "nothing_fits_s": (huge, idle),
        "every_other_s": (different, idle),
        "gpus_taken_s": (gpus, taken),
        "places_s": (small, idle),
        "owners_s": (small, owned),
        "one_owner_s": (small, mine),
    }
    figures: dict[str, float] = {}
    for name, (wanted, machines) in cases.items():
        jobs = waiting(wanted)
        took = []
        for _ in range(5):
            gc.collect()
            begun = time.perf_counter()
            plan = place(jobs, machines, usage={f"p-{n}": n * 1e3 for n in range(OWNERS)}, limits={}, now=NOW)
            took.append(time.perf_counter() - begun)
        figures[name] = sorted(took)[len(took) // 2]
        if name == "places_s":
            figures["placed"] = len(plan.placed)
    figures["placement_pass_s"] = max(value for name, value in figures.items() if name.endswith("_s"))
    figures["gangs_s"] = gangs_pass(small, idle)
    return figures


def gangs_pass(small: Sequence[Demand], idle: Sequence[Machine]) -> float:
    ready = [replace(one, has_door=True, engines=frozenset({"plain"})) for one in idle]
    rooms = [ready[start : start + 20] for start in range(0, MACHINES, 20)]
    reach = {
        one.id: {other.id: f"ip-{other.id}" for other in room if other is not one} for room in rooms for one in room
    }
    jobs = [
        replace(job, gang=GangPlace(f"g-{n // 100}", 1 + n // 10 % 10, 2)) if n % 10 == 0 else job
        for n, job in enumerate(waiting(small))
    ]
    demands = {job.gang.gang: job.demand for job in jobs if job.gang}
    jobs = [replace(job, demand=demands[job.gang.gang]) if job.gang else job for job in jobs]
    took = []
    for _ in range(5):
        gc.collect()
        begun = time.perf_counter()
        place(jobs, ready, usage={}, limits={}, now=NOW, reach=reach)
        took.append(time.perf_counter() - begun)
    return sorted(took)[len(took) // 2]


def machine(n: int) -> Machine:
    """All different in what is free of them, as real ones are."""
    memory = random.choice((8, 16, 32, 64)) * GB
    vram = random.choice((8, 12, 24)) * GB
    gpus = tuple(Gpu(i, f"NVIDIA RTX {vram // GB}", vram, vram - random.randrange(GB)) for i in range(n % 3))
    return Machine(
        f"w-{n:04}",
        f"worker {n}",
        cores=random.choice((4, 8, 16)),
        memory=memory,
        memory_free=memory - random.randrange(2 * GB),
        disk_free=random.randrange(50, 500) * GB,
        gpus=gpus,
        labels={"room": f"lab-{n % 7}"},
        os="linux",
        arch="x86_64",
        max_tasks=1 + n % 2,
        executors=frozenset({"bubblewrap", "process"}),
    )


def busy(one: Machine, *, memory: int, whole: bool, tasks: int) -> Machine:
    """`one` with jobs, and with a slot more than those if it has GPUs that are all taken."""
    gpus = tuple(gpu.index for gpu in one.gpus) if whole else ()
    held = tuple(
        Held(f"{one.id}-{n}", f"p-{n}", Grant(gpus, 0, 0, memory, 0), NOW + random.randrange(10**4))
        for n in range(tasks)
    )
    return replace(one, held=held, max_tasks=tasks + whole)


def demands(gigabytes: range) -> list[Demand]:
    return [
        Demand(
            cpu=1 + n % 4,
            memory=random.choice(gigabytes) * GB + n,
            disk=random.randrange(20) * GB,
            gpus_min=n % 3 // 2,
            gpus_max=n % 3 // 2,
        )
        for n in range(DEMANDS)
    ]


def waiting(wanted: Sequence[Demand]) -> list[Waiting]:
    return [
        Waiting(
            f"j-{n:05}",
            f"job {n}",
            f"p-{random.randrange(OWNERS)}",
            replace(wanted[n % len(wanted)]),  # equal, not the same: as if read from the ledger
            priority=random.choice((0, 0, 0, 5, 10)),
            queued_at=NOW - random.randrange(10**5),
            timeout_s=random.choice((None, 3600.0)),
        )
        for n in range(JOBS)
    ]


if __name__ == "__main__":
    main()
