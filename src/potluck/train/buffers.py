"""What do buffers become in a merge?

They bypass the outer optimizer: a running mean is a measurement, not a direction. The new buffers are a
mixture of the updates' buffers, each with its weight in the merge, and the base's with what is left of one:
with K updates of M workers, the 1 − K/M that did not speak keep what they last said.

- `running_mean` and `running_var` of the same module are merged by moments, so that they are the mean and
  variance of all the data together: mean = Σ wμ, var = Σ w(σ² + (μ − mean)²), which is Σ w(σ² + μ²) − mean²
  without cancellation.
- other float buffers: Σ wb. Counters (`num_batches_tracked`): the largest, never below the base's.

Sums are in fp64, elementwise, in the order of the updates.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from potluck.protocol import Layout
from potluck.train.reduce import dot

COUNTER_LIMIT = 1 << 53
SLACK = 4.0
"""How much further than the median of its peers a buffer may be from the base's. Wide: it only stops absurd values."""


def fault(buffers: Tensor, counters: Tensor, layout: Layout) -> str:
    """Why these buffers cannot be merged, or an empty string. That they are finite has been checked by the reader."""
    if counters.numel():
        low, high = torch.aminmax(counters)
        if int(low) < -COUNTER_LIMIT or int(high) > COUNTER_LIMIT:
            return "a counter is beyond 2**53"
    for name, (start, end) in _places(layout).items():
        if name.endswith("running_var") and bool((buffers[start:end] < 0).any()):
            return f"{name} has a negative variance"
    return ""


def merge_buffers(base: Tensor, updates: list[Tensor], weights: list[float], layout: Layout, *, clip: bool) -> Tensor:
    """The mixture; `weights` sum to at most one. `clip`: with three updates or more, hold back one that is far off."""
    places = _places(layout)
    if clip and len(updates) >= 3:
        updates = _held_back(base, updates, list(places.values()))
    left = 1 - sum(weights)
    parts = [(weight, update.double()) for weight, update in zip(weights, updates, strict=True)]
    if left > 1e-9:  # less is the rounding of weights that sum to one
        parts.insert(0, (left, base.double()))
    total = sum(weight for weight, _ in parts)
    mean = torch.zeros(base.shape, dtype=torch.float64)
    for weight, part in parts:
        mean.add_(part * (weight / total))
    merged = mean.clone()
    for name, (start, end) in places.items():
        pair = places.get(name.removesuffix("var") + "mean")
        if not name.endswith("running_var") or pair is None or pair[1] - pair[0] != end - start:
            continue
        centre = mean[pair[0] : pair[1]]
        for weight, part in parts:
            away = part[pair[0] : pair[1]] - centre
            merged[start:end].add_(away.mul_(away).mul_(weight / total))
    return merged.float()


def merge_counters(base: Tensor, updates: list[Tensor]) -> Tensor:
    merged = base.clone()
    for update in updates:
        torch.maximum(merged, update, out=merged)
    return merged


def _held_back(base: Tensor, updates: list[Tensor], places: list[tuple[int, int]]) -> list[Tensor]:
    held = [update.clone() for update in updates]
    for start, end in places:
        here = base[start:end]
        away = [update[start:end] - here for update in updates]
        far = [dot(x, x) ** 0.5 for x in away]
        seen = [distance for distance in far if distance > 0]
        limit = SLACK * statistics.median_low(seen) if len(seen) >= 3 else float("inf")
        for update, x, distance in zip(held, away, far, strict=True):
            if distance > limit:  # towards the base, so a variance stays positive
                update[start:end] = here + x * (limit / distance)
    return held


def _places(layout: Layout) -> dict[str, tuple[int, int]]:
    places = {}
    start = 0
    for name, shape in layout.buffers:
        end = start + torch.Size(shape).numel()
        places[name] = (start, end)
        start = end
    return places
