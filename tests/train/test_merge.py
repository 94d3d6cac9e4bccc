"""The laws of the merge: the same bits for everybody, no update counts too much, and what is sent is what is held."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from potluck.errors import BadInput, PotluckError
from potluck.protocol import Blob, Layout, MergeInput, MergePolicy
from potluck.train.codec import codec, write_update
from potluck.train.merge import MergeOutcome, damping, ema_decay, initial_state, merge
from potluck.train.reduce import dot
from potluck.train.weights import Weights, advance

LAYOUT = Layout(
    [("g.w", [70, 70]), ("g.b", [11]), ("d.w", [5, 4])],
    [("g.bn.running_mean", [3]), ("g.bn.running_var", [3]), ("g.shift", [2])],
    [("g.bn.num_batches_tracked", []), ("g.ids", [2])],
)
N = LAYOUT.param_count
EXACT = MergePolicy(codec="fp32", clip_to_median=False)


def base() -> Weights:
    make = torch.Generator().manual_seed(1)
    return Weights(
        torch.randn(N, generator=make),
        torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 4.0, 8.0]),
        torch.tensor([10, 3, 4]),
    )


def noise(seed: int, size: float = 0.01) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * size


Maker = Callable[..., tuple[MergeInput, Path]]


@pytest.fixture
def update(tmp_path: Path) -> Maker:
    """Writes an update file; returns it as an input of the merge."""

    def make(
        task_id: int,
        delta: Tensor,
        *,
        samples: int = 64,
        base_version: int = 7,
        name: str = "fp32",
        buffers: Tensor | None = None,
        counters: Tensor | None = None,
    ) -> tuple[MergeInput, Path]:
        path = tmp_path / f"u{task_id}"
        write_update(
            path,
            codec(name).encode(delta, LAYOUT),
            base().buffers if buffers is None else buffers,
            base().counters if counters is None else counters,
        )
        return MergeInput(task_id, Blob("", 0), name, base_version, samples, steps=samples // 32), path

    return make


def run(
    inputs: list[tuple[MergeInput, Path]],
    policy: MergePolicy = EXACT,
    *,
    active: int = 0,
    applied: int = 0,
    state: dict[str, Tensor] | None = None,
    start: Weights | None = None,
) -> MergeOutcome:
    start = start or base()
    return merge(
        start,
        initial_state(start, policy) if state is None else state,
        inputs,
        base_version=7,
        active=active,
        policy=policy,
        applied_samples=applied,
        layout=LAYOUT,
    )


def step(outcome: MergeOutcome) -> Tensor:
    return codec("fp32").decode(outcome.delta, LAYOUT)


# --- determinism --------------------------------------------------------------------------------------------------

POLICIES = [
    MergePolicy(ema_decay=0.9),
    MergePolicy(codec="bf16", outer="nesterov", outer_lr=0.7, momentum=0.9),
    MergePolicy(codec="fp32", outer="adam", outer_lr=2e-4),
]


def fingerprint(outcome: MergeOutcome) -> tuple[object, ...]:
    state = {name: tensor.numpy().tobytes() for name, tensor in outcome.state.items()}
    delta = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in outcome.delta.items()}
    return outcome.weights.sha256(), state, delta, outcome.verdicts, outcome.metrics


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.outer)
def test_the_order_of_arrival_does_not_change_a_bit(update: Maker, policy: MergePolicy) -> None:
    inputs = [update(i, noise(i), samples=32 * (i + 1), base_version=7 - i % 2, name="int8") for i in range(4)]

    seen = [fingerprint(run(list(order), policy)) for order in itertools.permutations(inputs)]

    assert all(one == seen[0] for one in seen)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.outer)
def test_the_number_of_threads_does_not_change_a_bit(update: Maker, policy: MergePolicy, tmp_path: Path) -> None:
    layout = Layout([("m.w", [400_000]), ("m.v", [3])])
    start = Weights(noise_of(400_003, 1), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    inputs = []
    for i in range(3):
        tensors = codec("int8").encode(noise_of(400_003, 10 + i), layout)
        inputs.append((MergeInput(i, Blob("", 0), "int8", 0, 64, 2), tmp_path / f"big{i}"))
        write_update(inputs[i][1], tensors, start.buffers, start.counters)
    before = torch.get_num_threads()
    seen = []

    for threads in (1, 2):
        torch.set_num_threads(threads)
        outcome = merge(
            start,
            initial_state(start, policy),
            inputs,
            base_version=0,
            active=4,
            policy=policy,
            applied_samples=0,
            layout=layout,
        )
        seen.append(fingerprint(outcome))
    torch.set_num_threads(before)

    assert seen[0] == seen[1]


def noise_of(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_the_merge_leaves_what_it_was_given_alone(update: Maker) -> None:
    policy = MergePolicy(outer="nesterov", momentum=0.5, ema_decay=0.9)
    start = base()
    state = run([update(1, noise(1)), update(2, noise(2))], policy).state
    before = start.sha256(), {name: tensor.clone() for name, tensor in state.items()}

    run([update(3, noise(3))], policy, state=state, start=start)

    assert start.sha256() == before[0]
    assert all(torch.equal(state[name], before[1][name]) for name in before[1])


def grid(size: int, seed: int) -> Tensor:
    """The same values on every machine, without a random generator."""
    return ((torch.arange(size) * 7919 + seed * 104729) % 2003 - 1001).float() / 1001


GOLDEN = {
    "average": "7c7c7936c93616cc39a9c4518c45111887ce9ab0753fe77b00edb1de68d26634",
    "nesterov": "a5456b80e1a046c6425e08530d813f00557a6b0f6831d3563ff0be746fa88d6e",
    "adam": "78044209069ff8eee314c79a615b3c16f7e051792ae52ba3cba8513baf75312c",
}


@pytest.mark.parametrize("outer", list(GOLDEN))
def test_golden(update: Maker, outer: str) -> None:
    """If this fails, versions are no longer those that older code makes of the same updates: replay is broken."""
    start = Weights(grid(N, 0), grid(8, 1).abs(), torch.tensor([10, 3, 4]))
    policy = MergePolicy(outer=outer, outer_lr=0.7, momentum=0.9, ema_decay=0.9, codec="int8")
    state = initial_state(start, policy)

    for version in range(2):
        inputs = [
            update(
                10 * version + i,
                grid(N, 10 * version + i + 2) * 0.01 * (5 if i == 3 else 1),
                samples=64 + 32 * i,
                base_version=7 - i % 2,
                name=["int8", "bf16", "fp32", "int8"][i],
                buffers=grid(8, 20 + i).abs(),
                counters=torch.tensor([10 + i, 3, 4]),
            )
            for i in range(4)
        ]
        outcome = run(inputs, policy, active=5, applied=1000 * version, state=state, start=start)
        start, state = outcome.weights, outcome.state

    assert start.sha256() == GOLDEN[outer]


@pytest.mark.slow
def test_a_cpu_without_vector_units_makes_the_same_versions() -> None:
    """torch's kernels for the oldest CPUs, which know no fused multiply-add, against those that this one has."""
    old = os.environ | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}

    golden = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "golden"],
        env=old,
        capture_output=True,
        text=True,
    )

    assert golden.returncode == 0, golden.stdout[-2000:]


def test_a_dot_product_is_near_the_exact_one_for_all_lengths() -> None:
    for size in (0, 1, 63, 64, 65, 1000, 65_536, 65_537, 200_001):
        a, b = noise_of(size, 1), noise_of(size, 2)

        exact = math.fsum((a.double() * b.double()).tolist())

        assert dot(a, b) == pytest.approx(exact, rel=1e-12, abs=1e-12)
        assert dot(a, a) == pytest.approx(math.fsum((a.double() ** 2).tolist()), rel=1e-13)


# --- weighting and steps ------------------------------------------------------------------------------------------


def test_updates_count_by_their_samples(update: Maker) -> None:
    a, b = noise(1), noise(2)

    outcome = run([update(1, a, samples=300), update(2, b, samples=100)])

    assert torch.allclose(step(outcome), 0.75 * a + 0.25 * b, atol=1e-7)
    assert [v.weight for v in outcome.verdicts] == [0.75, 0.25]


@pytest.mark.parametrize(("active", "part"), [(0, 1.0), (2, 1.0), (4, 0.5), (8, 0.25)])
def test_the_step_is_scaled_by_updates_over_active_workers(update: Maker, active: int, part: float) -> None:
    a, b = noise(1), noise(2)

    outcome = run([update(1, a), update(2, b)], replace(EXACT, outer_lr=0.5), active=active)

    assert torch.allclose(step(outcome), 0.5 * part * (a + b) / 2, atol=1e-7)


def test_a_stale_update_takes_a_smaller_step_not_a_share_of_the_others(update: Maker) -> None:
    a, b = noise(1), noise(2)

    alone = run([update(1, a, base_version=5)])
    both = run([update(1, a, base_version=5), update(2, b)])

    assert damping(0) == 1
    assert torch.allclose(step(alone), a / 1.5, atol=1e-7)
    assert torch.allclose(step(both), (a / 1.5 + b) / 2, atol=1e-7)
    assert [v.fate for v in both.verdicts] == ["late", "applied"]
    assert "2 merges behind" in both.verdicts[0].reason


def test_nesterov_follows_the_published_recurrence(update: Maker) -> None:
    policy = replace(EXACT, outer="nesterov", outer_lr=0.7, momentum=0.9)
    state = None
    now, theta, m = base(), base().params.clone(), torch.zeros(N)

    for i in range(3):
        outcome = run([update(i, noise(i))], policy, active=2, state=state, start=now)
        now, state = outcome.weights, outcome.state
        gradient = -noise(i)  # papers write base - local
        m = 0.9 * m + gradient
        theta -= 0.7 * 0.5 * (gradient + 0.9 * m)

    assert torch.allclose(now.params, theta, atol=1e-6)


def test_the_outer_adam_is_torchs_adam_on_the_mean_gradient(update: Maker) -> None:
    policy = replace(EXACT, outer="adam", outer_lr=2e-4)
    state = None
    now = base()
    theta = base().params.clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=2e-4, betas=(0.5, 0.999))

    for i in range(3):
        outcome = run([update(i, noise(i)), update(i + 10, noise(i + 10))], policy, active=9, state=state, start=now)
        now, state = outcome.weights, outcome.state
        theta.grad = (noise(i) + noise(i + 10)) / 2
        adam.step()

    assert torch.allclose(now.params, theta.detach(), atol=1e-6)
    assert state is not None
    assert state["adam_t"].tolist() == [3]


def test_verdicts_tell_norm_and_agreement(update: Maker) -> None:
    a = noise(1)

    outcome = run([update(1, a), update(2, 2 * a), update(3, -0.1 * a)])

    assert outcome.verdicts[0].norm == pytest.approx(float(a.norm()), rel=1e-5)
    assert [round(v.cosine, 4) for v in outcome.verdicts] == [1.0, 1.0, -1.0]
    assert outcome.metrics["agreement"] == pytest.approx(1 / 3, abs=1e-4)
    assert outcome.metrics["update_norm"] == pytest.approx(float(a.norm()) * 2.9 / 3, rel=1e-5)


# --- what is sent is what is held ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "bf16", "fp32"])
def test_replicas_that_apply_the_deltas_hold_the_mergers_bits(update: Maker, tmp_path: Path, name: str) -> None:
    policy = MergePolicy(codec=name, outer="nesterov", outer_lr=0.7, momentum=0.3)
    now, replica, state = base(), base(), None

    for i in range(4):
        inputs = [update(2 * i, noise(i), buffers=torch.rand(8)), update(2 * i + 1, noise(50 + i))]
        outcome = run(inputs, policy, active=3, state=state, start=now)
        now, state = outcome.weights, outcome.state
        delta = write_update(tmp_path / "delta", outcome.delta, now.buffers, now.counters)
        advance(replica, delta, name, LAYOUT)

        assert replica.sha256() == now.sha256()


def test_what_the_delta_loses_is_carried_on(update: Maker) -> None:
    policy = MergePolicy(codec="int8", clip_to_median=False)
    now, state = base(), None
    meant = base().params.double()

    for i in range(20):
        outcome = run([update(i, noise(i))], policy, state=state, start=now)
        now, state = outcome.weights, outcome.state
        meant += noise(i)

    assert state is not None
    assert torch.allclose(now.params + state["residual"], meant.float(), atol=1e-5)
    assert outcome.metrics["residual_norm"] == pytest.approx(float(state["residual"].norm()), rel=1e-5)


# --- clipping -----------------------------------------------------------------------------------------------------


def test_one_attacker_of_six_cannot_turn_the_step(update: Maker) -> None:
    """Honest updates share a direction under noise; the attacker sends −5 times his own."""
    way = noise(100, 0.004)
    honest = [way + noise(i) for i in range(6)]
    inputs = [update(i, -5 * d if i == 2 else d) for i, d in enumerate(honest)]
    clean = sum(honest) / 6

    tamed = run(inputs, MergePolicy(codec="fp32"))
    naive = run(inputs, EXACT)

    def along(outcome: MergeOutcome) -> float:
        return float(step(outcome) @ way / (clean @ way))

    assert along(naive) < 0.1
    assert along(tamed) > 0.5
    assert "clipped" in tamed.verdicts[2].reason
    assert sum("clipped" in v.reason for v in tamed.verdicts) == 1


def test_an_attack_on_one_small_tensor_is_tamed_too(update: Maker) -> None:
    deltas = [noise(i) for i in range(5)]
    deltas[3][4900:4911] = 0.6  # g.b: this hardly changes the norm of the whole

    outcome = run([update(i, d) for i, d in enumerate(deltas)], MergePolicy(codec="fp32"))

    assert float(step(outcome)[4900:4911].mean()) < 0.02


def test_the_longer_unit_of_a_faster_machine_is_not_clipped(update: Maker) -> None:
    """Eight times the samples makes about √8 times the norm; exponents up to 0.65 were measured, see clip.py."""
    samples = [1024, 1024, 1024, 512, 256, 128]
    inputs = [update(i, noise(i) * (n / 1024) ** 0.6, samples=n) for i, n in enumerate(samples)]

    outcome = run(inputs, MergePolicy(codec="fp32"))

    assert not any("clipped" in v.reason for v in outcome.verdicts)


def test_two_updates_of_unequal_machines_are_both_whole(update: Maker) -> None:
    outcome = run([update(1, noise(1), samples=1024), update(2, 0.2 * noise(2), samples=64)], MergePolicy(codec="fp32"))

    assert torch.allclose(step(outcome), (1024 * noise(1) + 64 * 0.2 * noise(2)) / 1088, atol=1e-6)


def test_earlier_updates_vote_so_that_a_merge_of_one_is_protected(update: Maker) -> None:
    policy = MergePolicy(codec="fp32")
    first = run([update(1, noise(1)), update(2, noise(2))], policy)
    second = run([update(3, noise(3))], policy, state=first.state)

    attacked = run([update(4, -50 * noise(4))], policy, state=second.state)

    assert float(step(attacked).norm()) < 1.3 * float(noise(4).norm())
    assert second.state["norms"].shape == (3, len(LAYOUT.params) + 1)


def test_the_history_is_bounded_and_follows_a_change_of_scale(update: Maker) -> None:
    policy = MergePolicy(codec="fp32")
    state = None

    for i in range(30):
        outcome = run([update(i, noise(i, 0.01 if i < 15 else 0.05))], policy, state=state)
        state = outcome.state

    assert state is not None
    assert len(state["norms"]) == 16
    assert "clipped" not in outcome.verdicts[0].reason


# --- buffers ------------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(2, 50), min_size=1, max_size=4), seed=st.integers(0, 1 << 20))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_means_and_variances_are_those_of_all_the_data(update: Maker, sizes: list[int], seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    data = [torch.randn(n, 3, generator=make) * 3 + torch.randn(3, generator=make) * 5 for n in sizes]
    inputs = []
    for i, x in enumerate(data):
        moments = torch.cat([x.mean(0), x.var(0, correction=0), torch.full((2,), float(i))])
        inputs.append(update(i, noise(i), samples=sizes[i], buffers=moments))

    buffers = run(inputs).weights.buffers

    whole = torch.cat(data)
    assert torch.allclose(buffers[:3], whole.mean(0), atol=1e-4)
    assert torch.allclose(buffers[3:6], whole.var(0, correction=0), rtol=1e-3, atol=1e-4)
    assert buffers[6].item() == pytest.approx(sum(i * n for i, n in enumerate(sizes)) / sum(sizes), abs=1e-5)


def test_those_who_did_not_speak_keep_what_the_base_says(update: Maker) -> None:
    moments = torch.tensor([2.0, 0, 0, 3.0, 1, 1, 0, 0])

    buffers = run([update(1, noise(1), buffers=moments)], active=4).weights.buffers

    assert buffers.tolist() == [0.5, 0, 0, 0.25 * (3 + 1.5**2) + 0.75 * (1 + 0.5**2), 1, 1, 3.0, 6.0]


def test_buffers_bypass_the_outer_learning_rate_and_momentum(update: Maker) -> None:
    moments = torch.tensor([2.0, 0, 0, 3.0, 1, 1, 0, 0])
    policy = replace(EXACT, outer="nesterov", outer_lr=0.1, momentum=0.9)

    assert run([update(1, noise(1), buffers=moments)], policy).weights.buffers.tolist() == moments.tolist()


def test_counters_are_the_largest_and_never_below_the_base(update: Maker) -> None:
    one = update(1, noise(1), counters=torch.tensor([15, 0, 4]))
    two = update(2, noise(2), counters=torch.tensor([12, 0, 9]))

    assert run([one, two]).weights.counters.tolist() == [15, 3, 9]


def test_absurd_buffers_of_one_are_held_back(update: Maker) -> None:
    near = torch.tensor([0.1, 0.1, 0.1, 1.1, 1.1, 1.1, 4.0, 8.0])
    far = torch.tensor([1e20, 0, 0, 1e30, 1, 1, 4.0, 8.0])
    inputs = [update(i, noise(i), buffers=far if i == 2 else near) for i in range(4)]

    buffers = run(inputs, MergePolicy(codec="fp32")).weights.buffers

    assert bool((buffers.abs() < 10).all())
    assert bool((buffers[3:6] > 0).all())


# --- EMA ----------------------------------------------------------------------------------------------------------


@given(before=st.integers(1, 100_000), a=st.integers(1, 20_000), b=st.integers(1, 20_000))
def test_the_size_of_the_merges_does_not_change_the_averages_memory(before: int, a: int, b: int) -> None:
    for decay, at in [(0.9999999, before), (0.9, 10**9)]:  # while young, and when old
        twice = ema_decay(decay, at, a) * ema_decay(decay, at + a, b)

        assert twice == pytest.approx(ema_decay(decay, at, a + b), rel=1e-9, abs=1e-15)


def test_a_young_average_follows_and_an_old_one_is_slow(update: Maker) -> None:
    policy = replace(EXACT, ema_decay=0.9)
    inputs = [update(1, noise(1), samples=1000)]

    young = run(inputs, policy, applied=0)
    old = run(inputs, policy, applied=10**6)

    assert torch.equal(young.state["ema"], young.weights.params)
    assert torch.allclose(old.state["ema"], 0.9 * base().params + 0.1 * old.weights.params, atol=1e-6)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_bad_updates_get_a_verdict_and_the_others_are_merged(update: Maker, tmp_path: Path) -> None:
    good = update(1, noise(1))
    short = update(2, noise(2))
    short[1].write_bytes(short[1].read_bytes()[:-4])
    other = update(3, noise(3), name="bf16")
    other = (replace(other[0], codec="int8"), other[1])
    strange = (replace(update(4, noise(4))[0], codec="zip"), other[1])
    negative = update(5, noise(5), buffers=torch.tensor([0.0, 0, 0, 1, -1, 1, 0, 0]))
    endless = update(6, noise(6), counters=torch.tensor([1 << 60, 0, 0]))
    empty = update(7, noise(7), samples=0)
    future = update(8, noise(8), base_version=9)
    ancient = update(9, noise(9), base_version=2)
    nan = update(10, noise(10))
    content = bytearray(nan[1].read_bytes())
    content[-4:] = torch.tensor([math.nan]).numpy().tobytes()
    nan[1].write_bytes(content)
    bad = [short, other, strange, negative, endless, empty, future, ancient, nan]

    outcome = run([good, *bad])

    assert torch.equal(step(outcome), step(run([good])))
    assert [v.fate for v in outcome.verdicts] == ["applied", *["rejected"] * 7, "superseded", "rejected"]
    for verdict, says in zip(
        outcome.verdicts[1:],
        [
            "cut short",
            "values",
            "no codec",
            "negative variance",
            "2**53",
            "no samples",
            "newest is 7",
            "5 merges",
            "finite",
        ],
        strict=True,
    ):
        assert says in verdict.reason


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.outer)
def test_with_nothing_acceptable_nothing_moves(update: Maker, policy: MergePolicy) -> None:
    state = run([update(1, noise(1))], policy).state

    outcome = run([update(2, noise(2), base_version=1)], policy, state=state)

    assert outcome.applied == 0
    assert outcome.weights.sha256() == base().sha256()
    assert all(torch.equal(outcome.state[name], state[name]) for name in state)
    assert run([], policy).applied == 0


def test_a_task_that_occurs_twice_is_refused(update: Maker) -> None:
    with pytest.raises(PotluckError, match="twice"):
        run([update(1, noise(1)), update(1, noise(1))])


def test_an_unknown_outer_optimizer_is_refused() -> None:
    with pytest.raises(BadInput, match="nesterov"):
        run([], replace(EXACT, outer="sgd"))


def test_updates_that_are_not_held_in_memory_give_the_same_bits(update: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [update(i, noise(i), name="int8") for i in range(5)]
    held = fingerprint(run(inputs, MergePolicy()))

    monkeypatch.setattr("potluck.train.merge.HELD_BYTES", 0)

    assert fingerprint(run(inputs, MergePolicy())) == held
