"""Jobs as their users meet them: real processes, real PostgreSQL, real HTTP, real SIGKILL."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest
from job_kit import PLAIN, count, has_begun, process_of

from potluck.domain.job import JobSpec, Resources
from potluck.testing import LocalCluster


def test_a_killed_agent_takes_its_job_along_and_another_worker_goes_on_from_the_checkpoint(
    houseless: LocalCluster, shared: Path
) -> None:
    houseless.add_worker("ann", arguments=PLAIN)
    job = count(houseless, shared, 400)
    has_begun(houseless, shared, job)
    houseless.add_worker("bob", arguments=PLAIN)
    houseless.until(lambda: houseless.job(job).attempts[0].checkpoint is not None, timeout_s=60, what="a checkpoint")

    houseless.kill("ann")

    ended = houseless.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert [attempt.state for attempt in ended.attempts] == ["lost", "succeeded"]
    assert [attempt.worker for attempt in ended.attempts] == ["ann", "bob"]
    assert "begins at step 0" in houseless.output(job, attempt=1)
    assert "begins at step 0" not in houseless.output(job, attempt=2)
    assert not list(shared.glob("*.twice"))


@pytest.mark.slow
def test_without_retries_the_job_of_a_killed_agent_is_lost_and_says_so(houseless: LocalCluster, shared: Path) -> None:
    houseless.add_worker("ann", arguments=PLAIN)
    job = count(houseless, shared, 10_000, retries=0)
    has_begun(houseless, shared, job)

    houseless.kill("ann")

    ended = houseless.job_ends(job)
    assert ended.state == "lost"
    assert "agent ended" in ended.reason and ended.worker == "ann"
    assert process_of(shared, job) is None


def test_a_job_survives_the_death_of_the_hub_and_of_postgres(houseless: LocalCluster, shared: Path) -> None:
    houseless.add_worker("ann", arguments=PLAIN)
    job = count(houseless, shared, 150)
    has_begun(houseless, shared, job)

    houseless.kill_hub()
    houseless.start_hub()
    houseless.kill_postgres()

    ended = houseless.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert len(ended.attempts) == 1
    assert "step 150\n" in houseless.output(job)
    assert houseless.output(job).count("step 77\n") == 1


def test_what_ends_while_the_hub_is_away_is_reported_when_it_is_back(houseless: LocalCluster, shared: Path) -> None:
    houseless.add_worker("ann", arguments=PLAIN)
    job = count(houseless, shared, 15)
    has_begun(houseless, shared, job)

    houseless.kill_hub()
    houseless.until(lambda: process_of(shared, job) is None, timeout_s=60, what="the end of the process")
    houseless.start_hub()

    ended = houseless.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert len(ended.attempts) == 1


def test_an_agent_that_comes_back_hands_in_what_the_one_before_could_not(houseless: LocalCluster, shared: Path) -> None:
    houseless.add_worker("ann", arguments=PLAIN)
    job = count(houseless, shared, 15)
    has_begun(houseless, shared, job)
    houseless.kill_hub()
    houseless.until(lambda: process_of(shared, job) is None, timeout_s=60, what="the end of the process")
    spool = houseless.folder / "workers" / "ann"
    houseless.until(lambda: any(spool.rglob("report.json")), timeout_s=30, what="the report in the spool")

    houseless.kill("ann")
    houseless.start_hub()
    houseless.come_back("ann")

    ended = houseless.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert len(ended.attempts) == 1


def test_stop_ends_everything_that_a_job_started_and_it_stays_stopped(houseless: LocalCluster, shared: Path) -> None:
    houseless.add_worker("ann", arguments=PLAIN)
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
    job = houseless.submit(spec, {"fork.py": script})
    houseless.until(lambda: "they run" in houseless.output(job), timeout_s=60, what="its children")
    houseless.until(lambda: len(stragglers(marker)) >= 4, timeout_s=30, what="all of them")

    stopped = houseless.hub.stop_job(job)

    assert stopped.state == "cancelled"
    houseless.until(lambda: not stragglers(marker), timeout_s=30, what="the end of all processes")
    houseless.until(lambda: houseless.job(job).attempts[-1].ended_at is not None, timeout_s=30, what="its report")
    assert houseless.job(job).state == "cancelled"


def stragglers(marker: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if marker in (p.info["cmdline"] or []) and p.is_running()]


def test_a_command_that_fails_is_tried_again_only_if_it_was_asked_for(houseless: LocalCluster) -> None:
    houseless.add_worker("ann", arguments=PLAIN)
    once = houseless.submit(JobSpec(["/bin/sh", "-c", "exit 3"], retries=2))
    again = houseless.submit(JobSpec(["/bin/sh", "-c", "exit 3"], retries=2, retry_on="any"))

    first, second = houseless.job_ends(once), houseless.job_ends(again)

    assert (first.state, first.exit_code, len(first.attempts)) == ("failed", 3, 1)
    assert (second.state, second.exit_code, len(second.attempts)) == ("failed", 3, 3)


def test_a_frozen_worker_loses_its_job_only_after_its_patience_and_never_runs_it_twice(
    houseless: LocalCluster, shared: Path
) -> None:
    houseless.add_worker("ann", arguments=PLAIN)
    job = count(houseless, shared, 400, patience_s=10)
    has_begun(houseless, shared, job)
    agent = houseless.processes["ann"].popen.pid
    houseless.add_worker("bob", arguments=PLAIN)

    psutil.Process(agent).suspend()  # the agent alone: its job would go on for ever if nobody watched it

    houseless.until(lambda: len(houseless.job(job).attempts) == 2, timeout_s=60, what="the second attempt")
    psutil.Process(agent).resume()
    ended = houseless.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert [attempt.state for attempt in ended.attempts] == ["lost", "succeeded"]
    assert not list(shared.glob("*.twice"))
