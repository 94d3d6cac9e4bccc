"""How do positions look in PostgreSQL?"""

from __future__ import annotations

from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from potluck.errors import BadInput
from potluck.protocol import Positions


def to_positions(value: Multirange[int]) -> Positions:
    return [(r.lower, r.upper) for r in value if r.lower is not None and r.upper is not None]


def joined(positions: Positions) -> Positions:
    """Sorted and disjoint, whatever order and overlap they were sent in; empty ranges are left out."""
    ranges: Positions = []
    for lo, hi in sorted(positions):
        if ranges and ranges[-1][0] <= lo <= ranges[-1][1] and lo <= hi:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], hi))
        elif lo != hi:
            ranges.append((lo, hi))
    return ranges


def span(positions: Positions) -> int:
    """How many positions disjoint ranges hold."""
    return sum(hi - lo for lo, hi in positions)


def to_multirange(positions: Positions) -> Multirange[int]:
    for lo, hi in positions:
        if not 0 <= lo < hi < 1 << 62:
            raise BadInput(f"[{lo}, {hi}) is not a range of positions")
    return Multirange([Range(lo, hi, "[)") for lo, hi in positions])
