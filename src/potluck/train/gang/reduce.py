"""How do a member's gradients become the gradient of the whole batch, during its backward pass?

Parameters are laid into buckets, in the reverse order of their registration, which is about the order in which their
gradients come. When the last gradient of a bucket has come, its sum over the members begins, while autograd goes on. At
the end of the backward pass we wait for all sums, so that from then on `p.grad` is the gradient of the global batch:
clipping, GradScaler and anybody's code see what they would see on one machine.

Not DistributedDataParallel, because its buckets change after the first step of a process (a newcomer's would not match
the others'), it divides by members instead of samples, and it has no place for parts of a share.

Each member contributes Σ over its samples ÷ planned batch: of the size of a mean, so half precision does not overflow.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from potluck.errors import BadInput, PotluckError
from potluck.train.gang.compress import Begin, Compression

BUCKET_BYTES = 8 << 20
ROOM = 4096
"""Figures that may travel in the last bucket, behind its gradients: one sum less, which a small model notices."""


@dataclass(slots=True, eq=False)
class Bucket:
    whole: Tensor  # gradients, and in the last bucket room for figures
    flat: Tensor  # the gradients
    parameters: int  # how many
    waits_for: int  # of them


@dataclass(slots=True)
class _Pass:
    """What is known of one step's backward pass."""

    begin: Begin
    is_alone: bool  # then nothing needs to be compressed
    started_at: float
    factor: float = 1.0  # of the present part
    is_last: bool = True  # nothing is summed over the members before a share's last part
    launched: int = 0  # buckets
    seen: set[int] = field(default_factory=set)  # parameters that got a gradient in this part
    used: set[int] = field(default_factory=set)  # and in any part
    squares: list[Tensor] = field(default_factory=list)
    backward_at: float = 0.0
    first_at: float = 0.0
    is_queued: bool = False
    is_over: bool = False


class Reducer:
    """Of one model. `close` is called at the end of each step's last backward pass."""

    def __init__(self, model: nn.Module, close: Callable[[], None], compress: str = "none") -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise BadInput("the model has no parameter that needs a gradient: there is nothing to train")
        if strange := {p.device.type for p in self.parameters} - {"cpu", "cuda"}:
            raise BadInput(f"a gang cannot sum gradients on `{strange.pop()}`: move the model to the CPU or to CUDA")
        self._close = close
        self._pass: _Pass | None = None
        self._views = [torch.empty(0)] * len(self.parameters)
        self._bucket_of = [0] * len(self.parameters)
        layout = self._layout = _laid_out(self.parameters)
        self.buckets = [self._bucket(number, places) for number, places in enumerate(layout)]
        self.compression = Compression(compress, [[self.parameters[i].shape for i in places] for places in layout])
        for place, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(functools.partial(self._came, place))
        model.register_forward_hook(self._forward_done)

    def _bucket(self, number: int, places: list[int]) -> Bucket:
        like, size = self.parameters[places[0]], sum(self.parameters[i].numel() for i in places)
        whole = torch.zeros(size + _room(like) * (0 in places), dtype=like.dtype, device=like.device)
        flat = whole[:size]
        for i, piece in zip(places, flat.split([self.parameters[i].numel() for i in places]), strict=True):
            self._views[i] = piece.view(self.parameters[i].shape)
            self._bucket_of[i] = number
        return Bucket(whole, flat, len(places), len(places))

    # --- a step

    def open(self, begin: Begin, *, is_alone: bool = False) -> None:
        """A step begins; `begin` starts a sum over the members."""
        self._pass = _Pass(begin, is_alone, time.perf_counter())
        for parameter in self.parameters:
            parameter.grad = None
        for bucket in self.buckets:
            bucket.waits_for = bucket.parameters

    def part(self, factor: float, *, is_last: bool) -> None:
        """The next part of the share. `factor` turns its gradient into this part of Σ ÷ planned batch."""
        now = self._now()
        now.factor, now.is_last = factor, is_last
        now.seen.clear()

    def weigh(self, factor: float) -> None:
        """Another factor for the present part. Before its backward pass."""
        now = self._now()
        if now.seen:
            raise BadInput("gang.count must be called before loss.backward()")
        now.factor = factor

    def abandon(self) -> None:
        """The step is over, or given up; other backward passes are none of ours."""
        self._pass = None

    @property
    def is_over(self) -> bool:
        return self._pass is None or self._pass.is_over

    @property
    def forward_s(self) -> float:
        now = self._now()
        return max(now.backward_at - now.started_at, 0.0) if now.backward_at else 0.0

    def _now(self) -> _Pass:
        if self._pass is None:
            raise PotluckError("no step is open: take batches from gang.loader")
        return self._pass

    # --- autograd

    def _forward_done(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The end of the backward pass is known only from where it begins: checkpointing nests passes in it."""
        if self._pass is not None and not self._pass.is_over and self._pass.is_last and torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._began)

    def _began(self, grad: Tensor) -> None:
        now = self._pass
        if now is None or now.is_over or not now.is_last or now.is_queued:
            return
        now.is_queued, now.backward_at = True, time.perf_counter()
        torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    def _ended(self) -> None:
        now = self._pass
        if now is not None and not now.is_over:
            self._close()

    def _came(self, place: int, parameter: Tensor) -> None:
        now = self._pass
        if now is None or parameter.grad is None:
            return
        if now.is_over or place in now.seen:
            raise BadInput(
                "backward() ran twice for one batch of gang.loader: add the losses up and call backward() once"
            )
        if parameter.grad.is_sparse:
            raise BadInput("a gang cannot sum sparse gradients: build the embedding with sparse=False")
        self._began(parameter.grad)  # where the model was called in another way than model(x)
        now.seen.add(place)
        if now.factor:  # without a sample of its own a member adds nothing, not even NaN · 0
            with torch.no_grad():
                if place in now.used:
                    self._views[place].add_(parameter.grad, alpha=now.factor)
                else:
                    torch.mul(parameter.grad, now.factor, out=self._views[place])
            now.used.add(place)
        parameter.grad = None
        if now.is_last:
            bucket = self.buckets[self._bucket_of[place]]
            bucket.waits_for -= 1
            self._launch_full(now)

    def _launch_full(self, now: _Pass) -> None:
        while now.launched < len(self.buckets) - 1 and self.buckets[now.launched].waits_for == 0:
            self._launch(now)  # all but the last one, which takes the figures along

    def _launch(self, now: _Pass) -> None:
        flat = self.buckets[now.launched].flat
        for place in self._layout[now.launched]:
            if place not in now.used:
                self._views[place].zero_()  # the others are overwritten: a large model would notice a second pass
        if not now.launched:
            now.first_at = time.perf_counter()
        now.squares.append(_square(flat))
        now.launched += 1
        if now.launched < len(self.buckets):
            self._send(now, now.launched - 1)

    def _send(self, now: _Pass, number: int) -> None:
        codec, flat = self.compression.codec, self.buckets[number].flat
        if codec is None or now.is_alone:
            now.begin(flat)
        else:
            codec.begin(number, flat, now.begin)

    # --- its end

    def launch_rest(self) -> tuple[float, float, float]:
        """Begin all sums but the last one's. This member's |g|², and when its first and its last bucket were ready."""
        now = self._now()
        now.is_over = True
        while now.launched < len(self.buckets):
            self._launch(now)
        square = math.fsum(one.item() for one in now.squares)  # waits for a GPU
        return square, now.first_at - now.started_at, time.perf_counter() - now.started_at

    def launch_last(self, figures: Tensor) -> Callable[[], Tensor]:
        """Begin the last bucket's sum, and that of `figures` (float64): with it, if they fit. Call it for their sum."""
        now, last = self._now(), self.buckets[-1]
        room = last.whole[last.flat.numel() :]
        parts = _parts(last.whole.dtype)
        size = parts * figures.numel()
        if not parts or size > room.numel() or (self.compression.codec is not None and not now.is_alone):
            self._send(now, len(self.buckets) - 1)
            now.begin(figures)
            return lambda: figures
        _split_into(room[:size], figures)
        now.begin(last.whole[: last.flat.numel() + size])
        return lambda: room[:size].double().view(parts, -1).sum(0)

    def unpack(self, finish: Callable[[], str]) -> str:
        """After the sums, where they were compressed: `finish` waits for more of them. Why there are none, or empty."""
        codec, now = self.compression.codec, self._now()
        if codec is None or now.is_alone:
            return ""
        codec.second(now.begin)
        if failure := finish():
            return failure
        for number, bucket in enumerate(self.buckets):
            codec.end(number, bucket.flat)
        return ""

    def settle(self) -> None:
        """The step was committed."""
        if self.compression.codec is not None and not self._now().is_alone:
            self.compression.codec.settle()

    def used(self) -> Tensor:
        """Which parameters got a gradient here."""
        flags = torch.zeros(len(self.parameters), dtype=torch.float64)
        flags[list(self._now().used)] = 1
        return flags

    def show(self, used: Tensor, scale: float) -> None:
        """After the sums: `p.grad` is the global gradient, None where no member used the parameter."""
        for bucket in self.buckets:
            if scale != 1.0:
                bucket.flat.mul_(scale)
        for parameter, view, count in zip(self.parameters, self._views, used.tolist(), strict=True):
            parameter.grad = view if count else None

    def clear(self) -> None:
        """After a failure: zeros, which no GradScaler takes for an overflow."""
        for bucket in self.buckets:
            bucket.flat.zero_()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view

    def square(self) -> float:
        """|g|² of the gradient that the optimizer will see."""
        return math.fsum(_square(p.grad.reshape(-1)).item() for p in self.parameters if p.grad is not None)

    def scale(self, factor: float) -> None:
        """Of the gradient that the optimizer will see."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    @property
    def size_bytes(self) -> int:
        return sum(bucket.flat.numel() * bucket.flat.element_size() for bucket in self.buckets)

    def part_sent(self, way: str) -> float:
        """How much of the gradient's bytes a way of compression sends."""
        return self.compression.part(way, self.size_bytes, self.parameters[0].element_size())

    @property
    def others_by_last(self) -> float:
        """How many bytes all buckets but the last have, for one of the last."""
        sizes = [bucket.flat.numel() * bucket.flat.element_size() for bucket in self.buckets]
        return sum(sizes[:-1]) / max(sizes[-1], 1)


def _laid_out(parameters: list[nn.Parameter]) -> list[list[int]]:
    """Which parameters share a bucket: neighbours of one dtype and device, up to a size."""
    groups: list[list[int]] = []
    size = 0
    for place in reversed(range(len(parameters))):
        parameter, bytes_ = parameters[place], parameters[place].numel() * parameters[place].element_size()
        last = parameters[groups[-1][0]] if groups else None
        if (
            last is None
            or (last.dtype, last.device) != (parameter.dtype, parameter.device)
            or size + bytes_ > BUCKET_BYTES
        ):
            groups.append([])
            size = 0
        groups[-1].append(place)
        size += bytes_
    return groups


def _parts(dtype: torch.dtype) -> int:
    """How many numbers of this type hold one of float64 without loss; 0: too many."""
    return {torch.float64: 1, torch.float32: 3}.get(dtype, 0)


def _room(like: Tensor) -> int:
    return ROOM * _parts(like.dtype) if like.device.type == "cpu" else 0


def _split_into(room: Tensor, figures: Tensor) -> None:
    """Write each number as a sum of narrower ones. A number to which all others add zero comes through exactly."""
    left = figures.clone()
    for piece in room.view(-1, figures.numel()):
        piece.copy_(left)
        left -= piece.double()


def _square(flat: Tensor) -> Tensor:
    wide = flat.float() if flat.element_size() < 4 else flat
    return torch.dot(wide, wide)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dataclass_fields__"):
        yield from _tensors([getattr(output, name) for name in output.__dataclass_fields__])
