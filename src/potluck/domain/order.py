"""Which sample is at position `p`, and which shards does a range of positions need?

Positions are one endless line. With `n` training samples, position `p` is place `p % n` of epoch `p // n`:

    positions   0 ........ n | n ........ 2n | 2n ....
    epoch            0       |       1       |   2
    shards      C A D B      |  B D A C      |  a new order each epoch, drawn from (seed, epoch)
    samples     each shard's samples in a new order, drawn from (seed, epoch, shard)

So a range of positions touches few shards, one epoch meets every training sample exactly once, and held-out
samples (the data set's last ones; a shard may be cut by them) have no position at all. A worker's agent asks
`shards_needed` without torch or numpy; the training child walks the same `segments`.

The order must be the same on every machine and Python for ever, so it rests on nothing but integer
arithmetic: item `i` of a stream gets the key `splitmix64(stream, i)` (Steele, Lea and Flood 2014), and items
stand in the order of their keys (equal keys: the lower item first).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

from potluck.errors import BadInput

Ranges = Sequence[tuple[int, int]]
"""Half-open ranges. What these functions return is sorted, disjoint and without empty ranges."""


class HasSamples(Protocol):
    @property
    def samples(self) -> int: ...


class Sharded(Protocol):
    """What the order needs to know of a data set; `protocol.Dataset` is one."""

    @property
    def shards(self) -> Sequence[HasSamples]: ...
    @property
    def samples(self) -> int: ...
    @property
    def held_out(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Places `[start, stop)` of one shard's order in one epoch; the first of them is position `position`."""

    epoch: int
    shard: int
    start: int
    stop: int
    position: int


def position_to_epoch(position: int, train_samples: int) -> tuple[int, int]:
    """The epoch that `position` is in, and its place there."""
    if train_samples < 1:
        raise BadInput("the data set has no training samples, so there are no positions: hold fewer samples out")
    if position < 0:
        raise BadInput(f"positions start at 0, and {position} is below it")
    return divmod(position, train_samples)


def segments(positions: Ranges, dataset: Sharded, seed: int) -> Iterator[Segment]:
    """Walk `positions` in order, cut wherever an epoch or a shard ends."""
    sizes = train_sizes(dataset)
    n = sum(sizes)
    for lo, hi in positions:
        position = lo
        while position < hi:
            epoch, place = position_to_epoch(position, n)
            order, ends = _epoch(sizes, seed, epoch)
            at = bisect_right(ends, place)
            shard, end = order[at], ends[at]
            start = place - (end - sizes[shard])
            stop = min(sizes[shard], start + hi - position)
            yield Segment(epoch, shard, start, stop, position)
            position += stop - start


def shards_needed(positions: Ranges, dataset: Sharded, seed: int) -> list[int]:
    """The shards that hold the samples at `positions`, in the order in which they are first met."""
    total = sum(size > 0 for size in train_sizes(dataset))
    needed: dict[int, None] = {}
    for segment in segments(positions, dataset, seed):
        needed[segment.shard] = None
        if len(needed) == total:
            break
    return list(needed)


def shards_held_out(dataset: Sharded) -> list[int]:
    """The shards that an evaluation on the held-out samples needs."""
    train = train_sizes(dataset)
    return [i for i, shard in enumerate(dataset.shards) if shard.samples > train[i]]


def train_sizes(dataset: Sharded) -> tuple[int, ...]:
    """How many training samples each shard holds: whole shards, then perhaps a cut one, then none."""
    left = dataset.samples - dataset.held_out
    sizes = []
    for shard in dataset.shards:
        sizes.append(max(0, min(shard.samples, left)))
        left -= shard.samples
    return tuple(sizes)


def sample_order(samples: int, *, seed: int, epoch: int, shard: int) -> list[int]:
    """The order of one shard's first `samples` samples in one epoch: place → index in the shard."""
    return permutation(samples, seed, 1, epoch, shard)


def permutation(count: int, *key: int) -> list[int]:
    """A fair order of `range(count)` that depends on the integers of `key` alone."""
    stream = 0
    for part in key:
        stream = _mix((stream + _GAMMA) ^ _mix(part + _GAMMA))
    keys = [_mix(stream + _GAMMA * (i + 1)) for i in range(count)]
    return sorted(range(count), key=keys.__getitem__)


# --- ranges -------------------------------------------------------------------------------------------------


def count(ranges: Ranges) -> int:
    """How many positions disjoint `ranges` hold."""
    return sum(max(0, hi - lo) for lo, hi in ranges)


def union(*many: Ranges) -> list[tuple[int, int]]:
    """Sorted, disjoint, joined where they touch, empty ranges dropped."""
    joined: list[tuple[int, int]] = []
    for lo, hi in sorted(r for ranges in many for r in ranges if r[0] < r[1]):
        if joined and lo <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], hi))
        else:
            joined.append((lo, hi))
    return joined


def take(ranges: Ranges, k: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The first `k` positions of `ranges` (all, if there are fewer), and the rest."""
    first: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    for lo, hi in ranges:
        cut = min(hi, lo + max(0, k))
        if lo < cut:
            first.append((lo, cut))
        if cut < hi:
            rest.append((cut, hi))
        k -= cut - lo
    return first, rest


def subtract(ranges: Ranges, gone: Ranges) -> list[tuple[int, int]]:
    """The positions of `ranges` that are not in `gone`."""
    left: list[tuple[int, int]] = []
    holes = union(gone)
    next_hole = 0
    for start, hi in union(ranges):
        lo = start
        while next_hole < len(holes) and holes[next_hole][0] < hi:
            hole_lo, hole_hi = holes[next_hole]
            if lo < hole_lo:
                left.append((lo, hole_lo))
            lo = max(lo, hole_hi)
            if hole_hi > hi:
                break  # it may reach into the next range too
            next_hole += 1
        if lo < hi:
            left.append((lo, hi))
    return left


# --- inside -------------------------------------------------------------------------------------------------

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GAMMA = 0x9E37_79B9_7F4A_7C15  # SplitMix64's step: 2**64 / golden ratio, made odd


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return z ^ (z >> 31)


@lru_cache(maxsize=32)
def _epoch(sizes: tuple[int, ...], seed: int, epoch: int) -> tuple[Sequence[int], Sequence[int]]:
    """The epoch's order of shards, and the place after the last sample of each of them."""
    order = [shard for shard in permutation(len(sizes), seed, 0, epoch) if sizes[shard] > 0]
    return order, list(accumulate(sizes[shard] for shard in order))
