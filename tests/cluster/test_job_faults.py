"""Jobs as their users meet them: real processes, real PostgreSQL, real HTTP, real SIGKILL."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from potluck.domain.job import ENDED, JobSpec, Resources
from potluck.errors import PotluckError
from potluck.protocol import JobView
from potluck.testing import LocalCluster

COUNTING = (Path(__file__).parent / "counting.py").read_text()
PLAIN = ("--runtime", "any", "--yes", "--executor", "process")
"""A worker that runs foreign code as a plain process: its jobs can see the test's shared folder."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Without a house worker, so that every job goes to the worker that the test will kill."""
    with LocalCluster(tmp_path / "c", house_worker=False) as running:
        yield running
        print(running.tails())


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


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


def result(cluster: LocalCluster, job: JobView) -> str:
    assert job.attempts[-1].outputs is not None
    tree = cluster.hub.tree(job.id, "outputs", 0)
    assert [file.path for file in tree.files] == ["result.txt"]
    return tree.files[0].blob.hash


def process_of(shared: Path, job: str) -> psutil.Process | None:
    """The process of the job that began last, while it lives."""
    try:
        process = psutil.Process(int((shared / f"{job}.pid").read_text()))
        return process if "counting.py" in " ".join(process.cmdline()) else None
    except (OSError, ValueError, psutil.Error):
        return None


def has_begun(cluster: LocalCluster, shared: Path, job: str, step: int = 3) -> None:
    cluster.until(lambda: f"step {step}\n" in cluster.output(job), timeout_s=60, what=f"{job} at step {step}")


def test_a_killed_agent_takes_its_job_along_and_another_worker_goes_on_from_the_checkpoint(
    cluster: LocalCluster, shared: Path
) -> None:
    cluster.add_worker("ann", arguments=PLAIN)
    job = count(cluster, shared, 120)
    has_begun(cluster, shared, job)
    cluster.add_worker("bob", arguments=PLAIN)
    cluster.until(lambda: cluster.job(job).attempts[0].checkpoint is not None, timeout_s=60, what="a checkpoint")

    cluster.kill("ann")

    ended = cluster.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert [attempt.state for attempt in ended.attempts] == ["lost", "succeeded"]
    assert [attempt.worker for attempt in ended.attempts] == ["ann", "bob"]
    assert "begins at step 0" in cluster.output(job, attempt=1)
    assert "begins at step 0" not in cluster.output(job, attempt=2)
    assert not list(shared.glob("*.twice"))


def test_without_retries_the_job_of_a_killed_agent_is_lost_and_says_so(cluster: LocalCluster, shared: Path) -> None:
    cluster.add_worker("ann", arguments=PLAIN)
    job = count(cluster, shared, 10_000, retries=0)
    has_begun(cluster, shared, job)

    cluster.kill("ann")

    ended = cluster.job_ends(job)
    assert ended.state == "lost"
    assert "agent ended" in ended.reason and ended.worker == "ann"
    assert process_of(shared, job) is None


def test_a_job_survives_the_death_of_the_hub_and_of_postgres(cluster: LocalCluster, shared: Path) -> None:
    cluster.add_worker("ann", arguments=PLAIN)
    job = count(cluster, shared, 150)
    has_begun(cluster, shared, job)

    cluster.kill_hub()
    cluster.start_hub()
    cluster.kill_postgres()

    ended = cluster.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert len(ended.attempts) == 1
    assert "step 150\n" in cluster.output(job)
    assert cluster.output(job).count("step 77\n") == 1


def test_what_ends_while_the_hub_is_away_is_reported_when_it_is_back(cluster: LocalCluster, shared: Path) -> None:
    cluster.add_worker("ann", arguments=PLAIN)
    job = count(cluster, shared, 15)
    has_begun(cluster, shared, job)

    cluster.kill_hub()
    cluster.until(lambda: process_of(shared, job) is None, timeout_s=60, what="the end of the process")
    cluster.start_hub()

    ended = cluster.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert len(ended.attempts) == 1


def test_an_agent_that_comes_back_hands_in_what_the_one_before_could_not(cluster: LocalCluster, shared: Path) -> None:
    cluster.add_worker("ann", arguments=PLAIN)
    job = count(cluster, shared, 15)
    has_begun(cluster, shared, job)
    cluster.kill_hub()
    cluster.until(lambda: process_of(shared, job) is None, timeout_s=60, what="the end of the process")
    spool = cluster.folder / "workers" / "ann"
    cluster.until(lambda: any(spool.rglob("report.json")), timeout_s=30, what="the report in the spool")

    cluster.kill("ann")
    cluster.start_hub()
    cluster.come_back("ann")

    ended = cluster.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert len(ended.attempts) == 1


def test_stop_ends_everything_that_a_job_started_and_it_stays_stopped(cluster: LocalCluster, shared: Path) -> None:
    cluster.add_worker("ann", arguments=PLAIN)
    script = """
import os, subprocess, sys, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        sys.stdout.close()
        time.sleep(10_000)
print("they run", flush=True)
try:
    time.sleep(10_000)
finally:
    sys.exit(0)
"""
    marker = f"straggler-{os.getpid()}"
    spec = JobSpec([sys.executable, "fork.py", marker], grace_s=2, resources=Resources(cpu="0.1"))
    job = cluster.submit(spec, {"fork.py": script})
    cluster.until(lambda: "they run" in cluster.output(job), timeout_s=60, what="its children")
    assert len(stragglers(marker)) >= 4

    stopped = cluster.hub.stop_job(job)

    assert stopped.state == "cancelled"
    cluster.until(lambda: not stragglers(marker), timeout_s=30, what="the end of all processes")
    cluster.until(lambda: cluster.job(job).attempts[-1].ended_at is not None, timeout_s=30, what="its report")
    assert cluster.job(job).state == "cancelled"


def stragglers(marker: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if marker in (p.info["cmdline"] or []) and p.is_running()]


def test_a_command_that_fails_is_tried_again_only_if_it_was_asked_for(cluster: LocalCluster) -> None:
    cluster.add_worker("ann", arguments=PLAIN)
    once = cluster.submit(JobSpec(["/bin/sh", "-c", "exit 3"], retries=2))
    again = cluster.submit(JobSpec(["/bin/sh", "-c", "exit 3"], retries=2, retry_on="any"))

    first, second = cluster.job_ends(once), cluster.job_ends(again)

    assert (first.state, first.exit_code, len(first.attempts)) == ("failed", 3, 1)
    assert (second.state, second.exit_code, len(second.attempts)) == ("failed", 3, 3)


def test_a_frozen_worker_loses_its_job_only_after_its_patience_and_never_runs_it_twice(
    cluster: LocalCluster, shared: Path
) -> None:
    cluster.add_worker("ann", arguments=PLAIN)
    job = count(cluster, shared, 400, patience_s=10)
    has_begun(cluster, shared, job)
    agent = cluster.processes["ann"].popen.pid
    cluster.add_worker("bob", arguments=PLAIN)

    psutil.Process(agent).suspend()  # the agent alone: its job would go on for ever if nobody watched it

    cluster.until(lambda: len(cluster.job(job).attempts) == 2, timeout_s=60, what="the second attempt")
    psutil.Process(agent).resume()
    ended = cluster.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert [attempt.state for attempt in ended.attempts] == ["lost", "succeeded"]
    assert not list(shared.glob("*.twice"))


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_whatever_is_killed_no_job_is_lost_run_twice_or_stuck(cluster: LocalCluster, shared: Path, seed: int) -> None:
    chance = random.Random(seed)
    names = ("ann", "bob", "cem")
    for name in names:
        cluster.add_worker(name, arguments=(*PLAIN, "--max-tasks", "2"))
    jobs = [count(cluster, shared, chance.randint(5, 60), retries=50, patience_s=15) for _ in range(10)]

    for _ in range(8):
        fault = chance.choice(("agent", "agent", "job", "hub", "postgres"))
        worker = chance.choice(names)
        try:
            match fault:
                case "agent":
                    cluster.kill(worker)
                    cluster.come_back(worker)
                case "job":
                    alive = [p for job in jobs if (p := process_of(shared, job)) is not None]
                    if alive:
                        chance.choice(alive).kill()
                case "hub":
                    cluster.kill_hub()
                    cluster.start_hub()
                case "postgres":
                    cluster.kill_postgres()
        except (OSError, psutil.Error, PotluckError):
            pass  # it was dead already
        gap = chance.uniform(0.2, 3.0)
        before = cluster.hub
        cluster.until(lambda before=before: before.info() is not None, timeout_s=60, what="the hub")  # type: ignore[misc]
        _let_them_work(cluster, gap)

    cluster.until(
        lambda: all(cluster.job(job).state in ENDED for job in jobs), timeout_s=200, what=f"all ends (seed {seed})"
    )
    for job in jobs:
        ended = cluster.job(job)
        if ended.state != "succeeded":  # only a job whose own process was killed may fail, and it says by what
            assert ended.state == "failed" and "SIGKILL" in ended.reason, ended
        assert all(attempt.ended_at for attempt in ended.attempts)
        assert process_of(shared, job) is None
    assert not list(shared.glob("*.twice"))


def _let_them_work(cluster: LocalCluster, seconds: float) -> None:
    """The time between two faults: it is part of the plan, not a wait for something."""
    threading.Event().wait(seconds)
