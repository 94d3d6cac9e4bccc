"""What holds of every pass, whatever waits, joins, leaves or ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from placement_kit import HOUR, NOW, decide, held, job, machine, where
from placement_worlds import after, assert_allowed, assert_not_too_much, some_jobs, some_machines, usages

from potluck.domain import fairness
from potluck.domain.placement import Held, Limits, Machine, Waiting, explain


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
    for job_ in jobs:
        assert explain(job_, machines, plan=plan, limits=limits, now=NOW).reason


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
