"""Potluck trains models on the machines people bring.

In a job, `potluck.log(step, loss=0.3, sample=image)` records figures and pictures (potluck/job.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potluck.job import log as log

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Only on demand, so that importing any part of Potluck costs nothing more. Jobs get this file and job.py alone.
    if name == "log":
        from potluck.job import log

        globals()["log"] = log
        return log
    raise AttributeError(f"module 'potluck' has no attribute {name!r}")
