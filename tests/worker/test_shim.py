"""Does nothing of a job survive its end, its agent's or its shim's, and do its limits hold, with control groups or without?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from box_kit import DAEMON, NOWHERE, a_box, is_free, python, start, until

from potluck.worker.jobs import limits
from potluck.worker.jobs.box import clock
from potluck.worker.jobs.executors.process import Process
from potluck.worker.jobs.executors.running import SHIM, Running
from potluck.worker.jobs.limits import Groups

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim's guarantees are Linux's")


@pytest.fixture(params=["groups", "no groups"])
def groups(request: pytest.FixtureRequest) -> Groups:
    """With the kernel's help and without."""
    if request.param == "no groups":
        return NOWHERE
    if not limits.here().works:
        pytest.skip(limits.here().reason)
    return limits.here()


# --- a command's own end


def test_a_command_leaves_with_its_own_exit_code(tmp_path: Path, groups: Groups) -> None:
    job = start(a_box(tmp_path, "sh", "-c", "echo out; echo err >&2; exit 7"), groups=groups)

    ended = job.ended()

    assert (ended.exit_code, ended.signal, ended.reason, ended.code) == (7, "", "exit code 7", "")
    assert job.said == "out\nerr\n"


def test_a_signal_has_its_name_and_a_shells_exit_code(tmp_path: Path, groups: Groups) -> None:
    ended = start(a_box(tmp_path, "sh", "-c", "kill -SEGV $$"), groups=groups).ended()

    assert (ended.exit_code, ended.signal, ended.reason) == (139, "SIGSEGV", "ended by SIGSEGV")


def test_it_starts_in_its_folder_with_its_environment_and_nothing_to_read(tmp_path: Path) -> None:
    box = a_box(tmp_path, "sh", "-c", 'pwd; echo "$SONG"; cat; echo over', env={"SONG": "it's\ntwo lines"})

    job = start(box)

    assert job.ended().exit_code == 0
    assert job.said == f"{box.work}\nit's\ntwo lines\nover\n"


def test_the_agents_secrets_are_not_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "hidden")

    job = start(a_box(tmp_path, "env"))

    job.ended()
    assert "hidden" not in job.said
    assert "PATH=" in job.said


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    ended = start(a_box(tmp_path, "no-such-program")).ended()

    assert (ended.exit_code, ended.reason) == (127, "the command cannot be started: no-such-program was not found")


def test_a_command_that_may_not_be_executed_is_named(tmp_path: Path) -> None:
    box = a_box(tmp_path, "./script")
    (box.work / "script").write_text("#!/bin/sh\n")

    ended = start(box).ended()

    assert (ended.exit_code, ended.reason) == (126, "the command cannot be started: ./script may not be executed")


def test_megabytes_of_output_arrive_whole(tmp_path: Path) -> None:
    job = start(a_box(tmp_path, *python("import sys; sys.stdout.write('x' * 5_000_000)")))

    assert job.ended().exit_code == 0
    assert len(job.said) == 5_000_000


def test_a_listener_that_fails_does_not_hold_the_command_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(str(args.exc_value)))

    def fail(piece: bytes) -> None:
        raise OSError("no space left for the log")

    executor = Process()
    box = a_box(tmp_path, *python("print('x' * 500_000)"))
    ended = Running(executor, box, executor.plan(box, NOWHERE), on_output=fail).wait(60.0)

    assert ended is not None and ended.exit_code == 0
    assert told == ["no space left for the log"]


# --- nothing is left


def test_what_detaches_itself_dies_with_the_command(tmp_path: Path, groups: Groups) -> None:
    box = a_box(tmp_path)
    lock = box.output / "lock"

    job = start(a_box(tmp_path, *python(DAEMON, str(lock))), groups=groups)

    assert job.ended().exit_code == 0
    assert job.said == "ready\n"
    assert is_free(lock)


def test_a_fork_bomb_dies_with_the_command(tmp_path: Path, groups: Groups) -> None:
    lock = a_box(tmp_path).output / "lock"
    bomb = """
import fcntl, os, sys, time
fcntl.flock(open(sys.argv[1], "w"), fcntl.LOCK_SH)  # all descendants hold it
for _ in range(60):
    if os.fork() == 0:
        while True:  # for each that dies another is born
            try: pid = os.fork()
            except OSError: time.sleep(0.01); continue
            if pid: os.waitpid(pid, 0)
            else: time.sleep(0.05); os._exit(0)
print("ready", flush=True)
time.sleep(60)
"""
    job = start(a_box(tmp_path, *python(bomb, str(lock)), pids=200), groups=groups)
    job.says("ready")

    job.running.kill("enough")

    assert job.ended().reason == "enough"
    assert is_free(lock)


def test_everything_dies_when_the_agent_is_killed(tmp_path: Path, groups: Groups) -> None:
    box = a_box(tmp_path)
    lock = box.output / "lock"
    plan = Process().plan(a_box(tmp_path, *python(DAEMON + "time.sleep(60)", str(lock))), groups)
    shim = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SHIM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert shim.stdin is not None and shim.stderr is not None
    shim.stdin.write(json.dumps(plan).encode() + b"\n")
    shim.stdin.flush()
    assert shim.stderr.readline() == b"ready\n"

    shim.stdin.close()  # as the kernel does for a process that is no more

    out, _ = shim.stdout.read() if shim.stdout else b"", shim.wait(30)
    assert b'"why": "orphaned"' in out
    assert is_free(lock)
    shim.stderr.close()
    if shim.stdout:
        shim.stdout.close()


AGENT = """
import sys, time
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from box_kit import DAEMON, NOWHERE, a_box, python, start
from potluck.worker.jobs.box import clock
lock = Path(sys.argv[2])
job = start(a_box(Path(sys.argv[1]), *python(DAEMON + "time.sleep(60)", str(lock))), groups=NOWHERE,
            deadline=lambda: clock() + 1.5)
job.says("ready")
print("ready", flush=True)
time.sleep(60)
"""


def test_everything_dies_when_the_agent_freezes_past_its_deadline(tmp_path: Path) -> None:
    lock = a_box(tmp_path).output / "lock"
    words = [sys.executable, "-c", AGENT, str(tmp_path), str(lock), str(Path(__file__).parent)]
    agent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "ready\n"
        assert not is_free(lock)

        agent.send_signal(signal.SIGSTOP)

        assert until(lambda: is_free(lock))
    finally:
        agent.kill()
        agent.communicate()


def test_a_deadline_that_moves_on_ends_nothing(tmp_path: Path) -> None:
    job = start(a_box(tmp_path, "sleep", "3"), deadline=lambda: clock() + 2.0)

    assert job.ended().exit_code == 0


def test_a_deadline_that_stands_still_ends_the_command(tmp_path: Path) -> None:
    until_s = clock() + 0.5

    ended = start(a_box(tmp_path, "sleep", "60"), deadline=lambda: until_s).ended()

    assert ended.code == "fenced"
    assert ended.reason == "killed because its lease lapsed while the hub was out of reach"


def test_nothing_is_left_when_the_shim_itself_is_killed(tmp_path: Path, groups: Groups) -> None:
    box = a_box(tmp_path)
    lock = box.output / "lock"
    command = python(DAEMON + "time.sleep(60)", str(lock))
    job = start(a_box(tmp_path, *command, env={"OUT": str(box.output), "HERE": str(box.work)}), groups=groups)
    job.says("ready")

    os.kill(job.running.pid, signal.SIGKILL)

    ended = job.ended()
    assert (ended.code, ended.reason) == ("executor", "lost: the process that watches over it was killed from outside")
    assert until(lambda: is_free(lock))


def test_control_groups_are_removed_after_the_end(tmp_path: Path) -> None:
    if not limits.here().works:
        pytest.skip(limits.here().reason)
    box = a_box(tmp_path, "true", memory_bytes=100_000_000)

    start(box).ended()

    folders = [Path(group["folder"]) for group in limits.plan(box, limits.here())["groups"]]
    assert folders and not any(folder.exists() for folder in folders)


# --- being asked to end

SAVES = """
import signal, sys, time
def save(*_):
    open("checkpoint", "w").write("saved")
    sys.exit(5)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_training_inside_a_script_hears_that_it_shall_end(tmp_path: Path, groups: Groups) -> None:
    box = a_box(tmp_path, "sh", "-c", '"$@"; code=$?; echo after; exit $code', "sh", *python(SAVES))
    job = start(box, groups=groups)
    job.says("ready")

    job.running.end(30.0, "stopped by ann")

    ended = job.ended()
    assert (ended.exit_code, ended.signal, ended.reason, ended.code) == (5, "", "stopped by ann", "ended")
    assert (box.work / "checkpoint").read_text() == "saved"
    assert "after" in job.said


def test_whoever_does_not_hear_is_killed_after_the_grace(tmp_path: Path, groups: Groups) -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    job = start(a_box(tmp_path, *python(deaf)), groups=groups)
    job.says("ready")

    job.running.end(0.3, "stopped by ann")

    ended = job.ended()
    assert (ended.exit_code, ended.signal, ended.reason) == (137, "SIGKILL", "stopped by ann")


def test_a_second_word_makes_it_sooner(tmp_path: Path) -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    job = start(a_box(tmp_path, *python(deaf)))
    job.says("ready")

    job.running.end(600.0, "stopped by ann")
    job.running.kill("at once")

    assert job.ended().reason == "stopped by ann"


def test_orders_after_the_end_do_no_harm(tmp_path: Path) -> None:
    job = start(a_box(tmp_path, "true"))
    ended = job.ended()

    job.running.end(1.0, "late")
    job.running.kill("late")
    job.running.renew(clock() + 5)

    assert job.running.wait(0) is ended


# --- limits


def test_the_time_limit_ends_it(tmp_path: Path, groups: Groups) -> None:
    ended = start(a_box(tmp_path, "sleep", "60", timeout_s=0.3, grace_s=0.2), groups=groups).ended()

    assert (ended.code, ended.reason) == ("timeout", "stopped after its time limit of 0.3 s")


def test_the_memory_limit_kills_it_and_the_sentence_says_so(tmp_path: Path, groups: Groups) -> None:
    eater = "import time; held = bytearray(b'x') * 200_000_000; time.sleep(10); print('survived')"

    job = start(a_box(tmp_path, *python(eater), memory_bytes=64_000_000), groups=groups)

    ended = job.ended()
    assert (ended.exit_code, ended.signal, ended.code) == (137, "SIGKILL", "memory")
    assert ended.reason.startswith("killed by the memory limit: asked 64 MB, used ")
    assert "survived" not in job.said
    assert ended.usage.max_memory_bytes >= 60_000_000


def test_memory_that_a_child_took_is_told_of_when_the_command_fails_after_it(tmp_path: Path) -> None:
    if not limits.here().works:
        pytest.skip(limits.here().reason)
    eater = "held = bytearray(b'x') * 200_000_000"
    box = a_box(tmp_path, "sh", "-c", '"$@" || exit 3', "sh", *python(eater), memory_bytes=64_000_000)

    ended = start(box).ended()

    if limits.here().version == 1:  # version 2 kills all of it at once
        assert ended.reason.startswith("exit code 3, after one of its processes was killed by the memory limit")
    assert ended.code == "memory"


def test_processes_are_limited(tmp_path: Path, groups: Groups) -> None:
    many = """
import os, time
count = 0
try:
    for count in range(100):
        if os.fork() == 0:
            time.sleep(30); os._exit(0)
except OSError: pass
print("started", count, flush=True)
time.sleep(5 if count > 30 else 0)
print("survived")
"""
    job = start(a_box(tmp_path, *python(many), pids=20), groups=groups)

    ended = job.ended()
    if ended.code == "pids":
        assert not groups.works
        assert ended.reason == "killed because it had more than 20 processes"
        assert "survived" not in job.said
    else:  # the kernel did not let it: by its group, or an ordinary user by RLIMIT_NPROC
        assert int(job.said.split()[1]) <= 20


def test_the_disk_limit_stops_many_files(tmp_path: Path) -> None:
    writer = """
import os, time
for n in range(20):
    with open(f"f{n}", "wb") as file: file.write(os.urandom(1_000_000))
time.sleep(30)
"""
    ended = start(a_box(tmp_path, *python(writer), disk_bytes=5_000_000)).ended()

    assert ended.code == "disk"
    assert ended.reason.startswith("stopped by the disk limit: asked 5 MB, wrote ")


def test_the_disk_limit_stops_one_file_at_once(tmp_path: Path) -> None:
    box = a_box(tmp_path, "dd", "if=/dev/zero", "of=big", "bs=1M", "count=50", disk_bytes=5_000_000)

    ended = start(box).ended()

    assert (ended.signal, ended.code) == ("SIGXFSZ", "disk")
    assert (box.work / "big").stat().st_size <= 5_000_000


def test_what_was_there_before_does_not_count_as_written(tmp_path: Path) -> None:
    box = a_box(tmp_path, "sh", "-c", "sleep 1.2; echo small > small", disk_bytes=5_000_000)
    (box.work / "data").write_bytes(os.urandom(8_000_000))

    assert start(box).ended().exit_code == 0


def test_cores_are_limited_where_there_are_groups(tmp_path: Path) -> None:
    if "cpu" not in limits.here().folders:
        pytest.skip("no control group for the CPU here")
    spin = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"

    ended = start(a_box(tmp_path, *python(spin), cpu=0.2)).ended()

    assert ended.usage.cpu_s < 0.6 * ended.usage.wall_s


# --- the shim itself


def test_the_shim_needs_nothing_but_the_standard_library() -> None:
    words = [sys.executable, "-I", "-S", "-X", "importtime", str(SHIM)]

    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)

    names = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "json" in names
    assert names - set(sys.stdlib_module_names) - {"imported package"} == {"potluck"}


# --- other systems


def test_everything_can_be_imported_where_there_is_no_unix() -> None:
    code = (
        "import sys, psutil\n"
        "for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'): sys.modules[name] = None\n"
        "import potluck.worker.jobs.executors, potluck.worker.jobs.shim_windows\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# A job object that allows everything: what is tried is the rest of the shim, on a system that it is not for.
WINDOWS = """
import ctypes, os, runpy, sys
class Kernel:
    def __getattr__(self, name):
        def call(*_): return 1
        setattr(self, name, call)
        return call
ctypes.WinDLL = lambda *_, **__: Kernel()
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("order", "result"),
    [
        (b"", {"exit": 7, "why": ""}),
        (b"kill\n", {"exit": 137, "why": "killed"}),
        (b"renew 0.1\n", {"exit": 137, "why": "fenced"}),
        (b"end 600\n", {"exit": -15, "why": "ended"}),
        (None, {"exit": 137, "why": "orphaned"}),
    ],
)
def test_the_windows_shim_hears_orders_and_says_how_it_ended(
    tmp_path: Path, order: bytes | None, result: dict[str, object]
) -> None:
    command = ["sh", "-c", "exit 7"] if order == b"" else ["sleep", "60"]
    plan = Process().plan(a_box(tmp_path, *command), NOWHERE)
    words = [sys.executable, "-I", "-S", "-c", WINDOWS, str(SHIM.with_name("shim_windows.py"))]
    shim = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert shim.stdin is not None and shim.stdout is not None

    shim.stdin.write(json.dumps(plan).encode() + b"\n" + (order or b""))
    shim.stdin.flush()
    if order is None:
        shim.stdin.close()
        shim.stdin = None
    first, last = shim.stdout.readline(), shim.stdout.readline()
    shim.communicate()

    assert "started" in json.loads(first)
    assert json.loads(last).items() >= result.items()
