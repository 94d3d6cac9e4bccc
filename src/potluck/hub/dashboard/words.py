"""How do numbers and times look to a person? No clock, no markup."""

from __future__ import annotations

from datetime import UTC, datetime


def count(value: float) -> str:
    """`12,345`."""
    return f"{round(value):,}"


def short(value: float) -> str:
    """`847`, `12.3 k`, `1.2 M`: three digits are enough from across a room."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{_three(scaled)} {unit}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else _three(value)


def _three(value: float) -> str:
    """Three significant digits, without an exponent and without zeros that say nothing."""
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def size(bytes_: float) -> str:
    """`3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(bytes_) < 1000:
            return f"{_three(bytes_)} {unit}"
        bytes_ /= 1000
    return f"{_three(bytes_)} TB"


def span(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((i for i, (number, _) in enumerate(parts) if number), 3)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number) or "0 s"


def brief(seconds: float) -> str:
    """`0.4 ms`, `84 ms`, `1.3 s`; from a minute on as `span`."""
    if seconds >= 60:
        return span(seconds)
    return f"{_three(seconds)} s" if seconds >= 1 else f"{_three(1000 * seconds)} ms" if seconds > 0 else "0"


def percent(fraction: float, places: int = 0) -> str:
    """`64 %`. Never 100 % or 0 % of what is only nearly so."""
    value = 100 * fraction
    nearest = round(value, places)
    if nearest >= 100 > value or nearest <= 0 < value:
        return f"> {100 - 10**-places:.{places}f} %" if value > 50 else f"< {10**-places:.{places}f} %"
    return f"{nearest:.{places}f} %"


def figure(name: str, value: float) -> str:
    """A metric's value; an accuracy is a percentage."""
    return percent(value, 1) if is_fraction(name) and 0 <= value <= 1 else short(value)


def is_fraction(name: str) -> bool:
    return name.lower().split("_")[-1] in ("accuracy", "acc", "precision", "recall", "f1")


def change(start: float, now: float) -> str:
    """`−62 %`: how far a metric moved from where it began."""
    if not start:
        return ""
    moved = 100 * (now - start) / abs(start)
    return f"{'+' if moved >= 0 else '−'}{abs(moved):,.0f} %"


def plural(number: float, noun: str) -> str:
    """`1 unit`, `12,345 units`."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def clock(iso: str | None) -> str:
    """`14:03:22`, UTC; the page's script turns it into the reader's own time."""
    return _utc(iso).strftime("%H:%M:%S") if iso else "–"


def day(iso: str | None) -> str:
    """`2 Mar, 14:03`, UTC."""
    moment = _utc(iso) if iso else None
    return f"{moment.day} {moment:%b, %H:%M}" if moment else "–"


def _utc(iso: str) -> datetime:
    moment = datetime.fromisoformat(iso)
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
