"""What is a job: which command, with what, where may it run, and how long?"""

from __future__ import annotations

from dataclasses import dataclass, field

STATES = ("queued", "placed", "preparing", "running", "succeeded", "failed", "cancelled", "lost")
ENDED = frozenset({"succeeded", "failed", "cancelled", "lost"})
"""A job in one of these stays there, unless somebody retries it."""


@dataclass(frozen=True)
class Resources:
    """What a job asks for, as people write it: `gpu: 24GB..:2`, `cpu: 4`, `memory: 8GB`. domain/resources.py reads it.

    Empty (or "0" for gpu) means: no demand. What a job asks for is also what it gets and its limit.
    """

    gpu: str = "0"  # COUNT | VRAM | VRAM:COUNT | MODEL[:VRAM][:COUNT]; each a number or a range like 24GB..40GB, 1..
    cpu: str = ""  # cores, a number or a range, fractions allowed
    memory: str = ""  # bytes
    disk: str = ""  # bytes that the job may write on the machine
    labels: dict[str, str] = field(default_factory=dict)  # the worker's must be equal
    os: str = ""  # linux | macos | windows
    arch: str = ""  # x86_64 | arm64


@dataclass(frozen=True)
class JobSpec:
    """A job as `potluck.yaml`, the command line and the API say it. Times in seconds."""

    command: list[str]  # argv; a string in potluck.yaml becomes ["/bin/sh", "-c", string]
    name: str = ""
    env: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)  # names; the values come with the lease
    resources: Resources = field(default_factory=Resources)
    image: str = ""  # of a container; empty: the machine's own Python, or `requirements`
    requirements: str = ""  # a path in the project: requirements.txt, or pyproject.toml (with uv.lock beside it)
    python: str = ""  # "3.11": the interpreter of an environment that is built; empty: the machine's
    priority: int = 0  # -100 … 100, higher first
    retries: int = 2  # how often it may be placed again
    retry_on: str = "lost"  # lost: when its worker was lost | any: also when the command failed
    timeout_s: float | None = None  # wall clock of one attempt
    grace_s: float = 30.0  # between SIGTERM and SIGKILL
    patience_s: float = 120.0  # how long its worker may be silent (a cut network) before the job counts as lost
    procs: int = 1  # processes on the machine, by torchrun
    network: bool = True
