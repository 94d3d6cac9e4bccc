"""How does a series of numbers become a drawing that everybody can read? Pure geometry and words.

The drawing is an SVG that stretches to whatever room it is given; the numbers along its axes are HTML text, so that
they stay readable on a phone. Ticks are evenly spaced from one end of an axis to the other, which is why plain flexbox
puts every label in its place (the page's security policy forbids inline styles).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from potluck.hub.commands.board import Point
from potluck.hub.dashboard import words
from potluck.protocol import Fates, Taste

WIDTH, HEIGHT = 1000, 400
MOST_POINTS = 240
MOST_LINES = 6
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    path: str  # SVG path data
    dot: str  # a path without length where the line ends: a round cap makes it a dot that never gets stretched
    latest: str


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    text: str  # what somebody who cannot see it should hear
    lines: list[Line]
    grid: str
    x_ticks: list[str]
    y_ticks: list[str]  # from the top
    x_name: str
    marks: str = ""  # SVG path data: a line from top to bottom at each place where something happened


def chart(
    title: str,
    series: Mapping[str, Points],
    *,
    show: Callable[[float], str] = words.short,
    ticks: int = 4,
    x_name: str = "samples trained",
    over: Callable[[float], str] = lambda x: f"over {words.short(x)} samples",
    lowest: float = math.inf,
    marks: Sequence[float] = (),
) -> Chart | None:
    """Lines over samples (or `x_name`); None when there is nothing to draw. Values that are not finite are left out.

    The axis of the values begins at `lowest`, if that is below all of them. `marks` are places on the other axis.
    """
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    kept = {name: points for name, points in list(kept.items())[:MOST_LINES] if points}
    if not kept:
        return None
    thinned = {name: thin(points, MOST_POINTS) for name, points in kept.items()}
    values = [y for points in thinned.values() for _, y in points]
    y_ticks = nice_ticks(min(*values, lowest), max(values), ticks)
    x_low = min(points[0][0] for points in thinned.values())
    x_high = max(points[-1][0] for points in thinned.values())
    x_low = 0.0 if x_low < x_high / 4 else x_low
    frame = _Frame(x_low, x_high, y_ticks[0], y_ticks[-1])
    return Chart(
        title=title,
        text="; ".join(_sentence(name, points, show, over) for name, points in kept.items()),
        lines=[
            Line(name, frame.path(points), frame.dot(points[-1]), show(points[-1][1]))
            for name, points in thinned.items()
        ],
        grid="".join(f"M0 {frame.y(tick):.0f}H{WIDTH}" for tick in y_ticks),
        x_ticks=[words.short(x_low + (x_high - x_low) * i / ticks) for i in range(ticks + 1)]
        if x_high > x_low
        else [words.short(x_high)],
        y_ticks=[show(tick).replace(".0 %", " %") for tick in reversed(y_ticks)],
        x_name=x_name,
        marks="".join(f"M{frame.x(x):.1f} 0V{HEIGHT}" for x in marks if x_low <= x <= x_high),
    )


def losses(curve: Sequence[Point]) -> list[Chart]:
    """Losses share one chart; whatever else a recipe reports (an accuracy) has another scale and gets its own."""
    names = list(dict.fromkeys(name for point in curve for name in point.losses))
    together = [name for name in names if not words.is_fraction(name)]
    apart = [name for name in names if words.is_fraction(name)]

    def points(name: str) -> Points:
        return [(point.samples, point.losses[name]) for point in curve if name in point.losses]

    drawn = [chart("Losses in training", {name: points(name) for name in together})]
    drawn += [
        chart(f"{name} in training", {name: points(name)}, show=lambda v, name=name: words.figure(name, v))  # type: ignore[misc]
        for name in apart[:2]
    ]
    return [each for each in drawn if each]


def metric(name: str, tastes: Sequence[Taste]) -> Chart | None:
    points = [(taste.samples, taste.metrics[name]) for taste in tastes if name in taste.metrics]
    return chart(name, {name: points}, show=lambda value: words.figure(name, value), ticks=2)


def _sentence(name: str, points: Points, show: Callable[[float], str], over: Callable[[float], str]) -> str:
    if len(points) == 1:
        return f"{name} is {show(points[0][1])}"
    values = [y for _, y in points]
    return (
        f"{name} went from {show(values[0])} to {show(values[-1])} {over(points[-1][0])}, "
        f"between {show(min(values))} and {show(max(values))}"
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return WIDTH * (value - self.x_low) / (self.x_high - self.x_low) if self.x_high > self.x_low else WIDTH

    def y(self, value: float) -> float:
        return HEIGHT - HEIGHT * (value - self.y_low) / (self.y_high - self.y_low)

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def dot(self, point: tuple[float, float]) -> str:
        return f"M{self.x(point[0]):.1f} {self.y(point[1]):.1f}h0"


def thin(points: Points, most: int) -> list[tuple[float, float]]:
    """At most `most` points: means of equal stretches, but the first and the last as they are."""
    if len(points) <= most:
        return list(points)
    inner, stretches = points[1:-1], most - 2
    means = []
    for i in range(stretches):
        part = inner[len(inner) * i // stretches : len(inner) * (i + 1) // stretches]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [points[0], *means, points[-1]]


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Evenly spaced round numbers, some `about` steps, that hold [low, high] between the first and the last."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # nearer than that, the ticks would be one and the same number
        room = abs(high) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


# --- fates ----------------------------------------------------------------------------------------------------------

FATES = {
    "applied": "in the model",
    "late": "in the model, damped because late",
    "pending": "being trained on, or waiting for a merge",
    "superseded": "came too late to count",
    "rejected": "refused",
    "lost": "the machine left; trained again by another",
}


@dataclass(frozen=True, slots=True)
class Slice:
    fate: str
    meaning: str
    samples: int
    share: float
    x: float  # of WIDTH
    width: float


def slices(fates: Fates) -> list[Slice]:
    """Every fate's part of a bar. What is there at all stays visible, however little it is."""
    counts = {fate: max(0, getattr(fates, fate)) for fate in FATES}
    total = sum(counts.values())
    widths = {fate: max(WIDTH * n / total, 4.0) if n else 0.0 for fate, n in counts.items()} if total else {}
    scale = WIDTH / sum(widths.values()) if total else 0.0
    cut, x = [], 0.0
    for fate, meaning in FATES.items():
        width = widths.get(fate, 0.0) * scale
        cut.append(
            Slice(fate, meaning, counts[fate], counts[fate] / total if total else 0.0, round(x, 1), round(width, 1))
        )
        x += width
    return cut
