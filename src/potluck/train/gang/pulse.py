"""How can a member's agent see that it hangs?

All members wait when one hangs, so waiting is no sign. The pulse says what the member is doing, since when, and how long
that may take: an agent ends the process whose phase is `compute` or `load` for longer than `patience_s`, or `sum` for
several times as long, and the kernel then frees the others at once. Other phases may last as long as they like.

The file is one JSON object, padded with spaces, overwritten in place.
"""

from __future__ import annotations

import json
import os
import time

SIZE = 160


class Pulse:
    """Of one process; an empty path: nobody looks."""

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o644) if path else None

    def beat(self, phase: str, step: int, patience_s: float) -> None:
        """`phase`: meet, load, compute, sum or outside."""
        if self._file is None:
            return
        about = {"phase": phase, "step": step, "since": time.time(), "patience_s": patience_s, "pid": os.getpid()}
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, json.dumps(about).ljust(SIZE).encode())
