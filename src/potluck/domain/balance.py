"""When does a gang change its members' shares, and to what?

Every member feeds its own `Balancer` the same figures, which came with the gradient, and the arithmetic is plain
Python's: so all of them come to the same decision at the same step, without a coordinator. What a newcomer gets of it
(`to_state`) is exact, too.

    Fit        what a member's steps say of its pace
    Jumps      how much a member's times jump by themselves
    Trial      a plan has to deliver what it promised
    Balancer   decides after each step whether another split is worth it, with its reason

The method is by simulation (tests/domain/test_balance.py): medians, so that a spike changes nothing; a large gain is
taken at once and a small one only if it lasts; what was measured before a change is forgotten. Members that share a
machine break the model, for there the pace of one depends on the work of the others. So noise raises the gain that a
plan must promise, a plan that does not deliver raises the evidence for the next one, and no plan goes far from what
was measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from statistics import fmean, median
from typing import Any

from potluck.domain import gangs
from potluck.domain.gangs import Pace, ShareError, Wire, step_s

POLICIES = ("dynamic", "proportional", "uniform")
_TINY_S = 1e-9
_JUMPS = 20


# --- fitting --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Line:
    """Least squares of t = a·k + c·b (k parts, b samples), older steps counting less."""

    kk: float = 0.0
    kb: float = 0.0
    bb: float = 0.0
    kt: float = 0.0
    bt: float = 0.0

    def add(self, parts: int, share: int, seconds: float, forget: float) -> None:
        self.kk = forget * self.kk + parts * parts
        self.kb = forget * self.kb + parts * share
        self.bb = forget * self.bb + share * share
        self.kt = forget * self.kt + parts * seconds
        self.bt = forget * self.bt + share * seconds

    @property
    def mean_b(self) -> float:
        return self.kb / self.kk

    @property
    def mean_s(self) -> float:
        return self.kt / self.kk

    def solve(self, noise: float) -> tuple[float, float] | None:
        """a and c, neither negative. None as long as all steps were alike: one equation for two unknowns.

        The noisier the times, the more of them it takes to believe in a base: without one, more samples never look free.
        """
        spread = self.bb / self.kk - self.mean_b**2
        if spread <= (0.02 * self.mean_b) ** 2:
            return None
        steepest = self.mean_s / self.mean_b
        doubt = (2 * noise * self.mean_b) ** 2 / self.kk  # the spread that would tell as much as is believed before
        slope = (self.bt / self.kk - self.mean_b * self.mean_s + doubt * steepest) / (spread + doubt)
        slope = min(max(slope, 0.05 * steepest), steepest)
        return max(self.mean_s - slope * self.mean_b, 0.0), slope


@dataclass(slots=True)
class Fit:
    """What a member's steps say of its pace.

    As long as all steps had the same share, the pace known before keeps its shape and is scaled to what is measured.
    """

    pace: Pace | None = None
    at_once: int = gangs.NO_BOUND  # of the member's memory
    forget: float = 0.98
    _ready: _Line = field(default_factory=_Line)
    _first: _Line = field(default_factory=_Line)

    def add(self, share: int, ready_s: float, first_s: float = 0.0, *, noise: float = 0.0) -> None:
        """One step: seconds from its start until its last bucket was ready, and its first one (0: not known)."""
        parts = max(1, -(-share // self.at_once))
        self._ready.add(parts, share, ready_s, self.forget)
        found = self._ready.solve(noise)
        if found is not None:
            base_s, sample_s = found
            self.pace = replace(self.pace or Pace(0.0, 0.0, at_once=self.at_once), base_s=base_s, sample_s=sample_s)
        elif self.pace is None:
            self.pace = Pace(0.0, self._ready.mean_s / max(self._ready.mean_b, 1.0), at_once=self.at_once)
        else:
            expected = self.pace.base_s + self.pace.sample_s * self._ready.mean_b
            self.pace = self.pace.scaled(self._ready.mean_s / max(expected, _TINY_S))
        if first_s > 0 and parts == 1:
            self._first.add(1, share, first_s, self.forget)
            base_s, sample_s = self._first.solve(noise) or (0.0, self._first.mean_s / max(self._first.mean_b, 1.0))
            self.pace = replace(self.pace, first_base_s=base_s, first_sample_s=sample_s)

    def start_over(self, pace: Pace) -> None:
        """The machine has changed: what was measured before says nothing any more."""
        self.pace = pace
        self._ready, self._first = _Line(), _Line()


# --- trust ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Jumps:
    """How much a member's times jump from step to step, as a part of them. A change that stays is one jump only.

    No logarithms: they are not the same to the last bit on every machine.
    """

    latest: deque[float] = field(default_factory=lambda: deque(maxlen=_JUMPS))

    def add(self, before: float, after: float) -> None:
        self.latest.append(2 * abs(after - before) / (after + before))

    @property
    def noise(self) -> float:
        """Like a standard deviation."""
        spike = 2 if len(self.latest) >= 6 else 0  # one spike is two jumps
        counted = sorted(self.latest)[: len(self.latest) - spike]
        return fmean(counted) / 1.13 if counted else 0.0


@dataclass(slots=True)
class Trial:
    """The last plan has to show that it was right. Only computing counts: the network's time is not the plan's doing."""

    before: dict[str, int]  # the shares that it replaced
    before_s: float
    promised_s: float
    seen_s: dict[str, list[float]]

    def took_s(self, steps: int) -> float | None:
        """None: not seen long enough."""
        if any(len(seen) < steps for seen in self.seen_s.values()):
            return None
        return max(median(seen) for seen in self.seen_s.values())

    def is_kept(self, took_s: float) -> bool:
        return took_s <= 1.1 * self.promised_s

    def has_failed(self, took_s: float) -> bool:
        """Half of what was promised is neither."""
        return not self.is_kept(took_s) and took_s > (self.promised_s + self.before_s) / 2


# --- balancing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Patience:
    """When a new split is worth its disturbance."""

    window: int = 3  # steps whose median shows a sudden change
    gain: float = 0.08  # of the step's time, for a sudden change
    middle_window: int = 8
    middle_gain: float = 0.04
    long_window: int = 20
    long_gain: float = 0.02
    settle: int = 2  # steps after a change that are not looked at: caches, data prepared for the old shares
    blind_window: int = 2  # for the first plan: almost anything is better than equal shares
    blind_gain: float = 0.25
    blind_settle: int = 1
    noise: float = 0.04  # the gains are for this much of it, and grow with it
    most_doubt: int = 3  # each plan that does not deliver doubles windows and gains, so many times
    calm: int = 600  # steps without such a plan, until one is forgotten
    furthest: int = 4  # a share grows or shrinks by this factor at most: further away nothing was measured
    floor: int = 16  # no share is less than this part of an equal one: it would say nothing of the member's pace
    long_floor: int = 64  # …than this part, with the evidence of the long window

    @property
    def kept_steps(self) -> int:
        return max(self.window, self.middle_window, self.long_window) << self.most_doubt


@dataclass(frozen=True, slots=True)
class Replan:
    """Another split from the next step on."""

    shares: dict[str, int]
    predicted_s: float  # a step's time; 0: not known
    reason: str


@dataclass(slots=True)
class Balancer:
    """The closed loop: `members_changed` when somebody came or went (and to begin with), `observe` after each step."""

    batch: int
    policy: str = "dynamic"
    patience: Patience = Patience()
    wire: Wire = gangs.INSTANT
    shares: dict[str, int] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    replans: int = 0  # because of what was measured
    _ratios: dict[str, deque[float]] = field(default_factory=dict)  # measured by expected
    _unseen: int = 0
    _planned: bool = False  # by speed, since the members changed
    _blind: bool = False  # nothing was known when the shares were made
    _jumps: dict[str, Jumps] = field(default_factory=dict)
    _trial: Trial | None = None
    _doubt: int = 0  # plans that did not deliver, and are not forgotten
    _calm: int = 0  # steps since then

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ShareError(f"there is no policy `{self.policy}`: choose {', '.join(POLICIES)}")

    # --- members

    def members_changed(self, members: Sequence[str], *, at_once: Mapping[str, int] | None = None) -> Replan:
        """Somebody came or went. A newcomer counts as fast as the others on average, until it has been measured."""
        for name in members:
            fit = self.fits.setdefault(name, Fit())
            cap = (at_once or {}).get(name, 0) or gangs.NO_BOUND
            if cap != fit.at_once:
                self.fits[name] = Fit(at_once=cap)
        came = [name for name in members if name not in self.shares]
        went = [name for name in self.shares if name not in members]
        paces = self._paces(members)
        self._planned = self.policy == "uniform" or any(self.fits[name].pace is not None for name in members)
        if self.batch < len(members):
            raise ShareError(
                f"a batch of {self.batch} cannot feed {len(members)} members: raise batch_size to at least "
                f"{len(members)}, or use fewer machines"
            )
        self._blind = paces is None and self.policy == "dynamic"
        self._trial, self._doubt = None, min(self._doubt, 1)  # another gang deserves another try
        words = [f"{', '.join(came)} joined"] * bool(came) + [f"{', '.join(went)} left"] * bool(went)
        told = self._take(
            members, self._shares(self.batch, members, paces), paces, " and ".join(words) or "a new start"
        )
        if self._blind:
            self._unseen = self.patience.blind_settle
        return told

    def shares_of(self, batch: int) -> dict[str, int]:
        """The shares of a batch that is smaller than usual, the last of an epoch: some may be 0."""
        members = list(self.shares)
        if batch == self.batch:
            return dict(self.shares)
        return dict(zip(members, self._shares(batch, members, self._paces(members)), strict=True))

    def _paces(self, members: Sequence[str]) -> list[Pace] | None:
        """What is known of them; None if it is nothing at all."""
        known = [pace for name in members if (pace := self.fits[name].pace) is not None]
        if not known:
            return None
        usual = Pace(fmean(p.base_s for p in known), fmean(p.sample_s for p in known))
        return [self.fits[name].pace or replace(usual, at_once=self.fits[name].at_once) for name in members]

    def _shares(self, batch: int, members: Sequence[str], paces: list[Pace] | None) -> list[int]:
        if self.policy == "uniform" or paces is None:
            return gangs.uniform(batch, len(members))
        if batch < self.batch:
            return gangs.split_small(batch, paces, self.wire)
        if self.policy == "proportional":
            even = max(1, batch // len(members))
            return gangs.proportional(batch, [even / max(pace.ready_s(even), _TINY_S) for pace in paces])
        return gangs.split(batch, paces, self.wire)

    # --- steps

    def observe(
        self,
        ready_s: Mapping[str, float],
        *,
        first_s: Mapping[str, float] | None = None,
        shares: Mapping[str, int] | None = None,
    ) -> Replan | None:
        """What each member needed until its last (and its first) bucket was ready. A better split, if it is worth it.

        `shares`: of this step, if they were not the usual ones.
        """
        if self._unseen > 0:
            self._unseen -= 1
            return None
        usual = shares is None or shares == self.shares
        for name, seconds in ready_s.items():
            share = (shares or self.shares).get(name, 0)
            if share > 0 and 0 < seconds < float("inf"):
                self._learn(name, share, seconds, (first_s or {}).get(name, 0.0))
                if usual and self._trial is not None:
                    self._trial.seen_s[name].append(seconds)
        if any(self.fits[name].pace is None for name in self.shares):
            return None
        if self.policy == "dynamic":
            return self._dynamic()
        if not self._planned and all(len(ratios) >= self.patience.window for ratios in self._ratios.values()):
            self._planned = True
            return self._replan(list(self.shares), self._paces(list(self.shares)), "shares in proportion to speed")
        return None

    def _dynamic(self) -> Replan | None:
        self._calm += 1
        if self._doubt and self._calm >= self.patience.calm:
            self._doubt, self._calm = self._doubt - 1, 0
        if self._trial is not None:
            took_s = self._trial.took_s(self._trial_steps())
            if took_s is None:
                return None
            trial, self._trial = self._trial, None
            told = self._judged(trial, took_s)
            if told is not None:
                return told
        return self._best()

    def _trial_steps(self) -> int:
        steps = int(self.patience.window * self._noisiness())
        return max(self.patience.window << self._doubt, min(steps, self.patience.long_window))

    def _noisiness(self) -> float:
        """By how much all gains grow."""
        known = [jumps.noise for name in self.shares if (jumps := self._jumps.get(name)) is not None]
        return max([1.0, *(noise / self.patience.noise for noise in known)])

    def _judged(self, trial: Trial, took_s: float) -> Replan | None:
        """Back to the shares before, if the new ones are worse."""
        if trial.is_kept(took_s):
            self._doubt = max(self._doubt - 1, 0)
        if not trial.has_failed(took_s):
            return None
        self._doubt, self._calm = min(self._doubt + 1, self.patience.most_doubt), 0
        if took_s <= trial.before_s:
            return None
        self.replans += 1
        reason = (
            f"back to the shares before: computing takes {took_s * 1e3:.0f} ms a step, not "
            f"{trial.promised_s * 1e3:.0f} as the others promised"
        )
        names = list(self.shares)
        return self._take(names, [trial.before[name] for name in names], self._paces(names), reason)

    def _best(self) -> Replan | None:
        patience = self.patience
        if self._blind:
            if any(len(ratios) < patience.blind_window for ratios in self._ratios.values()):
                return None
            self._blind = False
            told = self._better(patience.blind_window, patience.blind_gain, patience.floor)
            if told is not None:
                return told
        return (
            self._better(patience.window, patience.gain, patience.floor)
            or self._better(patience.middle_window, patience.middle_gain, patience.floor)
            or self._better(patience.long_window, patience.long_gain, patience.long_floor)
        )

    def _learn(self, name: str, share: int, ready_s: float, first_s: float) -> None:
        fit, ratios, jumps = self.fits[name], self._ratios[name], self._jumps.setdefault(name, Jumps())
        expected = fit.pace.ready_s(share) if fit.pace is not None else ready_s
        ratio = ready_s / max(expected, _TINY_S)
        if ratios:
            jumps.add(ratios[-1], ratio)
        ratios.append(ratio)
        if fit.pace is None or 0.7 < ratio < 1.4:  # a spike teaches nothing
            fit.add(share, ready_s, first_s, noise=jumps.noise)

    def _better(self, window: int, gain: float, floor: int) -> Replan | None:
        window <<= self._doubt
        if any(len(ratios) < window for ratios in self._ratios.values()):
            return None
        names = list(self.shares)
        gain *= (1 << self._doubt) * self._noisiness()
        factors = {name: median(list(self._ratios[name])[-window:]) for name in names}
        paces = [self._pace_now(name, factors[name]) for name in names]
        now = [step_s([pace], [share], self.wire) for pace, share in zip(paces, self.shares.values(), strict=True)]
        now_s = max(now)
        if now_s / max(min(now), _TINY_S) - 1 < gain:
            return None  # in any other split somebody has no less than now, so no step is shorter than min(now)
        near = [self._near(pace, share, floor) for pace, share in zip(paces, self.shares.values(), strict=True)]
        shares = gangs.split(self.batch, near, self.wire)
        then_s = step_s(paces, shares, self.wire)
        if shares == list(self.shares.values()) or now_s / max(then_s, _TINY_S) - 1 < gain:
            return None
        for name, pace in zip(names, paces, strict=True):
            if pace is not self.fits[name].pace:
                self.fits[name].start_over(pace)
        reason = f"{_what_changed(factors)}: {now_s * 1e3:.0f} → {then_s * 1e3:.0f} ms a step"
        trial = Trial(
            dict(self.shares),
            _slowest_s(paces, self.shares.values()),
            _slowest_s(paces, shares),
            {n: [] for n in names},
        )
        self.replans += 1
        told = self._take(names, shares, paces, reason)
        self._trial = trial
        return told

    def _near(self, pace: Pace, share: int, floor: int) -> Pace:
        """The pace, for shares only that are not too far from this one."""
        equal, furthest = self.batch / len(self.shares), self.patience.furthest
        most = min(pace.most, max(share * furthest, ceil(equal / self.patience.floor)))
        least = max(pace.least, ceil(share / furthest), ceil(equal / floor))
        return replace(pace, least=min(least, most), most=most)

    def _pace_now(self, name: str, factor: float) -> Pace:
        """The fit has followed a small change already; a large one was kept from it as a spike."""
        pace = self.fits[name].pace
        assert pace is not None
        return pace.scaled(factor) if abs(factor - 1) > 0.2 else pace

    def _replan(self, members: Sequence[str], paces: list[Pace] | None, reason: str) -> Replan:
        self.replans += 1
        return self._take(members, self._shares(self.batch, members, paces), paces, reason)

    def _take(self, members: Sequence[str], shares: list[int], paces: list[Pace] | None, reason: str) -> Replan:
        self.shares = dict(zip(members, shares, strict=True))
        self._unseen = self.patience.settle
        self._ratios = {name: deque(maxlen=self.patience.kept_steps) for name in members}
        return Replan(dict(self.shares), step_s(paces, shares, self.wire) if paces else 0.0, reason)

    # --- for newcomers, and on disk

    def to_state(self) -> dict[str, Any]:
        """All of it as plain values; `from_state` makes the same one again."""
        return {
            "batch": self.batch,
            "policy": self.policy,
            "wire": asdict(self.wire),
            "shares": list(self.shares.items()),  # in the members' order
            "fits": {name: asdict(fit) for name, fit in self.fits.items()},
            "replans": self.replans,
            "ratios": {name: list(ratios) for name, ratios in self._ratios.items()},
            "unseen": self._unseen,
            "planned": self._planned,
            "blind": self._blind,
            "jumps": {name: list(jumps.latest) for name, jumps in self._jumps.items()},
            "trial": None if self._trial is None else asdict(self._trial),
            "doubt": self._doubt,
            "calm": self._calm,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], patience: Patience = Patience()) -> Balancer:
        made = cls(state["batch"], state["policy"], patience, Wire(**state["wire"]), dict(state["shares"]))
        for name, fit in state["fits"].items():
            pace = None if fit["pace"] is None else Pace(**fit["pace"])
            lines = _Line(**fit["_ready"]), _Line(**fit["_first"])
            made.fits[name] = Fit(pace, fit["at_once"], fit["forget"], *lines)
        made.replans, made._unseen = state["replans"], state["unseen"]
        made._planned, made._blind = state["planned"], state.get("blind", False)  # older states have no more
        made._doubt, made._calm = state.get("doubt", 0), state.get("calm", 0)
        made._trial = Trial(**state["trial"]) if state.get("trial") else None
        for name, latest in state.get("jumps", {}).items():
            made._jumps[name] = Jumps(deque(latest, maxlen=_JUMPS))
        made._ratios = {name: deque(ratios, maxlen=patience.kept_steps) for name, ratios in state["ratios"].items()}
        return made


def _slowest_s(paces: Sequence[Pace], shares: Iterable[int]) -> float:
    return max(pace.ready_s(share) for pace, share in zip(paces, shares, strict=True))


def _what_changed(factors: Mapping[str, float]) -> str:
    most = max(factors, key=lambda name: abs(factors[name] - 1))
    if factors[most] > 1.2:
        return f"{most} is {factors[most]:.1f}× slower than before"
    if factors[most] < 0.83:
        return f"{most} is {1 / factors[most]:.1f}× faster than before"
    return "the measured speeds say so"
