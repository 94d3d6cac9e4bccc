"""What does the person at the machine see while it works?

On a terminal a small panel that stays in place, below what was said; elsewhere (a pipe, a service, NO_COLOR, TERM=dumb)
one line for each thing that happens. What comes from the hub is cleaned of control characters first.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from potluck.telemetry import clean, logger


@dataclass(frozen=True)
class Work:
    """The task at hand."""

    name: str = ""
    fraction: float = 0.0
    samples_per_s: float = 0.0
    loss: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """All that the screen shows."""

    name: str
    hub: str
    device: str
    share: float
    is_away: bool = False
    is_leaving: bool = False
    works: tuple[Work, ...] = ()
    jobs: tuple[str, ...] = ()
    units: int = 0
    samples: int = 0
    applied: int = 0  # credit, as the hub counts it


class View(Protocol):
    def say(self, text: str, bad: bool = False) -> None: ...
    def show(self, facts: Facts) -> None: ...
    def close(self) -> None: ...


def view(wanted: bool, stream: TextIO | None = None) -> View:
    """The view that fits where we are."""
    stream = stream or sys.stderr
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or "POTLUCK_LOG" in os.environ
    return Panel(stream) if wanted and not plain and stream.isatty() else Lines()


class Lines:
    """One line a happening, through the log."""

    def __init__(self) -> None:
        self._log = logger("worker")

    def say(self, text: str, bad: bool = False) -> None:
        (self._log.warning if bad else self._log.info)("worker.said", say=clean(text))

    def show(self, facts: Facts) -> None:
        return

    def close(self) -> None:
        return


class Panel:
    """A live panel by rich, which is only imported here."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._live.start()
        self._shown_at = 0.0

    def say(self, text: str, bad: bool = False) -> None:
        from rich.text import Text

        line = Text(time.strftime("%H:%M:%S "), style="dim")
        line.append(clean(text), style="yellow" if bad else "")
        self._console.print(line)

    def show(self, facts: Facts) -> None:
        now = time.monotonic()
        if now - self._shown_at >= 0.2:
            self._shown_at = now
            self._live.update(draw(facts))

    def close(self) -> None:
        self._live.stop()


def draw(facts: Facts) -> Any:
    """The panel of these facts."""
    from rich.console import Group
    from rich.panel import Panel as Box
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(no_wrap=True)
    rows.add_column(ratio=1)
    rows.add_column(justify="right", no_wrap=True)
    for work in facts.works:
        losses = "  ".join(f"{clean(k)} {v:.3f}" for k, v in list(work.loss.items())[:3])
        speed = f"{work.samples_per_s:,.0f} samples/s" if work.samples_per_s else ""
        rows.add_row(Text(clean(work.name)), ProgressBar(total=1.0, completed=min(work.fraction, 1.0)), Text(speed))
        if losses:
            rows.add_row("", Text(losses, style="dim"), "")
    for job in facts.jobs:
        rows.add_row(Text(clean(job)), "", "")
    if not facts.works and not facts.jobs:
        rows.add_row(Text("waiting for work", style="dim"), "", "")
    credit = Text(f"{facts.units:,} units · {facts.samples:,} samples trained · {facts.applied:,} in the shared model")
    state = (
        "leaving: handing in what is done; Ctrl-C again leaves at once"
        if facts.is_leaving
        else "the hub does not answer; finished work is kept"
        if facts.is_away
        else "Ctrl-C hands in and leaves"
    )
    share = "" if facts.share >= 1 else f" · {facts.share:.0%} of the time"
    return Box(
        Group(rows, credit),
        title=Text(f"{clean(facts.name)} · {facts.device}{share} → {clean(facts.hub)}"),
        title_align="left",
        subtitle=Text(state, style="yellow" if facts.is_away or facts.is_leaving else "dim"),
        subtitle_align="left",
    )
