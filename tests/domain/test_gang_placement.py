"""Members of a gang are placed together or not at all, on machines that reach each other."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from placement_kit import HOUR, NOW, all_reach, decide, gang, held, job, order, room, where

from potluck.domain import fairness
from potluck.domain.job import Resources
from potluck.domain.placement import GangPlace, Limits, Machine, Plan, Waiting, explain, impossible
from potluck.domain.resources import read


def addresses(plan: Plan) -> dict[str, str]:
    return {placed.job.removeprefix("j-"): placed.address for placed in plan.placed}


def said(jobs: list[Waiting], machines: list[Machine], plan: Plan, **more: object) -> tuple[str, str]:
    found = explain(jobs[0], machines, plan=plan, **{"limits": {}, "now": NOW} | more)  # type: ignore[arg-type]
    return found.reason, found.advice


# --- forming --------------------------------------------------------------------------------------------------------


def test_all_members_are_placed_in_one_pass_each_on_a_machine_of_its_own() -> None:
    plan = decide(gang("g", 3, cpu="1"), room("a", "b", "c", "d"), reach=all_reach("a", "b", "c", "d"))

    assert where(plan) == {"g1": "a", "g2": "b", "g3": "c"}
    assert addresses(plan) == {"g1": "ip-a", "g2": "ip-b", "g3": "ip-c"}
    assert plan.placed[0].reason == "`a` has room, and reaches `b` and `c`"
    assert plan.knocks == ()


def test_with_too_few_machines_nobody_is_placed_and_all_are_told_how_many_are_missing() -> None:
    jobs = gang("g", 4, 3, cpu="1")
    plan = decide(jobs, room("a", "b"), reach=all_reach("a", "b"))

    assert plan.placed == ()
    assert set(plan.waits.values()) == {
        "1 more machine is needed: the gang begins with 3 at once, only `a` and `b` have room, and each member wants 1 core"
    }
    assert (
        said(jobs, room("a", "b"), plan)[1] == "join 1 more machine, or let the gang begin with fewer, like --gang 2..3"
    )


def test_a_gang_begins_with_what_fits_and_the_rest_waits() -> None:
    plan = decide(gang("g", 8, 2, cpu="8"), room("a", "b", "c"), reach=all_reach("a", "b", "c"))

    assert where(plan) == {"g1": "a", "g2": "b", "g3": "c"}
    assert set(plan.waits) == {f"j-g{n}" for n in range(4, 9)}
    assert "begins without it" in plan.waits["j-g4"]


def test_machines_that_do_not_reach_each_other_are_not_taken_and_the_pair_is_named() -> None:
    jobs, machines = gang("g", 3, cpu="1"), room("lab-1", "lab-2", "lab-3")
    plan = decide(jobs, machines, reach=all_reach("lab-1", "lab-2", "lab-3", except_for=[("lab-1", "lab-3")]))

    assert plan.placed == ()
    reason, advice = said(jobs, machines, plan)
    assert reason == (
        "`lab-1` cannot reach `lab-3`: 3 machines have room, only 2 of them reach each other, "
        "and the gang begins with 3 at once"
    )
    assert "firewalls" in advice


def test_the_largest_circle_is_found_past_machines_that_reach_nobody() -> None:
    alone = [pair for pair in permutations("abcdef", 2) if not set(pair) <= set("bdf")]
    plan = decide(gang("g", 5, 2, cpu="1"), room(*"abcdef"), reach=all_reach(*"abcdef", except_for=alone))

    assert where(plan) == {"g1": "b", "g2": "d", "g3": "f"}


def test_everybody_must_reach_a_machine_by_the_same_address() -> None:
    """`c` is behind two networks: `a` sees one address, `b` another."""
    reach = all_reach("a", "b", "c")
    reach["w-b"]["w-c"] = "other"
    jobs, machines = gang("g", 3, cpu="1"), room("a", "b", "c")

    plan = decide(jobs, machines, reach=reach)

    assert plan.placed == ()
    assert (
        "`c` is ip-c for `a` and other for `b`, and a gang needs one address for all" in said(jobs, machines, plan)[0]
    )
    assert where(decide(gang("g", 3, 2, cpu="1"), machines, reach=reach)) == {"g1": "a", "g2": "b"}


def test_what_nobody_knows_is_asked_in_both_directions_and_once() -> None:
    jobs, machines = gang("g", 2, cpu="1"), room("a", "b", "c")
    plan = decide([*jobs, *gang("h", 2, cpu="1", queued_at=NOW)], machines, reach={"w-a": {"w-b": "ip-b"}})

    assert plan.placed == ()
    assert plan.knocks == (("w-b", "w-a"),)
    reason, advice = said(jobs, machines, plan)
    assert reason.startswith("the hub is finding out whether `a` and `b` reach each other; `a` and `b` are kept for it")
    assert advice == "wait a few seconds: they knock at each other's doors"


def test_only_machines_with_a_door_and_the_engine_are_taken() -> None:
    no_door, no_engine = room("a", has_door=False), room("b", engines=frozenset())
    machines = [*no_door, *no_engine, *room("c", "d")]
    reach = all_reach("a", "b", "c", "d")

    assert where(decide(gang("g", 2, cpu="1", engine="plain"), machines, reach=reach)) == {"g1": "c", "g2": "d"}
    assert where(decide(gang("g", 3, cpu="1", engine="compat"), machines, reach=reach)) == {
        "g1": "c",
        "g2": "d",
        "g3": "b",
    }
    jobs = gang("g", 4, cpu="1", engine="torchft")
    plan = decide(jobs, machines, reach=reach)
    found = explain(jobs[0], machines, plan=plan, limits={}, now=NOW)
    assert found.near[0] == ("a", "has no door at which the others could knock")
    assert found.near[1] == ("b", "has no torchft in its own Python, which the engine torchft needs")
    assert "`b`: install torchft there" in found.advice


def test_a_machine_that_gave_one_member_back_gets_none_of_them() -> None:
    first, *rest = gang("g", 3, 2, cpu="1")
    plan = decide(
        [replace(first, avoid=frozenset({"w-a"})), *rest], room("a", "b", "c"), reach=all_reach("a", "b", "c")
    )

    assert where(plan) == {"g1": "b", "g2": "c"}


def test_ones_own_machines_come_first_and_machines_with_jobs_last() -> None:
    machines = [
        *room("a", held=(held("x"),)),
        *room("b", "c"),
        *room("d", owner="ann", whose="me"),
    ]

    assert where(decide(gang("g", 3), machines, reach=all_reach(*"abcd"))) == {"g1": "d", "g2": "b", "g3": "c"}


def test_a_gang_of_one_needs_nobody_and_gets_the_address_by_which_most_reach_it() -> None:
    (placed,) = decide(gang("g", 1, cpu="1"), room("a"), reach={}).placed
    (known,) = decide(gang("g", 1, cpu="1"), room("a"), reach={"w-x": {"w-a": "1.2.3.4"}, "w-y": {"w-a": ""}}).placed

    assert (placed.address, placed.reason) == ("", "`a` has room, and begins the gang")
    assert known.address == "1.2.3.4"


def test_a_gang_has_its_turn_with_the_first_of_its_members() -> None:
    jobs = [*gang("g", 2, cpu="8"), job("x", "bob", cpu="8", priority=5), job("y", "bob", cpu="8")]
    plan = decide(jobs, room("a", "b", "c"), reach=all_reach("a", "b", "c"), usage={"bob": 1.0})

    assert where(plan) == {"x": "a", "g1": "b", "g2": "c"}
    assert order(plan) == "x g1 y g2"  # what was placed counts at once, so bob is next


# --- joining --------------------------------------------------------------------------------------------------------


def test_a_member_comes_to_a_formed_gang_where_it_reaches_all_of_it() -> None:
    reach = all_reach("a", "b", "c", "d", except_for=[("b", "c")])
    jobs = gang("g", 2, 1, cpu="1", on=frozenset({"w-a", "w-b"}))

    plan = decide(jobs, room("a", "b", "c", "d"), reach=reach)

    assert where(plan) == {"g1": "d"}
    assert addresses(plan) == {"g1": "ip-d"}
    assert "`b` cannot reach `c`" in plan.waits["j-g2"]


def test_members_that_come_in_one_pass_reach_each_other_too() -> None:
    reach = all_reach("a", "b", "c", "d", except_for=[("b", "c")])

    plan = decide(gang("g", 3, 1, cpu="1", on=frozenset({"w-a"})), room("a", "b", "c", "d"), reach=reach)

    assert where(plan) == {"g1": "b", "g2": "d"}


def test_who_comes_knocks_at_the_doors_of_all_and_they_at_its() -> None:
    jobs, machines = gang("g", 1, cpu="1", on=frozenset({"w-a", "w-b"})), room("a", "b", "c")
    plan = decide(jobs, machines, reach=all_reach("a", "b"))

    assert set(plan.knocks) == {("w-a", "w-c"), ("w-c", "w-a"), ("w-b", "w-c"), ("w-c", "w-b")}
    assert said(jobs, machines, plan)[0].startswith("the hub is finding out whether `c` and the machines of its gang")


def test_a_gang_that_has_all_the_machines_waits_for_one_more() -> None:
    jobs, machines = gang("g", 1, cpu="1", on=frozenset({"w-a", "w-b"})), room("a", "b")
    plan = decide(jobs, machines, reach=all_reach("a", "b"))

    assert plan.kept == ()
    reason, advice = said(jobs, machines, plan)
    assert reason == "no machine beside the 2 of its gang is free that has what it wants: 1 core"
    assert advice == "join 1 more machine"


# --- limits ---------------------------------------------------------------------------------------------------------


def test_every_member_counts_for_the_limit_of_its_owner() -> None:
    jobs, machines, reach = gang("g", 4, 2, cpu="1"), room(*"abcd"), all_reach(*"abcd")

    plan = decide(jobs, machines, reach=reach, limits={"ann": Limits(running=4, running_now=1, name="Ann")})
    assert len(plan.placed) == 3

    tight = {"ann": Limits(running=4, running_now=3, name="Ann")}
    plan = decide(jobs, machines, reach=reach, limits=tight)
    assert plan.placed == () and plan.kept == ()
    reason = "`Ann` may run 4 jobs at once, and 3 run: its gang begins with 2 at once"
    assert said(jobs, machines, plan, limits=tight) == (
        reason,
        "wait until one of these jobs ends, stop one, or ask an admin for more",
    )

    never = {"ann": Limits(running=1, name="Ann")}
    advice = said(jobs, machines, decide(jobs, machines, reach=reach, limits=never), limits=never)[1]
    assert advice == "let the gang begin with fewer, like --gang 1..2, or ask an admin for more"


# --- the reservation ------------------------------------------------------------------------------------------------


def test_machines_are_kept_for_the_first_gang_until_the_last_of_them_is_free() -> None:
    machines = [
        *room("a"),
        *room("b", held=(held("x", NOW + HOUR, cpu=4),)),
        *room("c", held=(held("y", cpu=8),)),
    ]
    small = [job("short", cpu="1", timeout_s=0.9 * HOUR), job("long", cpu="1", timeout_s=2 * HOUR)]
    jobs = [*gang("g", 2, cpu="8", queued_at=NOW - 99), *small]

    plan = decide(jobs, machines, reach=all_reach(*"abc"))

    assert where(plan) == {"short": "a"}
    assert [(one.worker, one.starts_at) for one in plan.kept] == [("w-a", NOW + HOUR), ("w-b", NOW + HOUR)]
    assert "`a` and `b` are kept for it, free in 60 min at the latest" in said(jobs, machines, plan)[0]


def test_of_two_circles_the_one_that_is_free_sooner_is_kept_and_after_a_day_the_other_too() -> None:
    far = [pair for pair in permutations("abcd", 2) if set(pair) not in ({"a", "b"}, {"c", "d"})]
    reach = all_reach(*"abcd", except_for=far)
    busy = {"a": None, "b": 1.0, "c": 2.0, "d": 3.0}
    machines = [
        room(name, held=(held(name, None if end is None else NOW + end * HOUR, cpu=1),))[0]
        for name, end in busy.items()
    ]
    jobs = gang("g", 2, cpu="8")

    now = decide(jobs, machines, reach=reach)
    late = decide([replace(one, queued_at=NOW - fairness.OVERDUE_S) for one in jobs], machines, reach=reach)

    assert [(one.worker, one.starts_at) for one in now.kept] == [("w-c", NOW + 3 * HOUR), ("w-d", NOW + 3 * HOUR)]
    assert {one.worker for one in late.kept} == {"w-a", "w-b", "w-c", "w-d"}


def test_free_machines_are_kept_until_they_have_found_out_beside_those_that_are_known_and_busy() -> None:
    machines = [*room("a", "b", held=(held("x", None, cpu=8),)), *room("c", "d")]
    jobs = [*gang("g", 2, cpu="8", queued_at=NOW - 99), job("z", cpu="8")]

    plan = decide(jobs, machines, reach=all_reach("a", "b"))

    assert plan.placed == ()
    assert set(plan.knocks) == {("w-c", "w-d"), ("w-d", "w-c")}
    assert [(one.worker, one.starts_at) for one in plan.kept] == [
        ("w-c", NOW),
        ("w-d", NOW),
        ("w-a", None),
        ("w-b", None),
    ]


def test_a_gang_that_cannot_be_keeps_no_machine() -> None:
    machines = room("a", "b", held=(held("x", NOW + HOUR, cpu=1),))
    jobs = [*gang("g", 2, cpu="8", queued_at=0.0), job("z", cpu="8")]

    plan = decide(jobs, machines, reach=all_reach("a", "b", except_for=[("a", "b")]))

    assert [one.job for one in plan.kept] == ["j-z"]


# --- at submit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "least", "why"),
    [
        ("8", 2, ""),
        ("8", 3, "of the 3 of this hub only `a` and `b` could hold one, and the nearest other, `c`, has 2 cores"),
        ("16", 2, "of the 3 of this hub none could hold one: the nearest, `a`, has 8 cores, the job wants 16"),
        (
            "1",
            4,
            "of the 3 of this hub only `a`, `b` and `c` could hold one; join more machines, or let the gang begin",
        ),
    ],
)
def test_more_machines_than_the_hub_has_are_impossible(cpu: str, least: int, why: str) -> None:
    machines = [*room("a", "b"), *room("c", cores=2)]

    found = impossible(read(Resources(cpu=cpu)), machines, least=least)

    assert why in found and bool(why) == bool(found)


def test_members_that_do_not_all_wait_are_said_so() -> None:
    lonely = job("g1", cpu="1", gang=GangPlace("g", 1, 3))

    assert decide([lonely], room(*"abc"), reach=all_reach(*"abc")).waits == {
        "j-g1": "its gang begins with 3 at once, and only 1 of its members wait"
    }
