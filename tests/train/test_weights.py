"""Modules to one flat vector and back; every replica arrives at the merger's bits."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from potluck.errors import BadUpdate, PotluckError, RecipeError
from potluck.protocol import WeightFile
from potluck.train.codec import codec, encode_with_feedback, write_update
from potluck.train.weights import (
    Weights,
    apply_chain,
    gather,
    layout_of,
    load_snapshot,
    load_state,
    save_snapshot,
    save_state,
    scatter,
)


class Tied(nn.Module):
    """Everything that makes a layout hard: ties, frozen and half-precision parts, buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.short = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.ones(2, 2, dtype=torch.float16))
        self.register_buffer("cache", torch.ones(9), persistent=False)


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    return {"a": Tied(), "b": nn.Sequential(conv, nn.BatchNorm2d(8))}


def test_the_layout_names_each_tensor_once_and_leaves_out_what_is_not_persistent() -> None:
    layout = layout_of(models())

    assert [name for name, _ in layout.params] == [
        "a.frozen",
        "a.short",
        "a.scalar",
        "a.embed.weight",
        "a.norm.weight",
        "a.norm.bias",
        "b.0.weight",
        "b.0.bias",
        "b.1.weight",
        "b.1.bias",
    ]
    assert [name for name, _ in layout.buffers] == [
        "a.table",
        "a.norm.running_mean",
        "a.norm.running_var",
        "b.1.running_mean",
        "b.1.running_var",
    ]
    assert [name for name, _ in layout.counters] == [
        "a.mask",
        "a.norm.num_batches_tracked",
        "b.1.num_batches_tracked",
    ]
    assert dict(layout.params)["a.scalar"] == []


def test_a_parameter_shared_by_two_models_counts_once() -> None:
    one = nn.Linear(2, 2)

    assert layout_of({"a": one, "b": one}).param_count == 6


def test_what_was_gathered_is_scattered_into_another_copy() -> None:
    first, second = models(), models()
    layout = layout_of(first)
    weights = gather(first, layout)
    for vector in (weights.params, weights.buffers):
        vector.copy_(torch.arange(vector.numel()) % 100)  # exact in fp16 and bf16 too
    weights.counters.copy_(torch.tensor([1, 0, 5, 6]))

    scatter(weights, second, layout)

    assert gather(second, layout).sha256() == weights.sha256()
    assert second["a"].norm.num_batches_tracked.item() == 5
    assert second["a"].mask.dtype == torch.bool
    assert second["b"][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert second["b"][0].weight[0, 1, 0, 0].item() == weights.params[_start(layout, "b.0.weight") + 9].item()


def _start(layout: object, name: str) -> int:
    start = 0
    for found, shape in layout.params:  # type: ignore[attr-defined]
        if found == name:
            return start
        start += math.prod(shape)
    raise KeyError(name)


def test_scatter_keeps_the_tie_and_the_optimizers_hold() -> None:
    nets = models()
    layout = layout_of(nets)
    parameters = list(nets["a"].parameters())
    optimizer = torch.optim.SGD(nets["a"].parameters(), lr=1.0)
    weights = gather(nets, layout)
    weights.params.zero_()

    scatter(weights, nets, layout)
    nets["a"].embed.weight.grad = torch.ones(5, 4)
    optimizer.step()

    assert all(x is y for x, y in zip(parameters, nets["a"].parameters(), strict=True))
    assert nets["a"].head.weight.tolist() == [[-1.0] * 4] * 5


def test_gather_into_given_weights_allocates_none() -> None:
    nets = models()
    layout = layout_of(nets)
    given = Weights.zeros(layout)

    assert gather(nets, layout, given) is given
    assert given.sha256() == gather(nets, layout).sha256()


def test_a_gathered_vector_does_not_follow_the_module() -> None:
    nets = models()
    layout = layout_of(nets)
    weights = gather(nets, layout)
    before = weights.sha256()

    with torch.no_grad():
        nets["a"].scalar.add_(1)

    assert weights.sha256() == before


def test_a_recipe_that_does_not_fit_the_run_is_told_which_tensor() -> None:
    layout = layout_of({"m": nn.Linear(3, 2)})
    weights = Weights.zeros(layout)

    with pytest.raises(RecipeError, match=r"m\.weight has the shape \[2, 4\] here and \[2, 3\]"):
        scatter(weights, {"m": nn.Linear(4, 2)}, layout)
    with pytest.raises(RecipeError, match=r"m\.bias, this recipe has none"):
        scatter(weights, {"m": nn.Linear(3, 2, bias=False)}, layout)
    with pytest.raises(PotluckError, match="another model"):
        scatter(Weights.zeros(layout_of({"m": nn.Linear(9, 9)})), {"m": nn.Linear(3, 2)}, layout)


def test_lazy_and_integer_parameters_and_empty_recipes_are_refused() -> None:
    odd = nn.Module()
    odd.q = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)

    for nets, says in [
        ({"m": nn.LazyLinear(3)}, "lazy"),
        ({"m": odd}, r"m\.q"),
        ({"m": nn.ReLU()}, "nothing to train"),
    ]:
        with pytest.raises(RecipeError, match=says):
            layout_of(nets)


def test_the_hash_is_of_the_canonical_bytes() -> None:
    import hashlib
    import struct

    weights = Weights(torch.tensor([1.5, -0.0]), torch.tensor([2.0]), torch.tensor([3]))

    assert weights.sha256() == hashlib.sha256(struct.pack("<fffq", 1.5, -0.0, 2.0, 3)).hexdigest()
    assert Weights(torch.ones(1), torch.zeros(0), torch.zeros(0, dtype=torch.int64)).sha256()


def test_state_files_are_checked_against_the_layout(tmp_path: Path) -> None:
    layout = layout_of({"m": nn.Linear(3, 2)})
    save_state(tmp_path / "s", {"residual": torch.zeros(8), "adam_t": torch.tensor([4])})
    save_state(tmp_path / "t", {"ema": torch.zeros(7)})

    assert load_state(tmp_path / "s", layout)["adam_t"].item() == 4
    with pytest.raises(BadUpdate, match="ema"):
        load_state(tmp_path / "t", layout)


# --- chains -------------------------------------------------------------------------------------------------------


def chain(folder: Path, links: int, name: str = "int8") -> tuple[list[WeightFile], list[str]]:
    """A snapshot of version 0, deltas to version `links`, and a snapshot of each; hashes by version."""
    nets = models()
    layout = layout_of(nets)
    now = gather(nets, layout)
    files = [WeightFile("snapshot", 0, "fp32", str(save_snapshot(folder / "s0", now)), now.sha256())]
    residual = None
    for version in range(1, links + 1):
        torch.manual_seed(version)
        tensors, residual = encode_with_feedback(codec(name), torch.randn_like(now.params) * 0.01, residual, layout)
        buffers, counters = torch.rand_like(now.buffers), now.counters + 1
        path = write_update(folder / f"d{version}", tensors, buffers, counters)
        now = Weights(now.params + codec(name).decode(tensors, layout), buffers, counters)
        save_snapshot(folder / f"s{version}", now)
        files.append(WeightFile("delta", version, name, str(path), now.sha256()))
    return files, [file.weights_sha256 for file in files]


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8"])
def test_a_chain_of_deltas_arrives_at_the_snapshot(tmp_path: Path, name: str) -> None:
    layout = layout_of(models())
    files, hashes = chain(tmp_path, 3, name)

    whole = apply_chain(None, files, layout)
    half = apply_chain(apply_chain(None, files[:2], layout), files[2:], layout)

    assert whole.sha256() == half.sha256() == load_snapshot(tmp_path / "s3", layout).sha256() == hashes[3]


def test_a_chain_leaves_the_weights_it_started_from_alone(tmp_path: Path) -> None:
    layout = layout_of(models())
    files, hashes = chain(tmp_path, 2)
    start = apply_chain(None, files[:1], layout)

    apply_chain(start, files[1:], layout)

    assert start.sha256() == hashes[0]


def test_an_empty_chain_is_a_copy_of_what_there_is() -> None:
    layout = layout_of(models())
    weights = Weights.zeros(layout)

    copy = apply_chain(weights, [], layout)

    assert copy is not weights
    assert copy.sha256() == weights.sha256()


def test_a_broken_chain_is_refused(tmp_path: Path) -> None:
    layout = layout_of(models())
    files, _ = chain(tmp_path, 3)

    with pytest.raises(BadUpdate, match="another hash"):
        apply_chain(Weights.zeros(layout), files[1:], layout)
    with pytest.raises(PotluckError, match="jumps from version 1 to 3"):
        apply_chain(None, [files[0], files[1], files[3]], layout)
    with pytest.raises(PotluckError, match="no weights to add it to"):
        apply_chain(None, files[1:], layout)
    with pytest.raises(PotluckError, match="no weights yet"):
        apply_chain(None, [], layout)
