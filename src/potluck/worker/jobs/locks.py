"""Is somebody at work here? A lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO


def try_lock(path: Path, *, shared: bool = False) -> BinaryIO | None:
    """The lock, or None if somebody else holds it. It ends when the file is closed, or its process dies."""
    file = path.open("ab")
    try:
        if sys.platform == "win32":
            import msvcrt

            if not shared:  # there, a file that is in use cannot be removed anyway
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
