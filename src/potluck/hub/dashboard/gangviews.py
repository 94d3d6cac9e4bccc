"""What does the page of a gang say? Its members beside one another, what a step takes, and what was decided and why.

What the members' points and logs say is worked out by domain/gangwatch.py; here is what is read, and how much of it at once.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from potluck.domain.gangwatch import FIGURES, KEPT, PHASES, Ear, Lane, Said, Watch, story
from potluck.domain.job import ENDED
from potluck.hub.commands import board, gang_requests, placing
from potluck.hub.commands.board import BEGINNING, Figure, Place
from potluck.hub.commands.desk import Desk
from potluck.hub.dashboard import charts, words
from potluck.hub.dashboard.figures import Figures
from potluck.hub.dashboard.jobviews import INSIDER, OUTSIDER, command_line
from potluck.protocol import Event, GangView, MemberView, Outlook, Point

OUTSIDE = ("gang_head", "gang_lanes", "events")
INSIDE = ("gang_head", "gang_stats", "gang_lanes", "gang_steps", "curves", "gang_story", "events")
MOST_EVENTS = 40
MOST_SAID = 60
MOST_MARKS = 80
FIGURES_AT_ONCE = 5_000
"""So many points are read for one drawing at most, of all members; the rest follows with the next."""
FIGURE_BYTES = 4 << 20
LOG_TAIL = 256 << 10
"""Of a longer log only so much of its end is searched for the gang's sentences, and so much at once of what comes."""
LINES = charts.MOST_LINES


@dataclass(frozen=True)
class Row:
    """A member as one lane of the page."""

    view: MemberView
    lane: Lane
    is_current: bool
    batch: float

    @property
    def rank(self) -> int:
        return int(self.lane.newest("rank", self.view.rank)) if self.is_current else -1

    @property
    def share(self) -> int:
        return int(self.lane.newest("share", self.view.share)) if self.is_current else 0

    @property
    def part(self) -> float:
        """Of the batch."""
        return min(max(self.share / self.batch, 0.0), 1.0) if self.batch > 0 else 0.0

    @property
    def own_per_s(self) -> float:
        return (self.lane.now("samples_per_s") or self.view.samples_per_s) if self.is_current else 0.0

    @property
    def alone_per_s(self) -> float:
        return self.lane.newest("alone_per_s", self.view.alone_per_s)

    @property
    def bar(self) -> list[Slice]:
        """Where the time of a step goes."""
        cut, x = [], 0.0
        for part in self.lane.parts if self.is_current else []:
            cut.append(
                Slice(part.phase, PHASES[part.phase], part.part, round(x, 1), round(charts.WIDTH * part.part, 1))
            )
            x += charts.WIDTH * part.part
        return cut

    @property
    def largest(self) -> list[Slice]:
        return sorted(self.bar, key=lambda slice_: -slice_.part)[:3]

    @property
    def machine(self) -> str:
        """What it uses of its machine, as far as it says so."""
        lane = self.lane
        parts = [f"CPU {words.percent(lane.now('cpu'))}"] if lane.newest("cpu") > 0 else []
        parts += [words.size(lane.newest("memory_bytes"))] if lane.newest("memory_bytes") > 0 else []
        if (busy := lane.now("gpu")) > 0 or lane.newest("gpu_memory_bytes") > 0:
            parts.append(f"GPU {words.percent(busy)}, {words.size(lane.newest('gpu_memory_bytes'))}")
        parts += [f"{lane.newest('temperature_c'):.0f} °C"] if lane.newest("temperature_c") > 0 else []
        return " · ".join(parts) if self.is_current else ""


@dataclass(frozen=True, slots=True)
class Slice:
    phase: str
    meaning: str
    part: float
    x: float  # of charts.WIDTH
    width: float


@dataclass(frozen=True)
class GangFacts:
    gang: GangView
    look: Outlook | None  # of its first member that waits
    events: list[Event]
    watch: Watch = field(default_factory=Watch)
    said: list[Said] = field(default_factory=list)
    figures: Figures = field(default_factory=Figures)

    @property
    def is_over(self) -> bool:
        return self.gang.state in ENDED

    @property
    def at_work(self) -> int:
        return sum(member.state == "running" for member in self.gang.members)

    @property
    def size(self) -> str:
        least, most = self.gang.least, self.gang.most
        return f"{most} machines" if least == most else f"{least} to {most} machines"

    @property
    def engine(self) -> str:
        return "an unmodified script (compat)" if self.gang.engine == "compat" else f"engine {self.gang.engine}"

    @property
    def phases(self) -> Mapping[str, str]:
        return PHASES

    def hosts(self, member: MemberView) -> bool:
        return not self.is_over and bool(member.worker) and member.worker == self.gang.host

    @property
    def command(self) -> str:
        return command_line(self.gang.spec) if self.gang.spec is not None else ""

    @property
    def names(self) -> dict[int, str]:
        return names_of(self.gang)

    @property
    def rows(self) -> list[Row]:
        current = set(self.watch.current)
        lanes = self.watch.lanes
        batch = max((lanes[member].newest("batch") for member in current), default=0.0)
        batch = batch or sum(member.share for member in self.gang.members)
        live = {member.member for member in self.gang.members if self.is_over or member.state == "running"}
        return [
            Row(view, lanes.get(view.member, Lane()), view.member in live and view.member in (current or live), batch)
            for view in self.gang.members
        ]

    @property
    def efficiency(self) -> float:
        """What the gang reaches of what its machines do alone; 0: not known."""
        alone = self.watch.alone_per_s
        return self.watch.total_per_s / alone if alone > 0 else 0.0

    @property
    def pace(self) -> str:
        return self.watch.pace(self.names)

    @property
    def newest_said(self) -> list[Said]:
        return self.said[-MOST_SAID:][::-1]

    @property
    def marks(self) -> list[float]:
        """Steps at which the gang did something else than go on."""
        steps = {float(said.step) for said in self.said if said.step is not None and said.kind != "note"}
        return sorted(steps)[-MOST_MARKS:]

    @property
    def steps(self) -> charts.Chart | None:
        return self._chart("What a step takes", self.watch.steps(self.names, LINES), show=words.brief)

    @property
    def throughput(self) -> charts.Chart | None:
        together, alone = self.watch.throughput()
        return self._chart("Samples a second", {"the gang": together, "its machines alone, together": alone})

    @property
    def shares(self) -> charts.Chart | None:
        return self._chart("Shares of the batch", self.watch.shares(self.names, LINES))

    @property
    def drawn(self) -> list[charts.Chart]:
        return [chart for chart in (self.steps, self.throughput, self.shares) if chart is not None]

    def _chart(
        self, title: str, series: Mapping[str, charts.Points], show: Callable[[float], str] = words.short
    ) -> charts.Chart | None:
        return charts.chart(
            title,
            series,
            x_name="step",
            over=lambda x: f"to step {words.short(x)}",
            lowest=0.0,
            marks=self.marks,
            show=show,
        )

    @property
    def curves(self) -> list[charts.Chart]:
        return self.figures.curves

    @property
    def curves_more(self) -> int:
        return self.figures.more


def names_of(gang: GangView) -> dict[int, str]:
    """What members are called: by their machine, as they call themselves."""
    return {member.member: member.worker or f"member {member.member}" for member in gang.members}


@dataclass
class _Follower:
    """One attempt's output, as far as it was read."""

    ear: Ear = field(default_factory=Ear)
    offset: int = -1  # -1: not begun
    is_done: bool = False
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))


class GangPage:
    """One gang as its page shows it, again and again: it remembers what it has read."""

    def __init__(self, gang_id: str, *, inside: bool) -> None:
        self.gang_id, self.inside = gang_id, inside
        self.topics = ["change", f"job:{gang_id}"]  # its members' are added as soon as they are known
        self._watch = Watch()
        self._figures: dict[str, Figures] = {}
        self._at: dict[str, Place] = {}  # how far the figures about the gang were read, and all others
        self._other_at: dict[str, Place] = {}
        self._logs: dict[tuple[str, int], _Follower] = {}

    async def facts(self, desk: Desk) -> GangFacts:
        gang = await gang_requests.show(desk, INSIDER if self.inside else OUTSIDER, self.gang_id)
        jobs = [member.job for member in gang.members]
        known = set(self.topics)
        self.topics += [topic for job in jobs for topic in (f"job:{job}", f"points:{job}") if topic not in known]
        waits = next((member.job for member in gang.members if member.state == "queued"), "")
        look = await placing.outlook_of(desk, waits) if waits and gang.state not in ENDED else None
        events = await board.events_of_many(desk, [gang.id, *jobs], inside=self.inside, limit=MOST_EVENTS)
        if not self.inside:
            return GangFacts(gang, look, events)
        await self._read_figures(desk, gang)
        await self._read_logs(desk, gang)
        heard = {member.member: self._heard(member.job) for member in gang.members}
        said = story(self._watch, heard, names_of(gang))
        return GangFacts(gang, look, events, self._watch, said, self._all_figures(jobs))

    async def _read_figures(self, desk: Desk, gang: GangView) -> None:
        members = {member.job: member.member for member in gang.members}
        after = {job: self._at.get(job, BEGINNING) for job in members}
        for figure in await board.newest_figures(desk, after, FIGURES, most=KEPT):
            self._at[figure.job] = max(figure.place, self._at.get(figure.job, BEGINNING))
            self._watch.add(members[figure.job], figure.step, figure.values)
        after = {job: self._other_at.get(job, BEGINNING) for job in members}
        most, most_bytes = max(1, FIGURES_AT_ONCE // len(members)), FIGURE_BYTES // len(members)
        for figure in await board.other_figures(desk, after, FIGURES, most=most, most_bytes=most_bytes):
            self._other_at[figure.job] = figure.place
            self._figures.setdefault(figure.job, Figures()).add([_as_point(figure)])

    def _all_figures(self, jobs: Iterable[str]) -> Figures:
        """What the script logs: by the first member, and by the next one when that is gone."""
        together: dict[str, dict[float, float]] = {}
        for job in reversed(list(jobs)):
            for name, points in self._figures.get(job, Figures()).series.items():
                together.setdefault(name, {}).update(points)
        return Figures(series={name: sorted(points.items()) for name, points in together.items()})

    async def _read_logs(self, desk: Desk, gang: GangView) -> None:
        attempts = await board.newest_attempts(desk, [member.job for member in gang.members])
        await asyncio.to_thread(self._follow, desk, attempts)

    def _follow(self, desk: Desk, attempts: list[tuple[str, int, bool]]) -> None:
        for job, number, has_ended in attempts:
            one = self._logs.setdefault((job, number), _Follower())
            if one.is_done:
                continue
            end = desk.logs.end(job, number)
            if end > max(one.offset, 0):
                is_tail = one.offset < 0 and end > LOG_TAIL
                stretch = desk.logs.read(job, number, end - LOG_TAIL if is_tail else max(one.offset, 0), LOG_TAIL)
                text = one.decoder.decode(stretch.content)
                # the tail of a long log begins in the middle of a line, which is nobody's sentence
                one.ear.hear(text.partition("\n")[2] if is_tail else text)
                one.offset = stretch.next_offset
            # the state was read before the bytes: whoever had ended then has written all that it ever will
            one.is_done = has_ended and one.offset >= end

    def _heard(self, job: str) -> list[str]:
        return [
            said for (of, _), one in sorted(self._logs.items(), key=_by_attempt) if of == job for said in one.ear.heard
        ]


def _by_attempt(found: tuple[tuple[str, int], _Follower]) -> tuple[str, int]:
    return found[0]


def _as_point(figure: Figure) -> Point:
    return Point(figure.step, 0.0, figure.values, seq=figure.seq, attempt=figure.attempt)
