"""Does SIGTERM reach whoever can do something with it, once, and nobody whom it would only disturb?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from box_kit import PYTHON, Job, a_box, python, start

from potluck.worker.jobs import executors
from potluck.worker.jobs.below import Process, in_charge

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="who handles a signal is told by Linux's /proc")

SAVES = """
import signal, sys, time
heard = []
def save(*_):
    heard.append(1)
    time.sleep(0.6)
    open("checkpoint", "a").write(f"saved {len(heard)}")
    sys.exit(5)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
DATA_LOADER = """
import os, signal, sys, time
ready, told = os.pipe()
worker = os.fork()
if worker == 0:
    def hear(*_):
        print("the worker was disturbed", flush=True)
        os._exit(1)
    signal.signal(signal.SIGTERM, hear)
    os.write(told, b"x")
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
def save(*_):
    time.sleep(0.6)
    gone, _ = os.waitpid(worker, os.WNOHANG)
    open("checkpoint", "a").write("half" if gone else "saved 1")
    sys.exit(5)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
HELPED = """
import signal, subprocess, sys, time
def save(*_):
    sys.exit(5 if subprocess.run(["sh", "-c", "sleep 0.8; printf 'saved 1' > checkpoint"]).returncode == 0 else 1)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-I", "-S", "-c", sys.argv[1]]).returncode)
"""
WITH_A_DEAF_CHILD = """
import os, signal, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


@pytest.fixture(params=["process", "bubblewrap", "podman"])
def executor(request: pytest.FixtureRequest) -> executors.Executor:
    found = {one.name: one for one in executors.found()}[request.param]
    if not found.works:
        pytest.skip(found.reason)
    return executors.ALL[request.param]


def shell(line: str, script: str = "", name: str = "sh") -> list[str]:
    """The line for a shell, in which `$TRAIN` stands for Python with the script."""
    return [name, "-c", line.replace("$TRAIN", '"$@"'), "sh", *python(script)]


def asked_to_end(folder: Path, argv: list[str], executor: executors.Executor, *, ready: str = "ready") -> Job:
    """It has said `ready`, and has been asked to end since."""
    job = start(a_box(folder, *argv), executor=executor)
    job.says(ready)
    job.running.end(30.0, "stopped by ann")
    return job


@pytest.mark.parametrize("line", ["while true; do sleep .5; done", "sleep 60"])
def test_a_script_runs_its_trap(tmp_path: Path, executor: executors.Executor, line: str) -> None:
    job = asked_to_end(tmp_path, shell(f'trap "echo bye; exit 0" TERM; echo ready; {line}'), executor)

    ended = job.ended()

    assert (ended.exit_code, ended.signal, ended.code) == (0, "", "ended")
    assert "bye\n" in job.said


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(python(SAVES), id="without a shell"),
        pytest.param(shell("cd . && $TRAIN", SAVES), id="a line for the shell"),
        pytest.param(shell("cd . && $TRAIN; exit $?", SAVES), id="a shell that waits"),
        pytest.param(shell("$TRAIN | tee log; exit 5", SAVES), id="its output through a pipe"),
        pytest.param(shell("trap 'exit 5' TERM; $TRAIN", SAVES), id="below a trap"),
        pytest.param(shell("trap 'echo' EXIT; $TRAIN; exit $?", SAVES, "bash"), id="below an exit trap of bash"),
        pytest.param(shell("$TRAIN & wait $!; wait $!; exit 5", SAVES), id="in the background"),
        pytest.param(python(LAUNCHER, SAVES), id="below a launcher"),
        pytest.param(python(DATA_LOADER), id="with a data loader's process"),
        pytest.param(shell("$TRAIN; exit $?", DATA_LOADER), id="with a data loader's process, in a shell"),
        pytest.param(python(HELPED), id="with a helper started to save"),
    ],
)
def test_a_training_saves_once_and_undisturbed(tmp_path: Path, executor: executors.Executor, argv: list[str]) -> None:
    job = asked_to_end(tmp_path, argv, executor)

    ended = job.ended()

    assert (job.box.work / "checkpoint").read_text() == "saved 1", job.said
    assert (ended.exit_code, ended.signal, ended.code) == (5, "", "ended")
    assert "disturbed" not in job.said


def test_a_script_that_starts_one_program_after_the_other_ends(tmp_path: Path, executor: executors.Executor) -> None:
    job = asked_to_end(tmp_path, shell("while true; do $TRAIN; done", SAVES), executor)

    ended = job.ended()

    assert (ended.exit_code, ended.signal) == (143, "SIGTERM")
    assert (job.box.work / "checkpoint").read_text().startswith("saved 1")


def test_who_handles_nothing_dies_of_it_and_waits_for_no_deaf_child(
    tmp_path: Path, executor: executors.Executor
) -> None:
    job = asked_to_end(tmp_path, python(WITH_A_DEAF_CHILD), executor)

    ended = job.ended()

    assert (ended.exit_code, ended.signal) == (143, "SIGTERM")


def test_a_script_file_is_a_shell_by_its_program_not_its_name(tmp_path: Path, executor: executors.Executor) -> None:
    box = a_box(tmp_path, "./train.sh", *python(SAVES))
    script = box.work / "train.sh"
    script.write_text('#!/bin/bash\ntrap "echo bye" TERM\n"$@"\nexit 5\n')
    script.chmod(0o755)
    job = start(box, executor=executor)
    job.says("ready")

    job.running.end(30.0, "stopped by ann")

    assert job.ended().exit_code == 5
    assert "bye\n" in job.said
    assert (box.work / "checkpoint").read_text() == "saved 1"


def test_only_the_uppermost_that_handle_it_are_in_charge() -> None:
    def process(pid: int, parent: int, name: str, *, handles: bool) -> Process:
        one = Process(pid, parent, name)
        one.handles = handles
        return one

    tree = [
        process(10, 1, "dash", handles=True),
        process(11, 10, "time", handles=False),
        process(12, 11, "python3.11", handles=True),
        process(13, 12, "python3.11", handles=True),
        process(14, 13, "tool", handles=True),
        process(15, 10, "tee", handles=False),
        process(16, 10, "server", handles=True),
    ]

    assert in_charge(tree) == {12, 16}


def test_this_process_is_seen_as_what_it_is() -> None:
    one = Process(int(Path("/proc/self").readlink().name), 0, "?")

    one.look_closer()

    assert one.name == Path(PYTHON).name
    assert not one.nested or not one.is_first
