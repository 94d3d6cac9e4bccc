"""Shares against brute force, their bounds and errors, what a gang is worth, and the noise scale of known gradients."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.domain import gangs
from potluck.domain.gangs import NO_BOUND, Noise, Pace, ShareError, Wire, proportional, split, split_small, step_s

times = st.floats(0.0, 5.0)
paces = st.builds(
    Pace,
    base_s=times,
    sample_s=st.floats(0.01, 3.0),
    first_base_s=times,
    first_sample_s=st.floats(0.0, 1.5),
    least=st.integers(1, 2),
    most=st.sampled_from([8, 12, NO_BOUND]),
)
in_parts = st.builds(
    Pace, base_s=times, sample_s=st.floats(0.01, 3.0), most=st.sampled_from([8, NO_BOUND]), at_once=st.integers(1, 9)
)
wires = st.one_of(st.just(gangs.INSTANT), st.builds(Wire, last_s=times, others_s=st.floats(0, 10)))


def best_of_all(batch: int, members: list[Pace], wire: Wire) -> float:
    ranges = [range(p.least, min(p.most, batch) + 1) for p in members]
    return min(step_s(members, shares, wire) for shares in itertools.product(*ranges) if sum(shares) == batch)


@settings(deadline=None, max_examples=150)
@given(members=st.lists(st.one_of(paces, in_parts), min_size=1, max_size=3), batch=st.integers(6, 20), wire=wires)
def test_no_other_shares_make_a_shorter_step(members: list[Pace], batch: int, wire: Wire) -> None:
    if batch > sum(p.most for p in members):
        with pytest.raises(ShareError):
            split(batch, members, wire)
        return

    shares = split(batch, members, wire)

    assert sum(shares) == batch
    assert all(p.least <= share <= p.most for p, share in zip(members, shares, strict=True))
    assert step_s(members, shares, wire) == pytest.approx(best_of_all(batch, members, wire), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(members=st.lists(paces, min_size=1, max_size=8), batch=st.integers(16, 4000), wire=wires)
def test_shares_sum_to_the_batch_within_the_bounds_whatever_the_order(
    members: list[Pace], batch: int, wire: Wire
) -> None:
    members = [Pace(p.base_s, p.sample_s, p.first_base_s, p.first_sample_s, p.least) for p in members]

    forth, back = split(batch, members, wire), split(batch, members[::-1], wire)

    assert sum(forth) == sum(back) == batch
    assert all(share >= p.least for p, share in zip(members, forth, strict=True))
    assert step_s(members, forth, wire) == pytest.approx(step_s(members[::-1], back, wire), rel=1e-9)


def test_four_to_two_to_one_to_one_gets_shares_in_that_proportion() -> None:
    members = [Pace(0.01, 1e-3), Pace(0.01, 2e-3), Pace(0.01, 4e-3), Pace(0.01, 4e-3)]

    shares = split(512, members)

    assert shares == [256, 128, 64, 64]
    assert step_s(members, shares) < 0.51 * step_s(members, gangs.uniform(512, 4))


def test_a_slow_network_moves_samples_to_whoever_is_late_with_nothing() -> None:
    """When the first bucket starts a long sum, what counts is when it is ready, not when all is."""
    members = [Pace(0.0, 0.010, 0.0, 0.002), Pace(0.0, 0.010, 0.0, 0.009)]

    compute_bound = split(100, members, Wire(0.01, 0.0))
    network_bound = split(100, members, Wire(0.01, 5.0))

    assert compute_bound == [50, 50]
    assert network_bound[0] > 80


def test_a_share_that_needs_another_part_of_memory_pays_the_base_again() -> None:
    whole, cut = Pace(1.0, 0.1), Pace(1.0, 0.1, at_once=10)

    assert cut.parts(10) == 1 and cut.parts(11) == 2
    assert cut.ready_s(20) == whole.ready_s(20) + 1.0
    assert split(40, [whole, cut]) == [25, 15]


@pytest.mark.parametrize(
    ("batch", "members", "says"),
    [
        (3, [Pace(0, 1)] * 4, "cannot feed 4 members that need 4 samples together: raise the batch to at least 4"),
        (30, [Pace(0, 1, least=16)] * 2, "raise the batch to at least 32"),
        (30, [Pace(0, 1, most=10)] * 2, "these 2 members take at most 20 samples together"),
        (30, [], "without members"),
    ],
)
def test_a_batch_that_cannot_be_shared_says_why(batch: int, members: list[Pace], says: str) -> None:
    with pytest.raises(ShareError, match=says):
        split(batch, members)


def test_the_last_batch_of_an_epoch_may_leave_the_slow_without_a_sample() -> None:
    assert split_small(1, [Pace(0.0, 2.0), Pace(0.0, 1.0), Pace(0.0, 3.0)]) == [0, 1, 0]
    assert sum(split_small(7, [Pace(0.5, 2.0), Pace(0.0, 1.0), Pace(9.0, 3.0)])) == 7


@given(batch=st.integers(1, 3000), speeds=st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_proportional_shares_are_within_one_of_the_exact_ones(batch: int, speeds: list[float]) -> None:
    if batch < len(speeds):
        with pytest.raises(ShareError):
            proportional(batch, speeds)
        return

    shares = proportional(batch, speeds)

    assert sum(shares) == batch and min(shares) >= 1
    exact = [batch * speed / sum(speeds) for speed in speeds]
    lifted = sum(max(0.0, 1 - part) for part in exact)  # a sample for those that would have none
    assert all(abs(share - part) <= 1 + lifted for share, part in zip(shares, exact, strict=True))


@given(batch=st.integers(0, 3000), members=st.integers(1, 9))
def test_uniform_shares_differ_by_one_at_most(batch: int, members: int) -> None:
    shares = gangs.uniform(batch, members)

    assert sum(shares) == batch and max(shares) - min(shares) <= 1


@settings(deadline=None, max_examples=40)
@given(
    members=st.dictionaries(st.sampled_from("abcd"), st.builds(Pace, times, st.floats(0.01, 1)), min_size=1),
    latency=st.floats(0, 2),
)
def test_the_gang_that_is_kept_is_the_fastest_there_is(members: dict[str, Pace], latency: float) -> None:
    wires = {count: Wire(latency * (count - 1)) for count in range(1, 5)}

    kept, verdicts = gangs.worth_it(32, members, wires)

    def seconds(names: tuple[str, ...]) -> float:
        chosen = [members[name] for name in names]
        return step_s(chosen, split(32, chosen, wires[len(names)]), wires[len(names)])

    every = [names for count in range(1, len(members) + 1) for names in itertools.combinations(sorted(members), count)]
    assert seconds(kept) == pytest.approx(min(seconds(names) for names in every))
    assert set(verdicts) == set(members) - set(kept)


def test_a_laptop_that_costs_more_than_it_gives_is_named() -> None:
    members = {"gpu": Pace(0.01, 1e-4), "box": Pace(0.01, 2e-4), "laptop": Pace(0.3, 1e-2)}

    kept, verdicts = gangs.worth_it(512, members, {2: Wire(0.005), 3: Wire(0.01)})

    assert kept == ("box", "gpu")
    assert verdicts["laptop"].startswith("laptop would make a step") and "better as a spare" in verdicts["laptop"]


def test_of_many_machines_only_the_useless_ones_are_left_out() -> None:
    members = {f"m{i:02}": Pace(0.01, 1e-3) for i in range(12)} | {"old": Pace(5.0, 1.0)}

    kept, verdicts = gangs.worth_it(1024, members, {})

    assert len(kept) == 12 and list(verdicts) == ["old"]


def test_the_noise_scale_of_known_gradients_is_found_whatever_the_split() -> None:
    """Gradients of mean (2, 0, …) and variance 1 in each of 40 dimensions: |G|² = 4, S = 40, scale 10."""
    rng = random.Random(4)
    shares = [32, 16, 8, 8]
    noise = Noise()
    for _ in range(3000):
        locals_ = [[(2.0 if d == 0 else 0.0) + rng.gauss(0, 1) / share**0.5 for d in range(40)] for share in shares]
        whole = [sum(s * g[d] for s, g in zip(shares, locals_, strict=True)) / 64 for d in range(40)]
        noise = noise.seen(shares, [sum(x * x for x in g) for g in locals_], sum(x * x for x in whole), keep=0.999)

    assert noise.signal == pytest.approx(4, rel=0.05)
    assert noise.noise == pytest.approx(40, rel=0.05)
    assert noise.scale == pytest.approx(10, rel=0.08)


def test_one_member_alone_says_nothing_of_noise() -> None:
    assert Noise().seen([64], [3.0], 3.0) == Noise()
    assert Noise().seen([64, 0], [3.0, 0.0], 3.0) == Noise()
    assert Noise().scale == 0


def test_a_ring_takes_twice_the_bytes_over_the_slowest_link() -> None:
    assert gangs.ring_s(10**6, 1, bytes_per_s=1e8, delay_s=0.001) == 0
    assert gangs.ring_s(10**8, 4, bytes_per_s=1e8, delay_s=0.001) == pytest.approx(1.506)
