"""How does a change of weights become few bytes, and what does a reader refuse?

    codec   tensors                              bytes a value   error of one value
    fp32    "values" f32[N]                      4               none
    bf16    "values" bf16[N]                     2               2**-9 of itself
    int8    "values" i8[N], "scales" f32[blocks] 1.001           half its block's scale = absmax / 254

What is lost is not gone: `encode_with_feedback` carries the rest into the next update of the same encoder, so
the sum of what was decoded follows the sum of what was meant (error feedback; Seide et al. 2014, Karimireddy
et al. 2019).

Every operation here is elementwise or a maximum, in IEEE arithmetic, with halves rounded to even
(`torch.round`). There is no sum whose order could differ, so all CPUs, at any number of threads, give and
read the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from potluck.domain.tensorfile import BLOCK, blocks, check_codec, expected_update
from potluck.errors import BadUpdate
from potluck.protocol import Layout
from potluck.train import tensorio

LIMIT = 1e30
"""Larger values are no weights; refusing them keeps every later sum and square finite."""
TINY = 1e-30
"""A block whose largest value is below this is sent as zeros: its inverse would overflow. The rest goes to feedback."""
_ROWS = 128  # blocks at a time: 2 MB, so that the passes over them find them in the cache; measured best of 16..256


class Codec(Protocol):
    """Turns a flat fp32 vector of `layout.param_count` values into named tensors and back."""

    name: str

    def encode(self, vector: Tensor, layout: Layout, rest: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors to send. `rest`, if given, receives `vector` minus what they decode to; it may be `vector`."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], layout: Layout, out: Tensor | None = None) -> Tensor:
        """The vector, in `out` if given. Refuses wrong tensors and values that are not finite with `BadUpdate`."""
        ...


def codec(name: str) -> Codec:
    """The codec of that name; `BadInput` with the nearest name if there is none."""
    return _CODECS[check_codec(name)]


def encode_with_feedback(
    codec: Codec, delta: Tensor, residual: Tensor | None, layout: Layout
) -> tuple[dict[str, Tensor], Tensor]:
    """Encode `delta` plus what earlier calls left over; returns the tensors and the new residual."""
    rest = delta.clone() if residual is None else delta + residual
    tensors = codec.encode(rest, layout, rest)
    return tensors, rest


class Fp32:
    name = "fp32"

    def encode(self, vector: Tensor, layout: Layout, rest: Tensor | None = None) -> dict[str, Tensor]:
        _check_values(vector, layout)
        values = vector.clone()
        if rest is not None:
            rest.zero_()
        return {"values": values}

    def decode(self, tensors: Mapping[str, Tensor], layout: Layout, out: Tensor | None = None) -> Tensor:
        _check_tensors(self.name, tensors, layout)
        _check_values(tensors["values"], layout)
        return _out(out, layout).copy_(tensors["values"])


class Bf16:
    name = "bf16"

    def encode(self, vector: Tensor, layout: Layout, rest: Tensor | None = None) -> dict[str, Tensor]:
        _check_values(vector, layout)
        values = vector.to(torch.bfloat16)
        if rest is not None:
            torch.sub(vector, values.to(torch.float32), out=rest)
        return {"values": values}

    def decode(self, tensors: Mapping[str, Tensor], layout: Layout, out: Tensor | None = None) -> Tensor:
        _check_tensors(self.name, tensors, layout)
        out = _out(out, layout).copy_(tensors["values"])
        _check_values(out, layout)
        return out


class Int8:
    """Blocks of at most 4,096 values of one tensor share a scale of absmax / 127."""

    name = "int8"

    def encode(self, vector: Tensor, layout: Layout, rest: Tensor | None = None) -> dict[str, Tensor]:
        _check_length(vector, layout)
        values = torch.empty(vector.numel(), dtype=torch.int8)
        scales = torch.empty(blocks(layout), dtype=torch.float32)
        space = torch.empty(_ROWS * BLOCK, dtype=torch.float32)
        for piece in _pieces(layout):
            x = piece.of(vector)
            work = space[: x.numel()].view(x.shape)
            absmax = torch.abs(x, out=work).amax(dim=1, keepdim=True)
            tiny = absmax < TINY
            scale = (absmax / 127).masked_fill_(tiny, 0)
            torch.mul(x, (127 / absmax).masked_fill_(tiny, 0), out=work).round_()
            piece.of(values).copy_(work)
            scales[piece.block : piece.block + piece.rows] = scale[:, 0]
            if rest is not None:
                torch.sub(x, work.mul_(scale), out=piece.of(rest))
        if not bool((scales <= LIMIT / 127).all()):  # NaN and infinity travel from a value to its scale
            raise BadUpdate(f"{_first_unfit(scales, layout)} has a value that is not finite or beyond {LIMIT:g}")
        return {"values": values, "scales": scales}

    def decode(self, tensors: Mapping[str, Tensor], layout: Layout, out: Tensor | None = None) -> Tensor:
        _check_tensors(self.name, tensors, layout)
        values, scales = tensors["values"], tensors["scales"]
        if not bool(((scales >= 0) & (scales <= LIMIT / 127)).all()):
            raise BadUpdate("tensor 'scales' has a value that is negative, too large or not finite")
        out = _out(out, layout)
        for piece in _pieces(layout):
            to = piece.of(out).copy_(piece.of(values))
            to.mul_(scales[piece.block : piece.block + piece.rows, None])
        return out


_CODECS: dict[str, Codec] = {known.name: known for known in (Int8(), Bf16(), Fp32())}


@dataclass(frozen=True, slots=True)
class Update:
    """An update or a delta as it travels: the codec's tensors, and buffers and counters as they are, not as changes."""

    tensors: dict[str, Tensor]
    buffers: Tensor
    counters: Tensor
    metadata: dict[str, str]


def write_update(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    buffers: Tensor,
    counters: Tensor,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    return tensorio.save(path, {**tensors, "buffers": buffers, "counters": counters}, metadata)


def read_update(path: str | Path, layout: Layout, codec: str) -> Update:
    """Read an update or a delta; `BadUpdate` says which tensor is wrong. Allocates nothing before the header fits."""
    found, metadata = tensorio.load(path, expected_update(layout, codec))
    buffers, counters = found.pop("buffers"), found.pop("counters")
    if not _is_sane(buffers):
        raise BadUpdate(f"{_first_insane(buffers, layout.buffers)} of the buffers is not finite")
    return Update(found, buffers, counters, metadata)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Whole blocks of one tensor, or its last, shorter one."""

    start: int
    rows: int
    width: int
    block: int  # the first one's place among the scales

    def of(self, vector: Tensor) -> Tensor:
        return vector[self.start : self.start + self.rows * self.width].view(self.rows, self.width)


def _pieces(layout: Layout) -> Iterator[_Piece]:
    start = block = 0
    for _, shape in layout.params:
        size = 1
        for n in shape:
            size *= n
        whole, tail = divmod(size, BLOCK)
        for row in range(0, whole, _ROWS):
            rows = min(_ROWS, whole - row)
            yield _Piece(start + row * BLOCK, rows, BLOCK, block + row)
        if tail:
            yield _Piece(start + whole * BLOCK, 1, tail, block + whole)
        start, block = start + size, block + whole + (tail > 0)


def _check_length(vector: Tensor, layout: Layout) -> None:
    if vector.shape != (layout.param_count,) or vector.dtype != torch.float32:
        raise BadUpdate(
            f"the vector is {vector.dtype} of shape {list(vector.shape)}; "
            f"the layout has {layout.param_count} fp32 values"
        )


def _check_values(vector: Tensor, layout: Layout) -> None:
    _check_length(vector, layout)
    if not _is_sane(vector):
        raise BadUpdate(f"{_first_insane(vector, layout.params)} has a value that is not finite or beyond {LIMIT:g}")


def _check_tensors(name: str, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    for key, (dtype, shape) in expected_update(layout, name).items():
        if key in ("buffers", "counters"):
            continue
        if key not in tensors:
            raise BadUpdate(f"tensor {key!r} is missing")
        found = tensors[key]
        if found.dtype != tensorio.DTYPES[dtype] or tuple(found.shape) != shape:
            raise BadUpdate(
                f"tensor {key!r} is {found.dtype} of shape {list(found.shape)}, expected {dtype} of {list(shape)}"
            )


def _is_sane(vector: Tensor) -> bool:
    if not vector.numel():
        return True
    low, high = torch.aminmax(vector)  # one pass; NaN and infinity come through
    return bool(low >= -LIMIT) and bool(high <= LIMIT)


def _first_insane(vector: Tensor, slots: list[tuple[str, list[int]]]) -> str:
    sizes = [torch.Size(shape).numel() for _, shape in slots]
    for (name, _), part in zip(slots, torch.split(vector, sizes), strict=True):
        if not _is_sane(part):
            return name
    return "a tensor"


def _first_unfit(scales: Tensor, layout: Layout) -> str:
    counts = [-(-torch.Size(shape).numel() // BLOCK) for _, shape in layout.params]
    for (name, _), part in zip(layout.params, torch.split(scales, counts), strict=True):
        if not bool((part <= LIMIT / 127).all()):
            return name
    return "a tensor"


def _out(out: Tensor | None, layout: Layout) -> Tensor:
    if out is None:
        return torch.empty(layout.param_count, dtype=torch.float32)
    _check_length(out, layout)
    return out
