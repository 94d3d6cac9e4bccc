"""What the tests of jobs in a cluster have in common."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from potluck.domain.job import JobSpec, Resources
from potluck.testing import LocalCluster

COUNTING = (Path(__file__).parent / "counting.py").read_text()
PLAIN = ("--runtime", "any", "--yes", "--executor", "process")
"""A worker that runs foreign code as a plain process: its jobs can see the test's shared folder."""


def count(cluster: LocalCluster, shared: Path, steps: int, *, retries: int = 5, patience_s: float = 60) -> str:
    spec = JobSpec(
        [sys.executable, "counting.py"],
        env={"SHARED": str(shared), "STEPS": str(steps)},
        retries=retries,
        grace_s=2,
        patience_s=patience_s,
        resources=Resources(cpu="0.1"),
    )
    return cluster.submit(spec, {"counting.py": COUNTING})


def process_of(shared: Path, job: str) -> psutil.Process | None:
    """The process of the job that began last, while it lives."""
    try:
        process = psutil.Process(int((shared / f"{job}.pid").read_text()))
        return process if "counting.py" in " ".join(process.cmdline()) else None
    except (OSError, ValueError, psutil.Error):
        return None


def has_begun(cluster: LocalCluster, shared: Path, job: str, step: int = 3) -> None:
    cluster.until(lambda: f"step {step}\n" in cluster.output(job), timeout_s=60, what=f"{job} at step {step}")
