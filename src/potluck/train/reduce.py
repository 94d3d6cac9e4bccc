"""What is the sum of millions of products, to the last bit, on any CPU?

`torch.sum`, `dot` and `norm` add in an order that depends on the CPU's vector width and on the number of
threads. Here the order is ours: 65,536 lanes in fp64, folded in halves, and an exact sum of what remains. The
product of two fp32 values is exact in fp64, so it does not matter whether a CPU fuses it with the addition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potluck.protocol import Layout

LANES = 1 << 16  # 512 KB in fp64: stays in the cache of one core
_FEW = 64


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two fp32 vectors."""
    n = a.numel()
    lanes = a[:LANES].double().mul_(b[:LANES])
    for start in range(LANES, n, LANES):
        x = a[start : start + LANES].double()
        lanes[: x.numel()].addcmul_(x, x if a is b else b[start : start + LANES].double())
    live = lanes.numel()
    while live > _FEW:
        half = live - live // 2
        lanes[: live - half].add_(lanes[half:live])
        live = half
    return math.fsum(lanes[:live].tolist())


def segment_dots(a: Tensor, b: Tensor, layout: Layout) -> list[float]:
    """One inner product for each parameter tensor."""
    sizes = [torch.Size(shape).numel() for _, shape in layout.params]
    if a is b:
        return [dot(x, x) for x in torch.split(a, sizes)]
    return [dot(x, y) for x, y in zip(torch.split(a, sizes), torch.split(b, sizes), strict=True)]


def norm(vector: Tensor, layout: Layout) -> float:
    return math.sqrt(math.fsum(segment_dots(vector, vector, layout)))
