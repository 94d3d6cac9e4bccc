"""How do named tensors reach the disk and come back?

The format is safetensors (any reader of it opens our files). We write it ourselves because a file here is
named by the hash of its bytes: the library orders metadata by a hash map's whim, so the same tensors give
different bytes. We read it ourselves because the maker is not trusted: the header is checked against what is
expected before a byte is allocated, and there is one parser (domain/tensorfile.py) for hub and child, so that
they cannot disagree.

Memory order is the file's order: little-endian machines only, which is what torch runs on.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from potluck.domain import tensorfile
from potluck.domain.tensorfile import Expected
from potluck.errors import BadUpdate, DiskFull, PotluckError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file; the same tensors and metadata give the same bytes. It appears whole or not at all."""
    if sys.byteorder != "little":
        raise PotluckError("weights are little-endian on disk; this machine is big-endian and cannot take part")
    path = Path(path)
    held = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    # widest first, so that every tensor begins on a multiple of its own width
    order = sorted(held, key=lambda name: (-held[name].element_size(), name))
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(_header(held, order, metadata or {}))
            for name in order:
                file.write(as_bytes(held[name]))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no room to write {path}: free some space and try again") from error
        raise
    return path


def load(path: str | Path, expected: Expected | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that has exactly the `expected` tensors; otherwise `BadUpdate`."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(tensorfile.LENGTH_BYTES)
        head = prefix + file.read(tensorfile.head_bytes(prefix, size) - len(prefix))
        header = tensorfile.parse(head, size)
        if expected is not None:
            tensorfile.check(header, expected)
        tensors = {}
        for (
            name,
            entry,
        ) in header.tensors.items():  # in the order of their bytes: the file is read straight through
            if entry.dtype not in DTYPES:
                raise BadUpdate(f"tensor {name!r} is {entry.dtype}, which torch does not have")
            tensors[name] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            got = file.readinto(as_bytes(tensors[name]))
            if got != entry.end - entry.begin:
                raise BadUpdate(f"{path} ended within tensor {name!r}")
    return tensors, header.metadata


def _header(held: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]) -> bytes:
    listing: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    place = 0
    for name in order:
        tensor = held[name]
        end = place + tensor.numel() * tensor.element_size()
        listing[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(listing, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(tensorfile.LENGTH_BYTES, "little") + text


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's own memory, to be read or written in place."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
