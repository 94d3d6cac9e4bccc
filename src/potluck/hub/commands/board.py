"""What is there to see at a glance? The list of runs in one statement, however many there are."""

from __future__ import annotations

from dataclasses import dataclass

from potluck.hub.commands.desk import Desk

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
