"""What becomes of a gang when something happened to one of its members?

    not formed ──► formed ──► one succeeded: who still waits is not needed any more ──► succeeded
        ▲            │
        │            ├── a member ended: it waits, and comes back by itself while the others train on
        └────────────┴── none is there: all wait, and come together again ──► or it has failed, and why

A gang fails when fewer members than it needs could ever be there, and when all that ended did so by themselves: a
program that fails on every machine is not tried again on every machine, whatever its members' retries say. A compat gang
(an unmodified torchrun script) cannot lose a member: it is taken apart, and its members come together again.

One member's agent keeps the place where all meet open. It hosts as long as it is there: the lowest number first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from potluck.domain.quantity import say_count

CRASH_S = 3.0
"""When a member of a compat gang fails by itself, the others mostly do so too, within so long: if all do, it is the
program. Those that do not are ended then: they would wait for the missing one for as long as torch does, half an hour."""
ENOUGH = "the gang has finished"


@dataclass(frozen=True, slots=True)
class Mate:
    """A member as the ledger shows it."""

    number: int  # from 1
    job: str
    state: str  # of the job
    worker: str = ""  # the name of where it is, or was last
    lease: str = ""  # that is live; empty: it has no place
    delivered: bool = False  # its agent has the lease
    sound: bool = False  # its agent gives signs of life
    exit_code: int | None = None  # of its newest attempt, if that has ended
    said: str = ""  # why that has ended


@dataclass(frozen=True, slots=True)
class Standing:
    """A gang as the ledger shows it."""

    least: int
    mates: Sequence[Mate]  # by number
    compat: bool = False
    formed: bool = False
    cancelled_by: str = ""
    own_failures: int = 0  # since it was formed: attempts that failed by themselves
    misfortunes: int = 0  # the same: that ended by a signal, with their worker, given back, …
    hurt_s: float = 0.0  # since the first of either
    host: str = ""  # a lease
    late: bool = False  # the host has not said its address for longer than that takes


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now. At most one of `stop`, `part`, `end`, `unform` and `host`, beside the others."""

    reason: str = ""
    cancel: tuple[str, ...] = ()  # jobs that wait and are not needed any more
    stop: tuple[str, ...] = ()  # jobs that somebody stopped with their gang: they may end in peace
    part: tuple[str, ...] = ()  # jobs whose leases are taken back at once
    end: str = ""  # succeeded | failed | cancelled
    exit_code: int | None = None
    unform: bool = False
    host: str | None = None  # the lease whose agent keeps the meeting place from now on; "": nobody; None: as it is
    again: bool = False  # look once more in a moment, though nothing may happen until then

    @property
    def says_goodbye(self) -> str:
        """Why the jobs that wait are cancelled."""
        return f"the gang has failed: {self.reason}" if self.end == "failed" else ENOUGH


@dataclass(frozen=True, slots=True)
class _Tally:
    live: list[Mate] = field(default_factory=list)
    waiting: list[Mate] = field(default_factory=list)
    ended: list[Mate] = field(default_factory=list)  # and will not come again


def decide(gang: Standing) -> Step:
    """The next thing that follows from how the gang stands. After it was done the gang is looked at again."""
    tally = _Tally()
    for mate in gang.mates:
        (tally.live if mate.lease else tally.waiting if mate.state == "queued" else tally.ended).append(mate)
    if gang.cancelled_by:
        return _stopped(gang, tally)
    waiting = tuple(mate.job for mate in tally.waiting)
    winner = next((mate for mate in gang.mates if mate.state == "succeeded"), None)
    if winner is not None:
        if tally.live:
            return Step(ENOUGH, cancel=waiting, host=_host(gang, tally.live))
        reason = f"member {winner.number} succeeded on {winner.worker}"
        return Step(reason, cancel=waiting, end="succeeded", exit_code=0)
    if hopeless := _hopeless(gang, tally):
        if tally.live:
            return Step(hopeless, part=tuple(mate.job for mate in tally.live))
        return _over(hopeless, gang, tally)
    if gang.compat and gang.formed and (tally.waiting or tally.ended) and tally.live:
        if not gang.misfortunes and gang.hurt_s < CRASH_S:
            return Step(again=True, host=_host(gang, tally.live))
        return Step("a member ended, and the others cannot go on", part=tuple(mate.job for mate in tally.live))
    if not tally.live:
        if gang.formed and gang.own_failures and not gang.misfortunes:
            return _over("it failed on every machine", gang, tally)
        return Step("its members wait to come together again", unform=True) if gang.formed else Step()
    return Step(host=_host(gang, tally.live))


def _hopeless(gang: Standing, tally: _Tally) -> str:
    """Why the gang can never go on, "" if it can."""
    left = len(tally.live) + len(tally.waiting)
    if left >= gang.least:
        return ""
    if not left:
        return "all members have ended"
    return f"{say_count(left, 'member')} left, and it needs {gang.least}"


def _over(reason: str, gang: Standing, tally: _Tally) -> Step:
    """Nobody is at work, and nobody shall come any more."""
    waiting = tuple(mate.job for mate in tally.waiting)
    if not waiting and not any(mate.state in ("failed", "lost") for mate in gang.mates):
        return Step("all members were stopped", end="cancelled")
    first = next((mate for mate in gang.mates if mate.exit_code), None)
    if first is None and (teller := next((mate for mate in gang.mates if mate.said), None)):
        reason = f"{reason}; member {teller.number} on {teller.worker}: {teller.said}"
    elif first is not None:
        reason = f"{reason}; member {first.number} on {first.worker}: exit code {first.exit_code}"
    return Step(reason, cancel=waiting, end="failed", exit_code=first.exit_code if first else None)


def _stopped(gang: Standing, tally: _Tally) -> Step:
    reason = f"stopped by {gang.cancelled_by}"
    open_ = tuple(mate.job for mate in (*tally.live, *tally.waiting) if mate.state != "cancelled")
    if open_:
        return Step(reason, stop=open_)
    return Step(reason) if tally.live else Step(reason, end="cancelled")


def _host(gang: Standing, live: Sequence[Mate]) -> str | None:
    """The lease whose agent shall keep the meeting place, if it is another one than now."""
    now = next((mate for mate in live if mate.lease == gang.host), None)
    if gang.compat:  # the first of a torchrun script is where the others look for it
        first = next((mate for mate in live if mate.number == 1 and mate.delivered), None)
        if first is None:
            return "" if gang.host and now is None else None
        return first.lease if first is not now else None
    able = [mate for mate in live if mate.delivered and mate.sound and mate is not now]
    if not able:
        return "" if gang.host and now is None else None
    if now is not None and now.sound and not gang.late:
        return None
    if now is not None and gang.late:  # each in turn: it may be the machine that cannot
        return next((mate.lease for mate in able if mate.number > now.number), able[0].lease)
    return able[0].lease
