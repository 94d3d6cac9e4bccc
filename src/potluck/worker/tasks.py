"""What is remembered of a lease on its way through a lane, and of the lane's purpose?"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from potluck.protocol import Lease, Progress
from potluck.worker.orders import Parts

RIPE = 0.7  # of a box: when the next unit is leased, so that its data is there in time
SHORT_BOX_S = 1.5  # a box this short is over before its progress is heard of: lease the next at once


class Stage(Enum):
    FETCHING = "fetching"
    FETCHED = "fetched"
    TOLD = "told"
    WORKING = "working"
    SENDING = "sending"


@dataclass
class Task:
    lease: Lease
    leased_at: float
    stage: Stage = Stage.FETCHING
    parts: Parts = field(default_factory=Parts)
    started_at: float = 0.0
    box_s: float = 0.0
    window_until: float = 0.0  # the child would take a newer version until then
    progress: Progress = field(default_factory=lambda: Progress(""))
    fraction: float = 0.0
    asked_in: bool = False
    fetches: int = 1

    @property
    def name(self) -> str:
        return f"{self.lease.kind} {self.lease.task_id} of {self.lease.run_id}"

    def is_ripe(self, now: float) -> bool:
        """Will the unit at work soon be over?"""
        if self.stage is not Stage.WORKING or self.asked_in:
            return False
        short = 0 < self.box_s <= SHORT_BOX_S
        return short or self.fraction >= RIPE or now - self.started_at >= RIPE * self.box_s > 0


@dataclass(frozen=True)
class LanePolicy:
    """What kind of lane this is."""

    name: str
    kinds: tuple[str, ...]
    ahead: bool  # lease the next task while one is at work
    device: str = "cpu"
    share: float = 1.0
    once: bool = False  # stop after one task


@dataclass
class Tally:
    """For the screen."""

    done: int = 0
    refused: int = 0
    samples: int = 0
