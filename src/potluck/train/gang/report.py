"""Which figures travel with the gradient, and what do they say?

One vector of float64 is summed over the members together with the gradient's buckets. Each member writes into a row of
its own, so after the sum everybody has everybody's figures, and no collective is needed for balance, noise scale,
agreement or the mean of a loss. Everybody reads the same bits, and so decides the same.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from potluck.domain.gangs import Noise, Wire
from potluck.errors import BadInput

FIGURES = 32
"""Places for `gang.log`."""


@dataclass(slots=True)
class Row:
    """What a member says of its step."""

    count: float = 0.0  # samples, or tokens: what the gradient is divided by
    ready_s: float = 0.0  # until its last bucket was ready
    first_s: float = 0.0  # until its first one was
    tail_s: float = 0.0  # in the step before: from its last bucket to the end of all sums
    after_first_s: float = 0.0  # in the step before: from its first bucket to the end of all sums
    square: float = 0.0  # |Σ its samples' gradients ÷ planned batch|²
    is_bad: float = 0.0  # its gradient was not finite
    plan: float = 0.0  # a fingerprint of epoch, place and shares
    rate: float = 0.0  # learning rate and the like
    weights: float = 0.0  # a fingerprint of the weights; 0: none in this step
    meet_s: float = 0.0  # in the step before, as profile.Times has them; its sum_s is tail_s
    load_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    optimizer_s: float = 0.0
    outside_s: float = 0.0

    def spans(self) -> dict[str, float]:
        """Of the step before, by phase."""
        return {
            "meet_s": self.meet_s,
            "load_s": self.load_s,
            "forward_s": self.forward_s,
            "backward_s": self.backward_s,
            "sum_s": self.tail_s,
            "optimizer_s": self.optimizer_s,
            "outside_s": self.outside_s,
        }


_NAMES = tuple(f.name for f in fields(Row))
WIDTH = len(_NAMES)


@dataclass(slots=True)
class Figures:
    """What `gang.log` was given since the last step: sums and weights by name."""

    held: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, value: float, weight: float) -> None:
        total, weights = self.held.get(name, (0.0, 0.0))
        self.held[name] = (total + value * weight, weights + weight)

    def places_and_sums(self) -> dict[int, tuple[float, float]]:
        return {place: self.held[name] for name, place in self.places().items()}

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """Over all members; `sums` is what became of `places_and_sums`."""
        found = {name: (sums[2 * place], sums[2 * place + 1]) for name, place in self.places().items()}
        return {name: total / weight for name, (total, weight) in found.items() if weight > 0}

    def places(self) -> dict[str, int]:
        """A name's place depends on the name alone, because members need not log the same ones."""
        places = {name: zlib.crc32(name.encode()) % FIGURES for name in self.held}
        taken = Counter(places.values())
        both = sorted(name for name, place in places.items() if taken[place] > 1)
        if both:
            raise BadInput(
                f"gang.log cannot tell {' and '.join(f'`{name}`' for name in both)} apart: rename one of them"
            )
        return places


@dataclass(frozen=True, slots=True)
class Report:
    """All members' rows, and what was summed."""

    rows: Sequence[Row]
    used: Tensor  # float64[P]: how many members used each parameter
    norms: Tensor  # float64: what norms.py wrote
    figures: Sequence[float]  # a sum and a weight for each place

    @property
    def count(self) -> float:
        return sum(row.count for row in self.rows)


def write(
    row: Row, *, rank: int, size: int, used: Tensor, norms: Tensor, figures: Mapping[int, tuple[float, float]]
) -> Tensor:
    """The vector to be summed."""
    vector = torch.zeros(size * WIDTH + 2 * FIGURES + used.numel() + norms.numel(), dtype=torch.float64)
    vector[rank * WIDTH : (rank + 1) * WIDTH] = torch.tensor([getattr(row, n) for n in _NAMES], dtype=torch.float64)
    start = size * WIDTH
    for place, (total, weight) in figures.items():
        vector[start + 2 * place], vector[start + 2 * place + 1] = total, weight
    start += 2 * FIGURES
    vector[start : start + used.numel()] = used
    vector[start + used.numel() :] = norms
    return vector


def read(vector: Tensor, *, size: int, parameters: int) -> Report:
    """What the sum of all vectors says."""
    values = vector[: size * WIDTH + 2 * FIGURES].tolist()
    rows = [Row(*values[i * WIDTH : (i + 1) * WIDTH]) for i in range(size)]
    start = size * WIDTH
    figures = values[start : start + 2 * FIGURES]
    start += 2 * FIGURES
    return Report(rows, vector[start : start + parameters], vector[start + parameters :], figures)


def noise_seen(known: Noise, seen: Report, shares: Sequence[int], square: float | None) -> Noise:
    """With this step's |g|² of the whole batch, where it was asked."""
    if square is None:
        return known
    batch = sum(shares)
    rows = zip(seen.rows, shares, strict=True)
    return known.seen(shares, [row.square * (batch / share) ** 2 if share else 0.0 for row, share in rows], square)


def wire_seen(known: Wire, seen: Report, others_by_last: float) -> Wire:
    """The last bucket's sum takes what the slowest member, who waits for nobody, saw after its own."""
    if any(row.tail_s <= 0 for row in seen.rows):
        return known
    last_s = min(row.tail_s for row in seen.rows)
    all_s = min(row.after_first_s for row in seen.rows)
    others_s = min(last_s * others_by_last, max(all_s - last_s, 0.0))
    keep = 0.9 if known.last_s else 0.0
    return Wire(keep * known.last_s + (1 - keep) * last_s, keep * known.others_s + (1 - keep) * others_s)


def odd_ones(values: Sequence[float]) -> list[int]:
    """Whose value differs from most; where there is no majority, from the first one's."""
    tally = Counter(values)
    ordinary = max(values, key=lambda value: (tally[value], -values.index(value)))
    return [i for i, value in enumerate(values) if value != ordinary]


def fingerprint(*values: object) -> float:
    """A number that differs where these differ, exact in float64 and never 0."""
    return float(1 + zlib.crc32(repr(values).encode()))


def fingerprint_of(tensors: Sequence[Tensor]) -> float:
    """Of the bits of tensors. It reads them once, where they are."""
    sums = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1)
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        sums.append(flat.view(width).sum(dtype=torch.int64))
    if not sums:
        return 1.0
    return fingerprint(torch.stack([one.cpu() for one in sums]).tolist())
