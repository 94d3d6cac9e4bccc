"""What do its members' figures and sentences say of a gang: who does how much, where does the time go, what was decided?

    points of the members   ─►  Watch   who is how fast, who sets the pace, what all of them reach together
    lines of their logs     ─►  Ear     the sentences of the gang among all that a script prints
    both                    ─►  story   the sentences in order, each with its step

Things are put in order by step and not by time: all members take the same steps, but their clocks differ. The page and
the terminal show the same. The figures are those that a member writes with `potluck.log`, at most once a second.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Final

FIGURES: Final = tuple(
    f"gang/{name}"
    for name in (
        *("rank", "members", "share", "batch", "step_s", "load_s", "forward_s", "backward_s", "sum_s", "optimizer_s"),
        *("meet_s", "outside_s", "samples_per_s", "total_per_s", "alone_per_s", "noise_scale", "cpu", "memory_bytes"),
        *("gpu", "gpu_memory_bytes", "temperature_c"),
    )
)
"""What a member writes about itself, of what is known there."""
KEPT: Final = 600
"""Points of one member: ten minutes, as there is one a second at most."""
RECENT: Final = 15
"""Points whose mean is "now"."""
SIGN: Final = "potluck: "
"""What the gang's own lines begin with in a member's log."""
MOST_SAID: Final = 40
"""Sentences of one member that are remembered, the newest."""
LONGEST: Final = 4_000
"""Characters of a sentence: a script that never ends its line must not fill the memory of who watches."""

CALM: Final = 5
"""Points of the newest whose mean is the speed of the gang: each is the mean of a second."""

PHASES: Final = {
    "load": "the loader",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "sum": "waiting for the sum of the gradients",
    "optimizer": "the optimizer",
    "meet": "meeting the other members",
    "outside": "the script between two steps",
}
_WAITS: Final = ("sum", "meet")
"""Phases in which a member waits for others. All the rest is its own work."""
Series = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Look:
    """What a member wrote about one step. Values without the "gang/" in front."""

    step: int
    values: Mapping[str, float]

    @property
    def work_s(self) -> float:
        return sum(self.values.get(f"{name}_s", 0.0) for name in PHASES if name not in _WAITS)

    @property
    def step_s(self) -> float:
        return self.values.get("step_s", 0.0) or sum(self.values.get(f"{name}_s", 0.0) for name in PHASES)


@dataclass(frozen=True, slots=True)
class Part:
    """A phase's part of a member's step."""

    phase: str
    seconds: float
    part: float


@dataclass
class Lane:
    """One member, by the newest of its points."""

    looks: deque[Look] = field(default_factory=lambda: deque(maxlen=KEPT))

    def put(self, look: Look) -> None:
        self.cut(look.step)
        self.looks.append(look)

    def cut(self, step: int) -> None:
        """Forget this step and all after it."""
        while self.looks and self.looks[-1].step >= step:
            self.looks.pop()

    @property
    def step(self) -> int:
        return self.looks[-1].step if self.looks else -1

    def newest(self, name: str, otherwise: float = 0.0) -> float:
        return self.looks[-1].values.get(name, otherwise) if self.looks else otherwise

    def now(self, name: str) -> float:
        """The mean of the last points that know it."""
        known = [look.values[name] for look in list(self.looks)[-RECENT:] if name in look.values]
        return fmean(known) if known else 0.0

    @property
    def work_s(self) -> float:
        recent = list(self.looks)[-RECENT:]
        return fmean(look.work_s for look in recent) if recent else 0.0

    @property
    def parts(self) -> list[Part]:
        """Where the time of a step goes now; empty while nothing is known."""
        seconds = {name: max(self.now(f"{name}_s"), 0.0) for name in PHASES}
        whole = sum(seconds.values())
        return [Part(name, s, s / whole) for name, s in seconds.items()] if whole > 0 else []

    def first_step_with(self, share: int, after: int) -> int | None:
        return next(
            (look.step for look in self.looks if look.step >= after and look.values.get("share") == share), None
        )


@dataclass
class Watch:
    """A gang as its members see it. A member is known by its number."""

    lanes: dict[int, Lane] = field(default_factory=dict)

    def add(self, member: int, step: int, values: Mapping[str, float]) -> bool:
        """Take what is about the gang in one point; False if nothing is. Points come by time, as far as clocks agree."""
        own = {name[5:]: value for name, value in values.items() if name.startswith("gang/")}
        if own:
            lane = self.lanes.setdefault(member, Lane())
            if step < lane.step:  # all were gone, and go on from a checkpoint: what is behind it was lost for everybody
                for each in self.lanes.values():
                    each.cut(step)
            lane.put(Look(step, own))
        return bool(own)

    @property
    def current(self) -> list[int]:
        """Who takes part now: of all that ever wrote, those who wrote last, as many as the newest point says."""
        if not self.lanes:
            return []
        newest = max(self.lanes.values(), key=lambda lane: lane.step)
        count = int(newest.newest("members", len(self.lanes)))
        last = sorted(self.lanes, key=lambda member: (-self.lanes[member].step, member))
        return sorted(last[: max(count, 1)])

    @property
    def step(self) -> int:
        return max((lane.step for lane in self.lanes.values()), default=-1)

    @property
    def step_s(self) -> float:
        """What a step of the whole gang takes now."""
        return self._newest.now("step_s") if self.lanes else 0.0

    @property
    def total_per_s(self) -> float:
        """Samples a second of the whole gang now, by the clock on the wall."""
        if not self.lanes:
            return 0.0
        newest = self._newest
        same = newest.newest("members")  # what was before somebody came or left says nothing of now
        known = [
            look.values.get("total_per_s", 0.0) for look in newest.looks if look.values.get("members", 0.0) == same
        ]
        return fmean(known[-CALM:])

    @property
    def alone_per_s(self) -> float:
        """What its machines would do alone, together; 0 as long as it is not known of all."""
        alone = [self.lanes[member].newest("alone_per_s") for member in self.current]
        return sum(alone) if alone and min(alone) > 0 else 0.0

    @property
    def _newest(self) -> Lane:
        return max(self.lanes.values(), key=lambda lane: lane.step)

    def throughput(self) -> tuple[Series, Series]:
        """Samples a second by step: of the gang, and the sum of what its members of that time would do alone."""
        together: dict[int, float] = {}
        alone: dict[int, float] = {}
        last: dict[int, tuple[int, float]] = {}  # member → its newest step so far, and what it would do alone
        looks = sorted(
            ((look.step, member, look) for member, lane in self.lanes.items() for look in lane.looks), key=_order
        )
        for step, member, look in looks:
            last[member] = (step, look.values.get("alone_per_s", 0.0))
            gone = len(last) - int(look.values.get("members", len(last)))
            for left in sorted(last, key=lambda each: last[each][0])[: max(gone, 0)]:
                del last[left]
            if total := look.values.get("total_per_s"):
                together[step] = total
            if last and all(speed > 0 for _, speed in last.values()):
                alone[step] = sum(speed for _, speed in last.values())
        return _series(together), _series(alone)

    def steps(self, names: Mapping[int, str], most: int) -> dict[str, Series]:
        """What a step takes, by step: the whole of it, then the own work of the slowest members."""
        whole = {look.step: look.step_s for lane in self.lanes.values() for look in lane.looks}
        slowest = sorted(self.current, key=lambda member: -self.lanes[member].work_s)[: most - 1]
        own = {
            names.get(member, f"member {member}"): [
                (float(look.step), look.work_s) for look in self.lanes[member].looks
            ]
            for member in slowest
        }
        return {"the whole step": _series(whole), **own}

    def shares(self, names: Mapping[int, str], most: int) -> dict[str, Series]:
        """Samples of each member, by step; those of the largest shares."""
        largest = sorted(self.current, key=lambda member: -self.lanes[member].newest("share"))[:most]
        return {
            names.get(member, f"member {member}"): [
                (float(look.step), look.values["share"]) for look in self.lanes[member].looks if "share" in look.values
            ]
            for member in largest
        }

    def pace(self, names: Mapping[int, str]) -> str:
        """Who the others wait for, and what keeps it: one sentence; "" while nothing is known."""
        known = [member for member in self.current if self.lanes[member].parts]
        if not known:
            return ""
        slowest = max(known, key=lambda member: self.lanes[member].work_s)
        largest = max(self.lanes[slowest].parts, key=lambda part: part.part)
        name, share = names.get(slowest, f"member {slowest}"), f"{100 * largest.part:.0f} %"
        if len(known) == 1:
            return f"{share} of a step is {PHASES[largest.phase]}"
        if largest.phase in _WAITS:
            return f"`{name}` waits least, and still {share} of its step is {PHASES[largest.phase]}: the network limits"
        return f"`{name}` sets the pace: {share} of its step is {PHASES[largest.phase]}"


def _order(found: tuple[int, int, Look]) -> tuple[int, int]:
    return found[:2]


def _series(values: Mapping[int, float]) -> Series:
    return [(float(step), values[step]) for step in sorted(values)]


# --- sentences ------------------------------------------------------------------------------------------------------


@dataclass
class Ear:
    """Hears the gang's own sentences in what one member prints, piece by piece: lines that begin with `potluck: `."""

    heard: deque[str] = field(default_factory=lambda: deque(maxlen=MOST_SAID))
    _rest: str = ""

    def hear(self, text: str) -> None:
        *lines, rest = (self._rest + text).split("\n")
        # of a line without an end only its beginning matters; of a progress bar what it has written last
        self._rest = rest if len(rest) <= 2 * LONGEST else rest[rest.rfind("\r", 0, -1) + 1 :][: 2 * LONGEST]
        for line in lines:
            last = line.rstrip("\r").rpartition("\r")[2]  # a progress bar may have stood there before
            if last.startswith(SIGN) and last != SIGN:
                self.heard.append(last[len(SIGN) :].strip()[:LONGEST])


@dataclass(frozen=True, slots=True)
class Said:
    """What a gang told about itself."""

    text: str
    kind: str  # joined | left | replan | retry | healed | skip | drift | note
    step: int | None  # None: nobody knows
    who: tuple[str, ...] = ()  # the members that said it


_KINDS: Final = {
    "retry": " is taken again",
    "healed": " took over the state",
    "skip": " not finite",
    "drift": " drifted from",
}
_STEP = re.compile(r"\bstep (\d{1,15})\b")
_SHARES = re.compile(r"; shares of \d+: (.+)$")


def kind_of(text: str) -> str:
    reason, shares, _ = text.partition("; shares of ")
    if shares:
        return "left" if " left" in reason else "joined" if " joined" in reason else "replan"
    return next((kind for kind, words in _KINDS.items() if words in text), "note")


def story(watch: Watch, heard: Mapping[int, Iterable[str]], names: Mapping[int, str]) -> list[Said]:
    """All sentences by step. What several members said in the same words is there once."""
    found: dict[tuple[str, int | None], Said] = {}
    for member in sorted(heard):
        name, at = names.get(member, f"member {member}"), None
        for text in heard[member]:
            step = _step_of(watch, text, names, at or 0)
            at = at if step is None else step
            said = found.setdefault((text, at), Said(text, kind_of(text), at))
            if name not in said.who:
                found[text, at] = replace(said, who=(*said.who, name))
    return sorted(found.values(), key=lambda said: -1 if said.step is None else said.step)


def _step_of(watch: Watch, text: str, names: Mapping[int, str], after: int) -> int | None:
    """The step that it names; else the one by which all members that write had the shares of which it tells."""
    if named := _STEP.search(text):
        return int(named[1])
    shares = shares_in(text)
    steps = [
        lane.first_step_with(shares[name], after)
        for member, lane in watch.lanes.items()
        if (name := names.get(member, "")) in shares
    ]
    known = [step for step in steps if step is not None]
    return max(known) if known and len(known) == len(steps) else None


def shares_in(text: str) -> dict[str, int]:
    """`…; shares of 512: lab-1 300, lab-2 212` as a mapping."""
    tail = _SHARES.search(text)
    pairs: Sequence[tuple[str, str, str]] = [each.rpartition(" ") for each in tail[1].split(", ")] if tail else []
    return {name: int(share) for name, _, share in pairs if share.isascii() and share.isdecimal() and len(share) < 16}
