"""What is there to see at a glance? The list of runs and of jobs in one statement, however many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from potluck.domain.resources import Demand, describe
from potluck.hub.commands.desk import Desk, as_type

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
            started_at=row["started_at"].isoformat() if row["started_at"] else None,
            ended_at=row["ended_at"].isoformat() if row["ended_at"] else None,
        )
        for row in rows
    ]


async def job_counts(desk: Desk) -> tuple[int, int]:
    """How many jobs wait, and how many are at work."""
    async with desk.ledger.transaction() as tx:
        row = await tx.row("job_counts")
    assert row is not None
    return row["waiting"], row["at_work"]
