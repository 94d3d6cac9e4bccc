"""Which machines can train together?

    reach     what workers found when they knocked at each other's doors: from → to → the address that worked; "" it was
              tried, and none did; nothing: nobody knows
    a circle  machines of which each reaches each, and everybody reaches a machine by the same address: its members tell
              one another that one

The largest circle is a clique, and finding one is hard in general. Real networks are a few rooms in which everybody
reaches everybody, where the search goes straight to it; where it does not, it ends after a fixed effort with the
largest circle seen so far. Effort is counted, never timed: the same facts give the same circle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from itertools import permutations
from typing import Final

from potluck.domain.placement.records import GangPlace, Machine, Waiting
from potluck.domain.placement.room import has_engine
from potluck.domain.quantity import say_count
from potluck.domain.resources import Demand, describe

Circle = dict[str, str]
"""Machine (id) → the address by which the others reach it; "" as long as nobody has said one."""
Reach = Mapping[str, Mapping[str, str]]

MOST_LOOKS: Final = 50_000
"""So many pairs are looked at for one circle, some milliseconds."""
MOST_LOOKS_OF_A_PASS: Final = 500_000
FIRST_KNOCKS: Final = 8
"""A gang that could begin with fewer machines asks first for the ways among so many; the others come when it runs."""
JOINING: Final = 3
"""So many machines are tried for one that comes to a gang that runs."""
SAID: Final = 3
"""So many machines are named in a sentence."""


class Ways:
    """Who reaches whom, as far as it is known."""

    def __init__(self, reach: Reach | None) -> None:
        self._reach: Reach = reach or {}
        self._no: dict[str, Set[str]] = {}  # by machine, for those that were asked about
        self._yes: dict[str, Set[str]] = {}
        self._left = MOST_LOOKS_OF_A_PASS

    def way(self, source: str, target: str) -> str | None:
        """The address by which `source` reaches `target`; "" by none; None: not known."""
        return self._reach.get(source, _NOBODY).get(target)

    def known_as(self, machine: str) -> str:
        """The address by which most reach it; "" if nobody does."""
        said = Counter(row[machine] for source, row in self._reach.items() if source != machine and row.get(machine))
        return min(said, key=lambda address: (-said[address], address), default="")

    def around(self, on: Iterable[str]) -> Circle:
        """The machines of a gang that runs. What they found out about each other may have been forgotten by now."""
        here = sorted(on)
        return {
            one: next((way for other in here if other != one and (way := self.way(other, one))), "") for one in here
        }

    def circle(self, order: Sequence[str], *, want: int, least: int, base: Circle, guess: bool = False) -> Circle:
        """`base` with as many of `order` as reach each other, up to `want` and the first if there is a choice.

        Empty if there are fewer than `least` of them. `guess`: ways that nobody knows count as open.
        """
        search = _Growing(self, base, least=least, want=want, guess=guess, looks=min(MOST_LOOKS, self._left))
        rest = list(order)
        for other in base:
            rest = self.near(other, rest, guess=guess)
        search.grow(base, rest)
        self._left -= search.looked
        if len(search.best) == 1 and not guess:
            return {one: address or self.known_as(one) for one, address in search.best.items()}
        return search.best

    def soonest(self, order: Sequence[str], *, least: int, base: Circle, guess: bool = False) -> Circle:
        """`base` with `least` of `order`, the last of which stands as far in front as possible; empty: there is none."""
        ahead: list[str] = []
        enough = self._left - 2 * MOST_LOOKS
        for one in order:
            if self._left <= max(0, enough):
                break
            if self.reaches_at_most(one, guess=guess) < len(base) + least - 1:
                continue
            if not all(self.may(one, other, guess=guess) for other in base):
                continue
            self._left -= len(ahead)
            near = self.near(one, ahead, guess=guess)
            ahead.append(one)
            if len(near) < least - 1 or (grown := self.join(base, one, guess=guess)) is None:
                continue
            if found := self.circle(near, want=least - 1, least=least - 1, base=grown, guess=guess):
                return found
        return {}

    def join(self, circle: Circle, one: str, *, guess: bool) -> Circle | None:
        """`circle` with `one`; None if it does not reach all of them, they not it, or by different addresses."""
        grown, mine = dict(circle), ""
        for other, address in circle.items():
            there, back = self.way(one, other), self.way(other, one)
            if there == "" or back == "" or (not guess and (there is None or back is None)):
                return None
            if (there and address and there != address) or (back and mine and back != mine):
                return None
            grown[other] = address or there or ""
            mine = mine or back or ""
        grown[one] = mine
        return grown

    def may(self, one: str, other: str, *, guess: bool) -> bool:
        """Whether the two reach each other, or with `guess` are not known to fail."""
        return other not in self._shut(one) if guess else other in self._open(one)

    def near(self, one: str, others: Iterable[str], *, guess: bool) -> list[str]:
        """Those of them that `may` be with it."""
        if guess:
            shut = self._shut(one)
            return [other for other in others if other not in shut]
        reached = self._open(one)
        return [other for other in others if other in reached]

    def reaches_at_most(self, one: str, *, guess: bool) -> float:
        """No more others than these could be in a circle with it."""
        return float("inf") if guess else len(self._reach.get(one, _NOBODY))

    def unknown(self, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Those of which nobody knows the way. Nothing is asked about two of which one way is known to be shut."""
        return (pair for pair in pairs if self.way(*pair) is None and self.way(*pair[::-1]) != "")

    def trouble(self, machines: Sequence[str], names: Mapping[str, str]) -> str:
        """What keeps these machines from being one circle: the first pair without a way, or a machine of two addresses."""
        here = set(machines)
        for source in machines:
            shut = self._shut(source) & here
            for target in machines:
                if target in shut and self.way(source, target) == "":
                    return f"{say_names([source], names)} cannot reach {say_names([target], names)}"
        said: dict[str, tuple[str, str]] = {}
        for source in machines:
            for target, address in sorted(self._reach.get(source, _NOBODY).items()):
                if not address or target == source or target not in here:
                    continue
                first, by = said.setdefault(target, (address, source))
                if first != address:
                    one, two = say_names([by], names), say_names([source], names)
                    has = f"{say_names([target], names)} is {first} for {one} and {address} for {two}"
                    return f"{has}, and a gang needs one address for all"
        return ""

    def _shut(self, one: str) -> Set[str]:
        """Whom it does not reach, and who does not reach it."""
        found = self._no.get(one)
        if found is None:
            found = {target for target, address in self._reach.get(one, _NOBODY).items() if not address}
            found.update(source for source, row in self._reach.items() if row.get(one) == "")
            self._no[one] = found
        return found

    def _open(self, one: str) -> Set[str]:
        """Whom it reaches, and who reaches it."""
        found = self._yes.get(one)
        if found is None:
            row = self._reach.get(one, _NOBODY)
            found = {target for target, address in row.items() if address and self.way(target, one)}
            self._yes[one] = found
        return found


class _Growing:
    """The search for the largest circle: branch and bound, the machines in their order."""

    def __init__(self, ways: Ways, base: Circle, *, least: int, want: int, guess: bool, looks: int) -> None:
        self._ways = ways
        self._guess = guess
        self._size = len(base) + least - 1  # smaller ones are of no use
        self._most = len(base) + want
        self._looks = looks
        self.looked = 0
        self.best: Circle = {}

    def grow(self, circle: Circle, rest: list[str]) -> None:
        if len(circle) > self._size:
            self.best, self._size = circle, len(circle)
        for n, one in enumerate(rest, 1):
            if self._size >= self._most or self.looked > self._looks or len(circle) + 1 + len(rest) - n <= self._size:
                return
            if 1 + self._ways.reaches_at_most(one, guess=self._guess) <= self._size:
                continue
            self.looked += len(rest) - n + len(circle)
            near = self._ways.near(one, rest[n:], guess=self._guess)
            if len(circle) + 1 + len(near) <= self._size:
                continue
            if (grown := self._ways.join(circle, one, guess=self._guess)) is not None:
                self.grow(grown, near)


_NOBODY: Final[Mapping[str, str]] = {}


class Gangs:
    """The gangs of one pass: who of them waits, what became of them, and what must be found out."""

    def __init__(self, machines: Sequence[Machine], reach: Reach | None) -> None:
        self._machines = machines
        self.ways = Ways(reach)
        self.members: dict[str, list[Waiting]] = {}  # by gang: who waits, in the order of their numbers
        self.settled: set[str] = set()  # jobs that were decided with another member
        self.joined: dict[str, frozenset[str]] = {}  # by gang: its machines, those of this pass included
        self.failed: dict[tuple[object, ...], str] = {}  # what was asked for in vain, and why
        self.knocks: dict[tuple[str, str], None] = {}
        self._suitable: dict[str, frozenset[str]] = {}  # by engine

    def listen(self, waiting: Iterable[Waiting]) -> None:
        for job in waiting:
            if job.gang is not None:
                self.members.setdefault(job.gang.gang, []).append(job)
        for members in self.members.values():
            members.sort(key=lambda job: (job.gang.member if job.gang else 0, job.job))

    def on(self, place: GangPlace) -> frozenset[str]:
        """The machines that have a member."""
        return self.joined.get(place.gang, place.on)

    def form(
        self, ready: Sequence[str], on: frozenset[str], *, needed: int, want: int, demand: Demand
    ) -> tuple[Circle, Sequence[str], str]:
        """Find `needed` to `want` machines among those that have room, which reach each other and all of `on`.

        Returns (the circle, (), ""), or ({}, those that would do if they reach each other, why there is none).
        """
        if len(ready) < needed:
            return {}, (), _too_few(ready, self.names, needed=needed, beside=len(on), demand=demand)
        base = self.ways.around(on)
        if circle := self.ways.circle(ready, want=want, least=needed, base=base):
            return circle, (), ""
        if maybe := self._ask(ready, base, needed=needed, want=want):
            them = say_names([*maybe, *on] if len(on) == 1 else maybe, self.names)
            rest = " and the machines of its gang" if len(on) > 1 else ""
            return {}, maybe, f"the hub is finding out whether {them}{rest} reach each other"
        trouble = (
            self.ways.trouble([*ready, *sorted(on)], self.names) or "nobody knows whether its machines are reachable"
        )
        if on:
            return {}, (), f"{trouble}: it could not train with the others there"
        together = len(self.ways.circle(ready, want=needed, least=1, base={}))
        reach = f"only {together} of them reach each other" if together > 1 else "no two of them reach each other"
        many = f"{len(ready)} machines have room, {reach}, and the gang begins with {needed} at once"
        return {}, (), f"{trouble}: {many}"

    def _ask(self, ready: Sequence[str], base: Circle, *, needed: int, want: int) -> Sequence[str]:
        """Which of `ready` would do if all goes well; to know it, some must knock at the doors of others."""
        if base:
            maybe = [one for one in ready if self.ways.join(base, one, guess=True) is not None][:JOINING]
            asked = self._knock(pair for one in maybe for on in base for pair in ((one, on), (on, one)))
        else:
            most = min(want, max(needed, FIRST_KNOCKS))
            maybe = list(self.ways.circle(ready, want=most, least=needed, base={}, guess=True))
            asked = self._knock(permutations(maybe, 2))
        return maybe if asked else []

    def _knock(self, pairs: Iterable[tuple[str, str]]) -> bool:
        """Ask for what is not known of these ways. False: there is nothing to ask for."""
        wanted = [pair for pair in self.ways.unknown(pairs) if self.doors.issuperset(pair)]
        self.knocks.update(dict.fromkeys(wanted))
        return bool(wanted)

    def chances(self, order: Sequence[str], on: frozenset[str], *, needed: int, many: int) -> Iterator[list[str]]:
        """Ways to begin, the soonest first; each leaves out the machine that was the last in those before.

        `order`: the machines that could hold a member, the soonest first. Ways that nobody knows are asked for.
        """
        left, base = list(order), self.ways.around(on)
        for _ in range(many):
            circle = self.ways.soonest(left, least=needed, base=base)
            circle = circle or self.ways.soonest(left, least=needed, base=base, guess=True)
            if not circle:
                return
            self._knock(pair for pair in permutations(circle, 2) if not on.issuperset(pair))
            found = [one for one in left if one in circle]
            yield found
            left.remove(found[-1])

    def suitable(self, engine: str) -> frozenset[str]:
        """The machines that could have a member, as far as the machine alone is asked: a door, and the engine."""
        found = self._suitable.get(engine)
        if found is None:
            able = (machine.id for machine in self._machines if machine.has_door and has_engine(machine, engine))
            found = self._suitable[engine] = frozenset(able)
        return found

    @cached_property
    def names(self) -> Mapping[str, str]:
        return {machine.id: machine.name for machine in self._machines}

    @cached_property
    def doors(self) -> frozenset[str]:
        """The machines that can knock and be knocked at."""
        return frozenset(machine.id for machine in self._machines if machine.present and machine.has_door)


# --- sentences --------------------------------------------------------------------------------------------------------


def say_names(machines: Iterable[str], names: Mapping[str, str]) -> str:
    """`` `a`, `b` and `c` ``, or `` `a`, `b`, `c` and 5 more ``."""
    said = [f"`{names.get(one, one)}`" for one in machines]
    if len(said) > SAID + 1:
        said = [*said[:SAID], f"{len(said) - SAID} more"]
    return " and ".join((", ".join(said[:-1]), said[-1])) if len(said) > 1 else "".join(said)


def _too_few(ready: Sequence[str], names: Mapping[str, str], *, needed: int, beside: int, demand: Demand) -> str:
    """Not enough machines have room."""
    wants = describe(demand)
    if beside:
        return f"no machine beside the {beside} of its gang is free that has what it wants: {wants}"
    have = f"only {say_names(ready, names)} {'has' if len(ready) == 1 else 'have'} room" if ready else "none has room"
    missing = say_count(needed - len(ready), "more machine")
    verb = "is" if needed - len(ready) == 1 else "are"
    return f"{missing} {verb} needed: the gang begins with {needed} at once, {have}, and each member wants {wants}"
