"""How are answers shown: tables and sentences for people, JSON for programs?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.protocol import Fates, RunView


def print_json(value: Any) -> None:
    import msgspec

    click.echo(json.dumps(msgspec.to_builtins(value, enc_hook=str), indent=2, ensure_ascii=False))


def say(text: str = "") -> None:
    click.echo(text)


def note(text: str) -> None:
    """A remark beside the answer: to stderr, so that a program which reads the answer does not see it."""
    click.echo(text, err=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """Columns with a heading; those named in `right` hold numbers. Colours and folding only on a terminal."""
    cells = [[clean(cell) for cell in row] for row in rows]
    rights = set(right)
    if not is_terminal():
        click.echo("\n".join(_plain(columns, cells, rights)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in rights else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _plain(columns: Sequence[str], rows: list[list[str]], rights: set[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = []
    for row in [list(columns), *rows]:
        padded = [
            cell.rjust(width) if column in rights else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def is_terminal() -> bool:
    import os

    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


# --- words --------------------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((i for i, (number, _) in enumerate(parts) if number), len(parts) - 1)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number) or "0 s"


def ago(iso: str | None, now: datetime) -> str:
    return f"{span((now - when(iso)).total_seconds())} ago" if iso else "–"


def when(iso: str) -> datetime:
    moment = datetime.fromisoformat(iso)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def utc_now() -> datetime:
    return datetime.now(UTC)


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def figures(values: Mapping[str, float]) -> str:
    return "  ".join(f"{clean(name)} {number(value)}" for name, value in values.items()) or "–"


def share(part: float) -> str:
    return f"{part:.0%}"


# --- a run --------------------------------------------------------------------------------------------------


def fraction(run: RunView) -> float | None:
    """How far a run is towards its end, 0 to 1; None for a run without one."""
    done = run.fates.applied + run.fates.late
    parts = [done / run.target_samples] if run.target_samples else []
    parts += [run.elapsed_s / run.duration_s] if run.duration_s else []
    if run.state == "done":
        return 1.0
    return min(1.0, max(parts)) if parts else None


def fates_sentence(fates: Fates) -> str:
    parts = {
        "applied": fates.applied,
        "late": fates.late,
        "superseded": fates.superseded,
        "rejected": fates.rejected,
        "lost": fates.lost,
        "pending": fates.pending,
    }
    sum_of = " + ".join(f"{count:,} {name}" for name, count in parts.items() if count or name == "applied")
    return f"{fates.handed_out:,} handed out = {sum_of}"


def run_rows(run: RunView) -> list[tuple[str, str]]:
    """What there is to say of a run, as (heading, text)."""
    done = run.fates.applied + run.fates.late
    goal = f" of {run.target_samples:,}" if run.target_samples else ""
    far = fraction(run)
    time = span(run.elapsed_s) + (f" of {span(run.duration_s)}" if run.duration_s else "")
    rows = [
        ("state", run.state + (f": {clean(run.reason)}" if run.reason else "")),
        ("progress", (f"{far:.0%}, " if far is not None else "") + time),
        ("samples", f"{done:,}{goal} (epoch {run.epoch:.2f}), {number(run.samples_per_s)}/s"),
        ("version", f"{run.version:,}"),
        ("workers", f"{run.active_workers} at work"),
        ("losses", figures(run.losses)),
    ]
    if run.metrics:
        rows.append(
            ("taste", ", ".join(_growth(name, value, run.first_metrics) for name, value in run.metrics.items()))
        )
    return rows


def _growth(name: str, value: float, first: Mapping[str, float]) -> str:
    start = f" (at first {number(first[name])})" if name in first else ""
    return f"{clean(name)} {number(value)}{start}"
