"""How do tests put a command into a box, wait for it, and see whether anything of it is left?"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potluck.worker.jobs import executors, limits
from potluck.worker.jobs.box import Box, Ended
from potluck.worker.jobs.executors.process import Process
from potluck.worker.jobs.executors.running import Running
from potluck.worker.jobs.limits import Groups

PYTHON = os.path.realpath(sys.executable)  # the base Python, outside of any virtual environment
NOWHERE = Groups(0, {}, "this test goes without control groups")

# Starts somebody who is deaf, twice detached and holds a lock as long as it lives.
DAEMON = """
import fcntl, os, signal, sys, time
ready, told = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
        file = open(sys.argv[1], "w")
        os.chdir("/")
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(told, b"x")
        time.sleep(60)
    os._exit(0)
os.read(ready, 1)
print("ready", flush=True)
"""


def a_box(folder: Path, *argv: str, **more: Any) -> Box:
    places = {name: folder / name for name in ("work", "output", "checkpoint", "scratch", "cache")}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    given = {"env": {}, "read_only": [Path(sys.base_prefix)], "id": f"test-{os.getpid()}-{folder.name[-30:]}", **more}
    given["id"] = "".join(c if c.isalnum() else "-" for c in given["id"])
    return Box(argv=list(argv), **places, **given)


def python(script: str, *words: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", script, *words]


@dataclass
class Job:
    """A command at work, and what it said."""

    box: Box
    running: Running
    pieces: list[bytes] = field(default_factory=list)

    @property
    def said(self) -> str:
        return b"".join(self.pieces).decode(errors="replace")

    def ended(self, seconds: float = 60.0) -> Ended:
        ended = self.running.wait(seconds)
        assert ended is not None, f"it goes on after {seconds} s: {self.said}"
        return ended

    def says(self, text: str) -> None:
        assert until(lambda: text in self.said), self.said


def start(
    box: Box,
    *,
    executor: executors.Executor | None = None,
    groups: Groups | None = None,
    deadline: Callable[[], float | None] | None = None,
) -> Job:
    """Like executors.run, with these groups."""
    executor = executor or Process()
    pieces: list[bytes] = []
    executor.prepare(box)
    plan = executor.plan(box, groups if groups is not None else limits.here())
    running = Running(executor, box, plan, on_output=pieces.append, deadline=deadline)
    return Job(box, running, pieces)


def until(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_free(lock: Path) -> bool:
    """Has whoever held it ended?"""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
