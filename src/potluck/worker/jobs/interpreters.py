"""Which Pythons are on this machine, and which one is `3.11`?"""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from potluck.errors import PotluckError

_PROBE = "import json, sys; print(json.dumps([list(sys.version_info[:3]), sys.base_prefix]))"
_PLACES = (
    "/usr/bin",
    "/usr/local/bin",
    "/opt/*/bin",
    "/opt/homebrew/bin",
    "/Library/Frameworks/Python.framework/Versions/*/bin",
    "~/.local/bin",
    "~/.local/share/uv/python/*/bin",
    "~/.pyenv/versions/*/bin",
)


class EnvironmentFailed(PotluckError):
    """The environment that a job asks for cannot be had here; the text ends with the tool's own last lines."""

    code = "environment"


@dataclass(frozen=True)
class Interpreter:
    path: Path  # of no virtual environment, without links: it stays where it is
    version: str  # 3.11.7
    prefix: Path  # its own tree: the standard library is below

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])


def own() -> Interpreter:
    """The Python that the agent runs on, without its virtual environment."""
    executable = getattr(sys, "_base_executable", "") or sys.executable
    version = ".".join(map(str, sys.version_info[:3]))
    return Interpreter(Path(executable).resolve(), version, Path(sys.base_prefix))


def find(asked: str) -> Interpreter:
    """The interpreter that `asked` ("3.11", "3.11.7") means, the agent's own first; empty: the agent's own."""
    mine = own()
    if not asked:
        return mine
    if not re.fullmatch(r"3(\.\d{1,2}(\.\d{1,2})?)?", asked, re.ASCII):
        raise EnvironmentFailed(f"`{asked[:40]!s}` is no version of Python: write it as 3.11 or 3.11.7")
    if _fits(mine.version, asked):
        return mine
    others = list(installed())
    best = [one for one in others if _fits(one.version, asked)]
    if best:
        return max(best, key=lambda one: [int(part) for part in one.version.split(".")])
    have = sorted({mine.version, *(one.version for one in others)}, key=lambda v: [int(part) for part in v.split(".")])
    raise EnvironmentFailed(
        f"this machine has no Python {asked}: it has {', '.join(have)}. Ask for one of these, or for none to get "
        f"{mine.version}, or use an image"
    )


def installed() -> Iterator[Interpreter]:
    """Every Python that is found in the usual places, once each."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    for place in _PLACES:
        folders += sorted(glob.glob(os.path.expanduser(place)))
    seen = set()
    for folder in folders:
        for name in sorted(glob.glob(os.path.join(glob.escape(folder), "python3*"))) if folder else ():
            path = os.path.realpath(name)
            if re.fullmatch(r"python3(\.\d+)?(\.exe)?", os.path.basename(name)) and path not in seen:
                seen.add(path)
                found = _probe(path)
                if found is not None:
                    yield found


def _fits(version: str, asked: str) -> bool:
    return f"{version}.".startswith(f"{asked}.")


@lru_cache(maxsize=100)
def _probe(path: str) -> Interpreter | None:
    try:
        done = subprocess.run(
            [path, "-I", "-S", "-c", _PROBE], capture_output=True, timeout=10, check=True, stdin=subprocess.DEVNULL
        )
        version, prefix = json.loads(done.stdout)
        return Interpreter(Path(path), ".".join(str(int(part)) for part in version), Path(str(prefix)))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return None  # not a Python that works
