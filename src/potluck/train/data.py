"""Which samples does the training child see, in which order, and how do they get ready in time?

    reader = ShardReader(paths, dataset, seed)
    for batch in reader.batches(positions, batch_size=64):
        x = to_float(batch.x, device)      # float32 in [-1, 1]
        ...                                # meanwhile a thread prepares the next batch
        batch.positions                    # what may be reported as done after the step

Order and position arithmetic are domain/order.py's; here are the bytes. A shard is read when its first sample is due,
and a few are kept: an epoch goes through one shard after another. Flips and the like are the recipe's business.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from potluck.domain import order
from potluck.domain.order import Segment
from potluck.errors import DataError
from potluck.protocol import Dataset, Positions

KEEP_SHARDS = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    x: Tensor  # uint8 [b, C, H, W]
    y: Tensor | None  # int64 [b]; None if the data set has no labels
    positions: Positions  # where these samples stand; they are in this order

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class _Shard:
    x: Tensor
    y: Tensor | None


class ShardReader:
    """The samples of a data set by position. `paths[i]` is shard `i`'s file, or "" for one that is not needed."""

    def __init__(self, paths: Sequence[str], dataset: Dataset, seed: int) -> None:
        if len(paths) != len(dataset.shards):
            raise DataError(f"{dataset.name} has {len(dataset.shards)} shards, and {len(paths)} paths came for them")
        self._paths = list(paths)
        self._dataset = dataset
        self._seed = seed
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._orders: OrderedDict[tuple[int, int], list[int]] = OrderedDict()
        self._lock = threading.Lock()  # `held_out` may be asked for while a thread prepares batches
        self.opened: list[int] = []  # shards in the order of their reading, again if they had been let go

    def batches(self, positions: Positions, batch_size: int, *, ahead: int = 2) -> Iterator[Batch]:
        """The samples at `positions`, in order, in batches of `batch_size`; the last may be smaller.

        `ahead` batches are prepared by a thread, which ends with the iteration, also if that is left early: close the
        generator, or let it go. Errors of the thread are raised here.
        """
        if batch_size < 1:
            raise DataError(f"a batch holds at least 1 sample, not {batch_size}")
        return _ahead(self._batches(positions, batch_size), ahead)

    def held_out(self, most: int | None = None) -> Batch:
        """The samples for evaluation, or the first `most` of them. They have no positions."""
        wanted = self._dataset.held_out if most is None else min(most, self._dataset.held_out)
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        begin = 0
        for number, shard in enumerate(self._dataset.shards):
            lo = max(0, self._dataset.train_samples - begin)
            hi = min(shard.samples, self._dataset.train_samples + wanted - begin)
            if lo < hi:
                read = self._shard(number)
                xs.append(read.x[lo:hi])
                if read.y is not None:
                    ys.append(read.y[lo:hi])
            begin += shard.samples
        if not xs:
            empty = torch.empty((0, *self._dataset.shape), dtype=torch.uint8)
            return Batch(empty, torch.empty(0, dtype=torch.int64) if self._dataset.labels else None, [])
        return Batch(torch.cat(xs), torch.cat(ys) if ys else None, [])

    def _batches(self, positions: Positions, batch_size: int) -> Iterator[Batch]:
        rest: Positions = list(positions)
        while rest:
            now, rest = order.take(rest, batch_size)
            if not now:
                return
            parts = [self._read(segment) for segment in order.segments(now, self._dataset, self._seed)]
            ys = [part.y for part in parts if part.y is not None]
            if len(parts) == 1:
                yield Batch(parts[0].x, parts[0].y, now)
            else:
                yield Batch(torch.cat([part.x for part in parts]), torch.cat(ys) if ys else None, now)

    def _read(self, segment: Segment) -> _Shard:
        shard = self._shard(segment.shard)
        chosen = torch.tensor(self._order(segment)[segment.start : segment.stop])
        return _Shard(shard.x[chosen], None if shard.y is None else shard.y[chosen])

    def _order(self, segment: Segment) -> list[int]:
        key = (segment.epoch, segment.shard)
        with self._lock:
            if key not in self._orders:
                self._orders[key] = order.sample_order(
                    order.train_sizes(self._dataset)[segment.shard],
                    seed=self._seed,
                    epoch=segment.epoch,
                    shard=segment.shard,
                )
                if len(self._orders) > KEEP_SHARDS:
                    self._orders.popitem(last=False)
            self._orders.move_to_end(key)
            return self._orders[key]

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            if number not in self._shards:
                self._shards[number] = self._load(number)
                self.opened.append(number)
                if len(self._shards) > KEEP_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(number)
            return self._shards[number]

    def _load(self, number: int) -> _Shard:
        name, path = self._dataset.name, self._paths[number]
        if not path:
            raise DataError(f"shard {number} of {name} is needed now, but it was not fetched before this task")
        try:
            tensors = load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"shard {number} of {name} cannot be read from {path}: {error}") from error
        x, y = tensors.get("x"), tensors.get("y")
        samples = self._dataset.shards[number].samples
        if x is None or x.dtype != torch.uint8 or list(x.shape) != [samples, *self._dataset.shape]:
            was = "nothing" if x is None else f"{x.dtype} {list(x.shape)}"
            raise DataError(f"shard {number} of {name} should hold uint8 {[samples, *self._dataset.shape]}, not {was}")
        if not self._dataset.labels:
            return _Shard(x, None)
        classes = len(self._dataset.labels)
        if y is None or y.dtype != torch.int64 or list(y.shape) != [samples]:
            raise DataError(f"shard {number} of {name} lacks its {samples} class numbers")
        if samples and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise DataError(f"shard {number} of {name} has class numbers outside 0..{classes - 1}")
        return _Shard(x, y)


def to_float(x: Tensor, device: torch.device | str) -> Tensor:
    """uint8 pixels as float32 in [-1, 1] on `device`; sent as bytes, a quarter of the traffic to a GPU."""
    return x.to(device, non_blocking=True).to(torch.float32).div_(127.5).sub_(1.0)


class _End:
    """Follows the last item."""


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """`items`, made by a thread that is at most `depth` of them ahead."""
    made: queue.SimpleQueue[T | _End | BaseException] = queue.SimpleQueue()
    room = threading.Semaphore(max(0, depth - 1))
    stop = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                made.put(item)
                room.acquire()
                if stop.is_set():
                    return
            made.put(_End())
        except BaseException as error:  # noqa: BLE001 (it belongs to whoever waits for the next item)
            made.put(error)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = made.get()
            room.release()
            if isinstance(item, _End):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        room.release()
        thread.join()
