"""The closed loop in simulation: how soon it finds the optimum, and how often it moves for nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from statistics import fmean, median

import pytest

from potluck.domain import gangs
from potluck.domain.balance import Balancer, Fit
from potluck.domain.gangs import Pace, ShareError, Wire, split, step_s

NAMES = "abcd"
BASE_S = 5e-3
SAMPLE_S = {"a": 1e-3, "b": 2e-3, "c": 4e-3, "d": 4e-3}
BATCH = 512


def measured(rng: random.Random, pace: Pace, share: int) -> float:
    """3 % of noise, and one step in 200 that takes three times as long."""
    return pace.ready_s(share) * max(0.5, rng.gauss(1, 0.03)) * (3 if rng.random() < 0.005 else 1)


def simulate(seed: int, steps: int, factor: Callable[[str, int], float]) -> tuple[Balancer, list[float]]:
    """The loop, and its efficiency at each step: the optimum's time by the step's own."""
    rng = random.Random(seed)
    balancer = Balancer(BATCH)
    balancer.members_changed(list(NAMES))
    efficiency = []
    for step in range(steps):
        paces = [Pace(BASE_S, SAMPLE_S[name]).scaled(factor(name, step)) for name in NAMES]
        shares = [balancer.shares[name] for name in NAMES]
        efficiency.append(step_s(paces, split(BATCH, paces)) / step_s(paces, shares))
        balancer.observe({n: measured(rng, p, s) for n, p, s in zip(NAMES, paces, shares, strict=True)})
    return balancer, efficiency


def steps_until_good(efficiency: list[float], start: int) -> int:
    return next(i for i, value in enumerate([*efficiency[start:], 1.0]) if value >= 0.97)


SEEDS = [range(3), pytest.param(range(15), marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS)
def test_the_optimum_is_found_soon_and_again_after_a_machine_slows_down_and_recovers(seeds: range) -> None:
    found: dict[int, list[int]] = {0: [], 150: [], 300: []}
    means = []
    for seed in seeds:
        _, efficiency = simulate(seed, 450, lambda name, step: 3.0 if name == "a" and 150 <= step < 300 else 1.0)
        means.append(fmean(efficiency))
        for start, counts in found.items():
            counts.append(steps_until_good(efficiency, start))

    assert all(median(counts) <= 5 for counts in found.values()), found
    assert fmean(means) > 0.975


@pytest.mark.parametrize("seeds", SEEDS)
def test_noise_alone_hardly_ever_moves_the_shares(seeds: range) -> None:
    moved = [simulate(seed, 1000, lambda name, step: 1.0)[0].replans - 1 for seed in seeds]  # one is needed

    assert fmean(moved) <= 5, moved


def test_equal_machines_keep_equal_shares() -> None:
    rng = random.Random(1)
    balancer = Balancer(400)
    balancer.members_changed(list(NAMES))
    for _ in range(300):
        balancer.observe({n: measured(rng, Pace(0.02, 1e-3), s) for n, s in balancer.shares.items()})

    assert all(abs(share - 100) <= 3 for share in balancer.shares.values())


def test_a_gross_change_is_named_in_the_reason() -> None:
    balancer = Balancer(90)
    balancer.members_changed(["x", "y"])
    reasons = []
    for step in range(60):
        slow = 4.0 if step >= 30 else 1.0
        told = balancer.observe({n: 0.001 * s * (slow if n == "y" else 1) for n, s in balancer.shares.items()})
        if told is not None:
            reasons.append(told.reason)

    assert "y is 4.0× slower than before: 180 → 72 ms a step" in reasons
    assert balancer.shares == {"x": 72, "y": 18}


def test_a_newcomer_counts_as_fast_as_the_others_on_average_until_it_is_known() -> None:
    balancer = Balancer(90)
    balancer.members_changed(["x", "y"])
    for _ in range(12):
        balancer.observe({n: (0.001 if n == "x" else 0.002) * s for n, s in balancer.shares.items()})

    told = balancer.members_changed(["x", "y", "z"])

    assert told.reason == "z joined"
    assert told.shares["x"] > told.shares["z"] > told.shares["y"]
    assert balancer.members_changed(["x", "z"]).reason == "y left"


def test_a_member_that_comes_back_is_remembered() -> None:
    balancer = Balancer(90)
    balancer.members_changed(["x", "y"])
    for _ in range(12):
        balancer.observe({n: (0.001 if n == "x" else 0.008) * s for n, s in balancer.shares.items()})
    before = dict(balancer.shares)
    balancer.members_changed(["x"])

    assert balancer.members_changed(["x", "y"]).shares == before


def test_uniform_never_moves_and_proportional_moves_once() -> None:
    for policy, moves in (("uniform", 0), ("proportional", 1)):
        balancer = Balancer(90, policy)
        balancer.members_changed(["x", "y"])
        for _ in range(100):
            balancer.observe({n: 0.01 + (0.001 if n == "x" else 0.003) * s for n, s in balancer.shares.items()})
        assert balancer.replans == moves

    assert balancer.shares["x"] > 1.8 * balancer.shares["y"]


def test_a_small_last_batch_is_split_and_teaches_too() -> None:
    balancer = Balancer(90)
    balancer.members_changed(["x", "y", "z"])
    assert balancer.shares_of(2) == {"x": 1, "y": 1, "z": 0}

    for _ in range(10):
        balancer.observe({n: 0.001 * s for n, s in balancer.shares.items()})
    small = balancer.shares_of(2)
    balancer.observe({"x": 0.001, "y": 0.001, "z": 0.001}, shares=small)

    assert sum(small.values()) == 2
    assert sum(balancer.shares.values()) == 90


def test_what_is_not_a_time_is_not_looked_at() -> None:
    balancer = Balancer(90)
    balancer.members_changed(["x", "y"])
    for _ in range(30):
        balancer.observe({"x": float("nan"), "y": -1.0, "stranger": 3.0})
        balancer.observe({"x": float("inf"), "y": 0.0})

    assert balancer.shares == {"x": 45, "y": 45}


def test_the_state_goes_through_json_and_decides_alike_from_then_on() -> None:
    balancer, _ = simulate(3, 40, lambda name, step: 1.0)
    balancer.wire = Wire(0.01, 0.02)
    twin = Balancer.from_state(json.loads(json.dumps(balancer.to_state())))
    rng = random.Random(5)

    for step in range(80):
        slow = 3.0 if step > 20 else 1.0
        times = {
            n: measured(rng, Pace(BASE_S, SAMPLE_S[n]).scaled(slow if n == "b" else 1), s)
            for n, s in balancer.shares.items()
        }
        assert balancer.observe(times) == twin.observe(times)

    assert balancer.to_state() == twin.to_state()


def test_a_fit_learns_base_and_slope_from_two_shares_and_keeps_its_shape_with_one() -> None:
    fit = Fit()
    for share in (10, 20, 10, 20):
        fit.add(share, 0.5 + 0.01 * share, 0.1 + 0.004 * share)
    assert fit.pace is not None
    assert (fit.pace.base_s, fit.pace.sample_s) == (pytest.approx(0.5), pytest.approx(0.01))
    assert (fit.pace.first_base_s, fit.pace.first_sample_s) == (pytest.approx(0.1), pytest.approx(0.004))

    fit.start_over(fit.pace)
    for _ in range(40):
        fit.add(20, 2 * (0.5 + 0.01 * 20))

    assert (fit.pace.base_s, fit.pace.sample_s) == (pytest.approx(1.0), pytest.approx(0.02))


def test_a_fit_knows_that_a_share_in_parts_pays_its_base_for_each() -> None:
    true = Pace(0.5, 0.01, at_once=16)
    fit = Fit(at_once=16)

    for share in (10, 20, 40, 64) * 3:
        fit.add(share, true.ready_s(share))

    assert fit.pace is not None
    assert all(fit.pace.ready_s(share) == pytest.approx(true.ready_s(share)) for share in (8, 16, 33, 64))


def test_wrong_wishes_say_why() -> None:
    with pytest.raises(ShareError, match="no policy `fair`: choose dynamic, proportional, uniform"):
        Balancer(64, "fair")
    with pytest.raises(ShareError, match="a batch of 2 cannot feed 3 members: raise batch_size to at least 3"):
        Balancer(2).members_changed(["a", "b", "c"])
    assert gangs.ShareError.code == "bad_share"
