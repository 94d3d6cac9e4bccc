"""What is an executor told about a command, and what does it say of the command's end?"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from potluck.errors import BadInput
from potluck.protocol.jobs import Usage

PIDS = 4096

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def clock() -> float:
    """Seconds that go on while the machine sleeps (where the system has such a clock): what deadlines are counted in.

    A laptop that was shut for an hour must find its lease lapsed when it wakes.
    """
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


@dataclass(frozen=True)
class Box:
    """A command with its folders and limits. Inside, the folders have the same paths as outside."""

    id: str  # of the lease: names the container and the control group
    argv: list[str]
    env: dict[str, str] = field(repr=False)  # has secrets: it goes over pipes, never over a command line
    work: Path  # the job's own copy of the project, and where it starts
    output: Path
    checkpoint: Path
    cache: Path  # shared with other jobs: writable, and not part of the disk limit
    scratch: Path  # points and figures for the agent; its HOME in a sandbox
    resume: Path | None = None  # a checkpoint to go on from; read-only
    python: Path | None = None  # an environment's prefix; read-only
    read_only: list[Path] = field(default_factory=list)  # what else it may read: the base Python, Potluck's own package
    image: str = ""  # of a container; empty: the machine's own /usr
    gpus: list[int] = field(default_factory=list)
    cpu: float = 0.0  # cores; 0: no limit
    memory_bytes: int = 0  # 0: no limit
    disk_bytes: int = 0  # that it may add to its folders; 0: no limit
    pids: int = PIDS  # processes and threads
    network: bool = True
    host_network: bool = False  # the machine's own addresses and ports, in containers too: a gang's members are peers
    timeout_s: float | None = None  # wall clock from the start of the command
    grace_s: float = 30.0  # between SIGTERM and SIGKILL when a limit of time ends it
    interactive: bool = False

    @property
    def writable(self) -> list[Path]:
        return [self.work, self.output, self.checkpoint, self.scratch, self.cache]

    @property
    def readable(self) -> list[Path]:
        """What it may only read, each path once."""
        paths = [path for path in (self.resume, self.python, *self.read_only) if path is not None]
        return list(dict.fromkeys(paths))


@dataclass(frozen=True)
class Ended:
    """How a command ended. `exit_code` is what a shell would say (128 + n after a signal); None: it never started."""

    exit_code: int | None
    signal: str  # "SIGKILL"; empty: it left by itself
    reason: str  # a sentence for people
    code: str  # memory | disk | timeout | pids | ended | fenced | executor | "": it ended by itself
    usage: Usage = field(default_factory=Usage)


def check(box: Box) -> None:
    """`BadInput` if this is nothing that an executor could start."""
    if not box.argv or not box.argv[0]:
        raise BadInput("a job without a command: give it one, as in `potluck run -- python train.py`")
    if not _ID.fullmatch(box.id):
        raise BadInput(f"{box.id!r} cannot name a container: letters, digits, - and _ only, at most 63")
    for name, value in box.env.items():
        if not _NAME.fullmatch(name):
            raise BadInput(f"the environment variable {name!r}: a name is letters, digits and _, not a digit first")
        if "\0" in value:
            raise BadInput(f"the environment variable {name}: its value has a zero byte, which no process can be given")
    if any("\0" in word for word in box.argv):
        raise BadInput("the command has a zero byte, which no process can be given: remove it")
    for path in [*box.writable, *box.readable]:
        if not path.is_absolute() or ".." in path.parts or len(path.parts) < 2:
            raise BadInput(f"{path}: a box takes absolute paths, and never the root of a file system")
        if ":" in str(path) and sys.platform != "win32":
            raise BadInput(f"{path}: a container's volume cannot have ':' in its path: move Potluck's home elsewhere")
