"""Is this file of tensors what it claims to be, and what a run expects?

Reads the header of a safetensors file from bytes; it never opens a file and never looks at a value, so the
hub can judge an upload of any size from its first kilobytes, without torch.

    8 bytes   little-endian length n of the header
    n bytes   JSON {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__":
    {"k": "v"}} the rest  the tensors, one after another, without gaps

Whoever made the file is not trusted: everything is bounded before it is believed, and every refusal is a
`BadUpdate` that names the tensor. Values are the reader's business (train/codec.py).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from potluck.errors import BadInput, BadUpdate

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 10_000
MAX_DIMS = 8
MAX_NAME = 512
LENGTH_BYTES = 8

BLOCK = 4096
"""Values that share one scale in the int8 codec; a block never crosses a tensor's border."""
CODECS = ("int8", "bf16", "fp32")

SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

Expected = dict[str, tuple[str, tuple[int, ...]]]
"""Name → (dtype, shape)."""
Slots = Sequence[tuple[str, Sequence[int]]]


class Cut(Protocol):
    """What is needed of `protocol.Layout`, which is above the domain on the map."""

    @property
    def params(self) -> Slots: ...
    @property
    def buffers(self) -> Slots: ...
    @property
    def counters(self) -> Slots: ...


@dataclass(frozen=True, slots=True)
class Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    tensors: dict[str, Entry]  # in the order of their bytes
    metadata: dict[str, str]
    data_start: int  # bytes from the beginning of the file


def head_bytes(prefix: bytes, file_size: int) -> int:
    """How many bytes from the beginning of the file `parse` needs; `prefix` is at least its first eight."""
    if len(prefix) < LENGTH_BYTES or file_size < LENGTH_BYTES:
        raise BadUpdate(f"the file has {file_size} bytes: too short for a safetensors header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise BadUpdate(f"the file says that its header has {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if LENGTH_BYTES + length > file_size:
        raise BadUpdate(f"the file says that its header has {length} bytes, but the whole file has {file_size}")
    return LENGTH_BYTES + length


def parse(head: bytes, file_size: int) -> Header:
    """Read a header from the first bytes of a file (more than the header may be given)."""
    data_start = head_bytes(head, file_size)
    if len(head) < data_start:
        raise BadUpdate(f"the file's header has {data_start} bytes, only {len(head)} of them arrived")
    listing = _json(head[LENGTH_BYTES:data_start])
    metadata = _metadata(listing.pop("__metadata__", {}))
    if len(listing) > MAX_TENSORS:
        raise BadUpdate(f"the file lists {len(listing)} tensors; at most {MAX_TENSORS} are allowed")
    entries = sorted(
        ((name, _entry(name, item)) for name, item in listing.items()),
        key=lambda pair: (pair[1].begin, pair[1].end),
    )
    place = 0
    for name, entry in entries:
        if entry.begin != place:
            what = "overlaps the one before it" if entry.begin < place else "leaves a gap before it"
            raise BadUpdate(f"tensor {_show(name)} {what}: it begins at byte {entry.begin}, expected {place}")
        place = entry.end
    if data_start + place != file_size:
        raise BadUpdate(
            f"the file has {file_size} bytes, but its header accounts for {data_start + place}: "
            "it was cut short, or something was added"
        )
    return Header(dict(entries), metadata, data_start)


def expected_update(layout: Cut, codec: str) -> Expected:
    """The tensors of an update or a delta: the codec's, and the absolute buffers and counters."""
    count = _count(layout.params)
    match check_codec(codec):
        case "int8":
            values: Expected = {"values": ("I8", (count,)), "scales": ("F32", (blocks(layout),))}
        case "bf16":
            values = {"values": ("BF16", (count,))}
        case _:
            values = {"values": ("F32", (count,))}
    return values | {
        "buffers": ("F32", (_count(layout.buffers),)),
        "counters": ("I64", (_count(layout.counters),)),
    }


def expected_snapshot(layout: Cut) -> Expected:
    return {
        "params": ("F32", (_count(layout.params),)),
        "buffers": ("F32", (_count(layout.buffers),)),
        "counters": ("I64", (_count(layout.counters),)),
    }


def blocks(layout: Cut) -> int:
    """How many scales the int8 codec sends."""
    return sum(-(-_size(shape) // BLOCK) for _, shape in layout.params)


def check_update(head: bytes, file_size: int, layout: Cut, codec: str) -> Header:
    """Raise `BadUpdate`, saying which tensor is wrong, unless the file is an update for this layout and codec."""
    return check(parse(head, file_size), expected_update(layout, codec))


def check_snapshot(head: bytes, file_size: int, layout: Cut) -> Header:
    return check(parse(head, file_size), expected_snapshot(layout))


def check(header: Header, expected: Expected) -> Header:
    """Raise `BadUpdate` unless the header names exactly the expected tensors."""
    for name, entry in header.tensors.items():
        if name not in expected:
            raise BadUpdate(f"unknown tensor {_show(name)}; expected {', '.join(sorted(expected))}")
        dtype, shape = expected[name]
        if entry.dtype != dtype:
            raise BadUpdate(f"tensor {_show(name)} is {entry.dtype}, expected {dtype}")
        if entry.shape != shape:
            raise BadUpdate(f"tensor {_show(name)} has the shape {list(entry.shape)}, expected {list(shape)}")
    if missing := sorted(expected.keys() - header.tensors.keys()):
        raise BadUpdate(f"tensor {', '.join(map(_show, missing))} is missing")
    return header


def check_codec(name: str) -> str:
    """The name itself; `BadInput` with the nearest name if there is no such codec."""
    if name in CODECS:
        return name
    near = difflib.get_close_matches(name.lower(), CODECS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(CODECS)}"
    raise BadInput(f"there is no codec {_show(name)}: {hint}")


def _json(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number")

    try:
        listing = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise BadUpdate(f"the file's header is not valid JSON: {str(error)[:120]}") from None
    if not isinstance(listing, dict):
        raise BadUpdate("the file's header is not a JSON object")
    return listing


def _metadata(found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise BadUpdate("the file's __metadata__ must be an object of strings")
    return found


def _entry(name: str, item: object) -> Entry:
    if len(name) > MAX_NAME:
        raise BadUpdate(f"tensor {_show(name)} has a name of {len(name)} characters; at most {MAX_NAME} are allowed")
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadUpdate(f"tensor {_show(name)} must have a dtype, a shape and data_offsets, and nothing else")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise BadUpdate(f"tensor {_show(name)} has the unknown dtype {_show(dtype)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise BadUpdate(f"tensor {_show(name)} has an impossible shape {_show(shape)} (at most {MAX_DIMS} dimensions)")
    if not _naturals(offsets) or len(offsets) != 2:
        raise BadUpdate(f"tensor {_show(name)} has impossible data_offsets {_show(offsets)}")
    begin, end = offsets
    size = _size(shape) * SIZES[dtype]
    if end - begin != size:
        raise BadUpdate(
            f"tensor {_show(name)}: {dtype} of shape {_show(shape)} takes {size} bytes, its offsets span {end - begin}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _naturals(found: object) -> bool:
    # bool is an int to Python; 2**53 is where JSON stops being exact, and the product of eight stays cheap
    return isinstance(found, list) and all(type(n) is int and 0 <= n < 1 << 53 for n in found)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _count(slots: Slots) -> int:
    return sum(_size(shape) for _, shape in slots)


def _show(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 80 else text[:76] + "...'"
