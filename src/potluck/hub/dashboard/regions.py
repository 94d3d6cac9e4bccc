"""What does the page say? Facts from the ledger on one side, finished pieces of HTML on the other.

A page is a frame of regions. Each is rendered on its own, so that a change of one travels alone (see live.py), and by
the same template whether it is sent with the page or afterwards. Everything that strangers typed is escaped by Jinja;
nothing is marked safe but what a template of ours rendered.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from potluck.domain.access import MEMBERS
from potluck.domain.job import ENDED
from potluck.hub.commands import board, people, runs
from potluck.hub.commands.board import LIVE, Point, RunBrief
from potluck.hub.commands.desk import Desk
from potluck.hub.dashboard import charts, jobviews, words
from potluck.protocol import Contribution, Event, RunView, Taste, Why, WorkerView

MOST_TILES = 96
MOST_ROWS = 60
MOST_TASTES = 48
MOST_EVENTS = 12
MOST_FILES = 500
HEADLINE_METRICS = ("accuracy", "distance", "fid", "loss")
"""The first of these that a run has is its score."""
ASSETS = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "link.js": "text/javascript",
    "log.js": "text/javascript",
    "submit.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}

OVERVIEW = (
    "head",
    "stats",
    "samples",
    "score",
    "losses",
    "fates",
    "jobs",
    "workers",
    "contributions",
    "events",
    "runs",
)
ONE_RUN = ("head", "stats", "samples", "tastes", "score", "losses", "fates", "contributions", "details", "events")


@dataclass(frozen=True)
class Facts:
    """All that a page shows, read in one go."""

    hub: str
    workers: list[WorkerView]
    briefs: list[RunBrief]
    run: RunView | None
    tastes: list[Taste]
    curve: list[Point]
    contributions: list[Contribution]
    events: list[Event]
    why: Why | None
    one_run: bool  # a page about `run` alone
    jobs: jobviews.Glance | None = None

    @property
    def present(self) -> list[WorkerView]:
        return [worker for worker in self.workers if worker.state in ("working", "idle", "leaving", "away")]

    @property
    def over(self) -> bool:
        """A page about a run that has ended."""
        return self.one_run and self.run is not None and self.run.state not in LIVE

    @property
    def at_work(self) -> int:
        return sum(worker.state == "working" for worker in self.workers)

    @property
    def speed(self) -> float:
        """Samples per second now, as the machines measure them."""
        return sum(worker.samples_per_s for worker in self.workers if worker.state == "working")

    @property
    def picture(self) -> Taste | None:
        return next((taste for taste in reversed(self.tastes) if taste.image), None)

    @property
    def strip(self) -> list[Taste]:
        """The tastes with a picture; of very many, some from all over, with the first and the last."""
        seen = [taste for taste in self.tastes if taste.image]
        if len(seen) <= MOST_TASTES:
            return seen
        return [seen[round(i * (len(seen) - 1) / (MOST_TASTES - 1))] for i in range(MOST_TASTES)]

    @property
    def credit(self) -> int:
        """Samples in the model."""
        return sum(row.fates.applied + row.fates.late for row in self.contributions)

    @property
    def unused(self) -> int:
        return sum(row.fates.superseded + row.fates.rejected + row.fates.lost for row in self.contributions)

    @property
    def with_score(self) -> list[Taste]:
        return [taste for taste in self.tastes if self.score in taste.metrics]

    @property
    def score(self) -> str:
        """The name of the metric that sums this run up; "" while there is none."""
        names = list(dict.fromkeys(name for taste in self.tastes for name in taste.metrics))
        return next((name for name in HEADLINE_METRICS if name in names), names[0] if names else "")


async def gather(desk: Desk, run_id: str) -> Facts:
    """The facts of one run's page, or with "" of the overview, whose run is the liveliest one."""
    overview = not run_id
    briefs = await board.briefs(desk) if overview else []
    workers = await people.workers(desk, totals=False)
    chosen = run_id or (briefs[0].id if briefs else "")
    events = await runs.events(desk, ref=run_id or None, limit=MOST_EVENTS)
    jobs = await jobviews.at_a_glance(desk) if overview else None
    if not chosen:
        return Facts(desk.name, workers, briefs, None, [], [], [], events, None, one_run=False, jobs=jobs)
    run = await runs.show(desk, chosen)
    anybody = any(worker.state in ("working", "idle") and not worker.trusted for worker in workers)
    stuck = run.state == "queued" or (run.state == "running" and not run.active_workers and not anybody)
    return Facts(
        hub=desk.name,
        workers=workers,
        briefs=briefs,
        run=run,
        tastes=await runs.tastes(desk, chosen),
        curve=await board.curve(desk, chosen),
        contributions=await runs.contributions(desk, chosen),
        events=events,
        why=await runs.why(desk, chosen) if stuck else None,
        one_run=not overview,
        jobs=jobs,
    )


@dataclass(frozen=True, slots=True)
class Progress:
    fraction: float
    text: str
    left: str


def progress(run: RunView) -> Progress | None:
    """How far, and how much longer at the present speed; None for a run without an end."""
    settled = run.fates.applied + run.fates.late + run.fates.superseded + run.fates.rejected
    ways: list[tuple[float, str, float]] = []  # fraction, text, seconds left (negative: unknown)
    if run.target_samples:
        left = (run.target_samples - settled) / run.samples_per_s if run.samples_per_s > 0 else -1.0
        text = f"{words.count(min(settled, run.target_samples))} of {words.count(run.target_samples)} samples"
        ways.append((settled / run.target_samples, text, left))
    if run.duration_s:
        text = f"{words.span(min(run.elapsed_s, run.duration_s))} of {words.span(run.duration_s)}"
        ways.append((run.elapsed_s / run.duration_s, text, run.duration_s - run.elapsed_s))
    if not ways:
        return None
    fraction, text, left = max(ways)
    ticking = run.state == "running" and left > 0
    return Progress(min(max(fraction, 0.0), 1.0), text, f"about {words.span(_calm(left))} left" if ticking else "")


def _calm(seconds: float) -> float:
    """Rounded so that an estimate does not flicker."""
    step = 1 if seconds < 20 else 5 if seconds < 120 else 30 if seconds < 3600 else 300
    return round(seconds / step) * step


def render(facts: Any, names: tuple[str, ...]) -> dict[str, Markup]:
    """Finished HTML by region; an empty string for one that has nothing to say, so that CSS can fold it away."""
    environment = templates()
    run = getattr(facts, "run", None)
    return {
        name: Markup(environment.get_template(f"regions/{name}.html").render(f=facts, run=run).strip())
        for name in names
    }


_INVISIBLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _plain(value: Any) -> Any:
    """Without the characters that turn a sentence around or cannot be seen: a reason must read as it is meant."""
    return _INVISIBLE.sub("", value) if type(value) is str else value


def ways(role: str) -> list[tuple[str, str]]:
    """The pages that somebody of this role can go to from anywhere."""
    everybody = [("/", "Overview"), ("/queue", "Queue"), ("/workers", "Machines")]
    return [*everybody, ("/submit", "Submit")] if role in MEMBERS else everybody


def said(reason: str, advice: str = "") -> Markup:
    """A reason as a sentence, and in bold what would help. Names that stand in `ticks` are set off from it."""
    first, then = (_in_ticks(text.strip()) for text in (reason, advice))
    if not then:
        return first
    return first + Markup("" if first.endswith((".", "!", "?", ":")) else ".") + Markup(" <b>{}</b>").format(then)


def _in_ticks(text: str) -> Markup:
    parts = _INVISIBLE.sub("", text).split("`")
    if parts[0]:
        parts[0] = parts[0][0].upper() + parts[0][1:]
    if len(parts) % 2 == 0:
        return escape("`".join(parts))
    return Markup("").join(
        Markup("<em>{}</em>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )


@cache
def templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("potluck.hub.dashboard"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tools: Mapping[str, Any] = {
        "words": words,
        "charts": charts,
        "progress": progress,
        "asset": lambda name: f"/assets/{name}?v={asset(name)[1]}",
        "live_states": LIVE,
        "most_tiles": MOST_TILES,
        "most_rows": MOST_ROWS,
        "most_files": MOST_FILES,
        "ended_states": ENDED,
        "took": jobviews.took,
        "ways": ways,
        "said": said,
    }
    environment.globals.update(tools)
    return environment


@cache
def asset(name: str) -> tuple[bytes, str]:
    """A file's bytes and a short hash of them. Only for names in ASSETS."""
    content = (resources.files("potluck.hub.dashboard") / "assets" / name).read_bytes()
    return content, hashlib.sha256(content).hexdigest()[:12]
