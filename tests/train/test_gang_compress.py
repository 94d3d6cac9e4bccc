"""Gradients in fewer bytes: what arrives, what is kept for the next time, and who says that it is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from potluck.domain import gangs
from potluck.domain.balance import Balancer, Fit
from potluck.domain.gangs import Pace, Wire
from potluck.errors import BadInput
from potluck.train.gang import groups, healing
from potluck.train.gang.advice import Adviser
from potluck.train.gang.compress import WHOLE_STEPS, Compression
from potluck.train.gang.engine import Card
from potluck.train.gang.profile import Profile

SHAPES = [[torch.Size([40]), torch.Size([60, 50]), torch.Size([7, 3])], [torch.Size([30, 3, 40])]]
SIZES = [40 + 3000 + 21, 3600]


def step(members: list[Compression], gradients: list[list[Tensor]], *, commits: bool = True) -> list[list[Tensor]]:
    """One step of all members in this process: what each has in the end."""
    flats = [[flat.clone() for flat in own] for own in gradients]
    for begin in (
        lambda codec, own, put: [codec.begin(i, f, put) for i, f in enumerate(own)],
        lambda codec, own, put: codec.second(put),
    ):
        sent: list[list[Tensor]] = [[] for _ in members]
        for member, own, mine in zip(members, flats, sent, strict=True):
            begin(member.codec, own, mine.append)
        for tensors in zip(*sent, strict=True):
            total = torch.stack([t.double() for t in tensors]).sum(0)
            for tensor in tensors:
                tensor.copy_(total)
    for member, own in zip(members, flats, strict=True):
        for i, flat in enumerate(own):
            member.codec.end(i, flat)
        if commits:
            member.codec.settle()
    return flats


def random_gradients(count: int, seed: int, scale: float = 1.0) -> list[list[Tensor]]:
    torch.manual_seed(seed)
    return [[torch.randn(size) * scale for size in SIZES] for _ in range(count)]


def off(found: list[Tensor], gradients: list[list[Tensor]]) -> float:
    exact = [torch.stack(column).sum(0) for column in zip(*gradients, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_half_precision_is_right_to_three_digits_whatever_the_size_of_the_gradients(scale: float) -> None:
    members = [Compression("fp16", SHAPES) for _ in range(3)]

    errors = []
    for i in range(4):
        gradients = random_gradients(3, i, scale)
        found = step(members, gradients)
        errors.append(off(found[0], gradients))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))

    assert errors[0] < 1e-6 < max(errors[1:]) < 1e-3


def test_an_explosion_is_cut_in_half_precision_and_nan_stays_nan() -> None:
    members = [Compression("fp16", SHAPES) for _ in range(2)]
    step(members, random_gradients(2, 0))

    found = step(members, random_gradients(2, 1, 1e7))
    poisoned = random_gradients(2, 2)
    poisoned[1][0][5] = float("nan")
    after = step(members, poisoned, commits=False)

    assert 10 < float(found[0][0].abs().max()) < 1e4
    assert bool(after[0][0][5].isnan()) and bool(after[0][1].isfinite().all())


def test_thin_factors_are_enough_for_a_gradient_that_is_thin() -> None:
    members = [Compression("powersgd", SHAPES) for _ in range(3)]
    torch.manual_seed(5)
    left, right = torch.randn(60, 3), torch.randn(3, 50)
    for _ in range(WHOLE_STEPS + 3):
        gradients = random_gradients(3, 1)
        for own in gradients:
            own[0][40:3040] = (left @ torch.diag(torch.rand(3)) @ right).reshape(-1)
            own[1].zero_()
        found = step(members, gradients)

    expected = sum(own[0] for own in gradients)
    assert float((found[0][0] - expected).norm() / expected.norm()) < 5e-3
    assert torch.equal(found[0][0][:40], found[1][0][:40])
    assert float((found[0][0][:40] - expected[:40]).abs().max()) < 1e-5


def test_what_thin_factors_leave_out_comes_later() -> None:
    members = [Compression("powersgd", SHAPES) for _ in range(2)]
    gradients = random_gradients(2, 3)
    for _ in range(WHOLE_STEPS):
        step(members, gradients)

    arrived, errors = [torch.zeros(size) for size in SIZES], []
    for i in range(1, 121):
        found = step(members, gradients)
        for total, flat in zip(arrived, found[0], strict=True):
            total += flat
        if i in (1, 120):
            errors.append(off([total / i for total in arrived], gradients))

    assert errors[0] > 0.5 and errors[1] < 0.2


def test_a_step_that_was_given_up_leaves_no_trace_and_a_newcomer_sends_what_the_others_send(tmp_path: Any) -> None:
    members = [Compression("powersgd", SHAPES) for _ in range(2)]
    for i in range(WHOLE_STEPS + 2):
        step(members, random_gradients(2, i))
    step(members, random_gradients(2, 50), commits=False)
    healing.save(tmp_path / "state", {"c": members[0].state_dict()})
    newcomer = Compression("powersgd", SHAPES)
    newcomer.load_state_dict(healing.load(tmp_path / "state")["c"])

    found = step([*members, newcomer], random_gradients(3, 51))

    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_how_much_each_way_sends() -> None:
    compression = Compression("none", SHAPES)
    size = sum(SIZES) * 4

    assert compression.part("fp16", size, 4) == 0.5
    assert compression.part("none", size, 4) == 1.0
    assert 0.05 < compression.part("powersgd", size, 4) < 0.2
    with pytest.raises(BadInput, match="compress=`zip`"):
        Compression("zip", SHAPES)


# --- advice --------------------------------------------------------------------------------------------------------


def gang_of_two(wire: Wire, asked: str) -> tuple[Adviser, Compression, list[tuple[str, str]], Any]:
    balancer = Balancer(64, wire=wire)
    balancer.members_changed(["a", "b"])
    for name in "ab":
        balancer.fits[name] = Fit(Pace(0.01, 0.001))
    compression = Compression(asked, SHAPES)
    reducer = SimpleNamespace(
        compression=compression,
        size_bytes=26_000_000,
        part_sent=lambda way: compression.part(way, sum(SIZES) * 4, 4),
    )
    state = SimpleNamespace(balancer=balancer, cursor=SimpleNamespace(step=50))
    said: list[tuple[str, str]] = []
    adviser = Adviser(state, reducer, Profile(), lambda kind, text: said.append((kind, text)))  # type: ignore[arg-type]
    return adviser, compression, said, state


def test_a_gang_that_waits_for_the_network_is_told_so_once_with_figures() -> None:
    adviser, compression, said, _ = gang_of_two(Wire(0.4, 0.0), "none")

    adviser.look()
    adviser.look()

    ((kind, text),) = said
    assert kind == "profile" and compression.now == "none"
    assert "waiting for the sum of 26.0 MB takes 90% of a step (400 of 442 ms)" in text
    assert 'could make it 242 ms with "fp16", 108 ms with "powersgd"' in text
    assert "pool mode would be faster: by themselves these machines compute 1730 samples/s" in text


def test_a_fast_network_is_not_worth_a_word() -> None:
    adviser, _, said, _ = gang_of_two(Wire(0.005, 0.0), "none")

    adviser.look()

    assert said == []


def test_auto_changes_over_by_itself_and_says_so() -> None:
    adviser, compression, said, state = gang_of_two(Wire(0.4, 0.0), "auto")
    state.cursor.step = 49
    adviser.look()
    assert compression.now == "none"

    state.cursor.step = 50
    adviser.look()

    assert compression.now == "fp16" and said[0][0] == "compress"
    assert said[0][1].endswith("from now on they travel as fp16")
    newcomer = Compression("auto", SHAPES)
    newcomer.load_state_dict(compression.state_dict())
    assert newcomer.now == "fp16"


def test_pool_mode_is_only_spoken_of_where_no_compression_would_do() -> None:
    paces, shares = [Pace(0.01, 0.001)] * 2, [32, 32]

    much = gangs.wire_verdict(shares, paces, Wire(0.03, 0.0), size_bytes=50_000, ways={"fp16": 0.5, "powersgd": 0.05})

    assert much.is_bound and "the sum of 50 kB takes 42%" in much.sentence
    assert "pool mode" not in much.sentence and set(much.offers) == {"fp16", "powersgd"}
    assert much.offers["powersgd"] < much.offers["fp16"] < much.step_s


# --- which network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "has_nccl", "expected"),
    [
        (["cuda A", "cuda B"], True, "nccl"),
        (["cuda A", "cuda B"], False, "gloo"),
        (["cuda A", "cpu"], True, "gloo"),
        (["cuda A", "cuda A"], True, "gloo"),  # two processes on one GPU: NCCL refuses
        (["cuda A", ""], True, "gloo"),  # a model on two devices
        (["cpu", "cpu"], True, "gloo"),
        (["cuda A"], True, "gloo"),
    ],
)
def test_nccl_is_for_gangs_in_which_everybody_has_a_gpu(devices: list[str], has_nccl: bool, expected: str) -> None:
    cards = [Card(str(i), 0, {"device": device}) for i, device in enumerate(devices)]

    assert groups.backend(cards, has_nccl=has_nccl) == expected
