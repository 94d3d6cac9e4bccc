"""Where does a member's time go, and which member's time is it that all wait for?

Every member's times travel with the next step's gradient (report.py), so each of them knows all, and needs no other message.
"""

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
        return float(sum(getattr(self, name) for name in PHASES))


PHASES = ("meet_s", "load_s", "forward_s", "backward_s", "sum_s", "optimizer_s", "outside_s")
_SHARED = ("meet_s", "sum_s")
"""What no member does alone: who has nothing else to do spends its time there."""
_KEEP = 0.98
"""Of the other members' means, at each step."""
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
    kind: str  # joined, left, replan, retry, skip, drift, unfit, advice, healed, profile, compress
    text: str


@dataclass(slots=True)
class Profile:
    """The last committed steps of this member, and the means of all."""

    recent: deque[tuple[int, Times]] = field(default_factory=lambda: deque(maxlen=200))
    members: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds a step, by name and phase
    _p99_s: float = 0.0
    _fresh: int = 0  # steps for which it still holds

    def add(self, batch: int, times: Times) -> None:
        self.recent.append((batch, times))
        self._fresh -= 1

    def hear(self, told: Mapping[str, Mapping[str, float]]) -> None:
        """What every member says of its last step; nothing yet, of one that has just come."""
        for name in self.members.keys() - told.keys():
            del self.members[name]
        for name, spans in told.items():
            known = self.members.get(name)
            if not any(spans.values()):
                continue
            if known is None:
                self.members[name] = dict(spans)
            else:
                for phase, seconds in spans.items():
                    known[phase] += (1 - _KEEP) * (seconds - known[phase])

    @property
    def samples_per_s(self) -> float:
        """Of the whole gang, by the clock on the wall."""
        seconds = sum(times.total_s for _, times in self.recent)
        return sum(batch for batch, _ in self.recent) / seconds if seconds > 0 else 0.0

    def means(self) -> dict[str, float]:
        """Seconds a step, by what they go into."""
        count = max(len(self.recent), 1)
        return {name: sum(getattr(times, name) for _, times in self.recent) / count for name in PHASES}

    def sentence(self) -> str:
        """What takes most of a step, and where."""
        if len(self.members) > 1:
            return bottleneck(self.members).sentence
        means = self.means()
        if sum(means.values()) <= 0:
            return "no step has been committed yet"
        return bottleneck({"": means}).sentence

    def p99_s(self) -> float:
        """Of the part of a step that others may have to wait for; 0: not known yet."""
        if self._fresh <= 0 and self.recent:
            spans = sorted(t.load_s + t.forward_s + t.backward_s + t.sum_s for _, t in self.recent)
            self._p99_s = spans[min(len(spans) - 1, int(0.99 * len(spans)))]
            self._fresh = len(spans) // 8  # every step would be a fifth of what the profiler costs
        return self._p99_s


@dataclass(frozen=True, slots=True)
class Bottleneck:
    phase: str
    member: str  # whom the others wait for; empty: all alike
    share: float  # of the step
    sentence: str


def bottleneck(means: Mapping[str, Mapping[str, float]]) -> Bottleneck:
    """What takes most of a step, on the member that all others wait for: the one with most to do of its own.

    `means`: seconds a step, by member and phase.
    """
    busy = {name: sum(spans[phase] for phase in PHASES if phase not in _SHARED) for name, spans in means.items()}
    slowest = max(busy, key=lambda name: (busy[name], name))
    spans = means[slowest]
    phase = max(PHASES, key=lambda phase: spans[phase])
    share = spans[phase] / max(sum(spans.values()), 1e-9)
    if phase in _SHARED:  # even for the slowest: it is nobody's fault
        text = f"{_WORDS[phase]}: {share:.0%} of the step" + " on all members" * (len(means) > 1)
        return Bottleneck(phase, "", share, text)
    return Bottleneck(
        phase, slowest, share, f"{_WORDS[phase]}: {share:.0%} of the step" + f" on {slowest}" * bool(slowest)
    )
