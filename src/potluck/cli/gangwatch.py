"""How is a gang watched: what becomes of it on stderr, what its members print on stdout, and its exit code at the end?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import click

from potluck.cli import output
from potluck.cli.watch import AFTERLIFE_S, AGAIN_S, LOOK_S, Cleaner
from potluck.cli.watch import exit_code as job_exit_code
from potluck.domain.job import ENDED
from potluck.errors import HubUnreachable, LedgerError, NotFound, TimedOut, TryLater
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import GangView, MemberView

SHORTEST_S = 0.2  # between two looks at the members' output; longer while they print nothing
LONGEST_S = 1.0
MOST_BYTES = 1 << 18  # of one member's output in a turn, so that the others get theirs
WIDEST = 20  # characters of a name in front of a line
COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "bright_red", "bright_cyan", "bright_yellow")


class Lanes:
    """Writes the output of several members to stdout, line by line, each with its member's name in front."""

    def __init__(self) -> None:
        self._cleaners: dict[str, Cleaner] = {}
        self._rests: dict[str, str] = {}
        self._colours: dict[str, str] = {}
        self._width = 0

    def output(self, name: str, text: str, *, last: bool = False) -> None:
        shown = self._cleaners.setdefault(name, Cleaner()).feed(text, last=last)
        *lines, rest = (self._rests.pop(name, "") + shown).split("\n")
        if last and rest:
            lines, rest = [*lines, rest], ""
        if rest:
            self._rests[name] = rest
        if not lines:
            return
        head = self._head(name)
        click.echo("".join(f"{head}{line}\n" for line in lines), nl=False)

    def note(self, text: str) -> None:
        output.note(text)

    def end(self) -> None:
        """What is left of lines that nobody ended."""
        for name in list(self._rests):
            self.output(name, "", last=True)

    def _head(self, name: str) -> str:
        self._width = max(self._width, min(WIDEST, len(name)))
        colour = self._colours.setdefault(name, COLOURS[len(self._colours) % len(COLOURS)])
        return click.style(f"{clean(name).ljust(self._width)} | ", fg=colour)


class _Lane:
    """How far one member's output has been read."""

    def __init__(self, job: str, attempt: int) -> None:
        self.job = job
        self.attempt = attempt  # 0: the newest, whichever that is
        self.offset = 0
        self.is_read = False  # to the end of its last attempt


class GangWatch:
    """One gang, watched until it has ended."""

    def __init__(
        self,
        hub: Hub,
        gang: GangView,
        *,
        show: Callable[..., None] | None,
        say: Callable[[str], None],
        timeout_s: float | None = None,
        attempt: int = 1,
        offsets: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.hub = hub
        self.gang = gang
        self._show = show  # with a worker's name and text; None: only the states
        self._say = say
        self._timeout_s = timeout_s
        self._ends = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
        self._lanes = {member.job: _Lane(member.job, attempt) for member in gang.members}
        for job, (number, offset) in (offsets or {}).items():
            self._lanes[job].attempt, self._lanes[job].offset = number, offset
        self._told = ("", "")  # state, reason
        self._stood: dict[str, tuple[str, str]] = {}  # of each member that was told: its state, its worker
        self._trouble = ""
        self._pause_s = SHORTEST_S
        self._ended_at: float | None = None

    def until_the_end(self) -> GangView:
        self.tell()
        while not self._over():
            if time.monotonic() >= self._ends:
                raise TimedOut(
                    f"{self.gang.id} is {self.gang.state} after {output.span(self._timeout_s or 0)}; it goes on. "
                    f"{come_back(self.gang)}"
                )
            if self._show is not None:
                moved = [self._read(lane, member) for lane, member in self._to_read()]
                self._pause_s = SHORTEST_S if any(moved) else min(LONGEST_S, self._pause_s * 1.5)
            self._try(self._look)
        return self.gang

    # --- states

    def tell(self) -> None:
        """Say where the gang and its members stand, as far as that is news."""
        gang = self.gang
        if (gang.state, gang.reason) != self._told:
            self._told = (gang.state, gang.reason)
            self._say(gang_sentence(gang))
        news: dict[tuple[str, str], list[str]] = {}
        for member in gang.members:
            before, self._stood[member.job] = self._stood.get(member.job), (member.state, member.worker)
            if gang.state in ENDED and member.state == "cancelled":
                continue  # that nobody needs it any more is no news
            if before != (member.state, member.worker) and (what := _news(member, before))[0]:
                news.setdefault(what, []).append(member.worker or member.job)
        for (happened, why), names in news.items():
            who = ", ".join(map(clean, names))
            self._say(f"{clean(gang.id)}: {who}: {happened}" + (f": {clean(why)}" if why else ""))

    def _look(self) -> None:
        wait_s = LOOK_S if self._show is None or self.gang.state == "queued" else self._pause_s
        wait_s = max(0.0, min(wait_s, self._ends - time.monotonic()))
        self.gang = self.hub.wait_gang(self.gang.id, self.gang.state, wait_s)
        self.tell()

    def _over(self) -> bool:
        if self.gang.state not in ENDED:
            self._ended_at = None
            return False
        if self._show is None or all(lane.is_read for lane in self._lanes.values()):
            return True
        self._ended_at = self._ended_at or time.monotonic()
        return time.monotonic() - self._ended_at > AFTERLIFE_S  # a machine may be gone: the end of its log never comes

    # --- output

    def _to_read(self) -> list[tuple[_Lane, MemberView]]:
        for member in self.gang.members:
            self._lanes.setdefault(member.job, _Lane(member.job, 1))
        begun = [member for member in self.gang.members if member.state != "queued"]
        return [(self._lanes[member.job], member) for member in begun if not self._lanes[member.job].is_read]

    def _read(self, lane: _Lane, member: MemberView) -> bool:
        """Show one more piece of a member's output; whether there was any."""
        moved = False

        def read() -> None:
            nonlocal moved
            try:
                piece = self.hub.log(lane.job, lane.attempt, lane.offset, 0.0, MOST_BYTES)
            except NotFound:  # it is one more than it had
                lane.is_read = True
                return
            name = member.worker or lane.job
            if piece.offset > lane.offset:
                self._say(f"… {output.size(piece.offset - lane.offset)} of {clean(name)} are no longer kept")
            assert self._show is not None
            self._show(name, piece.text, last=piece.over)
            moved = bool(piece.text)
            lane.attempt, lane.offset = piece.attempt, piece.next_offset
            if piece.over and member.state in ENDED and not piece.attempt:
                lane.is_read = True  # it never began
            elif piece.over:
                lane.attempt, lane.offset = lane.attempt + 1, 0

        self._try(read)
        return moved

    def _try(self, action: Callable[[], None]) -> None:
        """Outlives a restart of the hub."""
        try:
            action()
            self._trouble = ""
        except (HubUnreachable, LedgerError, TryLater) as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                self._say(f"{error} Trying again; the gang goes on.")
            time.sleep(max(0.0, min(AGAIN_S, self._ends - time.monotonic())))


def _news(member: MemberView, before: tuple[str, str] | None) -> tuple[str, str]:
    """What a member's state says to people, and why; empty: nothing new."""
    match member.state:
        case "running":
            return "training", ""
        case "preparing":
            return "preparing", ""
        case "queued" if before is not None and before[1]:
            return "back in the line", member.reason
        case "failed" | "lost" | "cancelled" if before is not None:
            return member.state, member.reason
        case "succeeded" if before is not None:
            return "done", ""
    return "", ""


def watch_gang(hub: Hub, gang: GangView, *, timeout_s: float | None, quiet: bool = False) -> GangView:
    """The gang when it has ended, all that its members print with their names in front. Ctrl-C leaves it alone."""
    lanes = Lanes()
    say = _nothing if quiet else lanes.note
    watch = GangWatch(hub, gang, show=None if quiet else lanes.output, say=say, timeout_s=timeout_s)
    return see_to_the_end(watch, lanes)


def see_to_the_end(watch: GangWatch, lanes: Lanes) -> GangView:
    try:
        return watch.until_the_end()
    except KeyboardInterrupt:
        if watch.gang.state not in ENDED:
            state = f"is {watch.gang.state} and goes on"
            lanes.note(f"\nLeft {clean(watch.gang.id)}, which {state}. {come_back(watch.gang)}")
        raise
    finally:
        lanes.end()


def gang_gone(hub: Hub, gang: GangView, *, timeout_s: float | None) -> GangView:
    """A stopped gang, when its workers have reported that nothing of it runs any more."""
    ends = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
    while still := [member.worker for member in gang.members if _is_there(hub, member)]:
        if time.monotonic() >= ends:
            raise TimedOut(f"{gang.id} is still being ended on {', '.join(still)}: `potluck show {gang.id}`")
        time.sleep(min(LOOK_S / 4, max(0.0, ends - time.monotonic())))
    return hub.gang(gang.id)


def _is_there(hub: Hub, member: MemberView) -> bool:
    attempts = hub.job(member.job).attempts if member.worker else []
    return bool(attempts) and attempts[-1].ended_at is None


def gang_sentence(gang: GangView) -> str:
    """`faces-k3f2: running: 3 of 2..8 machines, by torchft`."""
    said = f": {clean(gang.reason)}" if gang.reason else ""
    return f"{clean(gang.id)}: {gang.state}{said}"


def come_back(gang: GangView) -> str:
    return f"Watch it with `potluck logs -f {gang.id}`, end it with `potluck stop {gang.id}`."


def gang_exit_code(hub: Hub, gang: GangView) -> int:
    """What its first member that ended left with; 128 + n after signal n; 1 if nothing ran to an end of its own."""
    if gang.state == "succeeded":
        return 0
    if gang.exit_code:
        return gang.exit_code
    for member in sorted(gang.members, key=lambda member: member.member):
        if member.worker and member.state in ENDED and member.state != "succeeded":
            return job_exit_code(hub.job(member.job))
    return 1


def _nothing(text: str) -> None:
    """With --json nothing is told on the way."""
