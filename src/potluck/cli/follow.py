"""How is a run watched until it ends?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from potluck.cli import output
from potluck.errors import HubUnreachable, TimedOut, TryLater
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import RunView

ENDED = frozenset({"done", "stopped", "failed"})
POLL_S = 1.0  # a page of a few kB; the hub's own figures change about once a second
LINE_EVERY_S = 10.0  # without a terminal: a line when something changed, at most so often


def follow(hub: Hub, run: RunView, *, timeout_s: float | None, quiet: bool = False) -> RunView:
    """Show `run` live until it has ended; return it then. TimedOut after `timeout_s`: the run goes on."""
    shown = _nothing if quiet else _live if output.is_terminal() else _lines
    try:
        return shown(_views(hub, run, timeout_s))
    except KeyboardInterrupt:
        output.note(f"\nDetached; the run goes on. {come_back(run)}")
        raise


def come_back(run: RunView) -> str:
    return f"Come back with `potluck show {run.name} --follow`, end it with `potluck stop {run.name}`."


def exit_code(run: RunView) -> int:
    """0 if the run did what was asked. Stopping a run that has no end of its own is how it ends."""
    endless = run.target_samples is None and run.duration_s is None
    return 0 if run.state == "done" or (run.state == "stopped" and endless) else 1


def _views(hub: Hub, run: RunView, timeout_s: float | None) -> Iterator[tuple[RunView, str]]:
    """The run, again and again, with a remark; the last one has ended. Outlives a restart of the hub."""
    started = time.monotonic()
    remark = ""
    while True:
        try:
            run, remark = hub.run(run.id), ""
        except (HubUnreachable, TryLater) as error:
            remark = f"{error} Trying again."
        yield run, remark
        if run.state in ENDED:
            return
        if timeout_s is not None and time.monotonic() - started >= timeout_s:
            raise TimedOut(
                f"run {run.name} is {run.state} after {output.span(timeout_s)}; it goes on. {come_back(run)}"
            )
        time.sleep(POLL_S)


Views = Iterator[tuple["RunView", str]]


def _nothing(views: Views) -> RunView:
    for run, _ in views:
        last = run
    return last


def _lines(views: Views) -> RunView:
    """One line when the run got further, for logs and pipes."""
    said, at = "", float("-inf")
    for run, remark in views:
        last = run
        line = remark or one_line(run)
        if line != said and (time.monotonic() - at >= LINE_EVERY_S or run.state in ENDED):
            click.echo(line, err=True)
            said, at = line, time.monotonic()
    return last


def one_line(run: RunView) -> str:
    far = output.fraction(run)
    done = run.fates.applied + run.fates.late
    return (
        f"{run.name}: {run.state}{f' {far:.0%}' if far is not None else ''}, version {run.version}, "
        f"{done:,} samples, {output.number(run.samples_per_s)}/s, {run.active_workers} workers, "
        f"{output.figures(run.losses | run.metrics)}"
    )


def _live(views: Views) -> RunView:
    from rich.live import Live

    with Live(refresh_per_second=4, transient=False) as live:
        for run, remark in views:
            last = run
            live.update(panel(run, remark))
    return last


def panel(run: RunView, remark: str) -> Any:
    """The live view: a bar, then what `potluck show` says."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    far = output.fraction(run)
    running = run.state not in ENDED
    head = Text(f"{run.name}  ", style="bold")
    head.append(f"{run.recipe.name} on {clean(run.dataset.name)}", style="dim")
    bar = ProgressBar(total=1.0, completed=far or 0.0, pulse=far is None and running, width=60)
    rows = Table.grid(padding=(0, 2))
    for heading, text in output.run_rows(run):
        rows.add_row(Text(heading, style="dim"), Text(text))
    tail = Text(remark, style="yellow") if remark else Text("Ctrl-C leaves; the run goes on.", style="dim")
    return Group(head, bar, rows, *([tail] if running else []))


Connect = Callable[[], "Hub"]
