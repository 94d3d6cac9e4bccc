"""Which job goes where, in which order, and for whom is a place kept?"""

from __future__ import annotations

from dataclasses import replace

from placement_kit import GB, HOUR, NOW, decide, held, job, machine, order, where

from potluck.domain import fairness
from potluck.domain.placement import Gpu, Grant, Limits

# --- the line -------------------------------------------------------------------------------------------------------


def test_an_admins_word_goes_before_priority_and_priority_before_time() -> None:
    jobs = [
        job("late", queued_at=NOW - 1),
        job("early", queued_at=NOW - 9),
        job("urgent", priority=5, queued_at=NOW),
        job("moved", rank=2.0, priority=-100, queued_at=NOW),
        job("front", rank=1.0, queued_at=NOW),
    ]

    assert order(decide(jobs, [])) == "front moved urgent early late"


def test_who_used_less_lately_goes_first_among_equals() -> None:
    jobs = [job("a", "heavy", queued_at=NOW - 99), job("b", "light"), job("c", "heavy", priority=1)]

    assert order(decide(jobs, [], usage={"heavy": 1e6})) == "c b a"


def test_what_is_placed_in_the_pass_counts_at_once_so_people_take_turns() -> None:
    jobs = [job(f"a{n}", "ann", cpu="1", queued_at=NOW - 50 + n) for n in range(3)]
    jobs += [job(f"b{n}", "bob", cpu="1", queued_at=NOW - 40 + n) for n in range(3)]

    assert order(decide(jobs, [machine(max_tasks=9)])) == "a0 b0 a1 b1 a2 b2"


def test_waiting_lifts_a_job_up_to_the_highest_priority_that_waits_and_no_further() -> None:
    old = job("old", "heavy", queued_at=NOW - 6 * fairness.AGING_S)
    new = job("new", "light", priority=5, queued_at=NOW - 1)

    assert order(decide([old, new], [], usage={"heavy": 1.0})) == "new old"  # equal now: usage decides
    assert order(decide([old, new], [], usage={"light": 1.0})) == "old new"
    assert order(decide([old, replace(new, priority=7)], [], usage={"light": 1.0})) == "new old"


def test_somebody_of_whom_nothing_runs_is_next_after_a_day() -> None:
    old = job("old", "heavy", queued_at=NOW - fairness.OVERDUE_S - 1)
    more = job("more", "heavy", queued_at=NOW - fairness.OVERDUE_S - 1)
    new = [job(f"n{n}", f"new{n}", priority=100, cpu="1") for n in range(2)]

    plan = decide([*new, old, more], [machine(max_tasks=4)], usage={"heavy": 1e9})

    assert order(plan) == "more n0 n1 old"  # one of theirs; then something of theirs runs
    busy = machine(held=(held("x", owner="heavy"),))
    assert order(decide([*new, old], [busy], usage={"heavy": 1e9})) == "n0 n1 old"


def test_after_a_week_a_job_is_next_whoever_owns_it() -> None:
    old = job("old", "heavy", priority=-100, queued_at=NOW - fairness.LAST_S - 1)
    busy = machine(held=(held("x", owner="heavy"),))

    assert order(decide([job("new", "light", priority=100), old], [busy], usage={"heavy": 1e9})) == "old new"


# --- where ----------------------------------------------------------------------------------------------------------


def test_a_job_goes_to_the_smallest_machine_that_has_room() -> None:
    machines = [machine("gpu", [24]), machine("big", memory=64 * GB, memory_free=64 * GB), machine("small")]

    assert where(decide([job("a", cpu="1", memory="4GB")], machines)) == {"a": "small"}
    assert where(decide([job("a", cpu="1", memory="32GB")], machines)) == {"a": "big"}
    assert where(decide([job("a", gpu="1")], machines)) == {"a": "gpu"}


def test_the_owners_own_machine_comes_first() -> None:
    machines = [machine("lab"), machine("mine", [24], owner="ann", whose="me", runtime="container")]

    assert where(decide([job("a", "ann", cpu="1"), job("b", "bob", cpu="1")], machines)) == {"a": "mine", "b": "lab"}


def test_jobs_that_name_no_cores_go_to_machines_that_do_nothing_else() -> None:
    plan = decide([job(f"{n}") for n in range(5)], [machine("a"), machine("b")])

    assert where(plan) == {"0": "a", "1": "b", "2": "a", "3": "a", "4": "a"}


def test_slices_share_a_gpu_and_whole_gpus_are_nobody_elses() -> None:
    one = machine(gpus=[24, 24])
    jobs = [job("a", gpu="10GB"), job("b", gpu="10GB"), job("c", gpu="1"), job("d", gpu="10GB")]
    jobs = [replace(one, queued_at=NOW + n) for n, one in enumerate(jobs)]

    plan = decide(jobs, [one])

    grants = {placed.job: placed.grant for placed in plan.placed}
    assert grants == {
        "j-a": Grant((0,), 10 * GB),
        "j-b": Grant((0,), 10 * GB),
        "j-c": Grant((1,)),
    }
    assert "j-d" in plan.waits


def test_a_range_gets_as_much_as_is_free() -> None:
    one = machine(gpus=[24, 24, 24], held=(held("x", gpus=(1,), cpu=3),))

    (placed,) = decide([job("a", gpu="1..4", cpu="2..8")], [one]).placed
    (sliced,) = decide([job("a", gpu="4GB..30GB")], [one]).placed

    assert placed.grant == Grant((0, 2), 0, 5.0)
    assert sliced.grant == Grant((0,), 24 * GB)


def test_memory_that_other_programs_use_counts() -> None:
    """16 GB; a job has reserved 6 and uses 1 of it, a browser uses 4: 11 are free, of which the job may still want 5."""
    browser = machine(memory_free=11 * GB, held=(held("x", memory=6 * GB, used=1 * GB),))

    assert where(decide([job("a", memory="6GB")], [browser])) == {"a": "m"}
    assert where(decide([job("a", memory="6.1GB")], [browser])) == {}


def test_a_job_whose_use_is_not_known_is_not_taken_off_twice() -> None:
    """It uses its 8 GB: 8 are free, not 0."""
    full = machine(memory_free=8 * GB, held=(held("x", memory=8 * GB),))
    placed_a_moment_ago = machine(memory_free=16 * GB, held=(held("x", memory=8 * GB, used=0),))

    for one in (full, placed_a_moment_ago):
        assert where(decide([job("a", memory="8GB")], [one])) == {"a": "m"}
        assert where(decide([job("a", memory="8.1GB")], [one])) == {}


def test_a_slice_leaves_room_for_the_slices_of_others_whether_they_are_used_yet_or_not() -> None:
    """24 GB: one job has reserved 10 and uses them, one has reserved 6 and just begins, a game uses 2: 6 are free."""
    begins, runs = held("x", used=0, gpus=(0,), vram=6 * GB), held("y", gpus=(0,), vram=10 * GB)
    shared = machine(gpus=[Gpu(0, "x", 24 * GB, 12 * GB)], held=(begins, runs))

    assert where(decide([job("a", gpu="6GB")], [shared])) == {"a": "m"}
    assert where(decide([job("a", gpu="6.1GB")], [shared])) == {}
    quiet = replace(shared, gpus=(Gpu(0, "x", 24 * GB, 24 * GB),))  # they use nothing, and may at any time
    assert where(decide([job("a", gpu="8GB")], [quiet])) == {"a": "m"}
    assert where(decide([job("a", gpu="8.1GB")], [quiet])) == {}


def test_a_gpu_on_which_somebody_plays_is_not_free() -> None:
    assert where(decide([job("a", gpu="1")], [machine(gpus=[Gpu(0, "x", 24 * GB, 6 * GB)])])) == {}
    assert where(decide([job("a", gpu="24GB..")], [machine(gpus=[Gpu(0, "x", 24 * GB, 20 * GB)])])) == {}
    assert where(decide([job("a", gpu="24GB..")], [machine(gpus=[Gpu(0, "x", 23 * GB, 22 * GB)])])) == {"a": "m"}


def test_limits_of_a_person_hold_also_within_the_pass() -> None:
    jobs = [job(f"{n}", cpu="1") for n in range(4)]

    plan = decide(jobs, [machine(max_tasks=9)], limits={"ann": Limits(running=3, running_now=1, name="Ann")})

    assert len(plan.placed) == 2
    assert set(plan.waits.values()) == {"`Ann` may run 3 jobs at once, and 3 run"}
    spent = {"ann": Limits(gpu_hours=5, gpu_hours_used=5.1)}
    assert where(decide([job("g", gpu="1"), job("c", cpu="1")], [machine(gpus=[8])], limits=spent)) == {"c": "m"}


def test_a_machine_that_gave_a_job_back_is_avoided_by_that_job_only() -> None:
    jobs = [job("a", cpu="1", avoid=frozenset({"w-a"})), job("b", cpu="1", queued_at=NOW)]

    assert where(decide(jobs, [machine("a"), machine("b", memory=32 * GB)])) == {"a": "b", "b": "a"}


# --- the reservation ------------------------------------------------------------------------------------------------


def test_a_place_is_kept_for_the_first_that_finds_none_and_only_short_jobs_go_before() -> None:
    """`big` wants all cores; the job that is in its way ends in an hour."""
    one = machine(held=(held("x", NOW + HOUR, cpu=4),))
    jobs = [
        job("big", cpu="8", queued_at=NOW - 100),
        job("short", cpu="2", timeout_s=0.9 * HOUR),
        job("long", cpu="2", timeout_s=1.1 * HOUR),
        job("endless", cpu="2"),
    ]

    plan = decide(jobs, [one])

    assert where(plan) == {"short": "m"}
    assert plan.reserved is not None
    assert (plan.reserved.job, plan.reserved.worker, plan.reserved.starts_at) == ("j-big", "w-m", NOW + HOUR)
    assert plan.reserved.after == {"j-x", "j-short"}


def test_what_the_reservation_leaves_over_may_be_used_however_long() -> None:
    one = machine(held=(held("x", None, cpu=4),))
    jobs = [job("big", cpu="6", queued_at=NOW - 100), job("a", cpu="2"), job("b", cpu="2")]

    plan = decide(jobs, [one])

    assert where(plan) == {"a": "m"}
    assert plan.reserved is not None and plan.reserved.starts_at is None


def test_nothing_is_filled_in_where_nobody_knows_the_end() -> None:
    jobs = [job("big", cpu="8", queued_at=NOW - 100), job("short", cpu="1", timeout_s=1.0)]

    assert where(decide(jobs, [machine(held=(held("x", None, cpu=1),))])) == {}


def test_the_place_is_kept_where_it_is_free_soonest_and_other_machines_go_on() -> None:
    machines = [
        machine("unknown", held=(held("u", None, cpu=1),)),
        machine("late", held=(held("l", NOW + 9 * HOUR, cpu=1),)),
        machine("soon", held=(held("s", NOW + HOUR, cpu=1),)),
        machine("small", cores=2),
    ]
    plan = decide([job("big", cpu="8", queued_at=NOW - 100), *(job(f"{n}", cpu="7") for n in range(3))], machines)

    assert plan.reserved is not None and plan.reserved.worker == "w-soon"
    assert set(where(plan).values()) == {"late", "unknown"}


def test_after_each_day_one_more_place_is_kept_lest_the_first_is_never_free() -> None:
    machines = [machine(f"{n}", held=(held(f"{n}", None, cpu=1),)) for n in range(3)]
    big = job("big", cpu="8")

    kept = [decide([replace(big, queued_at=NOW - days * 86400)], machines).kept for days in (0.9, 1.1, 9)]

    assert [[one.worker for one in each] for each in kept] == [["w-0"], ["w-0", "w-1"], ["w-0", "w-1", "w-2"]]


def test_a_job_that_no_machine_could_hold_keeps_no_place() -> None:
    one = machine(held=(held("x", None, cpu=1),))
    plan = decide([job("giant", cpu="64", queued_at=0.0), job("big", cpu="8", queued_at=1.0), job("a", cpu="1")], [one])

    assert plan.reserved is not None and plan.reserved.job == "j-big"


# --- the numbers ----------------------------------------------------------------------------------------------------


def test_usage_is_core_seconds_and_half_of_it_is_forgotten_in_a_day() -> None:
    assert fairness.charge(Grant(), 10) == 10
    assert fairness.charge(Grant(cpu=4), 10) == 40
    assert fairness.charge(Grant(cpu=1, memory=32 * GB), 10) == 80
    assert fairness.charge(Grant(gpus=(0, 1)), 10) == 330
    assert fairness.charge(Grant(gpus=(0,), vram=6 * GB), 10) == 50
    assert fairness.charge(Grant(cpu=4), -5) == 0
    assert fairness.decay(100, fairness.HALF_LIFE_S) == 50
    assert fairness.decay(100, -5) == 100
    assert fairness.entry_fee(Grant()) == 600
