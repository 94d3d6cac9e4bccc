"""How is a job watched: what becomes of it on stderr, what it prints on stdout, and its own exit code at the end?"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from potluck.cli import output
from potluck.domain.job import ENDED
from potluck.errors import HubUnreachable, LedgerError, NotFound, TimedOut, TryLater
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import AttemptView, JobView

WAIT_S = 20.0  # one long-poll
PLACED_WITHIN_S = 2.0  # an idle worker has the job by then; a longer wait is worth a sentence
LOOK_S = 2.0  # so often a job that prints is also asked for its state
AFTERLIFE_S = 15.0  # a cancelled job may still print while it is being ended
AGAIN_S = 1.0  # between two tries to reach the hub

# An escape sequence, or the first half of \r\n, that the end of a piece cut through.
_UNFINISHED = re.compile(r"(?:\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b\n]{0,300})?|\r)\Z")
_ODD = re.compile(r"[^\n\t -~]")


class Cleaner:
    """Turns a job's output into text that cannot steer a terminal, piece by piece.

    Control sequences go; a lone carriage return (a progress bar that draws over itself) begins a new line.
    """

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str, *, last: bool = False) -> str:
        text, self._rest = self._rest + text, ""
        if not last and (cut := _UNFINISHED.search(text)):
            text, self._rest = text[: cut.start()], text[cut.start() :]
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if not _ODD.search(text):
            return text
        # Line by line: a sequence without an end hides the rest of its line, not of everything.
        return "".join(clean(line, keep="\n\t", limit=len(line) + 1) for line in text.splitlines(keepends=True))


class Printer:
    """Writes a job's output to stdout; knows whether the last line is complete, so that remarks get lines of their own."""

    def __init__(self) -> None:
        self._cleaner = Cleaner()
        self._broken = False  # the cursor stands in the middle of a line

    def output(self, text: str, *, last: bool = False) -> None:
        if shown := self._cleaner.feed(text, last=last):
            self._broken = not shown.endswith("\n")  # first: Ctrl-C may come in between
            click.echo(shown, nl=False)

    def note(self, text: str) -> None:
        self.end_line()
        output.note(text)

    def end_line(self) -> None:
        if self._broken:
            click.echo()
            self._broken = False


class Watch:
    """One job, watched until it has ended."""

    def __init__(
        self,
        hub: Hub,
        job: JobView,
        *,
        show: Callable[..., None] | None,
        say: Callable[[str], None],
        timeout_s: float | None = None,
    ) -> None:
        self.hub = hub
        self.job = job
        self._show = show  # None: only the states
        self._say = say
        self._timeout_s = timeout_s
        self._ends = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
        self._told = ("", "", "")  # state, worker, reason
        self._trouble = ""
        self._why = ""
        self._waited = False
        self._looked = time.monotonic()
        self._ended_at: float | None = None

    def until_the_end(self, attempt: int = 0, offset: int = 0) -> JobView:
        """Follow from byte `offset` of `attempt` (0: the newest) on, over all attempts that come after it."""
        attempt = attempt or max(1, newest_attempt(self.job))
        self.tell()
        while not self._over(attempt):
            if time.monotonic() >= self._ends:
                raise TimedOut(
                    f"{self.job.id} is {self.job.state} after {output.span(self._timeout_s or 0)}; it goes on. "
                    f"{come_back(self.job)}"
                )
            if self._show is None or attempt > newest_attempt(self.job):
                self._wait()
            else:
                attempt, offset = self._read(attempt, offset)
        return self.job

    def tell(self) -> None:
        """Say where the job stands, if that is news. A reason that it has kept is not said again."""
        job, before = self.job, self._told
        self._told = (job.state, job.worker, job.reason)
        if self._told != before:
            self._say(progress_sentence(replace(job, reason="") if job.reason == before[2] else job))

    def _over(self, attempt: int) -> bool:
        if self.job.state not in ENDED:
            self._ended_at = None
            return False
        if self._show is None or attempt > newest_attempt(self.job):
            return True
        self._ended_at = self._ended_at or time.monotonic()
        return time.monotonic() - self._ended_at > AFTERLIFE_S  # its worker may be gone: the end of its log never comes

    def _patience(self) -> float:
        return max(0.0, min(WAIT_S, self._ends - time.monotonic()))

    def _wait(self) -> None:
        def look() -> None:
            wait_s = min(self._patience(), WAIT_S if self._waited else PLACED_WITHIN_S)
            self._waited = True
            self._see(self.hub.wait_job(self.job.id, self.job.state, wait_s))
            if self.job.state == "queued" and (why := waiting_sentence(self.hub, self.job)) != self._why:
                self._why = why
                self._say(why)

        self._try(look)

    def _read(self, attempt: int, offset: int) -> tuple[int, int]:
        """Show one more piece of the output; where to go on."""
        place = (attempt, offset)

        def read() -> None:
            nonlocal place
            running = self.job.state == "running"
            piece = self.hub.log(self.job.id, attempt, offset, min(self._patience(), WAIT_S if running else LOOK_S))
            if piece.offset > offset:
                self._say(f"… {output.size(piece.offset - offset)} before this are no longer kept")
            assert self._show is not None
            self._show(piece.text, last=piece.over)
            place = (attempt + 1, 0) if piece.over else (attempt, piece.next_offset)
            if piece.over or not piece.text or time.monotonic() - self._looked >= LOOK_S:
                self._see(self.hub.job(self.job.id))

        self._try(read)
        return place

    def _see(self, job: JobView) -> None:
        self.job, self._looked = job, time.monotonic()
        self.tell()

    def _try(self, action: Callable[[], None]) -> None:
        """Outlives a restart of the hub."""
        try:
            action()
            self._trouble = ""
        except (HubUnreachable, LedgerError, TryLater) as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                self._say(f"{error} Trying again; the job goes on.")
            time.sleep(min(AGAIN_S, self._patience()))


def watch_states(hub: Hub, job: JobView, *, timeout_s: float | None) -> JobView:
    """The job when it has ended. Its states go to stderr, its output nowhere; Ctrl-C leaves it alone."""
    watch = Watch(hub, job, show=None, say=output.note, timeout_s=timeout_s)
    try:
        return watch.until_the_end()
    except KeyboardInterrupt:
        output.note(f"\n{left(watch.job)}")
        raise


def wait_until_gone(hub: Hub, job: JobView, *, timeout_s: float | None) -> JobView:
    """A cancelled job, when its worker has reported that nothing of it runs any more."""
    ends = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
    while job.attempts and job.attempts[-1].ended_at is None:
        if time.monotonic() >= ends:
            raise TimedOut(f"{job.id} is still being ended on {job.attempts[-1].worker}: `potluck show {job.id}`")
        time.sleep(min(LOOK_S / 4, max(0.0, ends - time.monotonic())))
        job = hub.job(job.id)
    return job


def newest_attempt(job: JobView) -> int:
    return job.attempts[-1].number if job.attempts else 0


def progress_sentence(job: JobView) -> str:
    """`placed on lab-1: it has the most free cores`."""
    where = f" on {clean(job.worker)}" if job.worker and job.state not in ("queued", *ENDED) else ""
    return f"{clean(job.id)}: {job.state}{where}" + (f": {clean(job.reason)}" if job.reason else "")


def waiting_sentence(hub: Hub, job: JobView) -> str:
    """Why it waits, and what would help."""
    try:
        why = hub.why(job.id)
    except NotFound:
        return progress_sentence(job)
    return clean(why.text) + (f"\n{clean(why.advice, keep=chr(10))}" if why.advice else "")


def come_back(job: JobView) -> str:
    return f"Watch it with `potluck logs -f {job.id}`, end it with `potluck stop {job.id}`."


def left(job: JobView) -> str:
    """What to say when somebody stops watching."""
    if job.state in ENDED:
        return ""
    return f"Left {clean(job.id)}, which is {job.state} and goes on. {come_back(job)}"


def exit_code(job: JobView) -> int:
    """What the job's own command left with; 128 + n after signal n; 1 if it never ran to an end of its own."""
    if job.state == "succeeded":
        return 0
    last = job.attempts[-1] if job.attempts else None
    if last is not None and (number := signal_number(last)):
        return 128 + number
    code = job.exit_code if job.exit_code is not None else last.exit_code if last is not None else None
    return code or 1


def signal_number(attempt: AttemptView) -> int:
    return signal_named(attempt.signal)


def signal_named(name: str) -> int:
    """9 for `SIGKILL`; 0 for what is no signal here."""
    found = getattr(signal, name, None) if name.startswith("SIG") else None
    return int(found) if isinstance(found, signal.Signals) else 0
