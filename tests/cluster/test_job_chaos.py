"""Whatever is killed, and whenever: hub, agents, jobs and PostgreSQL by chance, with a seed."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import psutil
import pytest
from job_kit import PLAIN, count, process_of

from potluck.domain.job import ENDED
from potluck.errors import PotluckError
from potluck.testing import LocalCluster


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_is_killed_no_job_is_lost_run_twice_or_stuck(houseless: LocalCluster, shared: Path, seed: int) -> None:
    chance = random.Random(seed)
    names = ("ann", "bob", "cem")
    for name in names:
        houseless.add_worker(name, arguments=(*PLAIN, "--max-tasks", "2"))
    homes = [houseless.folder / "workers" / name for name in names]
    houseless.until(
        lambda: all((home / "credential.json").exists() for home in homes), timeout_s=60, what="the workers"
    )
    jobs = [count(houseless, shared, chance.randint(5, 60), retries=50, patience_s=15) for _ in range(10)]

    for _ in range(8):
        fault = chance.choice(("agent", "agent", "job", "hub", "postgres"))
        worker = chance.choice(names)
        try:
            match fault:
                case "agent":
                    houseless.kill(worker)
                    houseless.come_back(worker)
                case "job":
                    alive = [p for job in jobs if (p := process_of(shared, job)) is not None]
                    if alive:
                        chance.choice(alive).kill()
                case "hub":
                    houseless.kill_hub()
                    houseless.start_hub()
                case "postgres":
                    houseless.kill_postgres()
        except (OSError, psutil.Error, PotluckError):
            pass  # it was dead already
        gap = chance.uniform(0.2, 3.0)
        before = houseless.hub
        houseless.until(lambda before=before: before.info() is not None, timeout_s=60, what="the hub")  # type: ignore[misc]
        _let_them_work(houseless, gap)

    houseless.until(
        lambda: all(houseless.job(job).state in ENDED for job in jobs), timeout_s=200, what=f"all ends (seed {seed})"
    )
    for job in jobs:
        ended = houseless.job(job)
        if ended.state != "succeeded":  # only a job whose own process was killed may fail, and it says by what
            assert ended.state == "failed" and "SIGKILL" in ended.reason, ended
        assert all(attempt.ended_at for attempt in ended.attempts)
        assert process_of(shared, job) is None
    assert not list(shared.glob("*.twice"))


def _let_them_work(houseless: LocalCluster, seconds: float) -> None:
    """The time between two faults: it is part of the plan, not a wait for something."""
    threading.Event().wait(seconds)
