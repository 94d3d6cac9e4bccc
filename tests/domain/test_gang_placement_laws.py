"""What holds of every pass with gangs in it, whoever reaches whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, permutations, product
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from placement_kit import HOUR, NOW, all_reach, decide, gang, held, room
from placement_worlds import (
    after,
    assert_allowed,
    assert_not_too_much,
    jobs_of,
    machines_of,
    some_jobs,
    some_machines,
    usages,
)

from potluck.domain import fairness
from potluck.domain.job import Resources
from potluck.domain.placement import GangPlace, Held, Limits, Machine, Waiting, explain
from potluck.domain.resources import read

Reached = dict[str, dict[str, str]]
NAMES = "abcdef"


@st.composite
def networks(draw: st.DrawFn) -> Reached:
    """Who reaches whom among six machines: mostly all, some not, of some nobody knows; a few have two addresses."""
    ways = draw(st.lists(st.sampled_from([*["ip"] * 5, "vpn", "", None]), min_size=30, max_size=30))
    reach: Reached = {}
    for (one, other), how in zip(permutations(NAMES, 2), ways, strict=True):
        if how is not None:
            reach.setdefault(f"w-{one}", {})[f"w-{other}"] = f"{how}-{other}" if how else ""
    return reach


places = st.builds(
    GangPlace,
    gang=st.just(""),
    member=st.just(0),
    needed=st.integers(1, 3),
    on=st.just(frozenset[str]()) | st.frozensets(st.sampled_from(["w-0", "w-1", "w-gone"]), min_size=1, max_size=2),
    engine=st.sampled_from(["auto", "auto", "plain", "torchft"]),
)
easy = st.sampled_from([True, True, True, False])  # else hardly any gang would be placed
little = read(Resources(cpu="1"))
some_gangs = st.lists(st.tuples(jobs_of, places, st.integers(0, 3), easy), min_size=1, max_size=3).map(
    lambda found: [
        replace(
            one,
            job=f"j-g{n}-{k}",
            name=f"g{n}·{k}",
            demand=little if is_easy else one.demand,
            gang=replace(place, gang=f"g{n}", member=k, needed=1 if place.on else place.needed),
        )
        for n, (one, place, more, is_easy) in enumerate(found)
        for k in range(1, place.needed + more + 1)
    ]
)
outfits = st.tuples(
    easy,
    st.sampled_from([*[None] * 6, 1.0, 5.0, math.inf]),
    st.sampled_from([True, True, True, True, False]),
    st.sampled_from([frozenset[str](), frozenset({"plain"}), frozenset({"plain", "torchft"})]),
)


def outfit(one: Machine, is_easy: bool, busy_h: float | None, has_door: bool, engines: frozenset[str]) -> Machine:
    if is_easy:
        one = replace(one, present=True, draining=False, accept="all", whose="hub", executors=frozenset({"bubblewrap"}))
        one = replace(one, memory_free=one.memory, max_tasks=max(1, one.max_tasks))
        if busy_h is not None:
            ends_at = None if math.isinf(busy_h) else NOW + busy_h * HOUR
            one = replace(one, held=(held(f"on-{one.id}", ends_at, cpu=one.cores, used=0),))
    return replace(one, has_door=has_door, engines=engines)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Waiting], list[Machine], Reached]:
    """Jobs and gangs that wait, machines with doors and without, and what is known of the ways between them."""
    machines = draw(machines_of(draw(st.integers(0, 5))))
    fitted = draw(st.lists(outfits, min_size=len(machines), max_size=len(machines)))
    machines = [outfit(one, *what) for one, what in zip(machines, fitted, strict=True)]
    many = len(machines) * (len(machines) - 1)
    ways = draw(st.lists(st.sampled_from([*["ip"] * 6, "vpn", "", None]), min_size=many, max_size=many))
    reach: Reached = {}
    for (one, other), way in zip(permutations(machines, 2), ways, strict=True):
        if way is not None:
            reach.setdefault(one.id, {})[other.id] = f"{way}-{other.id}" if way else ""
    return draw(some_jobs)[:8] + draw(some_gangs), machines, reach


def assert_is_circle(workers: Sequence[str], reach: Reached, address: Mapping[str, str]) -> None:
    for source, target in permutations(workers, 2):
        way = reach.get(source, {}).get(target)
        assert way and way == address.get(target, way)


@settings(max_examples=150)
@given(worlds(), usages)
def test_gangs_are_placed_as_a_whole_where_they_reach_each_other_and_nothing_is_given_twice(
    world: tuple[list[Waiting], list[Machine], Reached], usage: dict[str, float]
) -> None:
    jobs, machines, reach = world
    limits = {"ann": Limits(running=3), "bob": Limits(gpu_hours=1, gpu_hours_used=1)}

    plan = decide(jobs, machines, usage=usage, limits=limits, reach=reach)

    by_id = {one.job: one for one in jobs}
    on = {one.id: one for one in machines}
    together: dict[str, dict[str, str]] = {}
    for placed in plan.placed:
        one = by_id[placed.job]
        assert_allowed(one, placed.grant, on[placed.worker])
        if one.gang is None:
            assert placed.address == ""
            continue
        members = together.setdefault(one.gang.gang, {})
        assert placed.worker not in members
        assert placed.worker not in one.gang.on
        assert on[placed.worker].has_door
        assert one.gang.engine == "auto" or one.gang.engine in on[placed.worker].engines
        members[placed.worker] = placed.address
    for name, members in together.items():
        place = next(one.gang for one in jobs if one.gang and one.gang.gang == name)
        assert len(members) >= place.needed
        assert all(members.values()) or len(members) + len(place.on) == 1
        assert_is_circle(list(members), reach, members)
        for new, running in product(members, place.on):
            assert reach[running][new] == members[new] and reach[new][running]
    for full in after(machines, jobs, plan, NOW):
        assert_not_too_much(full)
    assert sorted(plan.order) == sorted(by_id)
    assert {placed.job for placed in plan.placed} | set(plan.waits) == set(by_id)
    assert len(plan.placed) + len(plan.waits) == len(by_id)
    assert sum(by_id[placed.job].owner == "ann" for placed in plan.placed) <= 3
    assert len({kept.gang or kept.job for kept in plan.kept}) <= 1
    for source, target in plan.knocks:
        assert source != target and reach.get(source, {}).get(target) is None
        assert on[source].present and on[target].present and on[target].has_door
    for waits in jobs:
        assert explain(waits, machines, plan=plan, limits=limits, now=NOW).reason


@settings(max_examples=60)
@given(worlds(), usages, st.randoms(use_true_random=False))
def test_the_same_gangs_in_any_order_give_the_same_plan(
    world: tuple[list[Waiting], list[Machine], Reached], usage: dict[str, float], random: Random
) -> None:
    jobs, machines, reach = world
    plan = decide(jobs, machines, usage=usage, reach=reach)
    random.shuffle(jobs)
    random.shuffle(machines)
    mixed = {one: dict(random.sample(sorted(reach[one].items()), len(reach[one]))) for one in reversed(reach)}

    assert decide(jobs, machines, usage=usage, reach=mixed) == plan


@settings(max_examples=60)
@given(worlds(), usages)
def test_no_gang_that_waits_could_have_been_placed_beside_the_rest(
    world: tuple[list[Waiting], list[Machine], Reached], usage: dict[str, float]
) -> None:
    jobs, machines, reach = world
    plan = decide(jobs, machines, usage=usage, reach=reach)
    placed = {placed.job: placed.worker for placed in plan.placed}
    on: dict[str, frozenset[str]] = {}
    for one in jobs:
        if one.gang and one.job in placed:
            on[one.gang.gang] = on.get(one.gang.gang, one.gang.on) | {placed[one.job]}
    left = [one for one in jobs if one.job in plan.waits]
    left = [
        replace(one, gang=replace(one.gang, on=on[one.gang.gang], needed=1))
        if one.gang and one.gang.gang in on
        else one
        for one in left
    ]

    again = decide(left, after(machines, jobs, plan, NOW), usage=usage, reach=reach)

    if not plan.kept:
        assert again.placed == ()


@given(networks(), st.integers(1, 6), st.integers(1, 6))
def test_as_many_begin_as_reach_each_other_and_never_fewer_than_needed(
    reach: Reached, members: int, needed: int
) -> None:
    """Against all subsets of the machines."""
    needed = min(needed, members)

    def is_circle(some: Sequence[str]) -> bool:
        seen: dict[str, set[str | None]] = {one: set() for one in some}
        for source, target in permutations(some, 2):
            seen[target].add(reach.get(f"w-{source}", {}).get(f"w-{target}"))
        return all(len(addresses) <= 1 and not addresses & {None, ""} for addresses in seen.values())

    best = max(size for size in range(1, 7) if any(is_circle(some) for some in combinations(NAMES, size)))

    plan = decide(gang("g", members, needed, cpu="1"), room(*NAMES), reach=reach)

    assert len(plan.placed) == (min(best, members) if best >= needed else 0)


@given(networks(), networks(), st.integers(2, 5), st.booleans())
def test_what_is_asked_for_is_enough_to_find_a_place_wherever_there_is_one(
    known: Reached, rest: Reached, needed: int, fades: bool
) -> None:
    """Nothing is known at first (or something); each pass says who knocks, and all who do find out."""
    truth = {
        f"w-{one}": {
            f"w-{other}": known.get(f"w-{one}", {}).get(f"w-{other}", rest.get(f"w-{one}", {}).get(f"w-{other}", ""))
            for other in NAMES
            if other != one
        }
        for one in NAMES
    }
    jobs, machines = gang("g", needed, cpu="1"), room(*NAMES)
    possible = bool(decide(jobs, machines, reach=truth).placed)
    learned: Reached = {} if fades else {one: dict(row) for one, row in known.items()}

    for _ in range(40):
        plan = decide(jobs, machines, reach=learned)
        if plan.placed or not plan.knocks:
            break
        for source, target in plan.knocks:
            learned.setdefault(source, {})[target] = truth[source][target]

    assert bool(plan.placed) == possible


@settings(max_examples=60)
@given(worlds(), usages)
def test_what_is_filled_in_does_not_delay_the_gang_whose_places_are_kept(
    world: tuple[list[Waiting], list[Machine], Reached], usage: dict[str, float]
) -> None:
    jobs, machines, reach = world
    plan = decide(jobs, machines, usage=usage, reach=reach)
    for kept in plan.kept:
        big = next(one for one in jobs if one.job == kept.job)
        (on,) = [one for one in after(machines, jobs, plan, NOW) if one.id == kept.worker]

        later = replace(on, held=tuple(held for held in on.held if held.job not in kept.after))
        alone = decide(
            [replace(big, rank=None, gang=None)], [later], now=NOW if kept.starts_at is None else kept.starts_at
        )

        assert [placed.worker for placed in alone.placed] == [kept.worker]
        if kept.starts_at is not None:
            ends = [held.ends_at for held in on.held if held.job in kept.after]
            assert all(end is not None and end <= kept.starts_at for end in ends)


@given(some_jobs, some_machines, usages)
def test_a_gang_that_can_never_be_is_in_nobodys_way(
    jobs: list[Waiting], machines: list[Machine], usage: dict[str, float]
) -> None:
    machines = [replace(one, has_door=True) for one in machines]
    too_many = gang("g", 6, rank=0.5)

    without, beside = (decide(line, machines, usage=usage, reach={}) for line in (jobs, [*too_many, *jobs]))

    assert beside.placed == without.placed
    assert beside.kept == without.kept


@settings(max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # making it smaller takes minutes
@given(st.randoms(use_true_random=False), st.integers(2, 4), st.sampled_from(["8", "8", "5", "1"]), st.booleans())
def test_no_gang_starves_whatever_others_submit(random: Random, needed: int, wants: str, forgets: bool) -> None:
    """More small jobs and small gangs than fit, for ever, of ever new people and the highest priority. One machine reaches
    only one other; hardly anybody says how long a job runs. `forgets`: what knocks found is forgotten all the time."""
    names = "abcde"
    shut = [(one, other) for one, other in permutations(names, 2) if "a" in (one, other) and "b" not in (one, other)]
    truth = all_reach(*names, except_for=shut)
    machines = room(*names, max_tasks=8)
    poor = gang("poor", needed, owner="poor", cpu=wants, priority=-100, queued_at=NOW)
    line: list[Waiting] = []
    running: list[tuple[float, str, Held]] = []  # it ends really, it is on
    learned: Reached = {}
    now = NOW
    while now < NOW + fairness.LAST_S + 3 * 86400:
        now += 2 * HOUR
        for n in range(12):
            says, name = random.choice([None, None, 3 * HOUR]), f"{now:.0f}-{n}"
            two = gang(name, random.choice([1, 1, 2]), owner=name, cpu=random.choice(["1", "2"]), priority=100)
            two = two if len(two) > 1 else [replace(two[0], gang=None)]
            line += [replace(one, queued_at=now, timeout_s=says) for one in two]
        line = line[-30:]  # the oldest give up
        running = [one for one in running if one[0] > now]
        if forgets:
            learned = {
                one: {to: way for to, way in row.items() if random.random() < 0.5} for one, row in learned.items()
            }
        for _ in range(3):  # a knock takes seconds, and nothing else happens meanwhile
            full = [replace(m, held=tuple(what for _, on, what in running if on == m.id)) for m in machines]
            plan = decide([*poor, *line], full, usage={"poor": 1e12}, now=now, reach=learned)
            placed_of_poor = sum(placed.job in {one.job for one in poor} for placed in plan.placed)
            assert placed_of_poor in (0, needed)
            if placed_of_poor:
                return
            by_id = {one.job: one for one in line}
            for placed in plan.placed:
                one = by_id[placed.job]
                lasts, ends_at = random.choice([3, 5, 11]) * HOUR, None
                if one.timeout_s is not None:
                    lasts, ends_at = random.choice([1, 2.9]) * HOUR, now + one.timeout_s
                running.append((now + lasts, placed.worker, Held(one.job, one.owner, placed.grant, ends_at)))
                line.remove(one)
            for source, target in plan.knocks:
                learned.setdefault(source, {})[target] = truth[source][target]
            if not plan.knocks:
                break
    raise AssertionError("it has waited for ten days")
