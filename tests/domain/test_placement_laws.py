"""What holds of every pass, whatever waits, joins, leaves or ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from placement_kit import GB, HOUR, NOW, decide, held, job, machine, where

from potluck.domain import fairness
from potluck.domain.job import Resources
from potluck.domain.placement import Gpu, Grant, Held, Limits, Machine, Plan, Waiting, explain
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
some_machines = st.lists(
    st.builds(
        machine,
        gpus=cards,
        owner=st.just("") | people,
        cores=st.sampled_from([1, 2, 4.5, 8, 64]),
        memory_free=st.integers(0, 16 * GB),
        labels=st.sampled_from([{}, {"room": "1"}]),
        accept=st.sampled_from(["all", "jobs", "pool"]),
        whose=st.sampled_from(["hub", "hub", "me"]),
        runtime=st.sampled_from(["container", "any"]),
        executors=st.sampled_from(
            [frozenset(), frozenset({"process"}), frozenset({"podman"}), frozenset({"bubblewrap"})]
        ),
        max_tasks=st.integers(0, 4),
        present=st.sampled_from([True, True, True, False]),
        draining=st.sampled_from([False, False, False, True]),
    ),
    max_size=5,
).map(lambda found: [replace(one, id=f"w-{n}", name=f"m{n}") for n, one in enumerate(found)])
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


@given(some_jobs, some_machines, usages)
def test_nothing_is_given_twice_and_no_rule_is_broken(
    jobs: list[Waiting], machines: list[Machine], usage: dict[str, float]
) -> None:
    limits = {"ann": Limits(running=2), "bob": Limits(gpu_hours=1, gpu_hours_used=1)}

    plan = decide(jobs, machines, usage=usage, limits=limits)

    by_id = {one.job: one for one in jobs}
    on = {one.id: one for one in machines}
    for placed in plan.placed:
        assert_allowed(by_id[placed.job], placed.grant, on[placed.worker])
    for one in after(machines, jobs, plan, NOW):
        assert_not_too_much(one)
    assert sorted(plan.order) == sorted(by_id)  # everybody has a turn, once
    assert {placed.job for placed in plan.placed} | set(plan.waits) == set(by_id)
    assert len(plan.placed) + len(plan.waits) == len(by_id)
    assert sum(by_id[placed.job].owner == "ann" for placed in plan.placed) <= 2
    for one in jobs:
        assert explain(one, machines, plan=plan, limits=limits, now=NOW).reason


@given(some_jobs, some_machines, usages, st.randoms(use_true_random=False))
def test_the_same_facts_in_any_order_give_the_same_plan(
    jobs: list[Waiting], machines: list[Machine], usage: dict[str, float], random: Random
) -> None:
    plan = decide(jobs, machines, usage=usage)
    random.shuffle(jobs)
    random.shuffle(machines)

    assert decide(jobs, machines, usage=usage) == plan


@given(some_jobs, some_machines, usages)
def test_nobody_who_waits_could_have_been_placed_beside_the_rest(
    jobs: list[Waiting], machines: list[Machine], usage: dict[str, float]
) -> None:
    """Without a place that is kept, a second pass finds nothing to do: the shortcuts of the search overlook nobody."""
    plan = decide(jobs, machines, usage=usage)
    left = [one for one in jobs if one.job in plan.waits]

    again = decide(left, after(machines, jobs, plan, NOW), usage=usage)

    if plan.reserved is None:
        assert again.placed == ()
    for one in left:
        alone = decide([one], after(machines, jobs, plan, NOW), usage=usage)
        assert all(placed.worker in {kept.worker for kept in plan.kept} for placed in alone.placed)


@given(some_jobs, st.none() | st.sampled_from([1.0, 5.0]))
def test_the_line_is_one_order_for_all(jobs: list[Waiting], rank: float | None) -> None:
    """Whoever else waits, two jobs of equal kind stand to one another as they do alone."""
    jobs = [replace(one, rank=rank, priority=0) for one in jobs]
    turns = {job: n for n, job in enumerate(decide(jobs, []).order)}

    for one, other in pairwise(jobs):
        first, second = decide([one, other], []).order
        assert turns[first] < turns[second]


@given(some_jobs, some_machines, usages)
def test_what_is_filled_in_does_not_delay_the_one_whose_place_is_kept(
    jobs: list[Waiting], machines: list[Machine], usage: dict[str, float]
) -> None:
    plan = decide(jobs, machines, usage=usage)
    for kept in plan.kept:
        big = next(one for one in jobs if one.job == kept.job)
        (on,) = [one for one in after(machines, jobs, plan, NOW) if one.id == kept.worker]

        later = replace(on, held=tuple(held for held in on.held if held.job not in kept.after))
        alone = decide([replace(big, rank=None)], [later], now=NOW if kept.starts_at is None else kept.starts_at)

        assert where(alone) == {big.job.removeprefix("j-"): kept.worker.removeprefix("w-")}
        if kept.starts_at is not None:
            ends = [held.ends_at for held in on.held if held.job in kept.after]
            assert all(end is not None and end <= kept.starts_at for end in ends)


@settings(max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # making it smaller takes minutes
@given(
    st.randoms(use_true_random=False),
    st.lists(st.sampled_from([2, 4, 8]), max_size=2),
    st.sampled_from(["8", "8", "5", "1"]),
    st.booleans(),
)
def test_nobody_starves_whatever_others_submit(random: Random, cores: list[int], wants: str, busy: bool) -> None:
    """More small jobs than fit, for ever, of ever new people and the highest priority. Machines come and go, hardly
    anybody says how long a job runs; `busy`: something else of the poor one's runs all the time."""
    machines = [machine(str(n), cores=size, max_tasks=8) for n, size in enumerate([*cores, 8])]
    other = machine("other", max_tasks=1, held=(held("other", owner="poor" if busy else "somebody"),))
    poor = job("poor", "poor", cpu=wants, priority=-100, queued_at=NOW)
    line: list[Waiting] = []
    running: list[tuple[float, str, Held]] = []  # it ends really, it is on
    now = NOW
    while now < NOW + fairness.LAST_S + 2 * 86400:
        now += 2 * HOUR
        for n in range(16):
            says = random.choice([None, None, 3 * HOUR])
            cpu = random.choice(["1", "2"])
            line.append(job(f"{now:.0f}-{n}", f"{now:.0f}-{n}", cpu=cpu, priority=100, queued_at=now, timeout_s=says))
        line = line[-30:]  # the oldest give up
        running = [one for one in running if one[0] > now]
        here = [replace(m, present=n == len(cores) or random.random() < 0.95) for n, m in enumerate(machines)]
        full = [replace(m, held=tuple(what for _, on, what in running if on == m.id)) for m in here]
        plan = decide([poor, *line], [*full, other], usage={"poor": 1e12}, now=now)
        if any(placed.job == poor.job for placed in plan.placed):
            return
        by_id = {one.job: one for one in line}
        for placed in plan.placed:
            one = by_id[placed.job]
            lasts, ends_at = random.choice([3, 5, 11]) * HOUR, None
            if one.timeout_s is not None:
                lasts, ends_at = random.choice([1, 2.9]) * HOUR, now + one.timeout_s
            running.append((now + lasts, placed.worker, Held(one.job, one.owner, placed.grant, ends_at)))
            line.remove(one)
    raise AssertionError("it has waited for nine days")
