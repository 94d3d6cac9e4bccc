"""Is the place where a gang meets kept open as long as it is wanted, and not a moment longer?"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from agent_kit import answers, until

from potluck.train.gang.meeting import Line
from potluck.worker.jobs.meetings import MeetingPlace

HERE = "127.0.0.1"


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Callable[..., tuple[MeetingPlace, list[str]]]]:
    begun: list[MeetingPlace] = []

    def begin(engine: str = "plain", host: str = HERE) -> tuple[MeetingPlace, list[str]]:
        said: list[str] = []
        one = MeetingPlace(
            engine,
            host,
            name=f"test-{os.getpid()}-{len(begun)}",
            least=1,
            folder=tmp_path / "meeting",
            until=lambda: None,
            on_address=said.append,
            on_failure=said.append,
        )
        begun.append(one)
        return one, said

    yield begin
    for one in begun:
        one.close(wait_s=10.0)


def processes_at(folder: Path) -> list[int]:
    """The meeting places that work in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if "potluck.train.gang" in (process.info["cmdline"] or []) and Path(process.cwd()) == folder:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_meeting_place_that_was_killed_comes_back_where_it_was(
    places: Callable[..., tuple[MeetingPlace, list[str]]], tmp_path: Path
) -> None:
    _, said = places()
    until(lambda: said, "its address")
    Line(said[0], "lab-1", timeout_s=10).close()

    os.kill(processes_at(tmp_path / "meeting")[0], signal.SIGKILL)

    until(lambda: len(said) == 2, "its new life")
    assert said[0] == said[1]
    Line(said[1], "lab-1", timeout_s=10).close()


def test_a_closed_meeting_place_is_gone(places: Callable[..., tuple[MeetingPlace, list[str]]], tmp_path: Path) -> None:
    meeting, said = places()
    until(lambda: said, "its address")

    meeting.close(wait_s=10.0)

    assert not answers(said[0])
    assert processes_at(tmp_path / "meeting") == []
    meeting.close()


@pytest.mark.parametrize("engine", ["plain", "torchft"])
def test_a_meeting_place_needs_no_torch(tmp_path: Path, engine: str) -> None:
    if engine == "torchft" and importlib.util.find_spec("torchft") is None:
        pytest.skip("torchft is not installed here")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    serving = subprocess.Popen(
        [sys.executable, "-m", "potluck.train.gang", engine, "--host", HERE, "--least", "1"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert serving.stdout is not None
    try:
        assert serving.stdout.readline().startswith(f"{'http://' * (engine == 'torchft')}{HERE}:")
    finally:
        serving.kill()
        serving.communicate()


HOSTS = """
import sys, threading
from pathlib import Path
from potluck.worker.jobs.meetings import MeetingPlace
say = lambda text: print(text, flush=True)
MeetingPlace("plain", "127.0.0.1", name="orphan", least=1, folder=Path(sys.argv[1]), until=lambda: None,
             on_address=say, on_failure=say)
threading.Event().wait()
"""


def test_a_meeting_place_does_not_outlive_a_killed_agent(tmp_path: Path) -> None:
    agent = subprocess.Popen([sys.executable, "-c", HOSTS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    address = agent.stdout.readline().strip()
    assert answers(address)

    agent.kill()
    agent.communicate()

    until(lambda: not answers(address), "its end")
    until(lambda: not processes_at(tmp_path), "the end of its process")
