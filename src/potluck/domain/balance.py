"""When does a gang change its members' shares, and to what?

Every member feeds its own `Balancer` the same figures, which came with the gradient, and the arithmetic is plain
Python's: so all of them come to the same decision at the same step, without a coordinator. What a newcomer gets of it
(`to_state`) is exact, too.

    Fit        what a member's steps say of its pace
    Balancer   decides after each step whether another split is worth it, with its reason

The method is by simulation (tests/domain/test_balance.py): medians, so that a spike changes nothing; a large gain is
taken at once and a small one only if it lasts; what was measured before a change is forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, median
from typing import Any

from potluck.domain import gangs
from potluck.domain.gangs import Pace, ShareError, Wire, step_s

POLICIES = ("dynamic", "proportional", "uniform")
_TINY_S = 1e-9


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

    def solve(self) -> tuple[float, float] | None:
        """a and c, neither negative. None as long as all steps were alike: one equation for two unknowns."""
        spread = self.bb / self.kk - self.mean_b**2
        if spread <= (0.02 * self.mean_b) ** 2:
            return None
        steepest = self.mean_s / self.mean_b
        slope = (self.bt / self.kk - self.mean_b * self.mean_s) / spread
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

    def add(self, share: int, ready_s: float, first_s: float = 0.0) -> None:
        """One step: seconds from its start until its last bucket was ready, and its first one (0: not known)."""
        parts = max(1, -(-share // self.at_once))
        self._ready.add(parts, share, ready_s, self.forget)
        found = self._ready.solve()
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
            base_s, sample_s = self._first.solve() or (0.0, self._first.mean_s / max(self._first.mean_b, 1.0))
            self.pace = replace(self.pace, first_base_s=base_s, first_sample_s=sample_s)

    def start_over(self, pace: Pace) -> None:
        """The machine has changed: what was measured before says nothing any more."""
        self.pace = pace
        self._ready, self._first = _Line(), _Line()


# --- balancing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Patience:
    """When a new split is worth its disturbance."""

    window: int = 3  # steps whose median shows a sudden change
    gain: float = 0.08  # of the step's time, for a sudden change
    long_window: int = 20
    long_gain: float = 0.02
    settle: int = 2  # steps after a change that are not looked at: caches, data prepared for the old shares


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
        words = [f"{', '.join(came)} joined"] * bool(came) + [f"{', '.join(went)} left"] * bool(went)
        return self._take(
            members, self._shares(self.batch, members, paces), paces, " and ".join(words) or "a new start"
        )

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
        for name, seconds in ready_s.items():
            share = (shares or self.shares).get(name, 0)
            if share > 0 and 0 < seconds < float("inf"):
                self._learn(name, share, seconds, (first_s or {}).get(name, 0.0))
        if any(self.fits[name].pace is None for name in self.shares):
            return None
        if self.policy == "dynamic":
            return self._better(self.patience.window, self.patience.gain) or self._better(
                self.patience.long_window, self.patience.long_gain
            )
        if not self._planned and all(len(ratios) >= self.patience.window for ratios in self._ratios.values()):
            self._planned = True
            return self._replan(list(self.shares), self._paces(list(self.shares)), "shares in proportion to speed")
        return None

    def _learn(self, name: str, share: int, ready_s: float, first_s: float) -> None:
        fit = self.fits[name]
        expected = fit.pace.ready_s(share) if fit.pace is not None else ready_s
        ratio = ready_s / max(expected, _TINY_S)
        self._ratios[name].append(ratio)
        if fit.pace is None or 0.7 < ratio < 1.4:  # a spike teaches nothing
            fit.add(share, ready_s, first_s)

    def _better(self, window: int, gain: float) -> Replan | None:
        if any(len(ratios) < window for ratios in self._ratios.values()):
            return None
        names = list(self.shares)
        factors = {name: median(list(self._ratios[name])[-window:]) for name in names}
        paces = [self._pace_now(name, factors[name]) for name in names]
        now = [step_s([pace], [share], self.wire) for pace, share in zip(paces, self.shares.values(), strict=True)]
        now_s = max(now)
        if now_s / max(min(now), _TINY_S) - 1 < gain:
            return None  # in any other split somebody has no less than now, so no step is shorter than min(now)
        shares = gangs.split(self.batch, paces, self.wire)
        then_s = step_s(paces, shares, self.wire)
        if shares == list(self.shares.values()) or now_s / max(then_s, _TINY_S) - 1 < gain:
            return None
        for name, pace in zip(names, paces, strict=True):
            if pace is not self.fits[name].pace:
                self.fits[name].start_over(pace)
        reason = f"{_what_changed(factors)}: {now_s * 1e3:.0f} → {then_s * 1e3:.0f} ms a step"
        return self._replan(names, paces, reason)

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
        self._ratios = {name: deque(maxlen=self.patience.long_window) for name in members}
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
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], patience: Patience = Patience()) -> Balancer:
        made = cls(state["batch"], state["policy"], patience, Wire(**state["wire"]), dict(state["shares"]))
        for name, fit in state["fits"].items():
            pace = None if fit["pace"] is None else Pace(**fit["pace"])
            lines = _Line(**fit["_ready"]), _Line(**fit["_first"])
            made.fits[name] = Fit(pace, fit["at_once"], fit["forget"], *lines)
        made.replans, made._unseen, made._planned = state["replans"], state["unseen"], state["planned"]
        made._ratios = {name: deque(ratios, maxlen=patience.long_window) for name, ratios in state["ratios"].items()}
        return made


def _what_changed(factors: Mapping[str, float]) -> str:
    most = max(factors, key=lambda name: abs(factors[name] - 1))
    if factors[most] > 1.2:
        return f"{most} is {factors[most]:.1f}× slower than before"
    if factors[most] < 0.83:
        return f"{most} is {1 / factors[most]:.1f}× faster than before"
    return "the measured speeds say so"
