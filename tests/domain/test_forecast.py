"""Does the forecast say what the model of gangs.py says, for measurements as they come?"""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.domain.forecast import Solo, Way, forecast

FAST = Way(True, 0.0002, 1e9)
SLOW = Way(True, 0.02, 1e6)


def solo(samples_per_s: float, fixed_s: float = 0.0, gradient_bytes: int = 400_000) -> Solo:
    return Solo(fixed_s, 1 / samples_per_s, samples_per_s, gradient_bytes, "cpu")


def ways(names: str, way: Way) -> dict[tuple[str, str], Way]:
    return dict.fromkeys(permutations(names, 2), way)


def test_machines_of_4_2_1_1_reach_nearly_the_sum_of_what_they_do_alone() -> None:
    found = forecast(512, {"a": solo(4000), "b": solo(2000), "c": solo(1000), "d": solo(1000)}, ways("abcd", FAST))

    assert found.shares == {"a": 256, "b": 128, "c": 64, "d": 64}
    assert found.samples_per_s / found.alone_per_s > 0.97
    assert found.uniform_per_s / found.alone_per_s == pytest.approx(0.5, abs=0.02)
    assert found.verdicts == {}


def test_a_machine_that_costs_more_than_it_gives_is_better_left_out() -> None:
    found = forecast(64, {"a": solo(4000), "b": solo(4000), "slow": solo(50, fixed_s=0.5)}, {})

    assert set(found.shares) == {"a", "b"}
    assert "slow would make a step" in found.verdicts["slow"]


def test_a_slow_network_makes_one_machine_faster_than_any_gang() -> None:
    found = forecast(64, {"a": solo(4000), "b": solo(4000)}, ways("ab", SLOW))

    assert len(found.shares) == 1
    assert found.network_s == pytest.approx(0)


def test_what_the_network_takes_is_told_with_the_slowest_pair() -> None:
    some = ways("abc", FAST) | {("c", "a"): Way(True, 0.001, 20e6)}

    found = forecast(4096, {name: solo(1000, gradient_bytes=4_000_000) for name in "abc"}, some)

    assert found.slowest == ("c", "a")
    assert 0 < found.network_s < found.step_s


def test_of_two_machines_that_do_not_reach_one_another_the_slower_stays_out() -> None:
    some = ways("abc", FAST) | {("a", "b"): Way(False, reason="refused")}

    found = forecast(512, {"a": solo(1000), "b": solo(3000), "c": solo(1000)}, some)

    assert set(found.shares) == {"b", "c"}
    assert found.verdicts == {"a": "a cannot reach b (refused): a would have to stay out"}


paces = st.builds(
    lambda fixed, per, size: Solo(fixed, per, 1 / per, size),
    st.floats(0, 1),
    st.floats(1e-6, 1),
    st.integers(0, 10**9),
)


@given(
    st.dictionaries(st.sampled_from("abcde"), paces, min_size=1),
    st.integers(5, 5000),
    st.dictionaries(
        st.tuples(st.sampled_from("abcde"), st.sampled_from("abcde")).filter(lambda pair: pair[0] != pair[1]),
        st.builds(Way, st.booleans(), st.floats(0, 1), st.just(0.0) | st.floats(1e3, 1e10)),
    ),
)
def test_the_shares_sum_to_the_batch_and_equal_ones_are_never_better(
    solos: dict[str, Solo], batch: int, some: dict[tuple[str, str], Way]
) -> None:
    found = forecast(batch, solos, some)

    assert sum(found.shares.values()) == batch
    assert found.step_s > 0 and found.network_s >= -1e-12
    assert found.samples_per_s >= found.uniform_per_s * (1 - 1e-9)
    assert set(found.shares) | set(found.verdicts) == set(solos)
