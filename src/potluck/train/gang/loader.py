"""Which samples are this member's in the next step, and are they here already?

One order of the whole data set for each epoch, drawn from (seed, epoch) by integer arithmetic alone, and one cursor, which
moves only when a step is committed. A step takes the next samples from the cursor on, cut into the members' shares. So
whoever comes, leaves or fails, each sample enters exactly one committed step of an epoch, and all members do equally many
steps. Data is read one step ahead, in threads: a process forked from one that holds the gang's connections would keep
them open after its death, and the others would wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from potluck.domain import order
from potluck.errors import BadInput

_STREAM = 2  # of domain/order.py: its own uses are 0 and 1


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: which range of the epoch's order, and who takes how much of it."""

    epoch: int
    start: int
    shares: tuple[int, ...]  # in the order of the ranks
    rank: int
    parts: tuple[int, ...]  # of this member's share; without any sample: one, which does not count

    @property
    def batch(self) -> int:
        return sum(self.shares)

    @property
    def share(self) -> int:
        return self.shares[self.rank]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Of this member's parts, in the epoch's order."""
        low = self.start + sum(self.shares[: self.rank])
        if not self.share:  # its loop must run as often as the others', so it computes a sample for nothing
            return [(self.start, self.start + 1)]
        return list(pairwise(accumulate(self.parts, initial=low)))


def plan(epoch: int, start: int, shares: Sequence[int], rank: int, *, at_once: int) -> Plan:
    share = shares[rank]
    count = max(1, -(-share // at_once)) if at_once else 1
    parts = tuple(share // count + (i < share % count) for i in range(count))
    return Plan(epoch, start, tuple(shares), rank, parts)


class Loader:
    """Iterate over it for one epoch. Made by `gang.loader`."""

    def __init__(
        self,
        passing: Callable[[int], Iterator[Any]],
        dataset: Any,
        *,
        batch: int,
        collate: Callable[[list[Any]], Any] | None,
        workers: int,
        shuffle: bool,
        seed: int,
        at_once: int,
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise BadInput(
                f"{type(dataset).__name__} has no length or no [i]: a gang gives each sample out exactly once, so it needs "
                "a data set with __len__ and __getitem__. Read a stream into one first"
            )
        if len(dataset) < 1:
            raise BadInput("the data set has no samples")
        self.dataset, self.batch, self.seed, self.at_once = dataset, batch, seed, at_once
        self.length = len(dataset)
        self.passes = 0  # begun epochs, as the script counts them
        self._passing, self._collate, self._shuffle = passing, collate, shuffle
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="potluck-loader") if workers else None
        self._ahead: dict[tuple[int, int, int], Future[Any]] = {}

    def __len__(self) -> int:
        """Steps an epoch."""
        return -(-self.length // self.batch)

    def __iter__(self) -> Iterator[Any]:
        wanted = self.passes
        self.passes += 1
        return self._passing(wanted)

    def batches(self, step: Plan, following: Plan | None) -> Iterator[Any]:
        """The parts of this member's share, and meanwhile the following step's."""
        ready = [self._ask(step.epoch, low, high) for low, high in step.ranges]
        wanted = {(step.epoch, low, high) for low, high in step.ranges}
        for key in [key for key in self._ahead if key not in wanted]:
            self._ahead.pop(key).cancel()  # it was read for shares that have changed since
        if following is not None and self._pool is not None:
            for low, high in following.ranges:
                self._ahead[(following.epoch, low, high)] = self._submit(following.epoch, low, high)
        for batch, (low, high) in zip(ready, step.ranges, strict=True):
            self._ahead.pop((step.epoch, low, high), None)
            yield batch()

    def _ask(self, epoch: int, low: int, high: int) -> Callable[[], Any]:
        if self._pool is None:
            return lambda: self._read(epoch, low, high)
        asked = self._ahead.get((epoch, low, high)) or self._submit(epoch, low, high)
        return asked.result

    def _submit(self, epoch: int, low: int, high: int) -> Future[Any]:
        assert self._pool is not None
        if self._workers == 1 or isinstance(self.dataset, TensorDataset):
            return self._pool.submit(self._read, epoch, low, high)
        cuts = [low + (high - low) * i // self._workers for i in range(self._workers + 1)]
        indices = self.indices(epoch, low, high)
        pieces = [self._pool.submit(self.items, indices[a - low : b - low]) for a, b in pairwise(cuts) if a < b]
        # it stands behind its pieces in the queue, so they have all begun when it begins to wait for them
        return self._pool.submit(lambda: self._together([item for piece in pieces for item in piece.result()]))

    def _read(self, epoch: int, low: int, high: int) -> Any:
        indices = self.indices(epoch, low, high)
        if type(self.dataset) is TensorDataset and self._collate is None:
            chosen = torch.tensor(indices)
            return [tensor[chosen] for tensor in self.dataset.tensors]
        return self._together(self.items(indices))

    def _together(self, items: list[Any]) -> Any:
        return (self._collate or default_collate)(items)

    def items(self, indices: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            return list(self.dataset.__getitems__(indices))
        return [self.dataset[i] for i in indices]

    def indices(self, epoch: int, low: int, high: int) -> list[int]:
        """The samples at these places of the epoch's order."""
        if not self._shuffle:
            return list(range(low, high))
        known, places = self._order
        if known != epoch:
            places = permutation(self.length, self.seed, _STREAM, epoch)
            self._order = (epoch, places)
        indices: list[int] = places[low:high].tolist()
        return indices


def permutation(count: int, *key: int) -> Tensor:
    """`domain.order.permutation`, a hundred times as fast: millions of samples are in order within a second."""
    stream = 0
    for part in key:
        stream = order._mix((stream + order._GAMMA) ^ order._mix(part + order._GAMMA))
    z = torch.arange(1, count + 1, dtype=torch.int64) * _signed(order._GAMMA) + _signed(stream)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58_476D_1CE4_E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D0_49BB_1331_11EB)
    z = z ^ _shifted(z, 31)
    return torch.argsort(z ^ _signed(1 << 63), stable=True)  # the keys are unsigned


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
