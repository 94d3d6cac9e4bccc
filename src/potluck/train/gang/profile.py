"""Where does a member's time go?"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Times:
    """One step of one member, in seconds."""

    meet_s: float = 0.0  # agreeing on who takes part, and healing
    load_s: float = 0.0  # waiting for data
    forward_s: float = 0.0  # from then until the backward pass begins
    backward_s: float = 0.0  # until the last bucket is ready
    sum_s: float = 0.0  # waiting for the sums over the members
    optimizer_s: float = 0.0
    outside_s: float = 0.0  # the script's own doing between step() and the next batch

    @property
    def total_s(self) -> float:
        return float(sum(getattr(self, name) for name in _NAMES))


_NAMES = ("meet_s", "load_s", "forward_s", "backward_s", "sum_s", "optimizer_s", "outside_s")
_WORDS = {
    "meet_s": "meeting the other members",
    "load_s": "the loader",
    "forward_s": "the forward pass",
    "backward_s": "the backward pass",
    "sum_s": "waiting for the sum of the gradients",
    "optimizer_s": "the optimizer",
    "outside_s": "the script itself, between two steps",
}


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as a member saw it; `gang.watch` gets one after each."""

    step: int
    epoch: int
    start: int  # its range of the epoch's order: [start, start + Σ shares)
    shares: Mapping[str, int]  # by member, in the order of the ranks
    is_committed: bool
    is_skipped: bool  # committed without a change of the weights: the gradient was not finite
    times: Times
    ready_s: Mapping[str, float]  # every member's, until its last bucket was ready; empty if it was not committed
    noise_scale: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something that people want to know."""

    step: int
    kind: str  # joined, left, replan, retry, skip, drift, unfit, advice, healed
    text: str


@dataclass(slots=True)
class Profile:
    """The last committed steps of this member."""

    recent: deque[tuple[int, Times]] = field(default_factory=lambda: deque(maxlen=200))

    def add(self, batch: int, times: Times) -> None:
        self.recent.append((batch, times))

    @property
    def samples_per_s(self) -> float:
        """Of the whole gang, by the clock on the wall."""
        seconds = sum(times.total_s for _, times in self.recent)
        return sum(batch for batch, _ in self.recent) / seconds if seconds > 0 else 0.0

    def means(self) -> dict[str, float]:
        """Seconds a step, by what they go into."""
        count = max(len(self.recent), 1)
        return {name: sum(getattr(times, name) for _, times in self.recent) / count for name in _NAMES}

    def sentence(self) -> str:
        """What takes most of a step."""
        means = self.means()
        total = sum(means.values())
        if total <= 0:
            return "no step has been committed yet"
        most = max(means, key=lambda name: means[name])
        return f"{_WORDS[most]}: {means[most] / total:.0%} of the step"

    def p99_s(self) -> float:
        """Of the part of a step that others may have to wait for; 0: not known yet."""
        spans = sorted(t.load_s + t.forward_s + t.backward_s + t.sum_s for _, t in self.recent)
        return spans[min(len(spans) - 1, int(0.99 * len(spans)))] if spans else 0.0
