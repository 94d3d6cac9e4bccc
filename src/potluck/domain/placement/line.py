"""Whose turn is it?

The order is total: rank, then who waited too long, then priority (lifted by waiting), then what the owner used lately,
then `queued_at`, then the id. What is placed in a pass counts as used at once, so the line cannot be sorted once and for
all: within one priority, the owners take turns.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from potluck.domain import fairness
from potluck.domain.placement.records import Waiting


class Line:
    """Gives each waiting job its turn, once. Say `charge(...)` before you take the next, if the last one was placed."""

    def __init__(self, waiting: Sequence[Waiting], *, usage: Mapping[str, float], busy: set[str], now: float) -> None:
        self._usage = dict(usage)
        self._busy = set(busy)  # owners of whom something runs
        self._waiting = waiting
        self._now = now

    def charge(self, owner: str, fee: float) -> None:
        """A job of `owner` was placed."""
        self._usage[owner] = self._usage.get(owner, 0.0) + fee
        self._busy.add(owner)

    def __iter__(self) -> Iterator[Waiting]:
        moved = [job for job in self._waiting if job.rank is not None]
        yield from sorted(moved, key=lambda job: (job.rank, job.queued_at, job.job))
        rest = sorted((job for job in self._waiting if job.rank is None), key=_by_time)
        week = bisect_right(rest, self._now - fairness.LAST_S, key=_queued_at)
        day = bisect_right(rest, self._now - fairness.OVERDUE_S, key=_queued_at)
        yield from rest[:week]
        passed = []
        for job in rest[week:day]:
            if job.owner in self._busy:
                passed.append(job)
            else:
                yield job
        yield from self._by_priority(passed + rest[day:])

    def _by_priority(self, jobs: Sequence[Waiting]) -> Iterator[Waiting]:
        """`jobs` are sorted by time. The highest priority first; within one, whoever used least."""
        if not jobs:
            return
        top = max(job.priority for job in jobs)
        levels: dict[int, dict[str, deque[Waiting]]] = {}
        for job in jobs:
            lifted = job.priority + int(max(0.0, self._now - job.queued_at) // fairness.AGING_S)
            levels.setdefault(min(top, lifted), {}).setdefault(job.owner, deque()).append(job)
        for level in sorted(levels, reverse=True):
            yield from self._in_turns(levels[level])

    def _in_turns(self, by_owner: Mapping[str, deque[Waiting]]) -> Iterator[Waiting]:
        turns = [
            (self._usage.get(owner, 0.0), jobs[0].queued_at, jobs[0].job, owner) for owner, jobs in by_owner.items()
        ]
        heapq.heapify(turns)
        while turns:
            owner = turns[0][3]
            jobs = by_owner[owner]
            yield jobs.popleft()
            if jobs:
                heapq.heapreplace(turns, (self._usage.get(owner, 0.0), jobs[0].queued_at, jobs[0].job, owner))
            else:
                heapq.heappop(turns)


def _by_time(job: Waiting) -> tuple[float, str]:
    return job.queued_at, job.job


def _queued_at(job: Waiting) -> float:
    return job.queued_at
