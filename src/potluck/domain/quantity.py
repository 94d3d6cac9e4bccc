"""How do people write a duration, a size, an amount; and how do we write it back?"""

from __future__ import annotations

import re
from collections.abc import Mapping

from potluck.errors import BadInput


def parse_duration(text: str | float) -> float:
    """Seconds in `90s`, `10m`, `1h30m`, `2.5h`, `1d`; a bare number is seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    return _sum_of_parts(text, units, "a duration", "like 90s, 10m, 2h or 1d")


def parse_size(text: str | float) -> int:
    """Bytes in `500MB`, `2G`, `1.5GiB`; a bare number is bytes. An i makes it powers of 1,024."""
    units = {"": 1.0, "b": 1.0}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1e3**power, f"{letter}b": 1e3**power, f"{letter}i": 1024.0**power}
        units[f"{letter}ib"] = 1024.0**power
    return int(_sum_of_parts(text, units, "a size", "like 500MB, 2GB or 1.5GiB"))


def parse_number(word: str) -> float | None:
    """A finite number that is not negative, else None."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _sum_of_parts(text: str | float, units: Mapping[str, float], what: str, example: str) -> float:
    word = str(text).strip().lower().replace(" ", "")
    bare = parse_number(word)
    if bare is not None:
        return bare
    parts = re.findall(r"(\d+(?:\.\d+)?)([a-z]+)", word)
    if not parts or "".join(n + unit for n, unit in parts) != word or any(u not in units for _, u in parts):
        raise BadInput(f"`{text}` is not {what}: write it {example}")
    return sum(float(number) * units[unit] for number, unit in parts)


def say_size(size_bytes: float) -> str:
    """`24 GB`, `1.5 GB`, `512 MB`, `0 B`: at most one decimal."""
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= step * 0.9995:
            return f"{size_bytes / step:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size_bytes:.0f} B"


def say_duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h`, `2 days`: as a person would say it."""
    if seconds < 90:
        return f"{max(1.0, seconds):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} days"


def say_count(number: float, thing: str) -> str:
    """`1 core`, `2 cores`, `0.5 cores`."""
    return f"{number:g} {thing}{'' if number == 1 else 's'}"
