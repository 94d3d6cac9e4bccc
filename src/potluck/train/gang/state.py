"""What do all members hold the same copy of?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from potluck.domain.balance import Balancer
from potluck.domain.gangs import Noise
from potluck.errors import BadInput
from potluck.train.gang import healing, papers
from potluck.train.gang.compress import Compression
from potluck.train.gang.engine import Card


@dataclass(slots=True)
class Cursor:
    """Where the training is. It moves only when a step is committed."""

    epoch: int = 0
    place: int = 0  # samples of this epoch that are in committed steps
    step: int = 0


@dataclass(slots=True)
class State:
    name: str
    balancer: Balancer
    model: nn.Module
    optimizer: Optimizer
    papers: dict[str, Any]
    compression: Compression
    kept: dict[str, Any] = field(default_factory=dict)  # whatever else has a state_dict: schedulers, averages
    cursor: Cursor = field(default_factory=Cursor)
    noise: Noise = field(default_factory=Noise)
    skipped: int = 0  # steps in a row whose gradient was not finite
    has_drifted: bool = False  # this member's weights differ from the others': it takes theirs
    loads: int = 0

    @property
    def step(self) -> int:
        return self.cursor.step - self.has_drifted

    def card(self) -> Card:
        return Card(self.name, self.step, self.papers)

    def unfit(self, cards: Sequence[Card]) -> dict[str, str]:
        return papers.unfit(cards)

    def save(self, path: Path) -> None:
        healing.save(path, self._tree())

    def check(self) -> None:
        """BadInput if it could not be given to a newcomer: better now than when one comes."""
        healing.check(self._tree())

    def _tree(self) -> dict[str, Any]:
        return {
            "length": self.papers["length"],
            "seed": self.papers["seed"],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "compression": self.compression.state_dict(),
            "kept": {name: thing.state_dict() for name, thing in self.kept.items()},
            "cursor": asdict(self.cursor),
            "balancer": self.balancer.to_state(),
            "noise": asdict(self.noise),
            "skipped": self.skipped,
        }

    def load(self, path: Path) -> None:
        tree = healing.load(path)
        for key in ("length", "seed"):
            if tree[key] != self.papers[key]:
                raise BadInput(
                    f"{path} was made with {key} {tree[key]}, not {self.papers[key]}: it is another training's"
                )
        missing = set(self.kept) ^ set(tree["kept"])
        if missing:
            raise BadInput(f"gang.keep was given other things than where {path} was made: {', '.join(sorted(missing))}")
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        for name, thing in self.kept.items():
            thing.load_state_dict(tree["kept"][name])
        if "compression" in tree:
            self.compression.load_state_dict(tree["compression"])
        policy = self.balancer.policy
        self.balancer = Balancer.from_state(tree["balancer"])
        self.balancer.batch, self.balancer.policy = self.papers["batch"], policy
        self.cursor, self.noise = Cursor(**tree["cursor"]), Noise(**tree["noise"])
        self.skipped, self.has_drifted = tree["skipped"], False
        self.loads += 1
