"""How much may one update count, whatever its worker says?

No more than its peers, by the median of their norms (Templar does so per tensor; it restored a GAN that one
worker of six pulled with −5Δ, low_communication.md 2.9). What "as large" means needs care, because machines
are unequal:

- An update of more steps is longer. Measured on a small DCGAN and two classifiers, ‖Δ‖ grows as steps^0.9 up
  to some 16 steps and as steps^0.45..0.65 from there to 128. So norms are compared per *square root of
  samples*, and a fast machine is not punished for its longer unit. Samples, not steps: the hub hands them
  out, so nobody can claim more.
- The median of two is no majority. The last 16 updates of earlier merges vote too (`norms` in the outer
  state), so a merge of one or two is protected as well. Fewer than three votes clip nothing.
- A whole update may be 1.25 × the median: an honest one is then seldom touched, and an attacker gets a
  quarter more than a peer. A single tensor, whose growth differs more (exponents 0.2..1.2), may be 2 × its
  median; without that bound all of an attack could go into one small tensor. A tensor that stood still in an
  update does not vote.

Checked on a teacher/student classifier (Adam, 40 merges; loss with / without clipping; seed 1 tells the same):
six equal machines 0.861 / 0.861, speeds 1:1:1:½:¼:⅛ 0.896 / 0.896, two machines 1:¼ 0.929 / 0.930; one of six
sending −5Δ 0.949 / 2.477, in merges of two 0.912 / 1.137, the fastest of a mixed room 1.066 / diverges.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from potluck.protocol import Layout

HISTORY = 16  # updates of earlier merges that vote
QUORUM = 3  # votes without which nobody can say what is usual
TENSOR_SLACK = 2.0
WHOLE_SLACK = 1.25


@dataclass(frozen=True, slots=True)
class Clip:
    """What to multiply each tensor of one update by."""

    factors: list[float]
    norm: float  # of the update as it came
    kept: float  # its norm after clipping, over `norm`


def clip_to_median(squares: list[list[float]], sizes: list[float], history: Tensor | None) -> tuple[list[Clip], Tensor]:
    """One clip for each update, and the history with these updates in it.

    `squares[i][t]` is the squared norm of tensor t in update i; `sizes[i]` what its norm is expected to be
    proportional to. History: f64[≤ HISTORY, tensors + 1], norms over sizes, the last column that of the
    whole.
    """
    rows = [
        [*(math.sqrt(s) / size for s in square), math.sqrt(math.fsum(square)) / size]
        for square, size in zip(squares, sizes, strict=True)
    ]
    width = len(rows[0])
    earlier = history.tolist() if history is not None and history.shape[1:] == (width,) else []
    votes = [[x for x in column if x > 0] for column in zip(*earlier, *rows, strict=True)]
    limits = [statistics.median_low(seen) if len(seen) >= QUORUM else math.inf for seen in votes]
    clips = [
        _clip(square, [TENSOR_SLACK * limit * size for limit in limits[:-1]], WHOLE_SLACK * limits[-1] * size)
        for square, size in zip(squares, sizes, strict=True)
    ]
    return clips, torch.tensor([*earlier, *rows][-HISTORY:], dtype=torch.float64)


def keep_whole(square: list[float]) -> Clip:
    return Clip([1.0] * len(square), math.sqrt(math.fsum(square)), 1.0)


def scaled(vector: Tensor, clip: Clip, weight: float, layout: Layout, *, out: Tensor) -> Tensor:
    """weight · (the clipped vector), in `out`."""
    if len(set(clip.factors)) == 1:
        return torch.mul(vector, clip.factors[0] * weight, out=out)
    sizes = [torch.Size(shape).numel() for _, shape in layout.params]
    for x, to, factor in zip(torch.split(vector, sizes), torch.split(out, sizes), clip.factors, strict=True):
        torch.mul(x, factor * weight, out=to)
    return out


def _clip(square: list[float], limits: list[float], whole_limit: float) -> Clip:
    factors = [_factor(math.sqrt(s), limit) for s, limit in zip(square, limits, strict=True)]
    norm = math.sqrt(math.fsum(square))
    left = math.sqrt(math.fsum(s * f * f for s, f in zip(square, factors, strict=True)))
    whole = _factor(left, whole_limit)
    return Clip([f * whole for f in factors], norm, left * whole / norm if norm else 1.0)


def _factor(norm: float, limit: float) -> float:
    return limit / norm if norm > limit else 1.0
