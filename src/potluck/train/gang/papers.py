"""Do all members train the same thing?

Before they connect, members show each other papers: versions, the script's files, the model's tensors, the data set's
length and a few of its items. Who differs from most does not fit, and is told in what.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from potluck.train.gang.engine import Card

_SAMPLED_ITEMS = 8
_MOST_FILES = 300
_MOST_BYTES = 2 << 20  # a larger file is no script

_WHAT: dict[str, str] = {
    "torch": "torch",
    "batch": "the batch size",
    "loss": "the kind of loss",
    "optimizer": "the optimizer",
    "length": "the number of samples in the data set",
    "items": "the samples themselves (same number, other content)",
    "seed": "the seed",
    "compress": "the compression of the gradients",
}


def write(
    model: nn.Module, optimizer: object, dataset: Any, items: Callable[[list[int]], list[Any]], plan: Mapping[str, Any]
) -> dict[str, Any]:
    """A member's papers, as plain values. `items` reads samples; `plan`: batch, loss, seed."""
    length = len(dataset)
    return {
        "torch": torch.__version__.partition("+")[0],  # a CPU and a GPU build of one version go together
        "code": script_files(),
        "device": device_of(model),
        "model": {name: f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in _tensors(model)},
        "optimizer": type(optimizer).__name__,
        "length": length,
        "items": sampled(length, items),
        **plan,
    }


def device_of(model: nn.Module) -> str:
    """On which device all its parameters are: "cpu", "cuda GPU-…" with what tells this GPU from others; empty: several."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return ""
    device = devices.pop()
    if device.type != "cuda":
        return device.type
    return f"cuda {getattr(torch.cuda.get_device_properties(device), 'uuid', device.index)}"


def unfit(cards: Sequence[Card]) -> dict[str, str]:
    """Who differs from most of the others, and in what. Without a majority: from those that are furthest, then first."""
    found: dict[str, str] = {}
    for key in (*_WHAT, "code", "model"):
        values = [card.papers.get(key) for card in cards]
        odd = [i for i in _odd(values, [card.step for card in cards]) if cards[i].name not in found]
        ordinary = next((value for i, value in enumerate(values) if i not in odd), None)
        for i in odd:
            found[cards[i].name] = _sentence(cards[i].name, key, values[i], ordinary)
    return found


def _odd(values: Sequence[Any], steps: Sequence[int]) -> list[int]:
    keys = [repr(value) for value in values]
    tally = Counter(keys)
    # a gang that has run is right and a newcomer is not, whatever their numbers
    ordinary = keys[max(range(len(keys)), key=lambda i: (steps[i], tally[keys[i]], -i))]
    return [i for i, key in enumerate(keys) if key != ordinary]


def _sentence(name: str, key: str, value: Any, ordinary: Any) -> str:
    if key == "code":
        return (
            f"{name} does not fit: its {_first_difference(value, ordinary)} is not the one the others have. "
            "Start all members from the same project folder"
        )
    if key == "model":
        layer = _first_difference(value, ordinary)
        here, there = (value or {}).get(layer, "missing"), (ordinary or {}).get(layer, "missing")
        return f"{name} does not fit: its model has another `{layer}`: {here}, and {there} on the others"
    if key == "items":
        return f"{name} does not fit: its data set has other samples than the others', though as many"
    return f"{name} does not fit: {_WHAT[key]} is {value} there and {ordinary} on the others"


def _first_difference(value: Any, ordinary: Any) -> str:
    here, there = value or {}, ordinary or {}
    return next((name for name in [*here, *there] if here.get(name) != there.get(name)), "something")


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def script_files() -> dict[str, str]:
    """The script and what it imported from its own folder: path and hash of the content."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main is None:
        return {}
    folder = Path(main).resolve().parent
    files = {Path(main).resolve()}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.endswith(".py") and folder in (path := Path(file).resolve()).parents:
            files.add(path)
    own = sorted(path for path in files if not {"site-packages", "dist-packages"} & set(path.parts))
    return {path.relative_to(folder).as_posix(): _hash(path) for path in own[:_MOST_FILES]}


def _hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()[:_MOST_BYTES]).hexdigest()[:16]
    except OSError:
        return ""  # a script from standard input


def sampled(length: int, items: Callable[[list[int]], list[Any]]) -> str:
    """A hash of a few samples; empty if reading one twice gives two results (augmentation by its own random numbers)."""
    chosen = sorted(random.Random(length).sample(range(length), min(_SAMPLED_ITEMS, length)))
    first, second = (_digest(items, chosen) for _ in range(2))
    return first if first == second else ""


def _digest(items: Callable[[list[int]], list[Any]], chosen: list[int]) -> str:
    """With fixed seeds of the usual generators, so that usual augmentation does not make a difference."""
    state, torch_state = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        random.seed(0)
        torch.default_generator.manual_seed(0)
        if numpy is not None:
            numpy.random.seed(0)
        digest = hashlib.sha256()
        for item in items(chosen):
            _feed(digest, item)
        return digest.hexdigest()[:16]
    finally:
        random.setstate(state)
        torch.set_rng_state(torch_state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)


def _feed(digest: Any, item: Any) -> None:
    if isinstance(item, Tensor):
        tensor = item.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        if not tensor.is_sparse and not tensor.is_quantized:
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    elif isinstance(item, dict):
        for key, value in item.items():
            digest.update(repr(key).encode())
            _feed(digest, value)
    elif isinstance(item, list | tuple):
        digest.update(b"[")
        for value in item:
            _feed(digest, value)
    elif hasattr(item, "tobytes"):  # an array, or a picture
        digest.update(type(item).__name__.encode() + item.tobytes())
    elif isinstance(item, str | bytes | int | float | bool) or item is None:
        digest.update(repr(item).encode())
    else:
        digest.update(type(item).__name__.encode())  # its repr may hold an address
