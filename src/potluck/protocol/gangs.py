"""What do hub, workers and people say to one another about gangs?

A gang is a run of mode "gang"; each of its members is a job (protocol/jobs.py) with `gang` and `member`. Before a gang is
formed its machines must have reached each other: the hub asks for knocks, the workers say what they found. While it trains
its members meet at a place (torchft's lighthouse, or the plain engine's meeting) that one member's agent keeps open.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from potluck.domain.job import JobSpec
from potluck.protocol.pool import Blob

# --- workers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Door:
    """Where a worker can be reached by other workers: it listens there for knocks only."""

    port: int
    key: str = field(repr=False)  # whoever knocks proves with it that the hub sent them, and whoever opens who it is
    addresses: list[str] = field(default_factory=list)  # of this machine, the best first; never 127.0.1.1


@dataclass(frozen=True)
class Knock:
    worker: str  # the id of whom to reach
    door: Door


@dataclass(frozen=True)
class Reached:
    """What came of a knock. `address` empty: not reached, and `reason` says why."""

    worker: str
    address: str = ""  # that worked
    rtt_s: float = 0.0
    bytes_per_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Membership:
    """A member's place in its gang, with its lease."""

    gang: str  # the gang's run id
    gang_name: str
    member: int  # from 1; the rank of a compat gang is one less
    name: str  # the member's: its worker's name
    address: str  # of this machine, as the other members reach it
    engine: str  # torchft | plain; empty for compat


@dataclass(frozen=True)
class MeetOrder:
    """For one member's agent: where the gang meets, or that it shall meet here."""

    lease_id: str
    host: bool = False  # keep the meeting place open on this machine, and say its address in `OrdersRequest.meetings`
    address: str = ""  # "IP:PORT" (plain, compat) or "http://IP:PORT" (torchft); empty: nobody has said it yet
    turn: int = 0  # grows whenever the place is given to another member


@dataclass(frozen=True)
class Meeting:
    """What a member's agent knows of the meeting place; `host`: it is open on this machine, at `address`."""

    lease_id: str
    turn: int = 0
    address: str = ""
    host: bool = False


# --- people ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GangRequest:
    """`spec.gang` says how many machines. The same spec and project for all members."""

    spec: JobSpec
    project: Blob  # of a Tree


@dataclass(frozen=True)
class MemberView:
    job: str  # the member's job id: logs, outputs and attempts are there
    member: int
    state: str  # of the job
    reason: str
    worker: str
    address: str
    rank: int = -1  # in the gang at the moment, by its newest figures; -1: not known
    share: int = 0  # samples of the next batch; 0: not known
    samples_per_s: float = 0.0  # its own, by wall clock
    alone_per_s: float = 0.0  # what it would do alone, from its fit; 0: not known


@dataclass(frozen=True)
class GangView:
    id: str
    name: str
    owner: str
    state: str  # queued | running | succeeded | failed | cancelled
    reason: str
    mine: bool
    least: int
    most: int
    engine: str  # torchft | plain | compat; empty: not formed yet
    created_at: str
    started_at: str | None
    ended_at: str | None
    exit_code: int | None
    host: str  # the worker whose agent keeps the meeting place
    members: list[MemberView] = field(default_factory=list)
    spec: JobSpec | None = None  # for its owner and admins


@dataclass(frozen=True)
class Link:
    """What one worker found when it knocked at another's door."""

    source: str  # workers' names
    target: str
    address: str
    rtt_s: float
    bytes_per_s: float
    reason: str
    seconds_ago: float
