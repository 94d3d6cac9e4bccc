"""Potluck trains models on the machines people bring.

In a job, `potluck.log(step, loss=0.3, sample=image)` records figures and pictures (potluck/job.py), and
`potluck.gang.join()` makes the script a member of a gang, or of a gang of one (potluck/train/gang).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potluck.job import log as log
    from potluck.train import gang as gang

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Only on demand, so that importing any part of Potluck costs nothing more. Jobs get this file and job.py alone.
    if name == "log":
        from potluck.job import log

        globals()["log"] = log
        return log
    if name == "gang":
        from potluck.train import gang

        globals()["gang"] = gang
        return gang
    raise AttributeError(f"module 'potluck' has no attribute {name!r}")
