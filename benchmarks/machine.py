"""Which machine, versions and commit stand behind a figure?"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def facts() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "machine": f"{os.cpu_count()} cores, {_cpu()}, {platform.system()} {platform.release()}",
        "versions": f"Python {platform.python_version()}, torch {version('torch')}, psycopg {version('psycopg')}",
        "commit": commit or "unknown",
        "load": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()),
    }


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown CPU")
