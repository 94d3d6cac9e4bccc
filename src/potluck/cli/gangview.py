"""What do the members of a gang do, this minute: who has which share, where does the time go, what was decided and why?"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from potluck.cli import output
from potluck.domain.gangwatch import PHASES, Ear, Lane, Said, Watch, story
from potluck.domain.job import ENDED
from potluck.errors import HubUnreachable, LedgerError, TryLater
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import GangView, MemberView, Outlook

EVERY_S = 1.0  # members write about themselves as often
COLUMNS = ("MEMBER", "STATE", "RANK", "SHARE", "SAMPLES/S", "ALONE", "OWN WORK", "WHERE A STEP GOES")
RIGHT = ("RANK", "SHARE", "SAMPLES/S", "ALONE", "OWN WORK")
COLOURS = dict(zip(PHASES, ("red", "green", "blue", "bright_black", "magenta", "yellow", "white"), strict=True))
LETTERS = dict(zip(PHASES, "lfbsomx", strict=True))
BAR = 32  # characters
MOST_SAID = 8
POINTS = 256  # of each member are enough for the beginning: some minutes
TAIL_BYTES = 65536
BLOCKS = "▁▂▃▄▅▆▇█"


def show(hub: Hub, ref: str, *, once: bool = False, timeout_s: float | None = None) -> None:
    """Redraw until the gang has ended, Ctrl-C, or the time is over. Once, in plain text, where there is no terminal."""
    eye = Eye(hub, hub.gang(ref).id)
    eye.look()
    if once or not output.is_terminal():
        for line in head_lines(eye):
            output.say(line)
        output.print_table(COLUMNS, (plain_row(eye, member) for member in eye.gang.members), right=RIGHT)
        for line in (*pace_lines(eye), *(said_line(said) for said in eye.said)):
            output.say(line)
        return
    _live(eye, timeout_s)


def _live(eye: Eye, timeout_s: float | None) -> None:
    from rich.console import Console
    from rich.live import Live

    ends = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
    remark = "Ctrl-C leaves; the gang goes on."
    with Live(screen=True, auto_refresh=False) as live:
        while eye.gang.state not in ENDED:
            live.update(picture(eye, remark), refresh=True)
            rest = ends - time.monotonic()
            if rest <= 0:
                return
            time.sleep(min(EVERY_S, rest))
            try:
                eye.look()
                remark = "Ctrl-C leaves; the gang goes on."
            except (HubUnreachable, LedgerError, TryLater) as error:
                remark = f"{error} Trying again."
    Console().print(picture(eye, ""))  # the screen is gone; how it ended stays


# --- looking --------------------------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """How far one member's points and output were read: both are of an attempt."""

    attempt: int
    seq: int
    offset: int
    ear: Ear


@dataclass
class Eye:
    """One gang, looked at again and again: each time only what is new is asked for."""

    hub: Hub
    ref: str
    gang: GangView = field(init=False)
    outlook: Outlook | None = None
    said: list[Said] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    _readings: dict[str, _Reading] = field(default_factory=dict)

    @property
    def names(self) -> dict[int, str]:
        return {member.member: member.worker or f"member {member.member}" for member in self.gang.members}

    def look(self) -> None:
        self.gang = self.hub.gang(self.ref)
        waiting = next((member.job for member in self.gang.members if member.state == "queued"), "")
        self.outlook = self._outlook(waiting) if waiting and self.gang.state not in ENDED else None
        if not self.gang.mine:
            return  # what members print and log is for the gang's owner and admins
        for member in self.gang.members:
            if member.worker:
                self._read(member)
        heard = {
            member.member: self._readings[member.job].ear.heard
            for member in self.gang.members
            if member.job in self._readings
        }
        self.said = story(self.watch, heard, self.names)[-MOST_SAID:]

    def _outlook(self, job: str) -> Outlook | None:
        return next((look for look in self.hub.queue() if look.job == job), None)

    def _read(self, member: MemberView) -> None:
        attempts = self.hub.job(member.job).attempts
        if not attempts:
            return
        reading, number = self._readings.get(member.job), attempts[-1].number
        if reading is None or reading.attempt != number:
            ear = reading.ear if reading else Ear()
            reading = self._readings[member.job] = _Reading(number, *self._near_the_end(member.job, number), ear)
        for _ in range(20):  # a member that prints without end does not keep us from the others
            points = self.hub.points(member.job, reading.seq, number)
            for point in points:
                reading.seq = point.seq
                self.watch.add(member.member, point.step, point.values)
            piece = self.hub.log(member.job, number, reading.offset)
            reading.offset = piece.next_offset
            reading.ear.hear(piece.text)
            if not points and not piece.text:
                return

    def _near_the_end(self, job: str, attempt: int) -> tuple[int, int]:
        """A point and a byte not far from the newest ones: a day of training is not read from its beginning."""
        before, after = -1, POINTS
        while self.hub.points(job, after, attempt, limit=1):
            before, after = after, 2 * after
        while after - before > POINTS:
            middle = (before + after) // 2
            before, after = (middle, after) if self.hub.points(job, middle, attempt, limit=1) else (before, middle)
        end = self.hub.log(job, attempt, 1 << 60, limit=4).offset
        return max(before - POINTS, -1), max(end - TAIL_BYTES, 0)


# --- showing --------------------------------------------------------------------------------------------------------


def head_lines(eye: Eye) -> list[str]:
    gang, watch = eye.gang, eye.watch
    at_work = sum(member.state == "running" for member in gang.members)
    size = f"{gang.least}" if gang.least == gang.most else f"{gang.least}..{gang.most}"
    engine = f", engine {gang.engine}" if gang.engine else ""
    host = f", they meet at {clean(gang.host)}" if gang.host and gang.state not in ENDED else ""
    lines = [
        f"{clean(gang.name)} ({clean(gang.id)}) of {clean(gang.owner)}: {gang.state}, "
        f"{at_work} of {size} machines at work{engine}{host}"
    ]
    if gang.reason and gang.state != "running":
        lines.append(clean(gang.reason))
    if eye.outlook is not None:
        look = eye.outlook
        where = f"number {look.position} in the queue: " if look.position else ""
        lines.append(
            f"A member waits, {where}{clean(look.reason)}" + (f". {clean(look.advice)}" if look.advice else "")
        )
    if watch.lanes:
        alone = watch.alone_per_s
        part = (
            f", {output.share(watch.total_per_s / alone)} of what they do alone ({output.number(alone)})"
            if alone
            else ""
        )
        lines.append(
            f"step {watch.step:,}: {brief(watch.step_s)} {spark(watch)}  "
            f"{output.number(round(watch.total_per_s, 1))} samples/s{part}"
        )
    return lines


def pace_lines(eye: Eye) -> list[str]:
    sentence = clean(eye.watch.pace(eye.names)).replace("`", "")
    return [f"{sentence}."] if sentence else []


def said_line(said: Said) -> str:
    step = f"step {said.step:,}" if said.step is not None else "earlier"
    who = f"{', '.join(said.who)}: " if said.kind in ("retry", "healed", "note") else ""
    return clean(f"{step}: {who}{said.text}")


def cells(eye: Eye, member: MemberView) -> tuple[str, ...]:
    """All but the last column."""
    lane, is_current = lane_of(eye, member)
    share = int(lane.newest("share", member.share)) if is_current else 0
    batch = lane.newest("batch")
    rank = int(lane.newest("rank", member.rank)) if is_current else -1
    own = (lane.now("samples_per_s") or member.samples_per_s) if is_current else 0.0
    alone = lane.newest("alone_per_s", member.alone_per_s)
    return (
        member.worker or f"member {member.member}",
        member.state,
        str(rank) if rank >= 0 else "–",
        (f"{share:,}" + (f" ({output.share(share / batch)})" if batch > 0 else "")) if share else "–",
        output.number(round(own, 1)) if own else "–",
        output.number(round(alone, 1)) if alone else "–",
        brief(lane.work_s) if is_current and lane.looks else "–",
    )


def plain_row(eye: Eye, member: MemberView) -> tuple[str, ...]:
    lane, is_current = lane_of(eye, member)
    parts = sorted(lane.parts if is_current else [], key=lambda part: -part.part)
    return *cells(eye, member), ", ".join(f"{p.phase} {output.share(p.part)}" for p in parts if p.part >= 0.005) or "–"


def lane_of(eye: Eye, member: MemberView) -> tuple[Lane, bool]:
    """What is known of a member, and whether it takes part now."""
    current = eye.watch.current
    takes_part = (member.state == "running" or eye.gang.state in ENDED) and (member.member in current or not current)
    return eye.watch.lanes.get(member.member, Lane()), takes_part


def lengths(parts: Iterable[float], whole: int = BAR) -> list[int]:
    """Whole numbers in the ratio of `parts` that sum to `whole`: the largest remainders are rounded up."""
    exact = [part * whole for part in parts]
    cut = [int(each) for each in exact]
    for place in sorted(range(len(exact)), key=lambda i: cut[i] - exact[i])[: whole - sum(cut)]:
        cut[place] += 1
    return cut


def spark(watch: Watch, most: int = 24) -> str:
    """What the last steps took, as a row of blocks."""
    newest = max(watch.lanes.values(), key=lambda lane: lane.step, default=Lane())
    seconds = [look.step_s for look in list(newest.looks)[-most:]]
    top = max(seconds, default=0.0)
    return "".join(BLOCKS[min(7, int(8 * max(s, 0.0) / top))] for s in seconds) if top > 0 else ""


def brief(seconds: float) -> str:
    """`84 ms`, `1.3 s`."""
    return output.span(seconds) if seconds >= 60 else f"{seconds:.2g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def picture(eye: Eye, remark: str) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in RIGHT else "left", overflow="fold")
    for member in eye.gang.members:
        table.add_row(*(Text(clean(cell)) for cell in cells(eye, member)), _bar(eye, member))
    key = Text("  ").join(Text(f" {LETTERS[phase]} {phase} ", style=f"black on {COLOURS[phase]}") for phase in PHASES)
    lines = head_lines(eye)
    return Group(
        Text(lines[0], style="bold"),
        *map(Text, lines[1:]),
        Text(),
        table,
        *([key] if eye.watch.lanes else []),
        Text(),
        *(Text(line, style="yellow") for line in pace_lines(eye)),
        *(Text(said_line(said)) for said in eye.said),
        Text(clean(remark), style="dim"),
    )


def _bar(eye: Eye, member: MemberView) -> Any:
    """Its phases, each as long as its part, by letters: without colours it can be read as well."""
    from rich.text import Text

    lane, is_current = lane_of(eye, member)
    parts = lane.parts if is_current else []
    bar = Text()
    for part, length in zip(parts, lengths(part.part for part in parts), strict=True):
        bar.append(LETTERS[part.phase] * length, style=f"black on {COLOURS[part.phase]}")
    return bar if parts else Text("–")
