"""Does the training child get the samples that its positions mean, whoever cut them?"""

import gc
import hashlib
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from potluck.domain import order
from potluck.errors import DataError
from potluck.protocol import Blob, Dataset, Shard
from potluck.train.data import ShardReader, to_float


def written(folder: Path, sizes: list[int], held_out: int = 0, labels: int = 0) -> tuple[list[str], Dataset]:
    """A data set whose sample `i` is the two bytes of `i`, and its files."""
    paths, shards, begin = [], [], 0
    for number, size in enumerate(sizes):
        ids = np.arange(begin, begin + size)
        tensors = {"x": np.stack([ids // 256, ids % 256], axis=1).astype(np.uint8).reshape(size, 1, 1, 2)}
        if labels:
            tensors["y"] = (ids % labels).astype(np.int64)
        path = folder / f"{number}.safetensors"
        save_file(tensors, path)
        paths.append(str(path))
        shards.append(Shard(Blob(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size), size))
        begin += size
    names = [str(i) for i in range(labels)]
    return paths, Dataset("test", begin, shards, [1, 1, 2], labels=names, held_out=held_out)


def ids(x: torch.Tensor) -> list[int]:
    return (x[:, 0, 0, 0].int() * 256 + x[:, 0, 0, 1].int()).tolist()


SIZES = [40, 300, 7, 120, 120, 33]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 569), max_size=6),
    hole=st.tuples(st.integers(0, 569), st.integers(0, 569)).map(sorted),
    batch_size=st.integers(1, 97),
)
def test_units_and_the_holes_they_left_meet_each_sample_once(
    tmp_path_factory: pytest.TempPathFactory, seed: int, cuts: list[int], hole: list[int], batch_size: int
) -> None:
    paths, data = written(tmp_path_factory.mktemp("shards"), SIZES, held_out=50)
    n = data.train_samples
    ends = sorted({0, n, *cuts})
    whole = list(pairwise(ends))
    left = [(hole[0], hole[1])] if hole[0] < hole[1] else []
    units = [order.subtract([unit], left) for unit in whole] + [left]
    met: Counter[int] = Counter()

    for unit in units:
        needed = order.shards_needed(unit, data, seed)
        here = [path if i in needed else "" for i, path in enumerate(paths)]
        reader = ShardReader(here, data, seed)
        batches = list(reader.batches(unit, batch_size))
        met.update(i for batch in batches for i in ids(batch.x))
        assert [r for batch in batches for r in batch.positions] == [] or order.union(
            *(batch.positions for batch in batches)
        ) == order.union(unit)
        assert set(reader.opened) == set(needed)

    assert met == Counter(range(n))


def test_batches_follow_the_positions_across_epochs(tmp_path: Path) -> None:
    paths, data = written(tmp_path, [30, 30], labels=7)
    reader = ShardReader(paths, data, seed=3)

    batches = list(reader.batches([(50, 65), (119, 130)], 8))

    assert [len(batch) for batch in batches] == [8, 8, 8, 2]
    assert batches[1].positions == [(58, 65), (119, 120)]
    one_by_one = [ids(b.x)[0] for b in reader.batches([(50, 65), (119, 130)], 1)]
    assert [i for batch in batches for i in ids(batch.x)] == one_by_one
    for batch in batches:
        assert batch.y is not None
        assert batch.y.tolist() == [i % 7 for i in ids(batch.x)]
        assert batch.x.dtype == torch.uint8
        assert batch.y.dtype == torch.int64


def test_held_out_samples_are_the_last_ones(tmp_path: Path) -> None:
    paths, data = written(tmp_path, [30, 30, 30], held_out=40, labels=3)
    reader = ShardReader(["", *paths[1:]], data, seed=0)

    everything, some = reader.held_out(), reader.held_out(12)

    assert ids(everything.x) == list(range(50, 90))
    assert ids(some.x) == list(range(50, 62))
    assert some.y is not None
    assert some.y.tolist() == [i % 3 for i in range(50, 62)]


def test_nothing_held_out_is_an_empty_batch(tmp_path: Path) -> None:
    paths, data = written(tmp_path, [5])

    batch = ShardReader(paths, data, seed=0).held_out()

    assert batch.x.shape == (0, 1, 1, 2)
    assert batch.y is None


def test_few_shards_are_kept_in_memory(tmp_path: Path) -> None:
    paths, data = written(tmp_path, [10] * 12)
    reader = ShardReader(paths, data, seed=0)

    list(reader.batches([(0, 120)], 7))

    assert sorted(reader.opened) == list(range(12)), "each is read once an epoch"
    assert len(reader._shards) <= 4


def test_leaving_early_ends_the_thread(tmp_path: Path) -> None:
    paths, data = written(tmp_path, [100])
    before = set(threading.enumerate())
    batches = ShardReader(paths, data, seed=0).batches([(0, 100_000)], 4)
    next(batches)

    del batches
    gc.collect()

    assert set(threading.enumerate()) == before


def test_a_shard_that_was_not_fetched_is_named(tmp_path: Path) -> None:
    paths, data = written(tmp_path, [10, 10])

    with pytest.raises(DataError, match="shard 1 of test is needed"):
        list(ShardReader([paths[0], ""], data, seed=0).batches([(0, 20)], 4))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"x": np.zeros((10, 1, 2, 2), np.uint8)}, "should hold uint8"),
        ({"x": np.zeros((9, 1, 1, 2), np.uint8)}, "should hold uint8"),
        ({"x": np.zeros((10, 1, 1, 2), np.float32)}, "should hold uint8"),
        ({"z": np.zeros(1)}, "not nothing"),
        ({"x": np.zeros((10, 1, 1, 2), np.uint8)}, "lacks its 10 class numbers"),
        ({"x": np.zeros((10, 1, 1, 2), np.uint8), "y": np.full(10, 5)}, "outside 0..2"),
    ],
)
def test_a_shard_that_is_not_what_the_data_set_says(tmp_path: Path, broken: dict[str, np.ndarray], said: str) -> None:
    paths, data = written(tmp_path, [10], labels=3)
    save_file(broken, paths[0])

    with pytest.raises(DataError, match=said):
        next(ShardReader(paths, data, seed=0).batches([(0, 4)], 4))


def test_a_shard_of_rubbish(tmp_path: Path) -> None:
    paths, data = written(tmp_path, [10])
    Path(paths[0]).write_bytes(b"rubbish")

    with pytest.raises(DataError, match="shard 0 of test cannot be read"):
        next(ShardReader(paths, data, seed=0).batches([(0, 4)], 4))


def test_pixels_become_floats_between_minus_one_and_one() -> None:
    x = to_float(torch.tensor([[0, 255, 51]], dtype=torch.uint8), "cpu")

    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.tensor([[-1.0, 1.0, -0.6]]))
