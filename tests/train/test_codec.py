"""What a codec loses is bounded, carried on by error feedback, and never a surprise to the reader."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from potluck.errors import BadInput, BadUpdate
from potluck.protocol import Layout
from potluck.train import tensorio
from potluck.train.codec import codec, encode_with_feedback, read_update, write_update

NAMES = ["fp32", "bf16", "int8"]
SHAPES = st.lists(
    st.sampled_from([[], [0], [1], [7, 3], [64, 64], [4097], [3, 4096], [65, 64, 2]]), min_size=1, max_size=5
)
HALF = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 1 / 254 * 1.001}


def layout_of(shapes: list[list[int]]) -> Layout:
    return Layout([(f"m.{i}", shape) for i, shape in enumerate(shapes)])


def vector(layout: Layout, seed: int, scale: float = 1e-3) -> Tensor:
    """Values whose size differs from tensor to tensor, as gradients' do."""
    make = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(math.prod(shape), generator=make) * scale * 10 ** torch.randint(-3, 3, (1,), generator=make)
        for _, shape in layout.params
    ]
    return torch.cat(parts)


def allowed(name: str, x: Tensor, layout: Layout) -> Tensor:
    """The largest error of each value: relative to itself, or for int8 to the largest of its block."""
    if name != "int8":
        return x.abs() * HALF[name]
    parts = []
    for part in torch.split(x, [math.prod(shape) for _, shape in layout.params]):
        parts += [
            block.abs().amax().expand(block.numel()) * HALF[name] for block in torch.split(part, 4096) if len(block)
        ]
    return torch.cat(parts) if parts else x


@pytest.mark.parametrize("name", NAMES)
@given(shapes=SHAPES, seed=st.integers(0, 1 << 30), scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e12]))
@settings(max_examples=40, deadline=None)
def test_what_is_decoded_is_near_what_was_encoded(name: str, shapes: list[list[int]], seed: int, scale: float) -> None:
    layout = layout_of(shapes)
    x = vector(layout, seed, scale)

    decoded = codec(name).decode(codec(name).encode(x, layout), layout)

    assert bool(((decoded - x).abs() <= allowed(name, x, layout)).all())


@pytest.mark.parametrize("name", NAMES)
@given(shapes=SHAPES, seed=st.integers(0, 1 << 30))
@settings(max_examples=25, deadline=None)
def test_the_rest_is_what_the_reader_lacks(name: str, shapes: list[list[int]], seed: int) -> None:
    layout = layout_of(shapes)
    x = vector(layout, seed)
    rest = torch.full_like(x, math.nan)

    tensors = codec(name).encode(x, layout, rest)

    assert torch.equal(rest, x - codec(name).decode(tensors, layout))
    plain = codec(name).encode(x, layout)
    assert all(torch.equal(plain[key], tensors[key]) for key in plain)


@pytest.mark.parametrize("name", NAMES)
@given(shapes=SHAPES, seed=st.integers(0, 1 << 30), rounds=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_with_feedback_the_sums_agree(name: str, shapes: list[list[int]], seed: int, rounds: int) -> None:
    layout = layout_of(shapes)
    meant = torch.zeros(layout.param_count, dtype=torch.float64)
    arrived = torch.zeros_like(meant)
    residual = None

    for i in range(rounds):
        delta = vector(layout, seed + i)
        meant += delta
        tensors, residual = encode_with_feedback(codec(name), delta, residual, layout)
        arrived += codec(name).decode(tensors, layout)

    assert residual is not None
    assert torch.allclose(arrived + residual, meant, rtol=1e-5, atol=1e-6)


def test_feedback_leaves_the_callers_delta_and_residual_alone() -> None:
    layout = layout_of([[100]])
    delta, residual = vector(layout, 1), vector(layout, 2)
    before = delta.clone(), residual.clone()

    encode_with_feedback(codec("int8"), delta, residual, layout)

    assert torch.equal(delta, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e31])
def test_a_value_that_is_not_finite_is_refused_by_name(name: str, bad: float) -> None:
    layout = layout_of([[5000], [300]])
    x = vector(layout, 3)
    x[5100] = bad

    with pytest.raises(BadUpdate, match=r"m\.1"):
        codec(name).encode(x, layout)


def test_int8_rounds_halves_to_even_and_keeps_blocks_within_tensors() -> None:
    layout = layout_of([[4], [2]])
    x = torch.tensor([127.0, 0.5, 1.5, -2.5, 254.0, 3.0])

    tensors = codec("int8").encode(x, layout)

    assert tensors["values"].tolist() == [127, 0, 2, -2, 127, 2]
    assert tensors["scales"].tolist() == [1.0, 2.0]


def test_blocks_of_nothing_and_of_next_to_nothing_are_zeros() -> None:
    layout = layout_of([[3], [3]])
    x = torch.tensor([0.0, -0.0, 0.0, 1e-38, -1e-44, 0.0])
    rest = torch.empty_like(x)

    tensors = codec("int8").encode(x, layout, rest)

    assert tensors["values"].tolist() == [0] * 6
    assert tensors["scales"].tolist() == [0.0, 0.0]
    assert torch.equal(rest, x)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 1e30])
def test_a_reader_refuses_impossible_scales(scale: float) -> None:
    layout = layout_of([[10]])
    tensors = codec("int8").encode(vector(layout, 1), layout) | {"scales": torch.tensor([scale])}

    with pytest.raises(BadUpdate, match="scales"):
        codec("int8").decode(tensors, layout)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_reader_refuses_values_that_are_not_finite(name: str) -> None:
    layout = layout_of([[10]])
    tensors = codec(name).encode(vector(layout, 1), layout)
    tensors["values"][3] = math.nan

    with pytest.raises(BadUpdate, match=r"m\.0"):
        codec(name).decode(tensors, layout)


def test_a_reader_refuses_tensors_of_another_layout() -> None:
    tensors = codec("int8").encode(vector(layout_of([[10]]), 1), layout_of([[10]]))

    with pytest.raises(BadUpdate, match="values"):
        codec("int8").decode(tensors, layout_of([[11]]))


def test_an_unknown_codec_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadInput, match="did you mean bf16"):
        codec("bfloat16")


def test_threads_do_not_change_a_bit() -> None:
    layout = layout_of([[300, 4096], [77]])
    x = vector(layout, 5)
    before = torch.get_num_threads()
    seen = []

    for threads in (1, 2):
        torch.set_num_threads(threads)
        tensors, rest = encode_with_feedback(codec("int8"), x, None, layout)
        seen.append((*tensors.values(), rest, codec("int8").decode(tensors, layout)))
    torch.set_num_threads(before)

    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))


# --- files --------------------------------------------------------------------------------------------------------

LAYOUT = Layout([("g.w", [3, 5]), ("g.b", [4097])], [("g.running_mean", [2])], [("g.n", [])])


def write(path: Path, name: str = "int8") -> Path:
    tensors = codec(name).encode(vector(LAYOUT, 1), LAYOUT)
    return write_update(path, tensors, torch.tensor([1.0, 2.0]), torch.tensor([7]), {"b": "2", "a": "1"})


@pytest.mark.parametrize("name", NAMES)
def test_a_file_brings_back_what_was_written(tmp_path: Path, name: str) -> None:
    update = read_update(write(tmp_path / "u", name), LAYOUT, name)

    assert all(torch.equal(update.tensors[k], v) for k, v in codec(name).encode(vector(LAYOUT, 1), LAYOUT).items())
    assert update.buffers.tolist() == [1.0, 2.0]
    assert update.counters.tolist() == [7]
    assert update.metadata == {"a": "1", "b": "2"}


def test_the_same_update_is_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "u").read_bytes() == write(tmp_path / "v").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["u", "v"]


def test_it_is_the_safetensors_that_everybody_reads_and_writes(tmp_path: Path) -> None:
    theirs = load_file(write(tmp_path / "u"))
    save_file(theirs, tmp_path / "v")

    update = read_update(tmp_path / "v", LAYOUT, "int8")

    assert torch.equal(update.tensors["values"], theirs["values"])
    assert torch.equal(update.buffers, theirs["buffers"])


def test_empty_vectors_are_written_too(tmp_path: Path) -> None:
    layout = layout_of([[3]])
    path = write_update(tmp_path / "u", {"values": torch.ones(3)}, torch.zeros(0), torch.zeros(0, dtype=torch.int64))

    update = read_update(path, layout, "fp32")

    assert update.buffers.shape == (0,)
    assert update.counters.shape == (0,)


@pytest.mark.parametrize("cut", [0, 5, 8, 100, -1])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "u")
    path.write_bytes(path.read_bytes()[:cut])

    with pytest.raises(BadUpdate):
        read_update(path, LAYOUT, "int8")


def test_a_small_file_that_claims_terabytes_is_refused_before_allocation(tmp_path: Path) -> None:
    size = 1 << 42
    text = json.dumps({"values": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (tmp_path / "u").write_bytes(len(text).to_bytes(8, "little") + text)

    with pytest.raises(BadUpdate, match="header accounts for"):
        read_update(tmp_path / "u", LAYOUT, "int8")
    with pytest.raises(BadUpdate, match="header accounts for"):
        tensorio.load(tmp_path / "u")


def test_buffers_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    tensors = codec("int8").encode(vector(LAYOUT, 1), LAYOUT)
    path = write_update(tmp_path / "u", tensors, torch.tensor([1.0, math.nan]), torch.tensor([7]))

    with pytest.raises(BadUpdate, match=r"g\.running_mean"):
        read_update(path, LAYOUT, "int8")
