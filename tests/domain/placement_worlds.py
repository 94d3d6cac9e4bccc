"""Lines of jobs and rooms of machines as hypothesis draws them, and what must hold of them after a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st
from placement_kit import GB, NOW, machine

from potluck.domain.job import Resources
from potluck.domain.placement import Gpu, Grant, Held, Machine, Plan, Waiting
from potluck.domain.resources import read

demands = st.builds(
    lambda gpu, cpu, memory, disk, label: read(
        Resources(gpu=gpu, cpu=cpu, memory=memory, disk=disk, labels={"room": label} if label else {})
    ),
    st.sampled_from(["0"] * 4 + ["1", "2", "1..", "0..2", "10GB..", "6GB", "6GB:2", "4GB..9GB", "A100"]),
    st.sampled_from(["", "0.1", "1", "2.5", "2..6", "8", "32"]),
    st.sampled_from(["", "1GB", "7GB", "20GB"]),
    st.sampled_from(["", "10GB"]),
    st.sampled_from([""] * 4 + ["1"]),
)
people = st.sampled_from(["ann", "bob", "cid", "dee"])
jobs_of = st.builds(
    Waiting,
    job=st.just(""),
    name=st.just(""),
    owner=people,
    demand=demands,
    priority=st.sampled_from([0, 0, 0, -100, 3, 100]),
    rank=st.sampled_from([None, None, None, None, 1.0, 2.0]),
    queued_at=st.floats(NOW - 9 * 86400, NOW + 10),
    timeout_s=st.none() | st.floats(1, 1e5),
    avoid=st.frozensets(st.sampled_from(["w-0", "w-1"]), max_size=1),
)
cards = st.lists(st.tuples(st.sampled_from(["RTX 3060", "A100"]), st.integers(4, 40), st.floats(0, 1)), max_size=3).map(
    lambda given: tuple(
        Gpu(n * 2, name, size * GB, int(size * GB * free)) for n, (name, size, free) in enumerate(given)
    )
)
any_machine = st.builds(
    machine,
    gpus=cards,
    owner=st.just("") | people,
    cores=st.sampled_from([1, 2, 4.5, 8, 64]),
    memory_free=st.integers(0, 16 * GB),
    labels=st.sampled_from([{}, {"room": "1"}]),
    accept=st.sampled_from(["all", "jobs", "pool"]),
    whose=st.sampled_from(["hub", "hub", "me"]),
    runtime=st.sampled_from(["container", "any"]),
    executors=st.sampled_from([frozenset(), frozenset({"process"}), frozenset({"podman"}), frozenset({"bubblewrap"})]),
    max_tasks=st.integers(0, 4),
    present=st.sampled_from([True, True, True, False]),
    draining=st.sampled_from([False, False, False, True]),
)


def machines_of(least: int) -> st.SearchStrategy[list[Machine]]:
    found = st.lists(any_machine, min_size=least, max_size=5)
    return found.map(lambda drawn: [replace(one, id=f"w-{n}", name=f"m{n}") for n, one in enumerate(drawn)])


some_machines = machines_of(0)
some_jobs = st.lists(jobs_of, max_size=14).map(
    lambda found: [replace(one, job=f"j-{n}", name=f"{n}") for n, one in enumerate(found)]
)
usages = st.dictionaries(people, st.floats(0, 1e7))


def after(machines: Sequence[Machine], jobs: Sequence[Waiting], plan: Plan, now: float) -> list[Machine]:
    """The machines with what was placed, which uses nothing yet."""
    by_id = {one.job: one for one in jobs}
    grown = {one.id: list(one.held) for one in machines}
    for placed in plan.placed:
        one = by_id[placed.job]
        ends_at = None if one.timeout_s is None else now + one.timeout_s
        grown[placed.worker].append(Held(one.job, one.owner, placed.grant, ends_at, 0, 0, one.name))
    return [replace(one, held=tuple(grown[one.id])) for one in machines]


def assert_not_too_much(one: Machine) -> None:
    grants = [held.grant for held in one.held]
    assert len(grants) <= one.max_tasks
    assert sum(round(grant.cpu * 1000) for grant in grants) <= round(one.cores * 1000)
    assert sum(grant.memory for grant in grants) <= min(one.memory, one.memory_free)
    assert sum(grant.disk for grant in grants) <= one.disk_free
    for gpu in one.gpus:
        slices = [grant.vram for grant in grants if gpu.index in grant.gpus]
        assert sum(slices) <= min(gpu.memory, gpu.free)
        assert len(slices) == 1 or 0 not in slices  # a whole GPU is nobody else's
    assert all(index in {gpu.index for gpu in one.gpus} for grant in grants for index in grant.gpus)


def assert_allowed(one: Waiting, grant: Grant, on: Machine) -> None:
    demand = one.demand
    assert on.present and not on.draining and on.accept != "pool"
    assert on.id not in one.avoid
    if one.owner != on.owner:
        assert on.whose != "me"
        assert on.runtime == "any" or on.executors & {"podman", "docker", "apptainer", "bubblewrap"}
    assert on.executors
    assert all(on.labels.get(key) == value for key, value in demand.labels)
    assert (grant.memory, grant.disk) == (demand.memory, demand.disk)
    assert demand.cpu <= grant.cpu <= max(demand.cpu, demand.cpu_max)
    assert demand.gpus_min <= len(grant.gpus)
    assert demand.gpus_max is None or len(grant.gpus) <= demand.gpus_max
    if grant.gpus and demand.vram_slice:
        assert demand.vram_min <= grant.vram <= (demand.vram_max or 0)
    for gpu in on.gpus:
        if gpu.index in grant.gpus and demand.models:
            assert demand.models[0] in gpu.name.lower()
