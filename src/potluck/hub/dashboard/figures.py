"""How do the figures that a job logs become curves, however many there are?

A job may log a million points; a page has room for some hundred. Each page of a job keeps a `Figures`: it reads only the
points that are new since the last look, some thousand at a time, and thins what it keeps as it grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from potluck.hub.dashboard import charts, words
from potluck.protocol import Point

MOST_FIGURES = 24
MOST_KEPT = 4 * charts.MOST_POINTS
MOST_NAMES = 200
"""Names beyond these are counted and not kept: a job that logs under ever new names must not fill the hub."""
MOST_PICTURES = 24
MOST_ALBUMS = 8


@dataclass(frozen=True, slots=True)
class Picture:
    step: int
    hash: str


@dataclass(frozen=True, slots=True)
class Album:
    """Pictures of one name."""

    name: str
    newest: list[Picture]  # the newest first


@dataclass
class Figures:
    """What is known so far. Points come in order, attempt by attempt."""

    attempt: int = 0
    seq: int = -1  # the newest point that was read, of that attempt
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    albums: dict[str, list[Picture]] = field(default_factory=dict)
    _resumed: set[str] = field(default_factory=set)  # names that this attempt has not logged yet

    def add(self, points: Iterable[Point]) -> None:
        for point in points:
            if point.attempt != self.attempt:
                self.attempt = point.attempt
                self._resumed = {*self.series}
            self.seq = point.seq
            for name, value in point.values.items():
                self._put(name, point.step, value)
            for name, blob in point.images.items():
                if name in self.albums or len(self.albums) < MOST_ALBUMS:
                    album = self.albums.setdefault(name, [])
                    album.append(Picture(point.step, blob.hash))
                    del album[:-MOST_PICTURES]

    def _put(self, name: str, step: float, value: float) -> None:
        if not math.isfinite(value) or (name not in self.series and len(self.series) >= MOST_NAMES):
            return
        line = self.series.setdefault(name, [])
        if name in self._resumed:  # a new attempt goes on from a checkpoint: what came after that was lost
            self._resumed.discard(name)
            line[:] = [(x, y) for x, y in line if x < step]
        line.append((float(step), value))
        if len(line) > MOST_KEPT:
            line[:] = charts.thin(line, MOST_KEPT // 2)

    @property
    def curves(self) -> list[charts.Chart]:
        drawn = [_draw(name, self.series[name]) for name in sorted(self.series, key=_order)[:MOST_FIGURES]]
        return [chart for chart in drawn if chart]

    @property
    def more(self) -> int:
        return max(0, len(self.series) - MOST_FIGURES)

    @property
    def pictures(self) -> list[Album]:
        return [Album(name, album[::-1]) for name, album in self.albums.items()]


def _draw(name: str, points: list[tuple[float, float]]) -> charts.Chart | None:
    return charts.chart(
        name,
        {name: sorted(points)},
        show=lambda value: words.figure(name, value),
        ticks=2,
        x_name="step",
        over=lambda x: f"to step {words.short(x)}",
    )


def _order(name: str) -> tuple[bool, bool, str]:
    """Losses first: they are what people look for. What a gang writes about itself comes last: its page shows it."""
    return name.startswith("gang/"), "loss" not in name.lower(), name.lower()
