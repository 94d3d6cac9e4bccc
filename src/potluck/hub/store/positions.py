"""How do positions look in PostgreSQL?"""

from __future__ import annotations

from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from potluck.errors import BadInput
from potluck.protocol import Positions


def to_positions(value: Multirange[int]) -> Positions:
    return [(r.lower, r.upper) for r in value if r.lower is not None and r.upper is not None]


def to_multirange(positions: Positions) -> Multirange[int]:
    for lo, hi in positions:
        if not 0 <= lo < hi < 1 << 62:
            raise BadInput(f"[{lo}, {hi}) is not a range of positions")
    return Multirange([Range(lo, hi, "[)") for lo, hi in positions])
