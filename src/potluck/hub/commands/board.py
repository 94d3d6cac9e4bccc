"""What is there to see at a glance? The list of runs and of jobs in one statement, however many there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potluck.domain.resources import Demand, describe
from potluck.hub.commands.desk import Desk, as_json, as_type, iso
from potluck.hub.store import Rows
from potluck.protocol import Event

LIVE = ("running", "finishing", "paused", "queued")
"""States of a run that is not over, the liveliest first."""


@dataclass(frozen=True, slots=True)
class RunBrief:
    """A run as one line of a list."""

    id: str
    name: str
    state: str
    recipe: str
    dataset: str
    version: int
    samples: int  # applied
    metrics: dict[str, float]  # of the newest taste
    created_at: str
    ended_at: str | None


@dataclass(frozen=True, slots=True)
class Point:
    """What a version's updates said of their losses."""

    version: int
    samples: int
    losses: dict[str, float]


async def curve(desk: Desk, run_id: str, most: int = 480) -> list[Point]:
    """At most `most` points, however long the run is; `runs.curve` has them all."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("curve_of_many", run_id=run_id, most=most)
    return [Point(row["number"], int(row["applied_samples"]), row["losses"]) for row in rows]


async def briefs(desk: Desk, limit: int = 20) -> list[RunBrief]:
    """The liveliest first, then the newest."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("run_briefs", limit=limit)
    return [
        RunBrief(
            id=row["id"],
            name=row["name"],
            state=row["state"],
            recipe=row["recipe"],
            dataset=row["dataset"],
            version=row["version"],
            samples=int(row["samples"]),
            metrics=row["metrics"] or {},
            created_at=row["created_at"].isoformat(),
            ended_at=row["ended_at"].isoformat() if row["ended_at"] else None,
        )
        for row in rows
    ]


# --- jobs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobLine:
    """A job as one line of a list: what everybody may know of it."""

    id: str
    name: str
    state: str
    owner: str  # the person's name
    needs: str
    priority: int
    worker: str
    exit_code: int | None
    created_at: str
    queued_at: str
    started_at: str | None
    ended_at: str | None
    gang: GangLine | None = None


@dataclass(frozen=True, slots=True)
class GangLine:
    """The gang that a job is a member of, as everybody may know it."""

    id: str
    name: str
    state: str
    started_at: str | None
    ended_at: str | None


async def job_lines(desk: Desk, *, ids: Sequence[str] = (), at_work: int = 0, ended: int = 0) -> list[JobLine]:
    """The jobs of these ids, and so many of those that are at work and of those that ended last; the newest first."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("job_lines", ids=list(ids), at_work=at_work, ended=ended)
    return [
        JobLine(
            id=row["id"],
            name=row["name"],
            state=row["state"],
            owner=row["owner"],
            needs=describe(as_type(row["needs"], Demand)),
            priority=row["priority"],
            worker=row["worker"],
            exit_code=row["exit_code"],
            created_at=row["created_at"].isoformat(),
            queued_at=row["queued_at"].isoformat(),
            started_at=iso(row["started_at"]),
            ended_at=iso(row["ended_at"]),
            gang=_gang(row) if row["gang"] else None,
        )
        for row in rows
    ]


def _gang(row: dict[str, Any]) -> GangLine:
    times = iso(row["gang_started_at"]), iso(row["gang_ended_at"])
    return GangLine(row["gang"], row["gang_name"], row["gang_state"], *times)


async def job_counts(desk: Desk) -> tuple[int, int]:
    """How many jobs wait, and how many are at work."""
    async with desk.ledger.transaction() as tx:
        row = await tx.row("job_counts")
    assert row is not None
    return row["waiting"], row["at_work"]


# --- gangs ----------------------------------------------------------------------------------------------------------

Place = tuple[int, int]
"""Attempt and seq of the newest point that is known."""
BEGINNING: Place = (0, -1)


@dataclass(frozen=True, slots=True)
class Figure:
    """What a job said of one step."""

    job: str
    attempt: int
    seq: int
    step: int
    values: dict[str, float]

    @property
    def place(self) -> Place:
        return self.attempt, self.seq


async def newest_figures(desk: Desk, after: Mapping[str, Place], names: Sequence[str], *, most: int) -> list[Figure]:
    """Of each job the newest points after a place, at most `most`, all by time; only the values of these names."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("newest_figures", after=_places(after), names=list(names), most=most)
    return _figures(rows)


async def other_figures(
    desk: Desk, after: Mapping[str, Place], names: Sequence[str], *, most: int, most_bytes: int
) -> list[Figure]:
    """Of each job the next points after a place, without the values of these names. None: there are no more."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("other_figures", after=_places(after), names=list(names), most=most, most_bytes=most_bytes)
    return _figures(rows)


def _places(after: Mapping[str, Place]) -> Any:
    return as_json([{"run_id": job, "attempt": attempt, "seq": seq} for job, (attempt, seq) in after.items()])


def _figures(rows: Rows) -> list[Figure]:
    return [Figure(row["run_id"], row["attempt"], row["seq"], row["step"], row["values"]) for row in rows]


async def newest_attempts(desk: Desk, jobs: Sequence[str], most: int = 3) -> list[tuple[str, int, bool]]:
    """Of each job its newest attempts: number, and whether it has ended; the oldest first."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("newest_attempts", ids=list(jobs), most=most)
    return [(row["run_id"], row["number"], row["ended"]) for row in rows]


async def events_of_many(desk: Desk, runs: Sequence[str], *, inside: bool, limit: int) -> list[Event]:
    """What happened to these, the oldest first; `inside`: with the reasons, which are not for everybody."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("events_of_many", ids=list(runs), inside=inside, limit=limit)
    return [Event(r["id"], r["at"].isoformat(), r["kind"], r["subject"], r["text"], r["actor"]) for r in rows]
