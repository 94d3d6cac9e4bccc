"""Does a worker begin what it was given once, keep to its owner's rules, and bring every end home?"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from agent_kit import told, until
from fake_hub import FakeHub

from potluck.client import Hub
from potluck.errors import DiskFull
from potluck.protocol import JobLease, JobReport, OrdersAnswer, OrdersRequest, Rules
from potluck.worker.jobs import reports
from potluck.worker.jobs.house import House, refuse
from potluck.worker.jobs.hubside import HubSide

PLAIN = House(Rules(), executor="process")
FOREVER = "import time\nprint('begun', flush=True)\ntime.sleep(1000)\n"
POLITE = """
import os, pathlib, signal, sys, time

def leave(*_):
    (pathlib.Path(os.environ["POTLUCK_CHECKPOINT_DIR"]) / "step").write_text("7")
    sys.exit(0)

signal.signal(signal.SIGTERM, leave)
print("begun", flush=True)
time.sleep(1000)
"""


def python(edge: FakeHub, script: str, *arguments: str, **more: Any) -> JobLease:
    """A lease of a job that runs this script."""
    return edge.job("python", "main.py", *arguments, files={"main.py": script}, **more)


def report_of(edge: FakeHub, lease: JobLease) -> JobReport:
    return until(lambda: edge.job_report(lease), f"the end of {lease.name}")


def begun(edge: FakeHub, lease: JobLease) -> None:
    until(lambda: b"begun" in edge.log(lease), f"the beginning of {lease.name}")


def marked(mark: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]


@pytest.fixture
def mark() -> Iterator[str]:
    """A word on a job's command line, to find its processes by."""
    word = f"potluck-test-{os.getpid()}-{os.urandom(4).hex()}"
    yield word
    for pid in marked(word):
        os.kill(pid, signal.SIGKILL)


def test_a_job_is_fetched_run_and_brought_home(edge: FakeHub, start: Any, tmp_path: Path) -> None:
    script = """
import os, pathlib, potluck
print("hello", open("data/words.txt").read(), os.environ["POTLUCK_ATTEMPT"], flush=True)
potluck.log(3, loss=0.25)
(pathlib.Path(os.environ["POTLUCK_OUTPUT_DIR"]) / "model.bin").write_bytes(b"\\x00weights")
"""
    lease = edge.job("python", "main.py", files={"main.py": script, "data/words.txt": "there"})

    start(house=PLAIN)
    edge.place(lease)

    report = report_of(edge, lease)
    assert (report.outcome, report.exit_code, report.executor) == ("exited", 0, "process")
    assert edge.log(lease) == b"hello there 1\n"
    assert report.log_bytes == len(edge.log(lease))
    assert report.outputs is not None
    assert edge.read_tree(report.outputs) == {"model.bin": b"\x00weights"}
    assert [(point.step, point.values) for point in edge.points[lease.id]] == [(3, {"loss": 0.25})]
    assert [progress.state for _, progress in edge.job_progress] == ["preparing", "running"]
    until(lambda: not list((tmp_path / "home/jobs").iterdir()), "its folder to be gone")
    until(lambda: edge.orders[-1].holding == [], "nothing to be held")


def test_what_the_machine_has_goes_with_every_request(edge: FakeHub, start: Any) -> None:
    house = House(Rules("all", "hub", "any", 3), {"room": "lab-2"}, "process")

    start(house=house)
    request = until(lambda: edge.orders and edge.orders[-1])

    assert request.rules == Rules("all", "hub", "any", 3)
    assert request.labels == {"room": "lab-2"}
    assert request.executors == ["process"]
    assert request.now.cpu_cores > 0
    assert 0 < request.now.memory_free_bytes <= request.now.memory_bytes
    assert request.now.disk_free_bytes > 0


@pytest.mark.parametrize(
    ("rules", "mine", "words"),
    [
        (Rules(accept="pool"), True, "pool runs only"),
        (Rules(whose="me"), False, "their own jobs only"),
        (Rules(runtime="container"), False, "in a container only"),
    ],
)
def test_a_lease_against_the_owners_rules_is_given_back(
    edge: FakeHub, start: Any, rules: Rules, mine: bool, words: str
) -> None:
    lease = python(edge, "print('it ran')", mine=mine)

    start(house=House(rules, executor="process"))
    edge.place(lease)

    report = report_of(edge, lease)
    assert report.outcome == "returned"
    assert words in report.reason
    assert report.code in ("rules", "executor")
    assert b"it ran" not in edge.log(lease)


def test_a_foreign_owner_is_recognised_whatever_the_hub_says() -> None:
    house = House(Rules(whose="me"), owner="ann")
    lease = FakeLease.of("bob", owns=True)

    assert "belongs to ann" in refuse(lease, house, at_work=0, leaving=False)
    assert refuse(FakeLease.of("ann", owns=True), house, at_work=0, leaving=False) == ""


class FakeLease:
    @staticmethod
    def of(name: str, *, owns: bool) -> JobLease:
        from potluck.domain.job import JobSpec
        from potluck.protocol import Blob

        return JobLease("l", 1, "r", "job", 1, f"m-{name}", name, owns, 60.0, JobSpec(["x"]), Blob("", 0))


def test_more_jobs_than_the_owner_allows_at_once_are_given_back(edge: FakeHub, start: Any) -> None:
    first, second = python(edge, FOREVER), python(edge, FOREVER)

    start(house=PLAIN)
    edge.place(first)
    begun(edge, first)
    edge.place(second)

    assert "1 at once" in report_of(edge, second).reason
    assert edge.job_report(first) is None


def test_a_job_that_the_hub_ends_gets_its_grace_and_is_reported_as_cancelled(edge: FakeHub, start: Any) -> None:
    lease = python(edge, POLITE)

    start(house=PLAIN)
    edge.place(lease)
    begun(edge, lease)
    edge.end_job(lease, "stopped by ann")

    report = report_of(edge, lease)
    assert (report.outcome, report.reason) == ("cancelled", "stopped by ann")
    assert report.exit_code == 0


def test_a_dropped_job_is_killed_and_not_reported(edge: FakeHub, start: Any, mark: str, tmp_path: Path) -> None:
    lease = python(edge, FOREVER, mark, ttl_s=1.5)

    start(house=PLAIN)
    edge.place(lease)
    begun(edge, lease)
    assert marked(mark)
    edge.take_away(lease)

    until(lambda: not marked(mark), "its processes to be gone")
    until(lambda: not list((tmp_path / "home/jobs").iterdir()), "its folder to be gone")
    assert edge.job_report(lease) is None


def test_a_job_ends_itself_when_the_hub_is_silent_for_longer_than_its_patience(
    edge: FakeHub, start: Any, mark: str
) -> None:
    lease = python(edge, FOREVER, mark, ttl_s=2.0)

    start(house=PLAIN)
    edge.place(lease)
    begun(edge, lease)
    edge.stop()

    until(lambda: not marked(mark), "its processes to be gone")
    edge.start()
    report = report_of(edge, lease)
    assert report.outcome == "returned"
    assert "patience" in report.reason


def test_a_job_goes_on_while_the_hub_is_away_for_less_than_its_patience(edge: FakeHub, start: Any) -> None:
    script = (
        "import time\nprint('begun', flush=True)\nfor n in range(20):\n    time.sleep(0.1)\n    print(n, flush=True)\n"
    )
    lease = python(edge, script, ttl_s=60)

    start(house=PLAIN)
    edge.place(lease)
    begun(edge, lease)
    edge.stop()
    edge.start()

    assert report_of(edge, lease).exit_code == 0
    assert edge.log(lease).split()[-1] == b"19"
    assert edge.log(lease).count(b"7\n") == 2  # 7 and 17


def test_an_end_while_the_hub_is_away_is_handed_in_by_the_next_agent(edge: FakeHub, start: Any, tmp_path: Path) -> None:
    script = """
import os, pathlib, time
print("begun", flush=True)
while not pathlib.Path("go").exists():
    time.sleep(0.02)
(pathlib.Path(os.environ["POTLUCK_OUTPUT_DIR"]) / "result").write_text("42")
print("the end", flush=True)
"""
    lease = python(edge, script)
    first = start(house=PLAIN)
    edge.place(lease)
    begun(edge, lease)
    edge.stop()
    jobs = tmp_path / "home/jobs"
    (jobs / lease.id / "work/go").touch()
    until(lambda: list(jobs.glob("*/report.json")), "the report on the disk")
    first.end()
    edge.start()

    start(house=PLAIN)

    report = report_of(edge, lease)
    assert (report.outcome, report.exit_code) == ("exited", 0)
    assert report.outputs is not None
    assert edge.read_tree(report.outputs) == {"result": b"42"}
    assert edge.log(lease).endswith(b"the end\n")
    seconds = [request for request in edge.orders if request.agent != edge.orders[0].agent]
    assert all(lease.id in request.holding for request in seconds[:1])
    until(lambda: not list(jobs.iterdir()), "its folder to be gone")


def test_nothing_of_a_job_survives_a_killed_agent_and_the_next_one_clears_up(
    edge: FakeHub, start: Any, start_process: Any, mark: str, tmp_path: Path
) -> None:
    script = """
import os, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    time.sleep(1000)
print("begun", flush=True)
time.sleep(1000)
"""
    lease = python(edge, script, mark)
    process = start_process(executor="process")
    edge.place(lease)
    begun(edge, lease)
    until(lambda: len(marked(mark)) >= 2, "the detached one")

    process.send_signal(signal.SIGKILL)
    process.wait(30)  # its lock goes with it

    until(lambda: not marked(mark), "its processes to be gone")
    assert list((tmp_path / "home/jobs").iterdir())
    before = len(edge.orders)
    start(house=PLAIN)
    until(lambda: len(edge.orders) > before, "the next agent to ask")
    assert not list((tmp_path / "home/jobs").iterdir())
    assert lease.id not in edge.orders[-1].holding
    assert edge.job_report(lease) is None


def test_a_lease_that_is_delivered_twice_is_begun_once(edge: FakeHub, start: Any, tmp_path: Path) -> None:
    counter = tmp_path / "count"
    script = f"open({str(counter)!r}, 'a').write('x')\nprint('begun', flush=True)\nimport time\ntime.sleep(0.5)\n"
    lease = python(edge, script)
    agent = start(house=PLAIN)
    until(lambda: edge.orders)

    edge.place(lease)
    begun(edge, lease)
    agent.agent._keeper._begin(replace(lease))

    assert report_of(edge, lease).exit_code == 0
    assert counter.read_text() == "x"


def test_ctrl_c_lets_a_job_write_its_checkpoint_and_gives_it_back(edge: FakeHub, start: Any) -> None:
    lease = python(edge, POLITE)
    agent = start(house=PLAIN)
    edge.place(lease)
    begun(edge, lease)

    agent.agent.stop()

    assert agent.wait() == 0
    report = edge.job_report(lease)
    assert report is not None
    assert (report.outcome, report.reason) == ("returned", "its worker is leaving")
    (checkpoint,) = [each for lease_id, each in edge.checkpoints if lease_id == lease.id]
    assert edge.read_tree(checkpoint.tree) == {"step": b"7"}
    assert edge.left == ["w1"]


def test_the_goodbye_is_the_last_that_the_hub_hears(edge: FakeHub, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, ask = threading.Event(), Hub.orders

    def slowly(hub: Hub, request: OrdersRequest, wait_s: float = 20.0) -> OrdersAnswer:
        sent.set()
        threading.Event().wait(0.3)  # it is on its way
        return ask(hub, request, wait_s)

    monkeypatch.setattr(Hub, "orders", slowly)
    agent = start(house=House(Rules(accept="jobs"), executor="process"))
    assert sent.wait(30)
    agent.agent.stop()

    assert agent.wait() == 0
    until(lambda: not agent.agent._keeper._asking.is_alive(), "the end of its requests")
    calls = [path for _, path in edge.calls]
    assert "/leave" in calls
    assert "/orders" not in calls[calls.index("/leave") :]


def test_who_is_leaving_and_holds_nothing_asks_for_no_more_orders(edge: FakeHub, start: Any) -> None:
    agent = start(house=PLAIN)
    until(lambda: edge.orders)
    keeper = agent.agent._keeper

    keeper.leave()
    late = python(edge, "print('it ran')")
    edge.place(late)  # the waiting request is answered with it, and it is given back

    assert report_of(edge, late).reason == "its worker is leaving"
    until(lambda: not keeper._asking.is_alive(), "the end of its requests")


def test_the_second_ctrl_c_leaves_at_once_and_takes_the_job_along(edge: FakeHub, start: Any, mark: str) -> None:
    stubborn = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER
    lease = python(edge, stubborn, mark, spec={"grace_s": 600.0})
    agent = start(house=PLAIN)
    edge.place(lease)
    begun(edge, lease)

    agent.agent.stop()
    until(lambda: agent.screen.has("leaving"))
    agent.agent.stop()

    assert agent.wait() == 130
    until(lambda: not marked(mark), "its processes to be gone")
    assert edge.job_report(lease) is None


def test_the_pool_hands_in_while_a_job_is_here_and_goes_on_after(edge: FakeHub, start: Any, child_log: Path) -> None:
    edge.endless = {"steps": 2000, "step_s": 0.02, "box_s": 60.0}
    script = "import pathlib, time\nprint('begun', flush=True)\nwhile not pathlib.Path('go').exists():\n    time.sleep(0.02)\n"
    lease = python(edge, script)
    agent = start(house=PLAIN)
    until(lambda: any("started" in line for line in told(child_log)), "a unit at work")

    edge.place(lease)
    until(lambda: edge.reports, "the unit to be handed in")
    begun(edge, lease)
    until(lambda: not any(map(psutil.pid_exists, children(child_log))), "the child to free its memory")
    leased = len(edge.leased)
    assert all(report.outcome in ("done", "returned") for _, report in edge.reports)
    (agent.agent.settings.home / "jobs" / lease.id / "work/go").touch()

    report_of(edge, lease)
    until(lambda: len(edge.leased) > leased, "the pool to go on")


def children(child_log: Path) -> set[int]:
    return {line["pid"] for line in told(child_log) if "pid" in line}


def test_a_full_disk_gives_the_job_to_another_machine_and_says_so(
    edge: FakeHub, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise DiskFull("the disk is full: 0.1 MB free")

    monkeypatch.setattr(HubSide, "project", full)
    lease = python(edge, FOREVER)

    agent = start(house=PLAIN)
    edge.place(lease)

    report = report_of(edge, lease)
    assert (report.outcome, report.code) == ("returned", "disk")
    assert agent.screen.has("disk is full")


def test_secrets_do_not_reach_the_hub_and_foreign_bytes_do(edge: FakeHub, start: Any, tmp_path: Path) -> None:
    script = """
import os, sys
print("the key is", os.environ["KEY"])
sys.stdout.flush()
sys.stdout.buffer.write(b"\\xff\\xfe raw\\n")
"""
    lease = python(edge, script, spec={"secrets": ["KEY"]}, secrets={"KEY": "s3cret-value"})

    start(house=PLAIN)
    edge.place(lease)

    report_of(edge, lease)
    assert edge.log(lease) == b"the key is ***\n\xff\xfe raw\n"
    assert "s3cret-value" not in str(edge.job_progress) + str(edge.job_reports)


def test_reports_come_back_from_the_disk_and_half_folders_are_dead(tmp_path: Path) -> None:
    kept = reports.Kept("lease", "w1", "run", "name", JobReport("exited", exit_code=0), 12)
    reports.keep(tmp_path / "a", kept, b"rest")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/report.json").write_bytes(b'{"lease_id": ')
    (tmp_path / "c/work/deep").mkdir(parents=True)
    (tmp_path / "c/work/deep").chmod(0)

    ended, dead = reports.left_behind(tmp_path)

    assert ended == [(tmp_path / "a", kept)]
    assert reports.rest_of(tmp_path / "a") == b"rest"
    assert dead == [tmp_path / "b", tmp_path / "c"]
    for folder in [*dead, tmp_path / "a"]:
        reports.remove(folder)
    assert not list(tmp_path.iterdir())
