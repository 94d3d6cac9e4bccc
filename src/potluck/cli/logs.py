"""What has a job printed, and what does it print now?"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from potluck.cli.follow import Connect
from potluck.cli.options import find_work, hub_options, timeout_option
from potluck.cli.watch import Printer, Watch, exit_code, left, newest_attempt
from potluck.domain.job import ENDED
from potluck.errors import BadInput, NotFound

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import JobView, LogPiece

LINE_BYTES = 160  # a guess, to begin reading near the last lines
MOST_BYTES = 1 << 20  # in one request


@click.command("logs", epilog="JOB is a job or a gang: an id or its beginning, a name, or `last`.")
@click.argument("ref", metavar="JOB")
@click.option("--follow", "-f", "live", is_flag=True, help="Go on until the job has ended, with its own exit code.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Begin with the last N lines.")
@click.option("--offset", type=click.IntRange(min=0), metavar="BYTES", help="Begin behind so many bytes.")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Of the Nth attempt, not of the newest.")
@click.option("--since-start", is_flag=True, help="All attempts, from the first one on.")
@click.option("--member", type=click.IntRange(min=1), metavar="K", help="Of a gang only the Kth member.")
@timeout_option("With --follow: stop watching")
@hub_options
def logs_command(
    connect: Connect,
    ref: str,
    live: bool,
    tail: int | None,
    offset: int | None,
    attempt: int | None,
    since_start: bool,
    member: int | None,
    timeout: float | None,
) -> int:
    """Print what a job printed; with -f as it happens."""
    if timeout is not None and not live:
        raise BadInput("--timeout is for --follow: without it there is nothing to wait for")
    chosen = {"--tail": tail, "--offset": offset, "--since-start": since_start or None}
    given = [name for name, value in chosen.items() if value is not None]
    if len(given) > 1:
        raise BadInput(f"{' and '.join(given)} each say where to begin: take one of them")
    if since_start and attempt is not None:
        raise BadInput("--since-start shows all attempts and --attempt one of them: take one of the two")
    from potluck.protocol import GangView

    with connect() as hub:
        job = find_work(hub, ref)
        if isinstance(job, GangView):
            from potluck.cli.gang import gang_logs, member_job

            if member is None:
                if offset is not None or since_start or attempt is not None:
                    raise BadInput(f"{job.id} is a gang: which member? Say --member 1, or leave the rest out")
                return gang_logs(hub, job, tail=tail, follows=live, timeout_s=timeout)
            job = member_job(hub, job, member)
        elif member is not None:
            raise BadInput(f"--member is for gangs, and {job.id} is a job")
        first = 1 if since_start else attempt or max(1, newest_attempt(job))
        if attempt is not None and attempt > newest_attempt(job):
            raise NotFound(f"{job.id} has {_attempts(job)}, and no attempt {attempt}")
        return print_log(hub, job, first, offset or 0, tail=tail, live=live, one=attempt is not None, timeout_s=timeout)


def print_log(
    hub: Hub,
    job: JobView,
    attempt: int,
    offset: int,
    *,
    tail: int | None,
    live: bool,
    one: bool,
    timeout_s: float | None,
) -> int:
    """Print from byte `offset` of `attempt` on. `one`: not the attempts after it; `live`: as it happens, to the end."""
    printer = Printer()
    try:
        if tail is not None and newest_attempt(job):
            text, offset = last_lines(hub, job, attempt, tail)
            printer.output(text)
        if live and not (one and attempt < newest_attempt(job)):
            watch = Watch(hub, job, show=printer.output, say=printer.note, timeout_s=timeout_s)
            try:
                return exit_code(watch.until_the_end(attempt, offset))
            except KeyboardInterrupt:
                if sentence := left(watch.job):
                    printer.note(f"\n{sentence}")
                raise
        if not newest_attempt(job):
            printer.note(f"{job.id} is {job.state} and has not begun: `potluck why {job.id}` tells what it waits for.")
            return exit_code(job) if live and job.state in ENDED else 0
        for number in range(attempt, attempt + 1 if one else newest_attempt(job) + 1):
            if not one and newest_attempt(job) > attempt:
                printer.note(f"--- attempt {number}, {job.attempts[number - 1].worker}")
            for piece in pieces(hub, job, number, offset):
                printer.output(piece.text, last=piece.over)
            offset = 0
        return exit_code(job) if live else 0
    finally:
        printer.output("", last=True)
        printer.end_line()


def pieces(hub: Hub, job: JobView, attempt: int, offset: int) -> Iterator[LogPiece]:
    """What there is now, from `offset` on."""
    while True:
        piece = hub.log(job.id, attempt, offset, 0.0, MOST_BYTES)
        yield piece
        if piece.over or piece.next_offset <= offset:
            return
        offset = piece.next_offset


def last_lines(hub: Hub, job: JobView, attempt: int, count: int) -> tuple[str, int]:
    """The last `count` lines that there are now, and the offset behind them."""
    size = next((a.log_bytes for a in job.attempts if a.number == attempt), 0)
    back = max(1, count) * LINE_BYTES
    while True:
        begin = max(0, size - back)
        lines: deque[str] = deque(maxlen=count + 1)
        rest, end = "", begin
        for piece in pieces(hub, job, attempt, begin):
            *complete, rest = (rest + piece.text).split("\n")
            lines.extend(complete)
            end = piece.next_offset
        if rest:
            lines.append(rest)
        if begin == 0 or len(lines) > count:  # the first one may be half a line: it does not count
            kept = list(lines)[-count:] if count else []
            return "\n".join(kept) + ("\n" if kept and not rest else ""), end
        back *= 4


def _attempts(job: JobView) -> str:
    count = newest_attempt(job)
    return "1 attempt" if count == 1 else f"{count or 'no'} attempts"
