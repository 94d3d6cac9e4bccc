"""By what does an agent see that a gang's member hangs, and can a job use that to lead its agent astray?"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from potluck.train.gang.pulse import Pulse
from potluck.worker.jobs.gangs import LOOK_S, PULSE, Files, Watch


def beat(phase: str = "compute", step: int = 1, patience_s: float = 3.0, since: float = 5.0) -> bytes:
    about = {"phase": phase, "step": step, "since": since, "patience_s": patience_s, "pid": 1}
    return json.dumps(about).ljust(160).encode()


def looked_at(watch: Watch, text: bytes, *, seconds: float, start: float = 100.0) -> str:
    """What it says in the end, when the same pulse is there for so long."""
    reason = ""
    for look in range(round(seconds / LOOK_S) + 1):
        reason = reason or watch.look(text, start + look * LOOK_S)
    return reason


@pytest.mark.parametrize(
    ("phase", "seconds", "hangs"),
    [
        ("compute", 2.5, False),
        ("compute", 3.5, True),
        ("load", 2.5, False),
        ("load", 3.5, True),
        ("sum", 8.5, False),  # the others' time limit acts first: who waits in a sum is not who hangs
        ("sum", 9.5, True),
        ("meet", 1000.0, False),
        ("outside", 1000.0, False),
    ],
)
def test_who_computes_for_longer_than_its_patience_hangs(phase: str, seconds: float, hangs: bool) -> None:
    assert bool(looked_at(Watch(), beat(phase), seconds=seconds)) is hangs


def test_each_step_has_the_whole_patience() -> None:
    watch = Watch()

    for step in range(10):
        assert looked_at(watch, beat(step=step, since=step * 2.5), seconds=2.5, start=100.0 + step * 2.5) == ""


def test_an_hour_in_which_nobody_looked_is_no_hour_in_which_it_hung() -> None:
    watch = Watch()
    watch.look(beat(), 100.0)

    assert watch.look(beat(), 3700.0) == ""


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"null", b'{"phase": 1}', beat(patience_s=float("nan")), b"[" * 4000]
)
def test_whatever_else_a_job_writes_there_ends_nobody(text: bytes) -> None:
    assert looked_at(Watch(), text, seconds=100.0) == ""


def test_what_the_library_writes_is_understood(tmp_path: Path) -> None:
    Pulse(str(tmp_path / PULSE)).beat("compute", 12, 3.0)

    reason = looked_at(Watch(), Files(tmp_path).read(PULSE), seconds=4.0)

    assert "step 12" in reason


# --- a folder that is the job's


def test_no_link_of_a_job_leads_its_agent_elsewhere(tmp_path: Path) -> None:
    owners = tmp_path / "owners"
    owners.mkdir()
    (owners / "where.json").write_text("the owner's")
    files = Files(tmp_path / "job")

    (tmp_path / "job" / "where.json").symlink_to(owners / "where.json")
    files.write("where.json", "new")
    (tmp_path / "job" / "pulse.json").symlink_to(owners / "where.json")
    assert files.read("pulse.json") == b""
    (tmp_path / "job").rename(tmp_path / "moved")
    (tmp_path / "job").symlink_to(owners)
    files.write("where.json", "newer")

    assert [path.read_text() for path in owners.iterdir()] == ["the owner's"]
    assert (tmp_path / "moved" / "where.json").read_text() == "newer"
    files.close()


def test_a_pipe_in_the_place_of_the_pulse_holds_nobody_up(tmp_path: Path) -> None:
    files = Files(tmp_path)
    os.mkfifo(tmp_path / PULSE)

    assert files.read(PULSE) == b""
    files.close()
    assert files.read(PULSE) == b""


def test_a_reader_never_sees_half_of_what_is_written(tmp_path: Path) -> None:
    files, stop = Files(tmp_path), threading.Event()
    files.write("where.json", "x" * 100)
    seen: set[str] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add((tmp_path / "where.json").read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for letter in "abcdefghij" * 5:
        files.write("where.json", letter * 100)
    stop.set()
    reader.join()

    assert all(len(text) == 100 and len(set(text)) == 1 for text in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["where.json"]
    files.close()
