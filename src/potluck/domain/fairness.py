"""What does a job cost its owner in the line, and how long does the hub remember it?

Usage is counted in core-seconds. A person who used more lately waits behind one who used less, among jobs of equal
priority. All the numbers of the line are here.
"""

from __future__ import annotations

from typing import Final

from potluck.domain.resources import Grant

HALF_LIFE_S: Final = 24 * 3600.0
"""After so long, half of what somebody used is forgotten: yesterday's exam week must not block today's lesson."""
GPU_CORES: Final = 16.0
"""A GPU costs as much as so many cores."""
WHOLE_VRAM: Final = 24 * 10**9
"""A slice of a GPU costs its share of so many bytes, at most a whole GPU."""
MEMORY_OF_A_CORE: Final = 4 * 10**9
"""A job that asks for much memory blocks the cores beside it, so it pays for them."""
ENTRY_S: Final = 600.0
"""A job pays for so long in advance: many short jobs cost their starts, and a burst does not go first as a whole."""
AGING_S: Final = 600.0
"""Waiting so long lifts a job by one point of priority, up to the highest priority that waits."""
OVERDUE_S: Final = 24 * 3600.0
"""Somebody of whom nothing runs and whose job has waited so long is next."""
LAST_S: Final = 7 * 24 * 3600.0
"""A job that has waited so long is next, whoever owns it."""


def cores(grant: Grant) -> float:
    """How many cores `grant` counts as. At least one: a job that asks for nothing still runs."""
    gpu = min(1.0, grant.vram / WHOLE_VRAM) if grant.vram else 1.0
    return max(1.0, grant.cpu, grant.memory / MEMORY_OF_A_CORE) + GPU_CORES * gpu * len(grant.gpus)


def charge(grant: Grant, seconds: float) -> float:
    """Core-seconds of holding `grant` for so long."""
    return cores(grant) * max(0.0, seconds)


def entry_fee(grant: Grant) -> float:
    """Core-seconds that a job pays when it is placed, whatever becomes of it."""
    return charge(grant, ENTRY_S)


def decay(amount: float, seconds: float) -> float:
    """What is left of `amount` after so long."""
    return float(amount * 0.5 ** (max(0.0, seconds) / HALF_LIFE_S))
