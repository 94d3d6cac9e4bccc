"""Does every training sample come up exactly once an epoch, the same everywhere, and no held-out one ever?"""

import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.domain import order
from potluck.errors import BadInput
from potluck.protocol import Blob, Dataset, Shard

SPLITMIX64 = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # published outputs for seed 1234567
GOLDEN = [11, 9, 10, 5, 6, 8, 7, 3, 0, 2, 4, 1]


def dataset(sizes: list[int], held_out: int = 0) -> Dataset:
    shards = [Shard(Blob("0" * 64, 1), size) for size in sizes]
    return Dataset("test", sum(sizes), shards, [1, 1, 1], held_out=held_out)


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    return dataset(sizes, draw(st.integers(0, sum(sizes) - 1)))


ranges = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120)), max_size=8).map(
    lambda pairs: order.union([(min(pair), max(pair)) for pair in pairs])
)


def samples(positions: order.Ranges, data: Dataset, seed: int) -> list[int]:
    """The numbers of the samples at `positions`: shard 0's first, then shard 1's ..."""
    begins = [sum(shard.samples for shard in data.shards[:i]) for i in range(len(data.shards))]
    train = order.train_sizes(data)
    met = []
    for segment in order.segments(positions, data, seed):
        chosen = order.sample_order(train[segment.shard], seed=seed, epoch=segment.epoch, shard=segment.shard)
        met += [begins[segment.shard] + i for i in chosen[segment.start : segment.stop]]
    return met


def members(positions: order.Ranges) -> set[int]:
    return {position for lo, hi in positions for position in range(lo, hi)}


@given(datasets(), st.integers(0, 2**63), st.integers(0, 3), st.lists(st.integers(0, 10**6), max_size=6))
def test_an_epoch_meets_each_training_sample_once_however_it_is_cut(
    data: Dataset, seed: int, epoch: int, cuts: list[int]
) -> None:
    n = data.train_samples
    lo, hi = epoch * n, (epoch + 1) * n
    ends = sorted({lo, hi, *(lo + cut % n for cut in cuts)})
    units = list(pairwise(ends))
    random.Random(seed).shuffle(units)

    met = [sample for unit in units for sample in samples([unit], data, seed)]

    assert Counter(met) == Counter(range(n))


@given(datasets(), st.integers(0, 2**63), ranges)
def test_shards_needed_are_those_that_the_segments_touch(data: Dataset, seed: int, positions: order.Ranges) -> None:
    touched = list(dict.fromkeys(segment.shard for segment in order.segments(positions, data, seed)))

    assert order.shards_needed(positions, data, seed) == touched
    assert len(samples(positions, data, seed)) == order.count(positions)


def test_the_order_is_the_same_for_ever() -> None:
    assert [order._mix(1234567 + order._GAMMA * (i + 1)) for i in range(3)] == SPLITMIX64
    assert order.permutation(10, 0) == [2, 0, 7, 5, 4, 6, 1, 3, 8, 9]
    assert samples([(0, 12)], dataset([5, 4, 3, 6], held_out=6), seed=1) == GOLDEN


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    data = dataset([50, 50, 50])

    epochs = [samples([(150 * epoch, 150 * (epoch + 1))], data, seed) for epoch in range(4) for seed in range(4)]

    assert len({tuple(epoch) for epoch in epochs}) == 16


def test_a_shard_cut_by_the_held_out_end_is_needed_for_both() -> None:
    data = dataset([10, 10, 10], held_out=15)

    assert order.train_sizes(data) == (10, 5, 0)
    assert sorted(order.shards_needed([(0, 1000)], data, 0)) == [0, 1]
    assert order.shards_held_out(data) == [1, 2]


def test_a_long_range_over_many_shards_is_answered_from_the_shards_alone() -> None:
    data = dataset([341] * 600)

    assert len(order.shards_needed([(0, 100_000)], data, 0)) == 294
    assert len(order.shards_needed([(0, 10**9)], data, 0)) == 600


def test_no_position_without_training_samples() -> None:
    with pytest.raises(BadInput, match="no training samples"):
        order.position_to_epoch(0, 0)
    with pytest.raises(BadInput, match="start at 0"):
        order.position_to_epoch(-1, 5)


def test_the_agent_needs_neither_numpy_nor_torch_for_it() -> None:
    code = "import sys, potluck.domain.order; sys.exit(bool({'numpy', 'torch', 'msgspec'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(ranges, ranges, st.integers(0, 130))
def test_ranges_are_sets_of_positions(a: order.Ranges, b: order.Ranges, k: int) -> None:
    first, rest = order.take(a, k)

    assert members(order.subtract(a, b)) == members(a) - members(b)
    assert members(order.union(a, b)) == members(a) | members(b)
    assert sorted(members(first)) == sorted(members(a))[:k]
    assert sorted(members(rest)) == sorted(members(a))[k:]
    assert order.count(a) == len(members(a))
    for made in (order.subtract(a, b), order.union(a, b), first, rest):
        assert all(lo < hi for lo, hi in made)
        assert made == sorted(made)
    for made in (order.subtract(a, b), order.union(a, b)):
        assert made == order.union(made), "touching ranges are one"
