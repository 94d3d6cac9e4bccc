"""What is remembered of a lease on its way through a lane, and of the lane's purpose?"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from potluck.protocol import Lease, Progress
from potluck.worker.orders import Parts


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
