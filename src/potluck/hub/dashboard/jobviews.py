"""What do the pages about jobs and machines say? Facts from the ledger; the templates of regions/ make HTML of them.

A piece of a page is drawn once for all who look at it. What only some may see is a view of its own: a job from inside
(its owner and admins) and from outside, the queue and the machines with an admin's buttons and without.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from potluck.domain.job import ENDED, JobSpec
from potluck.errors import NotFound
from potluck.hub.commands import board, jobs, keeping, people, placing, runs
from potluck.hub.commands.board import JobLine
from potluck.hub.commands.desk import Caller, Desk, as_type
from potluck.hub.dashboard import charts, words
from potluck.hub.dashboard.figures import Album, Figures
from potluck.protocol import AttemptView, Event, JobView, MachineNow, Outlook, Rules, Tree, WorkerView

QUEUE = ("queue_head", "waiting", "running", "ended")
MACHINES = ("machines_head", "machines", "gone")
JOB_OUTSIDE = ("job_head", "events")
JOB_INSIDE = ("job_head", "pictures", "curves", "files", "environment", "attempts", "events")
MOST_LINES = 60
MOST_ENDED = 20
MOST_EVENTS = 20
MOST_NAMED = 4
"""Machines of a gang that are named in one line."""
POINTS_AT_ONCE = 5000
"""So many points are read for one drawing at most; the rest follows with the next."""

INSIDER = Caller("admin", "the page", "the page")
"""Whose eyes see a job from inside. Only for what is shown to those who were asked for their right before."""
OUTSIDER = Caller("viewer", "the page", "the page")


# --- the queue ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InLine:
    """A job that waits."""

    look: Outlook
    name: str
    owner: str
    needs: str
    priority: int
    since: str
    path: str
    members: int = 0  # so many of a gang wait here; 0: it is a job by itself


@dataclass(frozen=True)
class Row:
    """A job, or all that is seen of a gang, as one line of a list."""

    path: str
    name: str
    state: str
    owner: str
    needs: str
    machines: list[str]
    exit_code: int | None
    created_at: str
    started_at: str | None
    ended_at: str | None
    members: int = 0  # of the gang, as many as are seen here; 0: it is a job by itself

    @property
    def where(self) -> str:
        shown = ", ".join(self.machines[:MOST_NAMED])
        more = len(self.machines) - MOST_NAMED
        return f"{shown} and {more} more" if more > 0 else shown


def rows(lines: Iterable[JobLine]) -> list[Row]:
    """Lines of a list; the members of a gang are one, where the first of them stands."""
    found: dict[str, list[JobLine]] = {}
    for line in lines:
        found.setdefault(f"/gangs/{quote(line.gang.id)}" if line.gang else f"/jobs/{quote(line.id)}", []).append(line)
    return [_row(path, members) for path, members in found.items()]


def _row(path: str, lines: list[JobLine]) -> Row:
    first, gang = lines[0], lines[0].gang
    machines = sorted({line.worker for line in lines if line.worker})
    if gang is None:
        times = first.created_at, first.started_at, first.ended_at
        return Row(path, first.name, first.state, first.owner, first.needs, machines, first.exit_code, *times)
    times = first.created_at, gang.started_at, gang.ended_at
    code = next((line.exit_code for line in lines if line.exit_code), None) if gang.state == "failed" else None
    return Row(path, gang.name, gang.state, first.owner, first.needs, machines, code, *times, len(lines))


@dataclass(frozen=True)
class QueueFacts:
    waiting: list[InLine]
    waiting_more: int  # jobs that are not in it
    waits: int  # jobs
    at_work: int
    running: list[Row]
    ended: list[Row]
    admin: bool


async def queue(desk: Desk, *, admin: bool) -> QueueFacts:
    line = await placing.queue(desk)
    shown = line[:MOST_LINES]
    # a gang is one line of many members
    found = await board.job_lines(desk, ids=[look.job for look in shown], at_work=MOST_LINES, ended=4 * MOST_ENDED)
    by_id = {job.id: job for job in found}
    waits, at_work = await board.job_counts(desk)
    ended = sorted(filter(_is_over, found), key=lambda job: job.ended_at or "", reverse=True)
    running = [job for job in found if job.state not in ENDED and job.state != "queued"]
    known = [look for look in shown if look.job in by_id]
    more = max(0, waits - len(known))
    return QueueFacts(
        _waiting(known, by_id), more, len(known) + more, at_work, rows(running), rows(ended)[:MOST_ENDED], admin
    )


def _is_over(job: JobLine) -> bool:
    """A member that ended before its gang is no news of its own."""
    return job.state in ENDED and (job.gang is None or job.gang.state in ENDED)


def _waiting(line: Sequence[Outlook], by_id: Mapping[str, JobLine]) -> list[InLine]:
    """Who waits; the members of a gang together, where the first of them stands."""
    found: dict[str, InLine] = {}
    for look in line:
        job = by_id[look.job]
        times = job.priority, job.queued_at
        if (gang := job.gang) is None:
            found[job.id] = InLine(look, job.name, job.owner, job.needs, *times, f"/jobs/{quote(job.id)}")
            continue
        path = f"/gangs/{quote(gang.id)}"
        before = found.get(path) or InLine(look, gang.name, job.owner, job.needs, *times, path)
        found[path] = replace(before, members=before.members + 1)
    return list(found.values())


@dataclass(frozen=True)
class Glance:
    """What the first page says of jobs."""

    waiting: int
    at_work: int
    lines: list[Row]  # those at work, then those that ended last


async def at_a_glance(desk: Desk, most: int = 6) -> Glance:
    found = await board.job_lines(desk, at_work=4 * most, ended=4 * most)
    waiting, at_work = await board.job_counts(desk)
    lines = rows(job for job in found if job.state not in ENDED or _is_over(job))
    return Glance(waiting, at_work, sorted(lines, key=lambda row: row.state in ENDED)[:most])


# --- machines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A machine with what it said about itself, as records."""

    view: WorkerView
    machine: MachineNow
    rules: Rules | None  # None: it never asked for jobs

    @property
    def hardware(self) -> str:
        view, now = self.view, self.machine
        cores, memory = now.cpu_cores or view.hardware.cpu_cores, now.memory_bytes or view.hardware.memory_bytes
        parts = [words.plural(cores, "core")] if cores else []
        if memory:
            free = f", {words.size(now.memory_free_bytes)} free" if now.memory_bytes else ""
            parts.append(f"{words.size(memory)} of memory{free}")
        if now.disk_free_bytes:
            parts.append(f"{words.size(now.disk_free_bytes)} of disk free")
        system = " ".join(word for word in (view.hardware.os or now.os, view.hardware.arch or now.arch) if word)
        parts += [system] if system else []
        if not now.gpus:
            parts.append(view.device if view.hardware.gpus else "no GPU")
        return " · ".join(parts)

    @property
    def allows(self) -> str:
        if self.rules is None:
            return "shared training; it never asked for jobs"
        what = {"pool": "shared training only", "jobs": "jobs only", "all": "everything"}
        text = what.get(self.rules.accept, self.rules.accept)
        if self.rules.accept != "pool":
            text += ", from its owner only" if self.rules.whose == "me" else ", from everybody"
            text += "" if self.rules.runtime == "any" else ", in a container"
            text += f", {words.plural(self.rules.max_tasks, 'job')} at once" if self.rules.max_tasks > 1 else ""
        return text


@dataclass(frozen=True)
class MachinesFacts:
    workers: list[WorkerView]
    admin: bool

    @property
    def present(self) -> list[Seen]:
        return [see(worker) for worker in self.workers if worker.state not in ("left", "revoked")]

    @property
    def capacity(self) -> str:
        """All of them together."""
        machines = [seen.machine for seen in self.present if seen.view.state != "away"]
        gpus = [gpu for machine in machines for gpu in machine.gpus]
        parts = [words.plural(sum(machine.cpu_cores for machine in machines), "core")]
        if gpus:
            memory = words.size(sum(gpu.memory_bytes for gpu in gpus))
            parts.append(f"{words.plural(len(gpus), 'GPU')} with {memory}")
        return ", ".join(parts)


def see(worker: WorkerView) -> Seen:
    return Seen(worker, as_type(worker.machine, MachineNow), as_type(worker.rules, Rules) if worker.rules else None)


async def machines(desk: Desk, *, admin: bool) -> MachinesFacts:
    return MachinesFacts(await people.workers(desk, totals=False), admin)


# --- a job ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    word: str
    kind: str  # done | now | bad | todo
    at: str | None = None
    note: str = ""


@dataclass(frozen=True)
class JobFacts:
    job: JobView
    look: Outlook | None
    events: list[Event]
    figures: Figures = field(default_factory=Figures)
    outputs: Tree | None = None
    outputs_attempt: int = 0

    @property
    def command(self) -> str:
        assert self.job.spec is not None
        return command_line(self.job.spec)

    @property
    def stages(self) -> list[Stage]:
        return stages(self.job, datetime.now(UTC))

    @property
    def curves(self) -> list[charts.Chart]:
        return self.figures.curves

    @property
    def curves_more(self) -> int:
        return self.figures.more

    @property
    def pictures(self) -> list[Album]:
        return self.figures.pictures

    @property
    def last(self) -> AttemptView | None:
        return self.job.attempts[-1] if self.job.attempts else None

    @property
    def packages(self) -> list[str]:
        """What was installed where the newest attempt ran."""
        found = self.last.environment.get("packages") if self.last else None
        return [str(each) for each in found[:2000]] if isinstance(found, list) else []

    @property
    def settings(self) -> list[tuple[str, str]]:
        """What was asked for, then what it really ran with."""
        spec, git = self.job.spec, self.job.git
        assert spec is not None
        asked = {
            "wants": self.job.needs,
            "image": spec.image,
            "packages from": spec.requirements,
            "Python": spec.python,
            "priority": str(self.job.priority or ""),
            "retries left": f"{self.job.retries_left} of {spec.retries}" if spec.retries else "",
            "time limit": words.span(spec.timeout_s) if spec.timeout_s else "",
            "processes": str(spec.procs) if spec.procs > 1 else "",
            "network": "" if spec.network else "none",
            "secrets": ", ".join(spec.secrets),
            **{f"{name}=": value for name, value in spec.env.items()},
        }
        if git:
            asked["commit"] = git.commit[:12] + (f" on {git.branch}" if git.branch else "")
            asked["commit"] += ", with changes" if git.dirty else ""
        ran: Mapping[str, Any] = self.last.environment if self.last else {}
        ran = {"ran in": self.last.executor if self.last else "", **ran}
        rows = [*asked.items(), *((name, value) for name, value in ran.items() if name != "packages")]
        return [(name, str(value)[:2000]) for name, value in rows if value not in ("", None, [], {})]


def command_line(spec: JobSpec) -> str:
    argv = spec.command
    return argv[2] if argv[:2] == ["/bin/sh", "-c"] and len(argv) == 3 else shlex.join(argv)


def stages(job: JobView, now: datetime) -> list[Stage]:
    """How far a job is, step by step. What it never reached is left out when it is over."""
    last = job.attempts[-1] if job.attempts else None
    over = job.state in ENDED
    order = ("queued", "placed", "preparing", "running")
    reached = order.index(job.state) if not over else 3 if job.started_at else 1 if job.worker else 0
    placed_at = last.placed_at if last and job.state != "queued" else None
    notes = {"placed": f"on {job.worker}" if job.worker and reached > 0 else ""}
    times = {"queued": job.created_at, "placed": placed_at, "running": job.started_at}
    if job.started_at and reached == 3:
        notes["running"] = f"for {_lasted(job.started_at, job.ended_at if over else None, now)}"
    found = []
    for place, word in enumerate(order):
        kind = "now" if place == reached and not over else "done" if place <= reached else "todo"
        if kind != "todo" or not over:
            known = kind != "todo"
            found.append(Stage(word, kind, times.get(word) if known else None, notes.get(word, "") if known else ""))
    if over:
        note = f"exit code {job.exit_code}" if job.exit_code else ""
        found.append(Stage(job.state, "done" if job.state == "succeeded" else "bad", job.ended_at, note))
    else:
        found.append(Stage("ended", "todo"))
    return found


def took(one: Any) -> str:
    """How long a job or an attempt ran; a dash for one that did not."""
    return _lasted(one.started_at, one.ended_at, datetime.now(UTC)) if one.started_at else "–"


def _lasted(start: str, end: str | None, now: datetime) -> str:
    seconds = ((datetime.fromisoformat(end) if end else now) - datetime.fromisoformat(start)).total_seconds()
    # one that is going on is drawn every few seconds: it must not look as if it were counting
    step = 1 if end or seconds < 60 else 10 if seconds < 600 else 60
    return words.span(seconds // step * step)


class JobPage:
    """One job as its page shows it, again and again: it remembers the figures it has read."""

    def __init__(self, job_id: str, *, inside: bool) -> None:
        self.job_id, self.inside = job_id, inside
        self._figures = Figures()
        self._outputs: tuple[str, Tree] | None = None

    async def facts(self, desk: Desk) -> JobFacts:
        eyes = INSIDER if self.inside else OUTSIDER
        job = await jobs.show(desk, eyes, self.job_id)
        look = await placing.outlook_of(desk, job.id) if job.state == "queued" else None
        events = await runs.events(desk, ref=job.id, limit=MOST_EVENTS, caller=eyes)
        if not self.inside:
            return JobFacts(job, look, events)
        await self._read_figures(desk, job)
        number, outputs = await self._read_outputs(desk, job)
        return JobFacts(job, look, events, self._figures, outputs, number)

    async def _read_figures(self, desk: Desk, job: JobView) -> None:
        figures, left = self._figures, POINTS_AT_ONCE
        for attempt in job.attempts:
            while left > 0 and attempt.number >= figures.attempt:
                after = figures.seq if attempt.number == figures.attempt else -1
                asked = min(left, 1000)
                found = await keeping.points(
                    desk, INSIDER, job.id, after_seq=after, attempt=attempt.number, limit=asked
                )
                figures.add(found)
                left -= len(found)
                if not found:
                    break

    async def _read_outputs(self, desk: Desk, job: JobView) -> tuple[int, Tree | None]:
        """What the newest attempt left that left anything."""
        newest = next((each for each in reversed(job.attempts) if each.outputs), None)
        if newest is None or newest.outputs is None:
            return 0, None
        if self._outputs is None or self._outputs[0] != newest.outputs.hash:
            try:
                tree = await keeping.tree(desk, INSIDER, job.id, "outputs", newest.number)
            except NotFound:
                return 0, None
            self._outputs = (newest.outputs.hash, tree)
        return newest.number, self._outputs[1]
