"""What can happen to a lane of a worker (events), and what can it want done (instructions)?"""

from __future__ import annotations

from dataclasses import dataclass, field

from potluck.protocol import FromChild, Lease, Report, ToChild, WeightFile
from potluck.worker.orders import Parts

# --- events: what happened


@dataclass(frozen=True)
class Leased:
    lease: Lease


@dataclass(frozen=True)
class NoWork:
    """The hub had nothing for as long as we waited."""


@dataclass(frozen=True)
class Fetched:
    lease_id: str
    parts: Parts


@dataclass(frozen=True)
class NotFetched:
    """Something of the task cannot be had. `ours`: this machine's fault (its disk is full), not the task's."""

    lease_id: str
    reason: str
    ours: bool = False


@dataclass(frozen=True)
class ChildSaid:
    event: FromChild


@dataclass(frozen=True)
class ChildDied:
    reason: str


@dataclass(frozen=True)
class Reported:
    """The hub's last word on a lease."""

    lease_id: str
    accepted: bool
    reason: str


@dataclass(frozen=True)
class NewVersion:
    """Newer weights of a run are on this machine."""

    run_id: str
    chain: list[WeightFile]


@dataclass(frozen=True)
class Beat:
    """What the hub answered to a heartbeat."""

    drop: frozenset[str] = frozenset()
    hand_in: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Stop:
    """Finish what is at hand and leave."""


@dataclass(frozen=True)
class Hold:
    """The machine has a job: hand in what is at work, free the memory, and lease no more until `GoOn`."""


@dataclass(frozen=True)
class GoOn:
    """The machine is the lane's again."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


LaneEvent = (
    Leased | NoWork | Fetched | NotFetched | ChildSaid | ChildDied | Reported | NewVersion | Beat
    | Stop | Hold | GoOn | Tick
)  # fmt: skip


# --- instructions: what to do about it


@dataclass(frozen=True)
class AskLease:
    kinds: tuple[str, ...]
    samples_per_s: dict[str, float] = field(default_factory=dict)
    except_runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fetch:
    """Get the task's files; its weights from version `have` of the run on (None: the child has none)."""

    lease: Lease
    have: int | None


@dataclass(frozen=True)
class Tell:
    message: ToChild


@dataclass(frozen=True)
class Send:
    """Keep this outcome safe, upload its files, report it; `Reported` follows."""

    lease: Lease
    report: Report
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Abandon:
    """The lease is gone: stop fetching or uploading for it. If it was being sent, `Reported` still follows."""

    lease_id: str


@dataclass(frozen=True)
class StartChild:
    pass


@dataclass(frozen=True)
class EndChild:
    """`gently`: it may finish its sentence; else it is killed. `ChildDied` follows."""

    gently: bool


@dataclass(frozen=True)
class WatchRun:
    """Tell me (`NewVersion`) when the run has a version newer than `after`. None: no longer interested."""

    run_id: str | None
    after: int = -1


@dataclass(frozen=True)
class Say:
    """For the person at the machine."""

    text: str
    bad: bool = False


@dataclass(frozen=True)
class Over:
    """This lane has nothing left to do."""


Instruction = AskLease | Fetch | Tell | Send | Abandon | StartChild | EndChild | WatchRun | Say | Over
