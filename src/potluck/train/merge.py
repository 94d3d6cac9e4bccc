"""What do the updates of a room make of the shared weights?

A pure function of the base, the outer state and the updates in the order of their task ids: whoever merges,
in whatever order the updates came, gets the same bits. Elementwise IEEE operations only, products and sums
apart (no fused multiply-add), and sums in an order that `reduce.py` fixes.

Sign: an update is Δ = θ_local − θ_base, the way the worker went; the merge goes the same way (papers write
−Δ).

1. *Judge* each update: unreadable, not finite, or of a version that is not there → rejected; more than
   `s_max` merges behind → superseded; behind at all → late.
2. *Clip* (clip.py): no update is much longer than the median of its peers, per square root of sample.
3. *Weigh*: w_i = (n_i / Σn) · g(s_i), g = 1 / (1 + s/4). The division is by the samples alone, so damping is
   absolute: a merge of stale updates is a smaller step, not the same step from worse directions. g is mild on
   purpose: under the K/M rule the plain 1/√(1+s) made things worse in our small check
   (research/low_communication.md 2.6).
4. *Step* by K/M, the updates in this merge over the active workers, so that the weights handed out in one
   cycle of the room sum to one. Without it a room of mixed speeds does not converge. Adam takes no K/M: its
   step has no size of its own to scale, and it is there to compare with the predecessor, which has none.
5. *Buffers* bypass the outer optimizer: they are a mixture of the updates', with the weights above, and the
   base's with what is left of one. Means and variances of BatchNorm by moments, other floats by mean,
   counters by max.
6. *Send* Q(step + residual) and keep the rest. The new weights are base + what everybody will decode, never
   the exact step.

With no acceptable update nothing moves: the delta is zeros, the state is as it was, and `applied` is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import torch
from torch import Tensor

from potluck.errors import BadInput, PotluckError
from potluck.protocol import Layout, MergeInput, MergePolicy, Verdict
from potluck.train.buffers import fault, merge_buffers, merge_counters
from potluck.train.clip import Clip, clip_to_median, keep_whole, scaled
from potluck.train.codec import codec, encode_with_feedback, read_update
from potluck.train.reduce import norm, segment_dots
from potluck.train.weights import Weights

BETAS = (0.5, 0.999)  # of the outer Adam: the predecessor's, usual for GANs
EPSILON = 1e-8
HELD_BYTES = 512 << 20
"""Decoded updates are kept for the second and third pass up to this; further ones are read again."""
OUTER = ("average", "nesterov", "adam")


@dataclass(frozen=True, slots=True)
class MergeOutcome:
    delta: dict[str, Tensor]  # by the policy's codec; goes into the delta file with weights.buffers and .counters
    weights: Weights
    state: dict[str, Tensor]
    verdicts: list[Verdict]  # in the order of task ids
    metrics: dict[str, float]
    applied: int  # K; 0: no update was acceptable and nothing moved


def initial_state(weights: Weights, policy: MergePolicy) -> dict[str, Tensor]:
    """The outer state of version 0."""
    return _state_for(weights, policy, {})


def merge(
    base: Weights,
    state: dict[str, Tensor],
    inputs: Sequence[tuple[MergeInput, str | Path]],
    *,
    base_version: int,
    active: int,
    policy: MergePolicy,
    applied_samples: int,
    layout: Layout,
) -> MergeOutcome:
    """The next version. `base` and `state` are left as they are. See the module's docstring for the rules.

    `applied_samples` is what the run had applied before this merge.
    """
    if policy.outer not in OUTER:
        raise BadInput(f"there is no outer optimizer {policy.outer!r}: choose one of {', '.join(OUTER)}")
    state = _state_for(base, policy, state)
    verdicts: dict[int, Verdict] = {}
    accepted: list[_Accepted] = []
    for task, path in sorted(inputs, key=lambda pair: pair[0].task_id):
        if task.task_id in verdicts:
            raise PotluckError(f"task {task.task_id} is in the merge twice")
        judged = _judge(task, path, base_version, policy, layout, keep=len(accepted) < _room(layout))
        verdicts[task.task_id] = judged if isinstance(judged, Verdict) else _PENDING
        if isinstance(judged, _Accepted):
            accepted.append(judged)
    if not accepted:
        return _unmoved(base, state, list(verdicts.values()), policy, layout)

    k, m = len(accepted), max(active, len(accepted))
    samples = sum(u.task.samples for u in accepted)
    weights = [u.task.samples / samples * damping(u.behind) for u in accepted]
    clips, norms = _clips(accepted, state.get("norms"), policy, layout)
    scratch = torch.empty(layout.param_count)
    mean = torch.zeros(layout.param_count)
    for update, weight, clip in zip(accepted, weights, clips, strict=True):
        mean.add_(scaled(update.vector(layout), clip, weight, layout, out=scratch))

    step = _outer_step(mean, state, policy, scale=k / m, scratch=scratch)
    mean_norm = norm(mean, layout)
    for update, weight, clip in zip(accepted, weights, clips, strict=True):
        length = mean_norm * clip.norm
        inner = math.fsum(segment_dots(update.vector(layout), mean, layout)) if length else 0.0
        verdicts[update.task.task_id] = Verdict(
            update.task.task_id,
            "late" if update.behind else "applied",
            _reason(update, clip),
            weight=weight * k / m,
            norm=clip.norm,
            cosine=max(-1.0, min(1.0, inner / length)) if length else 0.0,
        )

    sender = codec(policy.codec)
    delta, state["residual"] = encode_with_feedback(sender, step, state["residual"], layout)
    params = base.params + sender.decode(delta, layout, out=scratch)
    buffers = merge_buffers(
        base.buffers,
        [u.buffers for u in accepted],
        [weight * k / m for weight in weights],
        layout,
        clip=policy.clip_to_median,
    )
    counters = merge_counters(base.counters, [u.counters for u in accepted])
    if norms is not None:
        state["norms"] = norms
    if policy.ema_decay > 0:
        decay = ema_decay(policy.ema_decay, applied_samples, samples)
        state["ema"] = (state["ema"] * decay).add_(torch.mul(params, 1 - decay, out=scratch))
    metrics = {
        "update_norm": norm(step, layout),
        "agreement": sum(verdicts[u.task.task_id].cosine for u in accepted) / k,
        "residual_norm": norm(state["residual"], layout),
        "updates": float(k),
        "active": float(m),
    }
    return MergeOutcome(delta, Weights(params, buffers, counters), state, list(verdicts.values()), metrics, applied=k)


def damping(behind: int) -> float:
    """What an update counts that is so many merges behind."""
    return 1 / (1 + 0.25 * behind)


def ema_decay(decay: float, before: int, samples: int) -> float:
    """How much of the EMA stays when `samples` more are applied after `before`.

    `decay` per 1,000 samples, but not more than (before / (before + samples))⁹: a young average is over the
    last tenth of what there was, the usual (1+t)/(10+t) rule in samples instead of steps. Both compose: two
    merges of n samples leave what one of 2n does. Decimal, because a C library's pow may differ in its last
    bit.
    """
    full = Decimal(repr(decay)) ** (Decimal(samples) / 1000)
    young = (Decimal(before) / Decimal(before + samples)) ** 9 if before > 0 else Decimal(0)
    return float(min(full, young))


# --- one update ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Accepted:
    task: MergeInput
    path: str | Path
    behind: int
    buffers: Tensor
    counters: Tensor
    held: Tensor | None

    def vector(self, layout: Layout) -> Tensor:
        if self.held is not None:
            return self.held
        return codec(self.task.codec).decode(read_update(self.path, layout, self.task.codec).tensors, layout)


_PENDING = Verdict(-1, "applied", "")


def _room(layout: Layout) -> int:
    return max(2, HELD_BYTES // max(1, 4 * layout.param_count))


def _judge(
    task: MergeInput, path: str | Path, base_version: int, policy: MergePolicy, layout: Layout, *, keep: bool
) -> _Accepted | Verdict:
    behind = base_version - task.base_version
    if behind < 0:
        return _rejected(task, f"it says it is from version {task.base_version}; the newest is {base_version}")
    if behind > policy.s_max:
        return Verdict(
            task.task_id,
            "superseded",
            f"{behind} merges behind, at most {policy.s_max} are allowed: this worker's hand-in takes too long",
        )
    if task.samples <= 0:
        return _rejected(task, "it is of no samples")
    try:
        update = read_update(path, layout, task.codec)
        vector = codec(task.codec).decode(update.tensors, layout)
    except BadInput as error:  # BadUpdate, or a codec that we do not know
        return _rejected(task, str(error))
    if wrong := fault(update.buffers, update.counters, layout):
        return _rejected(task, wrong)
    return _Accepted(task, path, behind, update.buffers, update.counters, vector if keep else None)


def _rejected(task: MergeInput, reason: str) -> Verdict:
    return Verdict(task.task_id, "rejected", reason)


def _reason(update: _Accepted, clip: Clip) -> str:
    said = f"{update.task.samples} samples in {update.task.steps} steps"
    if update.behind:
        merges = "merge" if update.behind == 1 else "merges"
        said += f"; {update.behind} {merges} behind, so it counts {damping(update.behind):.2f}"
    if clip.kept < 0.995:
        said += f"; {1 / clip.kept:.1f} times longer than its peers allow, clipped"
    return said


def _clips(
    accepted: list[_Accepted], history: Tensor | None, policy: MergePolicy, layout: Layout
) -> tuple[list[Clip], Tensor | None]:
    squares = []
    for update in accepted:
        vector = update.vector(layout)
        squares.append(segment_dots(vector, vector, layout))
    if not policy.clip_to_median:
        return [keep_whole(square) for square in squares], None
    # the mean gradient of a unit does not grow with its samples; a walk of local steps does
    sizes = [1.0 if policy.outer == "adam" else math.sqrt(u.task.samples) for u in accepted]
    return clip_to_median(squares, sizes, history)


# --- the step -----------------------------------------------------------------------------------------------


def _outer_step(
    mean: Tensor, state: dict[str, Tensor], policy: MergePolicy, *, scale: float, scratch: Tensor
) -> Tensor:
    """The change of the weights that this merge wants. Writes the optimizer's part of `state`."""
    if policy.outer == "adam":  # mean is a gradient, so the step is against it
        m, v, t = state["adam_m"], state["adam_v"], int(state["adam_t"]) + 1
        m = m * BETAS[0] + mean * (1 - BETAS[0])
        v = v * BETAS[1] + torch.mul(mean, mean, out=scratch).mul_(1 - BETAS[1])
        state |= {"adam_m": m, "adam_v": v, "adam_t": torch.tensor([t])}
        unbias_m, unbias_v = (float(1 - Decimal(repr(beta)) ** t) for beta in BETAS)
        return (m / unbias_m).div_((v / unbias_v).sqrt_().add_(EPSILON)).mul_(-policy.outer_lr)
    if policy.outer == "nesterov" and policy.momentum:
        momentum = state["momentum"] * policy.momentum + mean
        state["momentum"] = momentum
        return (momentum * policy.momentum).add_(mean).mul_(policy.outer_lr * scale)
    return mean * (policy.outer_lr * scale)


def _state_for(weights: Weights, policy: MergePolicy, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that the policy needs: what there is, and fresh parts for what a changed policy newly asks for."""
    wanted = ["residual"]
    if policy.outer == "nesterov" and policy.momentum:
        wanted += ["momentum"]
    if policy.outer == "adam":
        wanted += ["adam_m", "adam_v"]
    kept = {name: state[name] if name in state else torch.zeros_like(weights.params) for name in wanted}
    if policy.outer == "adam":
        kept["adam_t"] = state.get("adam_t", torch.zeros(1, dtype=torch.int64))
    if policy.ema_decay > 0:
        kept["ema"] = state["ema"] if "ema" in state else weights.params.clone()
    if policy.clip_to_median and "norms" in state:
        kept["norms"] = state["norms"]
    return kept


def _unmoved(
    base: Weights, state: dict[str, Tensor], verdicts: list[Verdict], policy: MergePolicy, layout: Layout
) -> MergeOutcome:
    sender = codec(policy.codec)
    delta = sender.encode(torch.zeros(layout.param_count), layout)
    weights = base.clone()
    weights.params.add_(sender.decode(delta, layout))  # as every replica does it: −0 becomes 0
    metrics = {
        "update_norm": 0.0,
        "agreement": 0.0,
        "residual_norm": norm(state["residual"], layout),
        "updates": 0.0,
    }
    return MergeOutcome(delta, weights, state, verdicts, metrics, applied=0)
