"""How does a source of pictures become shards that everybody can fetch?

A `Source` is a numbered list of candidates that may turn out unreadable. `pack` goes through it once, in an
order that is shuffled with a fixed seed, so that every shard is a fair sample of the whole and the held-out
end is too. A shard is a safetensors file with "x" uint8 [n, C, H, W] and, if there are labels, "y" int64 [n].
The same source gives the same bytes, so shards that a hub already has are not sent again. Memory: one shard
and a few pictures.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from potluck.domain.order import permutation
from potluck.errors import DataError, DiskFull
from potluck.protocol import Blob, Dataset, Shard
from potluck.train.images import ImageFormat, Pixels, Unreadable

SHARD_BYTES = 4 << 20
MAX_SHARD_SAMPLES = 8192  # tiny samples: keeps a shard's shuffle far below 50 ms
MOST_HELD_OUT = 1000
SHUFFLE_SEED = 20_260_101  # fixed for ever: it is part of what makes a source's hashes the same


@dataclass(frozen=True)
class Source:
    """Pictures by number. `read` may be called from several threads and raises `Unreadable` for a broken one."""

    name: str
    images: ImageFormat
    read: Callable[[int], Pixels]
    count: int  # candidates; some may be unreadable
    y: Sequence[int] | None = None  # each candidate's class
    labels: Sequence[str] = ()  # the classes' names
    ignored: int = 0  # files that are no pictures
    licence: str = ""
    origin: str = ""
    close: Callable[[], None] = lambda: None


def pack(
    source: Source,
    add: Callable[[bytes], Blob],
    *,
    shard_bytes: int = SHARD_BYTES,
    held_out: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Write `source` as shards through `add`, and say what they hold.

    `held_out` samples at the end are for evaluation only; None holds out a tenth, at most 1,000. `progress`
    hears (candidates seen, candidates in all) after each shard. Closes the source.
    """
    shape = (source.images.channels, source.images.size, source.images.size)
    room = max(1, min(MAX_SHARD_SAMPLES, shard_bytes // int(np.prod(shape))))
    x = np.empty((room, *shape), np.uint8)
    y = np.empty(room, np.int64)
    shards: list[Shard] = []
    filled = skipped = seen = 0
    first_reason = ""
    is_full_shard = False  # did the picture just seen complete a shard?

    def write() -> None:
        nonlocal filled
        tensors: dict[str, np.ndarray[Any, Any]] = {"x": x[:filled]}
        if source.y is not None:
            tensors["y"] = y[:filled]
        with disk_full_explained("the packed data set"):
            shards.append(Shard(add(safetensors.numpy.save(tensors)), filled))
        filled = 0
        if progress:
            progress(seen, source.count)

    try:
        for number, pixels in _decoded(source):
            seen += 1
            if isinstance(pixels, Unreadable):
                skipped += 1
                is_full_shard = False
                first_reason = first_reason or str(pixels)
                continue
            x[filled] = pixels
            y[filled] = source.y[number] if source.y is not None else 0
            filled += 1
            is_full_shard = filled == room
            if is_full_shard:
                write()
        if filled:
            write()
        elif progress and not is_full_shard:
            progress(seen, source.count)  # the last shard was full before the last, unreadable pictures
    finally:
        source.close()

    samples = sum(shard.samples for shard in shards)
    if samples == 0:
        raise DataError(
            f"none of the {source.count} pictures in {source.name} can be read; the first said: {first_reason}. "
            "Open one in a picture viewer to see whether the files are complete."
        )
    if held_out is None:
        held_out = min(samples // 10, MOST_HELD_OUT)
    if not 0 <= held_out < samples:
        raise DataError(
            f"{held_out} samples cannot be held out of {samples}: hold out fewer, so that some are left to train on"
        )
    return Dataset(
        name=source.name,
        samples=samples,
        shards=shards,
        shape=list(shape),
        labels=list(source.labels),
        held_out=held_out,
        skipped=skipped,
        licence=source.licence,
        origin=source.origin,
    )


def join(sources: Sequence[Source], *, name: str, origin: str = "", licence: str = "") -> Source:
    """Several sources as one. Labels survive only if all of them have the same classes."""
    if not sources:
        raise DataError(f"{name} holds nothing to train on")
    first = sources[0]
    ends = np.cumsum([source.count for source in sources])
    labelled = all(source.y is not None and source.labels == first.labels for source in sources)

    def read(number: int) -> Pixels:
        at = int(np.searchsorted(ends, number, side="right"))
        return sources[at].read(number - int(ends[at]) + sources[at].count)

    def close() -> None:
        for source in sources:
            source.close()

    return Source(
        name=name,
        images=first.images,
        read=read,
        count=int(ends[-1]),
        y=np.concatenate([np.asarray(source.y) for source in sources]).tolist() if labelled else None,
        labels=first.labels if labelled else (),
        ignored=sum(source.ignored for source in sources),
        licence=licence or first.licence,
        origin=origin or first.origin,
        close=close,
    )


@contextmanager
def disk_full_explained(what: str | Path) -> Iterator[None]:
    """Turn the system's "no space left" into an error that says what did not fit."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no space is left for {what}: free some, or choose another disk with POTLUCK_HOME"
            ) from error
        raise


def _decoded(source: Source) -> Iterator[tuple[int, Pixels | Unreadable]]:
    """Every candidate in the shuffled order, decoded a little ahead on the other cores."""

    def read(number: int) -> Pixels | Unreadable:
        try:
            return source.read(number)
        except Unreadable as reason:
            return reason

    ahead: deque[tuple[int, Future[Pixels | Unreadable]]] = deque()
    threads = min(4, os.cpu_count() or 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads, "decode") as pool:
        warnings.filterwarnings("ignore", module="PIL")  # on damaged metadata and sizes: both are handled
        try:
            for number in permutation(source.count, SHUFFLE_SEED):
                ahead.append((number, pool.submit(read, number)))
                if len(ahead) >= 8 * threads:
                    done, future = ahead.popleft()
                    yield done, future.result()
            for done, future in ahead:
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
