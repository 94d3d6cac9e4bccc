"""How do gradients travel in fewer bytes where the network is what a gang waits for?

    none       as they are: the gang's gradient is one machine's, to the last digits
    fp16       half precision, scaled by what the last step's largest value was: half the bytes
    powersgd   of each matrix two thin factors (Vogels et al. 2019, arXiv 1905.13727) with error feedback: a small part
    auto       none, and fp16 from the step on when waiting for the network is seen to take much of it

Only the buckets' way to the others changes: what is summed still is Σ over a member's samples ÷ planned batch, and it is
divided by the exact count. Scales, factors and the decision of `auto` are made of what all members hold the same bits of;
so they belong to the state that a newcomer gets. What a member could not send (its error) is its own, and is lost with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from potluck.errors import BadInput

WAYS = ("none", "auto", "fp16", "powersgd")
WHOLE_STEPS = 10
"""Steps at the beginning that PowerSGD sends whole: the first gradients are unlike the later ones."""
RANK = 4
_AIM = 16.0
"""What a step's largest value becomes in fp16, at most. Then 64 times as much still fits, from 64 members."""
_MOST = 1023.0

Begin = Callable[[Tensor], None]


class Codec(Protocol):
    """Of one training. Buckets are named by their number; `settle` only comes if the step was committed."""

    def begin(self, number: int, flat: Tensor, begin: Begin) -> None: ...

    def second(self, begin: Begin) -> None:
        """Between the first sums and `end`: what can only be said when these are known."""

    def end(self, number: int, flat: Tensor) -> None:
        """`flat` becomes the sum over all members."""

    def settle(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Half:
    """A value that is more than 64 times the last step's largest is cut: that is an explosion anyway."""

    def __init__(self) -> None:
        self._scales: dict[int, float] = {}
        self._sent: dict[int, Tensor] = {}
        self._next: dict[int, float] = {}

    def begin(self, number: int, flat: Tensor, begin: Begin) -> None:
        scale = self._scales.get(number, 0.0)
        if not scale:  # nothing is known of its size yet
            begin(flat)
            return
        small = (flat * scale).clamp_(-_MOST, _MOST).half()
        self._sent[number] = small
        begin(small)

    def second(self, begin: Begin) -> None:
        """Nothing is left to say."""

    def end(self, number: int, flat: Tensor) -> None:
        sent = self._sent.pop(number, None)
        if sent is not None:
            flat.copy_(sent)
            flat.div_(self._scales[number])
        largest = float(flat.abs().max())
        if 0 < largest < math.inf:  # a power of two, so that scaling loses nothing
            self._next[number] = 2.0 ** min(max(math.floor(math.log2(_AIM / largest)), -100), 100)

    def settle(self) -> None:
        self._scales.update(self._next)
        self._next.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"scales": dict(self._scales)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scales = dict(state["scales"])
        self._sent.clear()
        self._next.clear()


@dataclass(slots=True)
class _Matrix:
    """A parameter's gradient as n × m, with its two factors."""

    low: int  # its place in the bucket
    rows: int
    columns: int
    q: Tensor  # m × r, from the last committed step: the same on all members
    error: Tensor | None = None  # what this member has not been able to send
    whole: Tensor = field(default_factory=lambda: torch.empty(0))  # gradient and error
    p: Tensor = field(default_factory=lambda: torch.empty(0))
    new_q: Tensor = field(default_factory=lambda: torch.empty(0))
    left: Tensor | None = None

    @property
    def high(self) -> int:
        return self.low + self.rows * self.columns


class PowerSGD:
    """Rank-4 factors. The sums over P and Q are linear in each member's contribution, so shares and counts stay exact.

    Both factors are rounded from float64, and their product to bfloat16: machines of different makes add in different
    orders, and would otherwise drift apart in the last digits.
    """

    def __init__(self, buckets: Sequence[Sequence[torch.Size]], *, rank: int = RANK) -> None:
        self._matrices = [_matrices(shapes, rank) for shapes in buckets]
        self._committed = 0
        self._sent: dict[int, Tensor] = {}
        self._seconds: dict[int, Tensor] = {}

    @property
    def sends_whole(self) -> bool:
        return self._committed < WHOLE_STEPS

    def begin(self, number: int, flat: Tensor, begin: Begin) -> None:
        matrices = self._matrices[number]
        if self.sends_whole or not matrices:
            begin(flat)
            return
        pieces, place = [], 0
        for matrix in matrices:
            whole = flat[matrix.low : matrix.high].view(matrix.rows, matrix.columns).clone()
            matrix.whole = whole if matrix.error is None else whole.add_(matrix.error)
            matrix.p = matrix.whole @ matrix.q.to(whole)
            pieces += [flat[place : matrix.low], matrix.p.view(-1)]
            place = matrix.high
        pieces.append(flat[place:])
        self._sent[number] = torch.cat(pieces)
        begin(self._sent[number])

    def second(self, begin: Begin) -> None:
        for number, sent in self._sent.items():
            place, at, parts = 0, 0, []
            for matrix in self._matrices[number]:
                place += matrix.low - at  # past what was sent as it is
                matrix.p = _orthogonal(sent[place : place + matrix.p.numel()].view(matrix.p.shape))
                place, at = place + matrix.p.numel(), matrix.high
                matrix.new_q = matrix.whole.T @ matrix.p
                matrix.left = matrix.whole - matrix.p @ matrix.new_q.T
                parts.append(matrix.new_q.reshape(-1))
            self._seconds[number] = torch.cat(parts)
            begin(self._seconds[number])

    def end(self, number: int, flat: Tensor) -> None:
        sent = self._sent.pop(number, None)
        if sent is None:
            return
        factors = self._seconds.pop(number)
        place, at, low = 0, 0, 0
        for matrix in self._matrices[number]:
            between = matrix.low - at
            flat[at : matrix.low] = sent[place : place + between]
            matrix.new_q = factors[low : low + matrix.new_q.numel()].view(matrix.new_q.shape)
            product = (matrix.p.double() @ matrix.new_q.double().T).bfloat16()
            flat[matrix.low : matrix.high] = product.reshape(-1).to(flat.dtype)
            low += matrix.new_q.numel()
            place, at = place + between + matrix.p.numel(), matrix.high
        flat[at:] = sent[place:]

    def settle(self) -> None:
        if not self.sends_whole:
            for matrices in self._matrices:
                for matrix in matrices:
                    matrix.error, matrix.left = matrix.left, None
                    if bool(matrix.new_q.any()):  # a factor of zeros would never see anything again
                        matrix.q = matrix.new_q.clone()
        self._committed += 1

    def state_dict(self) -> dict[str, Any]:
        return {"committed": self._committed, "q": [[m.q for m in matrices] for matrices in self._matrices]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._committed = state["committed"]
        for matrices, factors in zip(self._matrices, state["q"], strict=True):
            for matrix, q in zip(matrices, factors, strict=True):
                matrix.q, matrix.error = q, None
        self._sent.clear()
        self._seconds.clear()


def _matrices(shapes: Sequence[torch.Size], rank: int) -> list[_Matrix]:
    """Those of a bucket that two factors are smaller than."""
    found, low = [], 0
    for shape in shapes:
        rows = shape[0] if shape else 1
        columns = shape.numel() // max(rows, 1)
        if 2 * rank * (rows + columns) < rows * columns:
            made = torch.Generator().manual_seed(low + rows)  # the same on all members
            found.append(_Matrix(low, rows, columns, torch.randn(columns, rank, generator=made)))
        low += shape.numel()
    return found


def _orthogonal(p: Tensor) -> Tensor:
    """Its columns, made orthonormal one after the other. A column that says nothing new becomes zero."""
    wide = p.double()
    columns: list[Tensor] = []
    for i in range(wide.shape[1]):
        column, size = wide[:, i], wide[:, i].norm()
        for _ in range(2):  # once is not enough where columns are nearly alike
            for other in columns:
                column = column - other * (other @ column)
        norm = column.norm()
        is_new = ~(norm <= 1e-7 * size)  # also if it is not a number, which everybody must see
        columns.append(torch.where(is_new, column / norm, torch.zeros_like(column)))
    return torch.stack(columns, dim=1).to(p.dtype)


class Compression:
    """Which way gradients take at present, and what that way remembers."""

    def __init__(self, asked: str, buckets: Sequence[Sequence[torch.Size]]) -> None:
        if asked not in WAYS:
            raise BadInput(f"gang.wrap has compress=`{asked}`: there are {', '.join(WAYS)}")
        self.asked, self.now = asked, "none"
        self._buckets = buckets
        self._codec: Codec | None = None
        if asked != "auto":
            self.take(asked)

    @property
    def codec(self) -> Codec | None:
        return self._codec

    def take(self, way: str) -> None:
        """From the next step on, on all members alike."""
        self.now = way
        match way:
            case "fp16":
                self._codec = Half()
            case "powersgd":
                self._codec = PowerSGD(self._buckets)
            case _:
                self._codec = None

    def part(self, way: str, size_bytes: int, element_bytes: int) -> float:
        """How much of the gradient's bytes `way` would send."""
        if way == "fp16":
            return 2 / element_bytes
        if way == "powersgd":
            saved = sum(
                (m.rows * m.columns - RANK * (m.rows + m.columns)) * element_bytes
                for shapes in self._buckets
                for m in _matrices(shapes, RANK)
            )
            return 1 - saved / max(size_bytes, 1)
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now, "codec": self._codec.state_dict() if self._codec is not None else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.asked not in ("auto", state["now"]):
            return  # a file of a run that was asked another way
        self.take(state["now"])
        if self._codec is not None:
            self._codec.load_state_dict(state["codec"])
