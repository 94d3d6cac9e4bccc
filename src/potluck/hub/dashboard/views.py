"""Which page is which: what does it show, to whom, and which news makes it old?

A view has a key, so that all who look at the same thing share its drawings: "" is the overview, an id a run's page, and
what has a slash in it, which no id has, is one of the pages about jobs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from potluck.errors import NotFound
from potluck.hub.commands import gang_requests, jobs, runs
from potluck.hub.commands.desk import Caller, Desk
from potluck.hub.dashboard import gangviews, jobviews, regions


@dataclass(frozen=True)
class View:
    names: tuple[str, ...]
    gather: Callable[[Desk], Awaitable[Any]]
    topics: Sequence[str] = ("change",)  # it may become longer: a gang's members are known after the first look

    async def draw(self, desk: Desk) -> dict[str, Markup]:
        return regions.render(await self.gather(desk), self.names)


def make(key: str) -> View:
    """The view of a key that `find` gave."""
    if "/" not in key:
        return View(regions.ONE_RUN if key else regions.OVERVIEW, lambda desk: regions.gather(desk, key))
    what, _, rest = key.partition("/")
    if what == "job":
        job_id, _, side = rest.partition("/")
        page = jobviews.JobPage(job_id, inside=side == "inside")
        names = jobviews.JOB_INSIDE if page.inside else jobviews.JOB_OUTSIDE
        return View(names, page.facts, ("change", f"job:{job_id}", f"points:{job_id}"))
    if what == "gang":
        gang_id, _, side = rest.partition("/")
        gang = gangviews.GangPage(gang_id, inside=side == "inside")
        return View(gangviews.INSIDE if gang.inside else gangviews.OUTSIDE, gang.facts, gang.topics)
    if what == "queue":
        return View(jobviews.QUEUE, lambda desk: jobviews.queue(desk, admin=rest == "admin"))
    return View(jobviews.MACHINES, lambda desk: jobviews.machines(desk, admin=rest == "admin"))


async def find(desk: Desk, caller: Caller, *, run: str = "", job: str = "", gang: str = "", show: str = "") -> str:
    """The key of what this caller wants to see, as far as they may see it."""
    if job:
        view = await jobs.show(desk, caller, job)
        return f"job/{view.id}/{'inside' if view.mine else 'outside'}"
    if gang:
        found = await gang_requests.show(desk, caller, gang)
        return f"gang/{found.id}/{'inside' if found.mine else 'outside'}"
    if show in ("queue", "workers"):
        return f"{show}/{'admin' if caller.role == 'admin' else ''}"
    if show:
        raise NotFound(f"there is no page {show[:40]}")
    return (await runs.show(desk, run)).id if run else ""
