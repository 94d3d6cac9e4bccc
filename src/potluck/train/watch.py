"""What do the recipe's figures say, and are they still numbers?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

GPU_EVERY = 25
"""Steps between looks at figures that lie on a GPU: each look waits for the GPU."""


class NotFinite(Exception):
    """A figure became NaN or infinite; the message says which, and at or before which step."""


class Watch:
    """Means of the figures that `step` returned."""

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[str, float] = {}
        self._recent: dict[str, float] = {}
        self._recent_steps = 0
        self._held: dict[str, Tensor] = {}  # sums on the device since the last look
        self._held_steps = 0

    def add(self, figures: Mapping[str, Tensor | float]) -> None:
        """Take one step's figures. Raises `NotFinite`, on a GPU up to 25 steps late."""
        self.steps += 1
        self._held_steps += 1
        waits = False
        for name, value in figures.items():
            if isinstance(value, Tensor):
                value = value.detach()
                waits = waits or value.device.type != "cpu"
            held = self._held.get(name)
            self._held[name] = torch.as_tensor(value, dtype=torch.float32) if held is None else held + value
        if not waits or self._held_steps >= GPU_EVERY:
            self.look()

    def look(self) -> None:
        """Bring the figures over from the device and check them."""
        if not self._held_steps:
            return
        for name, held in self._held.items():
            value = held.item()
            if not math.isfinite(value):
                by = "at" if self._held_steps == 1 else "by"
                raise NotFinite(f"`{name}` became {value} {by} step {self.steps}")
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._recent[name] = self._recent.get(name, 0.0) + value
        self._recent_steps += self._held_steps
        self._held, self._held_steps = {}, 0

    def means(self) -> dict[str, float]:
        """Over all steps."""
        self.look()
        return {name: total / self.steps for name, total in self._sums.items()}

    def recent(self) -> dict[str, float]:
        """Over the steps since the last call."""
        self.look()
        means = {name: total / max(self._recent_steps, 1) for name, total in self._recent.items()}
        self._recent, self._recent_steps = {}, 0
        return means
