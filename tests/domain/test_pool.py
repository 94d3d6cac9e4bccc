"""When does a round close, and how big is the next unit?"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.domain.pool import (
    FIRST_UNIT_SAMPLES,
    MOST_UNIT_SAMPLES,
    Pending,
    PoolSettings,
    Round,
    close_round,
    grace_s,
    judge_losses,
    next_tick_s,
    outer_step,
    unit_size,
)
from potluck.errors import BadInput, UnknownSetting

T = PoolSettings(unit_s=10)
WAITED = st.floats(0, 100)
UPDATES = st.lists(st.tuples(st.sampled_from("abcdefgh"), WAITED), min_size=1, max_size=12)
OFFSETS = st.lists(st.floats(0, 1000), max_size=10)
TIMES = st.floats(0.05, 3600)


def waiting(*workers_waited: tuple[str, float]) -> list[Pending]:
    return [Pending(n, worker, waited) for n, (worker, waited) in enumerate(workers_waited, 1)]


# --- rounds


def test_nothing_waits_so_nothing_is_merged() -> None:
    decision = close_round(Round([], 3), T)

    assert decision.merge == ()
    assert decision.reason == "no update waits"


def test_a_lone_worker_is_merged_at_once() -> None:
    assert close_round(Round(waiting(("a", 0.0)), 1), T).merge == (1,)


def test_when_everybody_handed_in_nobody_waits() -> None:
    decision = close_round(Round(waiting(("a", 0.0), ("b", 0.1)), 2), T)

    assert decision.merge == (1, 2)
    assert "everybody handed in" in decision.reason


def test_one_of_four_waits_for_the_quorum_and_says_so() -> None:
    decision = close_round(Round(waiting(("a", 3.0)), 4), T)

    assert decision.merge == ()
    assert decision.reason == "1 updates of 1 of 4 workers: waiting for a quorum of 2"
    assert decision.wake_s == pytest.approx(12.0)


def test_a_quorum_waits_a_short_grace_and_then_no_longer() -> None:
    fresh = close_round(Round(waiting(("a", 2.0), ("b", 0.1)), 4), T)
    later = close_round(Round(waiting(("a", 3.0), ("b", 1.1)), 4), T)

    assert fresh.merge == ()
    assert "grace" in fresh.reason
    assert fresh.wake_s == pytest.approx(0.9)
    assert later.merge == (1, 2)


def test_the_slowest_is_not_waited_for() -> None:
    decision = close_round(Round(waiting(("a", 15.0)), 30), T)

    assert decision.merge == (1,)
    assert "the oldest has waited 15.0 s" in decision.reason


def test_the_last_updates_of_a_run_wait_for_nobody() -> None:
    decision = close_round(Round(waiting(("a", 0.0)), 9, ending=True), T)

    assert decision.merge == (1,)
    assert "last of the run" in decision.reason


def test_two_updates_of_one_worker_are_no_quorum_of_two() -> None:
    assert close_round(Round(waiting(("a", 2.0), ("a", 2.0)), 4), T).merge == ()


@given(UPDATES, st.integers(0, 40), OFFSETS, st.floats(0, 1), TIMES)
def test_no_update_waits_longer_than_one_and_a_half_boxes(
    updates: list[tuple[str, float]], active: int, offsets: list[float], quorum: float, unit_s: float
) -> None:
    settings = PoolSettings(unit_s=unit_s, quorum=quorum)
    pending = waiting(*updates)
    oldest = max(update.waited_s for update in pending)

    decision = close_round(Round(pending, active, offsets), settings)

    if decision.merge:
        assert decision.merge == tuple(sorted(update.task_id for update in pending)), "all that waits is merged"
    else:
        assert oldest < 1.5 * unit_s
        assert 0 < decision.wake_s <= 1.5 * unit_s
        # asked again when it said, it merges, unless something changed
        aged = [Pending(p.task_id, p.worker_id, p.waited_s + decision.wake_s + 1e-6) for p in pending]
        again = close_round(Round(aged, active, offsets), settings)
        assert again.merge or again.wake_s > 0
    assert decision.reason


@given(UPDATES, st.integers(0, 40), OFFSETS)
def test_the_order_of_arrival_does_not_matter(
    updates: list[tuple[str, float]], active: int, offsets: list[float]
) -> None:
    pending = waiting(*updates)

    assert close_round(Round(pending, active, offsets), T) == close_round(Round(pending[::-1], active, offsets), T)


@given(OFFSETS, TIMES)
def test_grace_is_short(offsets: list[float], unit_s: float) -> None:
    assert 0 <= grace_s(offsets, unit_s) <= 0.15 * unit_s


def test_grace_is_learned_from_how_far_apart_the_room_hands_in() -> None:
    assert grace_s([], 10) == 1.0
    assert grace_s([0.3, 0.3, 0.4], 10) == pytest.approx(0.3)
    assert grace_s([9, 9, 9], 10) == 1.5


# --- units


@given(TIMES, st.one_of(st.none(), st.floats()))
def test_a_unit_has_a_sensible_size_whatever_a_worker_claims(unit_s: float, samples_per_s: float | None) -> None:
    size = unit_size(PoolSettings(unit_s=unit_s), samples_per_s)

    assert 64 <= size <= MOST_UNIT_SAMPLES


def test_a_unit_is_a_bit_more_than_fits_into_a_box() -> None:
    assert unit_size(T, 100) == 1700
    assert unit_size(T, None) == FIRST_UNIT_SAMPLES
    assert unit_size(T, 0.01) == 64
    assert unit_size(PoolSettings(unit_samples=4096), 3) == 4096


@given(TIMES, st.floats(0, 10**7))
def test_the_next_tick_is_ahead_and_not_further_than_a_box(unit_s: float, elapsed_s: float) -> None:
    assert 0 < next_tick_s(PoolSettings(unit_s=unit_s), elapsed_s) <= unit_s


def test_ticks_are_the_same_for_everybody() -> None:
    assert (next_tick_s(T, 3), next_tick_s(T, 13), next_tick_s(T, 9.5)) == (7, 7, 0.5)


# --- settings


def test_settings_take_the_strings_of_a_command_line() -> None:
    assert PoolSettings().changed({"unit_s": "2.5", "s_max": "7"}) == PoolSettings(unit_s=2.5, s_max=7)


@pytest.mark.parametrize(
    ("key", "near"), [("unit", "unit_s"), ("quorun", "quorum"), ("codecs", "codec"), ("learning", "there are")]
)
def test_an_unknown_setting_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(UnknownSetting, match=f"no setting `{key}`: .*{near}"):
        PoolSettings().changed({key: "1"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unit_s", "nan"),
        ("unit_s", 0),
        ("unit_s", "soon"),
        ("overlap", 0.5),
        ("codec", "zip"),
        ("preset", ""),
        ("s_max", "1.5"),
        ("taste_count", math.inf),
        ("outer_lr", math.inf),
        ("outer_lr", "nan"),
        ("momentum", 1.0),
        ("quorum", None),
        ("quorum", [1]),
        ("quorum", True),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(BadInput, match=key):
        PoolSettings().changed({key: value})


@given(st.dictionaries(st.sampled_from([*PoolSettings.__slots__, "x"]), st.one_of(st.floats(), st.text(), st.none())))
def test_whatever_is_set_is_either_taken_or_refused(changes: dict[str, object]) -> None:
    try:
        settings = PoolSettings().changed(changes)
    except BadInput:
        return
    assert all(math.isfinite(v) for v in (getattr(settings, k) for k in settings.__slots__) if isinstance(v, float))


def test_presets_choose_the_outer_step_and_a_run_may_override_it() -> None:
    assert outer_step(PoolSettings()) == ("average", 1.0, 0.0)
    assert outer_step(PoolSettings(preset="nesterov")) == ("nesterov", 0.7, 0.3)
    assert outer_step(PoolSettings(preset="nesterov", outer_lr=0.5, momentum=0.0)) == ("nesterov", 0.5, 0.0)
    assert outer_step(PoolSettings(strategy="gradient"))[0] == "adam"


def test_a_loss_that_is_not_a_number_is_named() -> None:
    assert judge_losses({"g": 1.0, "d": 0.0}) == ""
    assert "`d`" in judge_losses({"g": 1.0, "d": math.nan})
