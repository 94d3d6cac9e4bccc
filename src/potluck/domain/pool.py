"""When does a round of the pool close, with which updates, and how big is the next unit?

A pool run has one endless line of sample positions. Units are carved off its front when a worker asks, by the worker's
own measured speed, so that a fast and a slow machine both hand in about every `unit_s` seconds, on common *ticks*.
Merging never waits for the slowest: a quorum and a short, learned grace close the round.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

from potluck.errors import BadInput, UnknownSetting


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What `--set` and `potluck set` may change of a pool run; everything else is computed."""

    preset: str = "average"  # average (GANs) | nesterov; the recipe chooses, an outer momentum ruins a GAN
    unit_s: float = 10.0  # T, seconds: everybody hands in about this often
    unit_samples: int = 0  # a unit's size in samples; 0: as many as fit into T at the worker's speed
    codec: str = "int8"  # of updates and deltas: int8 | bf16 | fp32
    strategy: str = "local"  # local | gradient (one gradient a unit, the predecessor's way, to compare)
    overlap: float = 0.2  # of T: how long a child may step on old weights while its update travels
    quorum: float = 0.5  # share of the active workers whose updates are enough to merge
    s_max: int = 4  # merges: an update that is further behind is superseded
    outer_lr: float = -1.0  # of the outer step; negative: the preset's
    momentum: float = -1.0  # of the outer step; negative: the preset's
    ema_decay: float = 0.5  # of the published average per 1,000 applied samples; 0: no average
    taste_every_s: float = 20.0  # seconds between sample grids; 0: only the first and the last
    taste_count: int = 64  # pictures a grid
    snapshot_every: int = 10  # versions between full snapshots
    keep_updates: bool = False  # keep merged updates on the hub's disk, to replay the run later

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, ("average", "nesterov"))
        _one_of("codec", self.codec, ("int8", "bf16", "fp32"))
        _one_of("strategy", self.strategy, ("local", "gradient"))
        _within("unit_s", self.unit_s, 0.05, 3600)
        _within("unit_samples", self.unit_samples, 0, 10**9)
        _within("overlap", self.overlap, 0, 0.2)
        _within("quorum", self.quorum, 0, 1)
        _within("s_max", self.s_max, 0, 1000)
        _within("outer_lr", self.outer_lr, -1, 100)
        _within("momentum", self.momentum, -1, 0.999999)
        _within("ema_decay", self.ema_decay, 0, 0.999999)
        _within("taste_every_s", self.taste_every_s, 0, 10**9)
        _within("taste_count", self.taste_count, 1, 1024)
        _within("snapshot_every", self.snapshot_every, 1, 10**6)

    def changed(self, changes: Mapping[str, Any]) -> PoolSettings:
        """These settings with `changes` (values may be strings). An unknown key names the nearest."""
        known = {f.name: f for f in fields(self)}
        coerced: dict[str, Any] = {}
        for key, value in changes.items():
            if key not in known:
                raise UnknownSetting(f"no setting `{key}`{nearest(key, known)}")
            coerced[key] = _coerce(key, value, type(getattr(self, key)))
        return replace(self, **coerced)


def nearest(key: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """`: did you mean …?`, or the list of what there is."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f": did you mean `{near[0]}`?" if near else f": there are {', '.join(sorted(known))}"


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise BadInput(f"{name} is `{value}`: it must be one of {', '.join(allowed)}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadInput(f"{name} is {value:g}: it must lie between {low:g} and {high:g}")


def _coerce(name: str, value: Any, kind: type) -> Any:
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in words:
            raise BadInput(f"{name} is `{value}`: it must be yes or no")
        return words[str(value).lower()]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadInput(f"{name} is {value!r}: it must be a {kind.__name__}")
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise BadInput(f"{name} is `{value}`: it must be a {kind.__name__}") from None


# --- units ----------------------------------------------------------------------------------------------------------

FIRST_UNIT_SAMPLES = 4096
"""What a worker of unknown speed is offered; what it does not reach in its time box goes back."""
MOST_UNIT_SAMPLES = 10**9
"""However fast a worker claims to be."""


FASTEST = 1e9
"""Samples per second that nobody does; whoever claims more is offered a first unit."""


def unit_size(settings: PoolSettings, samples_per_s: float | None) -> int:
    """How many positions to carve for a worker that does `samples_per_s` in this run (None: not known yet).

    A box may last up to 1.5 T (it ends on a tick), and speed drifts, so a little more is carved than is expected to
    be done: the rest goes back, whereas a unit that runs dry leaves its machine idle.
    """
    if settings.unit_samples:
        return settings.unit_samples
    if samples_per_s is None or not 0 < samples_per_s < math.inf:
        return FIRST_UNIT_SAMPLES
    return max(64, math.ceil(min(1.7 * settings.unit_s * samples_per_s, MOST_UNIT_SAMPLES)))


def next_tick_s(settings: PoolSettings, elapsed_s: float) -> float:
    """Seconds until the run's next common hand-in time."""
    return settings.unit_s - elapsed_s % settings.unit_s


# --- rounds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pending:
    """An update that waits for its merge."""

    task_id: int
    worker_id: str
    waited_s: float  # since it was reported


@dataclass(frozen=True, slots=True)
class Round:
    """What is known when we ask whether to merge."""

    pending: Sequence[Pending]
    active: int  # M: workers with a live unit lease or a pending update
    offsets_s: Sequence[float] = ()  # how long after a round's first update the others of recent rounds came
    ending: bool = False  # nobody is going to hand in anything more


@dataclass(frozen=True, slots=True)
class Decision:
    merge: tuple[int, ...]  # task ids, in order; empty: not yet
    reason: str
    wake_s: float = 1.0  # ask again after so long, if nothing happens before


def grace_s(offsets_s: Sequence[float], unit_s: float) -> float:
    """How long a quorum waits for the rest: median + 3·MAD of what recent rounds showed, at most 0.15 T."""
    if not offsets_s:
        return min(1.0, 0.1 * unit_s)
    middle = median(offsets_s)
    spread = median([abs(offset - middle) for offset in offsets_s])
    return min(max(middle + 3 * spread, 0.02 * unit_s), 0.15 * unit_s)


def close_round(round_: Round, settings: PoolSettings) -> Decision:
    """Decide whether a merge starts now, and with which updates. Never waits longer than 1.5 T for anybody."""
    tasks = tuple(sorted(update.task_id for update in round_.pending))
    if not tasks:
        return Decision((), "no update waits")
    workers = {update.worker_id for update in round_.pending}
    active = max(round_.active, len(workers))
    tally = f"{len(tasks)} updates of {len(workers)} of {active} workers"
    if round_.ending:
        return Decision(tasks, f"{tally}: the last of the run")
    if len(workers) >= active:
        return Decision(tasks, f"{tally}: everybody handed in")
    quorum = min(active, max(2, math.ceil(settings.quorum * active)))
    oldest = max(update.waited_s for update in round_.pending)
    newest = min(update.waited_s for update in round_.pending)
    patience = 1.5 * settings.unit_s
    if oldest >= patience:
        return Decision(tasks, f"{tally}: the oldest has waited {oldest:.1f} s")
    if len(workers) < quorum:
        return Decision((), f"{tally}: waiting for a quorum of {quorum}", patience - oldest)
    grace = grace_s(round_.offsets_s, settings.unit_s)
    if newest >= grace:
        return Decision(tasks, f"{tally}: quorum of {quorum} and {grace:.2f} s of grace are over")
    return Decision((), f"{tally}: quorum of {quorum} reached, grace of {grace:.2f} s runs", grace - newest)


def outer_step(settings: PoolSettings) -> tuple[str, float, float]:
    """(outer optimizer, learning rate, momentum) of the preset, unless the run sets its own.

    GANs: plain averaging; outer momentum 0.9 diverged in the small check. The rest: Nesterov with a momentum that pays
    back within the few dozen merges of a class (research/low_communication.md, 2.1).
    """
    if settings.strategy == "gradient":
        return "adam", 2e-4 if settings.outer_lr < 0 else settings.outer_lr, 0.5
    outer, lr, momentum = {"average": ("average", 1.0, 0.0), "nesterov": ("nesterov", 0.7, 0.3)}[settings.preset]
    return (
        outer,
        lr if settings.outer_lr < 0 else settings.outer_lr,
        momentum if settings.momentum < 0 else settings.momentum,
    )


# --- trust ----------------------------------------------------------------------------------------------------------

STRIKES = 3
"""So many rejected updates in a row and a worker gets no more units of the run."""


def judge_losses(losses: Mapping[str, float]) -> str:
    """Why an update with these mean losses is refused at the door; "" if it is not."""
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    return f"the loss `{bad[0]}` is not a number: its weights are of no use" if bad else ""
