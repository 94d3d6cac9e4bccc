"""What does a stranger's word become before it goes any further? A lease's id, a bounded number, one clean line."""

from __future__ import annotations

import uuid

from potluck.errors import NotFound

MOST = 1 << 40
"""Of anything that a worker counts: far beyond what is true, and a million of them still fit a bigint."""
MOST_BYTES = 1 << 60


def as_uuid(lease_id: str) -> uuid.UUID:
    try:
        return uuid.UUID(lease_id)
    except ValueError:
        raise NotFound(f"`{lease_id[:60]}` is not a lease") from None


def count(claimed: int, most: int = MOST) -> int:
    return min(max(claimed, 0), most)


def amount(claimed: float, most: float = MOST) -> float:
    return min(claimed, float(most)) if claimed > 0 else 0.0  # not a number is not above 0 either


def one_line(text: str, most: int = 500) -> str:
    """A sentence may be longer than a name; control characters and line breaks become spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * most]).split())[:most]
