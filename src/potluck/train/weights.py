"""How do a recipe's modules become one flat vector, and how does a machine arrive at a version's exact bits?

The weights of a run are three flat CPU vectors: parameters (fp32), float buffers (fp32), counters (int64).
`Layout` cuts them into named tensors. What belongs to them:

- every parameter, trained or frozen, so that a snapshot is the whole model; one that is shared (tied) counts
  once, under the first name, and the modules' own tie spreads it;
- every persistent float buffer (fp16 and bf16 too, kept in fp32) and every persistent integer or boolean
  buffer;
- not the non-persistent buffers: their author said that they can be computed again.

Version v+1 = version v + decoded delta. The product and the sum are separate elementwise operations: a fused
one rounds once instead of twice, and only some CPUs have it. So every replica holds the same bits, and
`sha256` proves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from potluck.domain import tensorfile
from potluck.errors import BadUpdate, PotluckError, RecipeError
from potluck.protocol import Layout, WeightFile
from potluck.train import tensorio
from potluck.train.codec import codec, read_update

Slots = list[tuple[str, list[int]]]


@dataclass(slots=True, eq=False)
class Weights:
    """One set of weights on the CPU, contiguous."""

    params: Tensor  # f32[N]
    buffers: Tensor  # f32[B]
    counters: Tensor  # i64[C]

    @classmethod
    def zeros(cls, layout: Layout) -> Weights:
        return cls(
            torch.zeros(layout.param_count),
            torch.zeros(layout.buffer_count),
            torch.zeros(layout.counter_count, dtype=torch.int64),
        )

    def clone(self) -> Weights:
        return Weights(self.params.clone(), self.buffers.clone(), self.counters.clone())

    def sha256(self) -> str:
        """Of the canonical bytes: params fp32, buffers fp32, counters int64, all little-endian."""
        digest = hashlib.sha256()
        for vector in (self.params, self.buffers, self.counters):
            digest.update(tensorio.as_bytes(vector))
        return digest.hexdigest()


# --- modules ------------------------------------------------------------------------------------------------


def layout_of(models: Mapping[str, nn.Module]) -> Layout:
    """The layout of these models, in the order in which they and their tensors were registered."""
    params: Slots = []
    buffers: Slots = []
    counters: Slots = []
    for name, tensor in _parameters(models):
        if nn.parameter.is_lazy(tensor):
            raise RecipeError(f"{name} has no shape yet: run a batch through lazy modules before they are returned")
        if not tensor.is_floating_point():
            raise RecipeError(f"{name} is a parameter of {tensor.dtype}: only floating-point ones can be averaged")
        params.append((name, list(tensor.shape)))
    for name, tensor in _buffers(models):
        if tensor.is_complex():
            raise RecipeError(f"{name} is a complex buffer: register its real and imaginary parts instead")
        (buffers if tensor.is_floating_point() else counters).append((name, list(tensor.shape)))
    if not params:
        raise RecipeError("the recipe's models have no parameters: there is nothing to train")
    return Layout(params, buffers, counters)


def gather(models: Mapping[str, nn.Module], layout: Layout, out: Weights | None = None) -> Weights:
    """The modules' present weights as flat CPU vectors, in `out` if given."""
    out = out or Weights.zeros(layout)
    found = _named(models)
    with torch.no_grad():
        for slots, vector in _vectors(layout, out):
            _copy_out(_pick(found, slots), vector)
    return out


def scatter(weights: Weights, models: Mapping[str, nn.Module], layout: Layout) -> None:
    """Copy the weights into the modules, in place, wherever they are: optimizers keep their hold on the parameters."""
    found = _named(models)
    with torch.no_grad():
        for slots, vector in _vectors(layout, weights):
            _copy_in(vector, _pick(found, slots))


def _parameters(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for model, module in models.items():
        for name, parameter in module.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{model}.{name}", parameter


def _buffers(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for model, module in models.items():
        for path, part in module.named_modules(prefix=model):
            for name, buffer in part.named_buffers(recurse=False):
                if id(buffer) not in seen and name not in part._non_persistent_buffers_set:
                    seen.add(id(buffer))
                    yield f"{path}.{name}", buffer


def _named(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return dict(_parameters(models)) | dict(_buffers(models))


def _vectors(layout: Layout, weights: Weights) -> list[tuple[Slots, Tensor]]:
    pairs = [
        (layout.params, weights.params),
        (layout.buffers, weights.buffers),
        (layout.counters, weights.counters),
    ]
    for slots, vector in pairs:
        size = sum(torch.Size(shape).numel() for _, shape in slots)
        if vector.numel() != size:
            raise PotluckError(
                f"these weights have {vector.numel()} values where the layout has {size}: another model's?"
            )
    return pairs


def _pick(found: Mapping[str, Tensor], slots: Slots) -> list[Tensor]:
    picked = []
    for name, shape in slots:
        tensor = found.get(name)
        if tensor is None:
            raise RecipeError(
                f"the run has a tensor {name}, this recipe has none: is it another recipe, or edited since?"
            )
        if list(tensor.shape) != shape:
            raise RecipeError(
                f"{name} has the shape {list(tensor.shape)} here and {shape} in the run: the recipe's settings differ"
            )
        picked.append(tensor)
    return picked


def _copy_out(tensors: list[Tensor], vector: Tensor) -> None:
    if not tensors:
        return
    devices = {tensor.device for tensor in tensors}
    if len(devices) == 1 and devices != {vector.device}:  # one transfer instead of one for each tensor
        vector.copy_(torch.cat([tensor.detach().reshape(-1).to(vector.dtype) for tensor in tensors]))
        return
    for view, tensor in zip(_views(vector, tensors), tensors, strict=True):
        view.copy_(tensor)


def _copy_in(vector: Tensor, tensors: list[Tensor]) -> None:
    if not tensors:
        return
    for view, tensor in zip(_views(vector.to(tensors[0].device), tensors), tensors, strict=True):
        tensor.copy_(view)


def _views(vector: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    parts = torch.split(vector, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


# --- files --------------------------------------------------------------------------------------------------


def save_snapshot(path: str | Path, weights: Weights, metadata: Mapping[str, str] | None = None) -> Path:
    return tensorio.save(
        path, {"params": weights.params, "buffers": weights.buffers, "counters": weights.counters}, metadata
    )


def load_snapshot(path: str | Path, layout: Layout) -> Weights:
    found, _ = tensorio.load(path, tensorfile.expected_snapshot(layout))
    return Weights(found["params"], found["buffers"], found["counters"])


def save_state(path: str | Path, state: Mapping[str, Tensor]) -> Path:
    """The outer state that belongs to a version: see merge.py for its tensors."""
    return tensorio.save(path, state)


def load_state(path: str | Path, layout: Layout) -> dict[str, Tensor]:
    state, _ = tensorio.load(path)
    for name in ("residual", "momentum", "ema", "adam_m", "adam_v"):
        vector = state.get(name)
        if vector is not None and (vector.dtype != torch.float32 or vector.shape != (layout.param_count,)):
            raise BadUpdate(
                f"{name} in {path} is {vector.dtype} of {list(vector.shape)}, expected fp32 of [{layout.param_count}]"
            )
    return state


# --- versions -----------------------------------------------------------------------------------------------


def advance(weights: Weights, path: str | Path, codec_name: str, layout: Layout) -> None:
    """One version further, in place, by a delta file. If the file is bad the weights are as they were."""
    update = read_update(path, layout, codec_name)
    step = codec(codec_name).decode(update.tensors, layout)
    weights.params.add_(step)
    weights.buffers.copy_(update.buffers)
    weights.counters.copy_(update.counters)


def apply_chain(weights: Weights | None, files: list[WeightFile], layout: Layout) -> Weights:
    """The weights after the last file, whose hash they are checked against. `weights` itself is left alone.

    A snapshot replaces, a delta adds. An empty chain gives a copy. A wrong hash is a `BadUpdate`: some link
    of the chain is not what the merger made, or the chain does not start from these weights.
    """
    now = weights.clone() if weights is not None else None
    for before, file in zip([None, *files], files, strict=False):
        if file.kind == "snapshot":
            now = load_snapshot(file.path, layout)
            continue
        if now is None:
            raise PotluckError(f"version {file.version} came as a delta, but there are no weights to add it to")
        if before is not None and file.version != before.version + 1:
            raise PotluckError(f"the chain of weights jumps from version {before.version} to {file.version}")
        advance(now, file.path, file.codec, layout)
    if now is None:
        raise PotluckError("there are no weights yet, and none were given")
    if files and now.sha256() != files[-1].weights_sha256:
        raise BadUpdate(
            f"the weights after version {files[-1].version} have another hash than the merger's: "
            "fetch a snapshot and start from it"
        )
    return now
