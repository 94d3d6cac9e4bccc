"""What happens to an attempt before, while and after its command runs, and to what it prints?"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from agent_kit import until
from package_kit import wheel

from potluck.domain.job import GangSpec, JobSpec, Resources
from potluck.errors import BadInput, PotluckError
from potluck.protocol import JobReport
from potluck.worker.jobs import builds, executors, local, output
from potluck.worker.jobs.attempt import command_of, key_of, proxies
from potluck.worker.jobs.locks import try_lock
from potluck.worker.jobs.output import Output
from potluck.worker.line import GivenUp


class Wire:
    """A hub's side of a log, that can be slow, away, or forget."""

    def __init__(self) -> None:
        self.log = b""
        self.pieces: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.ends = False

    def __call__(self, offset: int, piece: bytes, skip: bool) -> int:
        self.open.wait(30)
        if self.ends:
            raise GivenUp
        if offset > len(self.log) and not skip:
            return len(self.log)
        self.log = self.log[:offset] + piece
        self.pieces.append(len(piece))
        return max(offset, 0) + len(piece)


def closed(out: Output) -> None:
    out.close()
    assert out.wait_sent(30)


def test_output_arrives_in_order_and_whole(tmp_path: Path) -> None:
    wire = Wire()
    out = Output(tmp_path / "output.log", wire)

    for number in range(2000):
        out.write(b"line %d\n" % number)
    closed(out)

    expected = b"".join(b"line %d\n" % number for number in range(2000))
    assert wire.log == expected
    assert out.sent == len(expected)
    assert (tmp_path / "output.log").read_bytes() == expected
    assert max(wire.pieces) <= output.PIECE_BYTES


def test_a_writer_that_is_too_fast_is_never_held_up_and_the_gap_is_told(tmp_path: Path) -> None:
    wire = Wire()
    wire.open.clear()
    out = Output(tmp_path / "output.log", wire)
    line = b"x" * 999 + b"\n"

    for _ in range(20_000):  # 20 MB, while the hub takes nothing at all
        out.write(line)
    held = out._size
    out.write(b"the newest\n")
    wire.open.set()
    closed(out)

    assert held <= output.MOST_WAITING_BYTES
    assert len(wire.log) < 6_000_000
    assert wire.log.endswith(b"the newest\n")
    assert b"MB of output left out" in wire.log
    kept = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert kept <= 2 * output.FILE_BYTES + len(line)


def test_what_a_hub_forgot_is_sent_again(tmp_path: Path) -> None:
    wire = Wire()
    out = Output(tmp_path / "output.log", wire)
    out.write(b"first ")
    until(lambda: wire.log == b"first ")

    wire.log = b"fir"  # it crashed before that was on its disk
    out.write(b"second")
    closed(out)

    assert wire.log == b"first second"


def test_what_could_not_be_sent_is_there_for_the_spool(tmp_path: Path) -> None:
    wire = Wire()
    wire.ends = True
    out = Output(tmp_path / "output.log", wire)

    out.write(b"never sent")
    closed(out)

    assert out.unsent() == (0, b"never sent")
    wire.ends = False
    assert output.send_rest(wire, *out.unsent()) == len(b"never sent")
    assert wire.log == b"never sent"


def test_what_is_on_its_way_counts_as_not_sent(tmp_path: Path) -> None:
    wire = Wire()
    out = Output(tmp_path / "output.log", wire)
    out.write(b"one ")
    until(lambda: out.unsent() == (4, b""))
    wire.open.clear()

    out.write(b"two ")
    until(lambda: out._flying)
    out.write(b"three")

    assert out.unsent() == (4, b"two three")
    wire.open.set()
    closed(out)
    assert wire.log == b"one two three"


def test_a_full_disk_here_does_not_stop_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wire = Wire()
    out = Output(tmp_path / "file" / "output.log", wire)  # no file can be made there

    out.write(b"hello")
    closed(out)

    assert wire.log == b"hello"


def test_several_processes_run_below_torchrun_whatever_the_command_is() -> None:
    python = Path("/env/bin/python")

    assert command_of(["python", "train.py"], 1, python) == ["python", "train.py"]
    assert command_of(["python", "train.py"], 2, python) == [
        *["/env/bin/python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        *["--local-addr=127.0.0.1", "--no-python", "python", "train.py"],
    ]


@pytest.mark.parametrize("id_", ["../../etc", "a/b", "", "x" * 200, "a\0b"])
def test_a_lease_can_name_no_folder_but_its_own(id_: str) -> None:
    key = key_of(id_)

    assert key.isalnum()
    assert 8 <= len(key) <= 63
    assert key_of("00000000-0000-4000-8000-000000000001") == "00000000-0000-4000-8000-000000000001"


def test_a_proxys_password_is_not_for_jobs() -> None:
    found = proxies({"http_proxy": "http://me:pw@proxy:1", "HTTPS_PROXY": "http://proxy:1", "HOME": "/root"})

    assert found == {"HTTPS_PROXY": "http://proxy:1"}


# --- the whole of it, without a hub


class Here:
    """A project folder, and `potluck run --local` in it."""

    def __init__(self, root: Path) -> None:
        self.folder, self.out = root / "project", root / "project" / "out"
        self.folder.mkdir()
        self.said: list[str] = []
        self.output = b""
        self.stop = threading.Event()

    def run(
        self, script: str, *, secrets: dict[str, str] | None = None, executor: str = "process", **spec: Any
    ) -> JobReport:
        (self.folder / "main.py").write_text(script)
        wanted = JobSpec(["python", "main.py"], name="here", secrets=sorted(secrets or {}), **{"grace_s": 5.0, **spec})
        return local.run_local(
            wanted,
            self.folder,
            self.out,
            secrets=secrets or {},
            executor=executor,
            say=self.said.append,
            on_output=self._heard,
            stop=self.stop,
        )

    def _heard(self, piece: bytes) -> None:
        self.output += piece


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "potluck"))
    return Here(tmp_path)


def test_a_local_run_has_the_same_variables_and_leaves_its_results(here: Here, tmp_path: Path) -> None:
    script = """
import os, pathlib
assert not pathlib.Path("out").exists(), "earlier results are no part of the project"
for name in ("RUN_ID", "ATTEMPT", "OUTPUT_DIR", "CHECKPOINT_DIR", "METRICS_DIR"):
    assert os.environ["POTLUCK_" + name], name
pathlib.Path(os.environ["POTLUCK_OUTPUT_DIR"], "model").write_text("m")
pathlib.Path(os.environ["POTLUCK_CHECKPOINT_DIR"], "step").write_text("3")
print(os.environ["MINE"], os.environ["OMP_NUM_THREADS"], os.environ["KEY"][:3])
print(os.environ["KEY"])
"""
    here.out.mkdir()
    (here.out / "old").touch()

    report = here.run(script, env={"MINE": "yes"}, secrets={"KEY": "abcdefgh"}, resources=Resources(cpu="1"))

    assert (report.outcome, report.exit_code, report.executor) == ("exited", 0, "process"), here.output
    assert here.output == b"yes 1 abc\n***\n"
    assert (here.out / "model").read_text() == "m"
    assert sorted(path.name for path in here.out.iterdir()) == ["model", "old"]
    assert not list((tmp_path / "potluck/cache/local").iterdir())


def test_a_gang_without_a_hub_is_a_gang_of_one(here: Here) -> None:
    script = "import json, os\nprint(json.loads(os.environ['POTLUCK_GANG']), 'RANK' in os.environ)"

    assert here.run(script, gang=GangSpec(2, 8, batch=64)).exit_code == 0
    assert here.output == b"{'batch': 64, 'policy': 'dynamic'} False\n"

    assert here.run("import os; print(os.environ['WORLD_SIZE'])", gang=GangSpec(2, 2, compat=True)).exit_code == 0
    assert here.output.endswith(b"\n1\n")


def test_the_checkpoint_of_a_local_run_that_failed_is_kept_beside_its_results(here: Here) -> None:
    script = """
import os, pathlib
pathlib.Path(os.environ["POTLUCK_OUTPUT_DIR"], "log").write_text("l")
pathlib.Path(os.environ["POTLUCK_CHECKPOINT_DIR"], "step").write_text("3")
raise SystemExit(1)
"""

    report = here.run(script)

    assert report.exit_code == 1
    assert (here.out / "log").read_text() == "l"
    assert (here.out / local.CHECKPOINTS / "step").read_text() == "3"
    assert any(str(here.out / local.CHECKPOINTS) in line for line in here.said)


def test_what_a_killed_local_run_left_is_cleared_away_and_a_live_ones_is_not(here: Here, tmp_path: Path) -> None:
    place = tmp_path / "potluck/cache/local"
    dead, alive = place / "local-dead", place / "local-alive"
    for folder in (dead, alive):
        (folder / "work").mkdir(parents=True)
    (place / "local-dead.lock").touch()
    held = try_lock(place / "local-alive.lock")
    assert held is not None

    here.run("print('hello')")

    assert sorted(path.name for path in place.iterdir()) == ["local-alive", "local-alive.lock"]
    held.close()


def test_results_that_cannot_be_brought_home_are_not_lost(here: Here) -> None:
    (here.out / "model").mkdir(parents=True)
    script = "import os, pathlib; pathlib.Path(os.environ['POTLUCK_OUTPUT_DIR'], 'model').write_text('m')"

    with pytest.raises(PotluckError, match="could not be brought to") as caught:
        here.run(script)

    kept = Path(str(caught.value).rpartition("They are in ")[2])
    assert (kept / "output" / "model").read_text() == "m"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only an agent that is root changes the user")
def test_results_of_a_sandboxed_local_run_belong_to_the_caller_and_the_project_stays_as_it_was(here: Here) -> None:
    found = {one.name: one for one in executors.found()}["bubblewrap"]
    if not found.works:
        pytest.skip(found.reason)
    (here.folder / "data").mkdir()
    (here.folder / "data" / "set").write_text("1")
    here.out.mkdir()
    (here.out / "mine").write_text("from before")
    script = """
import os, pathlib
assert os.getuid() != 0
out = pathlib.Path(os.environ["POTLUCK_OUTPUT_DIR"])
(out / "deep").mkdir()
(out / "deep" / "model").write_text("m")
(out / "link").symlink_to("/etc/passwd")
pathlib.Path(os.environ["POTLUCK_CHECKPOINT_DIR"], "step").write_text("3")
pathlib.Path("data/set").write_text("2")
raise SystemExit(1)
"""

    report = here.run(script, executor="bubblewrap")

    assert (report.exit_code, report.executor) == (1, "bubblewrap"), here.output
    everything = [here.folder, *here.folder.rglob("*")]
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in everything} == {(0, os.getegid())}
    assert (here.out / "deep" / "model").read_text() == "m"
    assert (here.out / local.CHECKPOINTS / "step").read_text() == "3"
    assert (here.folder / "data" / "set").read_text() == "1"
    assert not (here.out / "link").is_symlink()


def test_an_exit_code_and_a_signal_come_through(here: Here) -> None:
    assert here.run("raise SystemExit(7)").exit_code == 7
    report = here.run("import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)")
    assert (report.exit_code, report.signal) == (138, "SIGUSR1")


def test_a_command_that_does_not_exist_says_so(here: Here) -> None:
    report = local.run_local(
        JobSpec(["no-such-program"]),
        here.folder,
        here.out,
        secrets={},
        executor="process",
        say=here.said.append,
        on_output=here._heard,
        stop=here.stop,
    )

    assert report.exit_code == 127
    assert "no-such-program" in report.reason


def test_a_time_limit_ends_it_and_is_a_failure(here: Here) -> None:
    report = here.run("import time\ntime.sleep(1000)", timeout_s=0.5)

    assert (report.outcome, report.code) == ("failed", "timeout")


def test_stop_ends_it(here: Here) -> None:
    ended = threading.Timer(0.0, lambda: until(lambda: b"begun" in here.output) and here.stop.set())
    ended.start()

    report = here.run("import time\nprint('begun', flush=True)\ntime.sleep(1000)")

    assert (report.outcome, report.reason, report.signal) == ("cancelled", "stopped", "SIGTERM")


def test_what_this_machine_does_not_have_is_refused_at_once(here: Here) -> None:
    with pytest.raises(BadInput, match="this machine has"):
        here.run("", resources=Resources(memory="900TB"))
    with pytest.raises(BadInput, match="GPU"):
        here.run("", resources=Resources(gpu="64"))


def test_an_environment_that_cannot_be_built_fails_with_its_reason(here: Here) -> None:
    report = here.run("print('no')", requirements="missing.txt")

    assert (report.outcome, report.code) == ("failed", "environment")
    assert "missing.txt" in report.reason
    assert here.output == b""
    assert os.path.isdir(here.out)


# --- with other Pythons and several processes

RANKS = """
import os, signal, sys, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {total.item():.0f}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("executor", "network"), [("process", True), ("bubblewrap", True), ("bubblewrap", False)])
def test_two_processes_of_one_job_add_up(here: Here, executor: str, network: bool) -> None:
    pytest.importorskip("torch")
    found = {one.name: one for one in executors.found()}[executor]
    if not found.works:
        pytest.skip(found.reason)

    report = here.run(RANKS, executor=executor, procs=2, network=network)

    assert (report.exit_code, report.executor) == (0, executor), here.output
    for rank in range(2):
        assert f"rank {rank} of 2: 3".encode() in here.output


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["process", "bubblewrap"])
def test_each_of_several_processes_may_save_when_the_job_is_to_end(here: Here, executor: str) -> None:
    pytest.importorskip("torch")
    found = {one.name: one for one in executors.found()}[executor]
    if not found.works:
        pytest.skip(found.reason)
    script = """
import os, pathlib, signal, sys, time
def save(*_):
    pathlib.Path(os.environ["POTLUCK_OUTPUT_DIR"], os.environ["RANK"]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(1000)
"""
    ended = threading.Timer(0.0, lambda: until(lambda: here.output.count(b"ready") == 2) and here.stop.set())
    ended.start()

    report = here.run(script, executor=executor, procs=2, grace_s=60.0)

    assert (report.outcome, report.reason) == ("cancelled", "stopped"), here.output
    assert [(here.out / str(rank)).read_text() for rank in range(2)] == ["saved", "saved"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_whatever_the_umask_a_sandboxed_job_can_use_its_environment(
    here: Here, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    found = {one.name: one for one in executors.found()}["bubblewrap"]
    if not found.works:
        pytest.skip(found.reason)
    monkeypatch.setattr(builds, "find_uv", lambda: "")
    wheel(here.folder / "wheels", "tinyone")
    (here.folder / "requirements.txt").write_text("--no-index\n./wheels/tinyone-1.0-py3-none-any.whl\n")
    before = os.umask(umask)

    try:
        report = here.run(
            "import potluck, tinyone, os\npotluck.log(1, a=1)\nprint(tinyone.VALUE, os.getcwd())",
            executor="bubblewrap",
            requirements="requirements.txt",
        )
    finally:
        os.umask(before)

    assert (report.exit_code, report.executor) == (0, "bubblewrap"), here.output
    assert b"\n1 /" in b"\n" + here.output
