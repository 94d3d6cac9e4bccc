"""Which executor is taken, what is it told, and does it do on this machine what it says?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from box_kit import DAEMON, PYTHON, a_box, is_free, python, start, until
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import BadInput, NotAllowed, NotFound
from potluck.worker.jobs import executors, limits
from potluck.worker.jobs.box import Box, check
from potluck.worker.jobs.executors import Found, choose
from potluck.worker.jobs.executors.common import binds, exports, parents_of
from potluck.worker.jobs.executors.containers import skeleton_tar
from potluck.worker.jobs.executors.ending import how_it_ended, size, span
from potluck.worker.jobs.limits import Groups

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are Linux's")


def working(*names: str) -> list[Found]:
    return [Found(name, name in names, "" if name in names else "not installed") for name in executors.ALL]


# --- choosing


@pytest.mark.parametrize(
    ("works", "image", "foreign", "runtime", "prefer", "taken"),
    [
        (("podman", "bubblewrap", "process"), "", True, "container", "", "bubblewrap"),
        (("podman", "bubblewrap", "process"), "python:3.12", True, "container", "", "podman"),
        (("docker", "apptainer", "process"), "python:3.12", False, "any", "", "docker"),
        (("podman", "process"), "", True, "container", "", "podman"),
        (("process",), "", False, "container", "", "process"),
        (("process",), "", True, "any", "", "process"),
        (("podman", "bubblewrap", "process"), "", False, "container", "process", "process"),
        (("podman", "bubblewrap", "process"), "", True, "container", "podman", "podman"),
    ],
)
def test_the_best_executor_that_the_owner_allows_is_taken(
    works: Sequence[str], image: str, foreign: bool, runtime: str, prefer: str, taken: str
) -> None:
    chosen = choose(image=image, foreign=foreign, runtime=runtime, found=working(*works), prefer=prefer)

    assert chosen.name == taken


def test_other_peoples_code_never_runs_as_a_plain_process_without_the_owners_yes() -> None:
    with pytest.raises(NotAllowed, match=r"in a container only.*bubblewrap: not installed.*--runtime any"):
        choose(foreign=True, runtime="container", found=working("process"))


def test_not_even_when_the_owner_prefers_processes_for_the_own_jobs() -> None:
    with pytest.raises(NotAllowed):
        choose(foreign=True, runtime="container", found=working("bubblewrap", "process"), prefer="process")


def test_an_image_without_an_engine_says_what_is_missing() -> None:
    with pytest.raises(NotFound, match=r"python:3.12 needs podman, docker or apptainer.*podman: not installed"):
        choose(image="python:3.12", foreign=False, runtime="any", found=working("bubblewrap", "process"))


def test_an_executor_that_does_not_exist_is_refused() -> None:
    with pytest.raises(NotFound, match="no executor 'chroot'"):
        choose(foreign=False, runtime="any", found=working("process"), prefer="chroot")


def test_every_executor_is_tried_once_and_says_why_it_does_not_work() -> None:
    found = executors.found()

    assert [one.name for one in found] == list(executors.ALL)
    assert all(one.works or one.reason for one in found)
    assert found[-1].name == "process" and found[-1].works
    assert executors.found() == found


# --- what a box may be


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"argv": []}, "without a command"),
        ({"id": "../x"}, "cannot name a container"),
        ({"env": {"A B": "x"}}, "environment variable 'A B'"),
        ({"env": {"A\nB": "x"}}, "environment variable"),
        ({"env": {"A": "x\0y"}}, "zero byte"),
        ({"work": Path("relative")}, "absolute paths"),
        ({"read_only": [Path("/")]}, "root of a file system"),
        ({"cache": Path("/a/../etc")}, "absolute paths"),
        ({"cache": Path("/a:b")}, "cannot have ':'"),
    ],
)
def test_a_box_that_no_executor_can_start_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    place = tmp_path / "x"
    fine: dict[str, object] = dict.fromkeys(("work", "output", "checkpoint", "cache", "scratch"), place)

    with pytest.raises(BadInput, match=words):
        check(Box(**{"id": "a", "argv": ["true"], "env": {}, **fine, **change}))  # type: ignore[arg-type]


def test_secrets_are_not_in_what_a_box_shows_of_itself(tmp_path: Path) -> None:
    assert "hidden" not in repr(a_box(tmp_path, "true", env={"TOKEN": "hidden"}))


# --- what an executor is told


def argv_of(name: str, box: Box, groups: Groups | None = None) -> list[str]:
    plan = executors.ALL[name].plan(box, groups or Groups(0, {}, ""))
    argv: list[str] = plan["argv"]
    return argv


def pairs(argv: Sequence[str]) -> set[tuple[str, str]]:
    return set(pairwise(argv))


@LINUX
@pytest.mark.parametrize("name", ["podman", "docker", "apptainer", "bubblewrap", "process"])
def test_no_secret_is_on_a_command_line_or_in_the_environment_of_who_builds_the_sandbox(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_TOKEN", "agents-own")
    box = a_box(tmp_path, "true", env={"TOKEN": "hidden", "LD_PRELOAD": "/evil.so", "PATH": "/evil"})

    plan = executors.ALL[name].plan(box, Groups(0, {}, ""))

    assert "hidden" not in " ".join(
        [*plan["argv"], *plan["ask"], *(word for words in plan["cleanup"] for word in words)]
    )
    if name != "process":
        assert "hidden" in plan["feed"]
        assert not {"LD_PRELOAD", "TOKEN", "AGENT_TOKEN"} & set(plan["env"])
        assert plan["env"]["PATH"] != "/evil"


@LINUX
@pytest.mark.parametrize("name", ["podman", "docker"])
def test_a_container_is_closed_and_limited(tmp_path: Path, name: str) -> None:
    box = a_box(tmp_path, "true", cpu=1.5, memory_bytes=10**9, disk_bytes=10**8, pids=99, network=False, image="img:1")

    argv = argv_of(name, box)

    assert {
        *[("--cap-drop", "all"), ("--security-opt", "no-new-privileges"), ("--memory", "1000000000")],
        *[("--memory-swap", "1000000000"), ("--cpus", "1.5"), ("--pids-limit", "99"), ("--network", "none")],
        *[("--pull", "never"), ("--ulimit", "fsize=100000000:100000000"), ("--entrypoint", "")],
        *[("--volume", f"{box.work}:{box.work}:rw"), ("--name", f"potluck-{box.id}")],
    } <= pairs(argv)
    assert "--read-only" in argv
    assert "--privileged" not in argv
    assert not any(".sock" in word for word in argv)
    assert argv[argv.index("img:1") + 1 :][-1] == "true"
    user = argv[argv.index("--user") + 1]
    assert not user.startswith("0:")


@LINUX
def test_gpus_are_handed_out_in_the_words_of_each(tmp_path: Path) -> None:
    box = a_box(tmp_path, "true", gpus=[0, 2], image="img:1")

    assert {("--device", "nvidia.com/gpu=0"), ("--device", "nvidia.com/gpu=2")} <= pairs(argv_of("podman", box))
    assert ("--gpus", '"device=0,2"') in pairs(argv_of("docker", box))
    assert "--nv" in argv_of("apptainer", box)
    for name in ("apptainer", "bubblewrap"):
        assert "export CUDA_VISIBLE_DEVICES=0,2\n" in executors.ALL[name].plan(box, Groups(0, {}, ""))["feed"]
    assert executors.ALL["process"].plan(box, Groups(0, {}, ""))["env"]["CUDA_VISIBLE_DEVICES"] == "0,2"


@LINUX
def test_a_job_without_gpus_sees_none(tmp_path: Path) -> None:
    box = a_box(tmp_path, "true")

    assert "export CUDA_VISIBLE_DEVICES=''\n" in executors.ALL["bubblewrap"].plan(box, Groups(0, {}, ""))["feed"]
    assert not any("/dev/nvidia" in word for word in argv_of("bubblewrap", box))


@LINUX
def test_apptainer_is_told_to_leave_the_home_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "potluck"))
    box = a_box(tmp_path, "true", network=False)

    argv = argv_of("apptainer", box)

    assert {"--containall", "--no-home", "--cleanenv", "--no-privs"} <= set(argv)
    assert {("--network", "none"), ("--bind", "/usr:/usr:ro"), ("--bind", f"{box.work}:{box.work}:rw")} <= pairs(argv)
    assert "docker://img:1" in argv_of("apptainer", a_box(tmp_path, "true", image="img:1"))


@LINUX
def test_docker_is_ended_through_its_daemon(tmp_path: Path) -> None:
    box = a_box(tmp_path, "true", image="img:1")

    plan = executors.ALL["docker"].plan(box, limits.here())

    assert plan["term"] == ["docker", "kill", "--signal", "TERM", f"potluck-{box.id}"]
    assert plan["kill"] == ["docker", "kill", f"potluck-{box.id}"]
    assert plan["cleanup"] == [["docker", "rm", "--force", f"potluck-{box.id}"]]
    assert plan["groups"] == []


@LINUX
@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("name", ["bubblewrap", "podman"])
def test_a_job_can_read_what_programs_look_for_whoever_runs_it(tmp_path: Path, name: str, umask: int) -> None:
    found = {one.name: one for one in executors.found()}[name]
    if not found.works:
        pytest.skip(found.reason)
    wanted = [f"/etc/{place}" for place in ("passwd", "group", "ld.so.cache", "ssl") if Path("/etc", place).exists()]
    wanted += ["/sys/devices/system/cpu/online"]
    line = (
        'for file; do test -r "$file" || echo "cannot read $file"; done; id -un; echo 1 > "$HOME/own"; touch /tmp/own'
    )
    before = os.umask(umask)
    try:
        job = start(a_box(tmp_path, "sh", "-c", line, "sh", *wanted), executor=executors.ALL[name])
        ended = job.ended()
    finally:
        os.umask(before)

    assert ended.exit_code == 0, job.said
    assert "cannot read" not in job.said
    assert name != "bubblewrap" or job.said == "job\n"


@LINUX
def test_bubblewrap_shares_the_network_only_if_the_job_may_use_it(tmp_path: Path) -> None:
    closed, opened = (argv_of("bubblewrap", a_box(tmp_path, "true", network=may)) for may in (False, True))

    if os.geteuid() == 0:
        assert "--unshare-net" in closed and "--unshare-net" not in opened
        assert {("--cap-drop", "ALL"), ("--cap-add", "CAP_SETUID")} <= pairs(closed)
        assert "--bounding-set=-all" in closed
    else:
        assert "--share-net" not in closed and "--share-net" in opened
    assert {"--die-with-parent", "--new-session", "--clearenv", "--unshare-pid"} <= {
        *closed,
        *ALL_NAMESPACES[closed[1]],
    }


ALL_NAMESPACES = {"--unshare-all": ["--unshare-pid"], "--unshare-ipc": []}


def test_inner_folders_come_after_outer_ones(tmp_path: Path) -> None:
    box = a_box(tmp_path, "true", read_only=[tmp_path / "work" / "kept", tmp_path])
    (tmp_path / "work" / "kept").mkdir()

    order = [path for path, _ in binds(box)]

    assert order.index(tmp_path) < order.index(box.work) < order.index(tmp_path / "work" / "kept")
    assert dict(binds(box))[box.work] and not dict(binds(box))[tmp_path]


def test_parents_are_outermost_first_and_never_inside_a_bound_folder() -> None:
    assert parents_of([Path("/a/b/c"), Path("/a/b/c/d/e"), Path("/x/y")]) == [Path("/a"), Path("/x"), Path("/a/b")]


@given(st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True), st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=30), max_size=4))  # fmt: skip
def test_every_value_reaches_the_command_as_it_is(env: dict[str, str]) -> None:
    env = {f"V{name}": value for name, value in env.items()}
    script = 'eval "$(cat)"; exec "$@"'

    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", "/usr/bin/env", "-0"],
        input=exports(env).encode(),
        stdout=subprocess.PIPE,
        env={},
        check=True,
    )

    got = dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0") if "=" in entry)
    assert {name: got[name] for name in env} == env


def test_the_skeleton_is_small_and_always_the_same() -> None:
    assert skeleton_tar() == skeleton_tar()
    assert len(skeleton_tar()) < 20_000


# --- control groups


def fake(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@LINUX
def test_in_version_2_groups_are_made_where_controllers_are_handed_on(tmp_path: Path) -> None:
    fake(tmp_path, {"cgroup.controllers": "cpu memory pids", "cgroup.subtree_control": "memory pids"})
    fake(tmp_path / "user", {"cgroup.controllers": "cpu memory pids", "cgroup.subtree_control": "cpu memory pids"})
    fake(tmp_path / "user" / "app", {"cgroup.controllers": "memory pids", "cgroup.subtree_control": ""})

    groups = limits.detect(tmp_path, "0::/user/app\n", try_it=False)

    assert (groups.version, set(groups.folders.values())) == (2, {str(tmp_path / "user")})
    assert set(groups.folders) == {"memory", "pids", "cpu"}


@LINUX
def test_the_root_of_version_2_is_asked_to_hand_its_controllers_on(tmp_path: Path) -> None:
    fake(tmp_path, {"cgroup.controllers": "cpu memory pids", "cgroup.subtree_control": ""})

    limits.detect(tmp_path, "0::/\n", try_it=False)

    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


@LINUX
def test_in_version_1_each_controller_has_its_own_place(tmp_path: Path) -> None:
    for name in ("memory", "pids", "cpu"):
        fake(tmp_path / name, {"cgroup.procs": ""})
    fake(tmp_path / "memory" / "mine", {"cgroup.procs": ""})

    groups = limits.detect(tmp_path, "4:memory:/mine\n8:pids:/\n1:cpu:/\n0::/\n", try_it=False)

    assert groups.version == 1
    assert groups.folders["memory"] == str(tmp_path / "memory" / "mine")
    assert groups.folders["pids"] == str(tmp_path / "pids")


@LINUX
def test_without_control_groups_the_reason_says_what_happens_instead(tmp_path: Path) -> None:
    groups = limits.detect(tmp_path, "0::/\n", try_it=False)

    assert not groups.works
    assert "watched four times a second instead" in groups.reason


@LINUX
def test_a_group_into_which_no_process_can_be_moved_is_not_taken(tmp_path: Path) -> None:
    for name in ("memory", "pids"):
        fake(tmp_path / name, {"cgroup.procs": ""})
        (tmp_path / name / f"potluck-probe-{os.getpid()}").write_text("in the way")

    assert not limits.detect(tmp_path, "4:memory:/\n8:pids:/\n").works


def test_limits_are_written_in_the_words_of_each_version(tmp_path: Path) -> None:
    box = a_box(tmp_path, "true", memory_bytes=10**9, cpu=1.5, pids=77)
    second = limits.plan(box, Groups(2, dict.fromkeys(("memory", "pids", "cpu"), "/cg"), ""))
    first = limits.plan(box, Groups(1, {name: f"/cg/{name}" for name in ("memory", "pids", "cpu")}, ""))

    (only,) = second["groups"]
    assert {(name, text) for name, text, _ in only["write"]} >= {
        *[("memory.max", "1000000000"), ("memory.swap.max", "0"), ("pids.max", "77"), ("cpu.max", "150000 100000")]
    }
    by_folder = {group["folder"]: {(name, text) for name, text, _ in group["write"]} for group in first["groups"]}
    assert ("memory.limit_in_bytes", "1000000000") in by_folder[f"/cg/memory/potluck-{box.id}"]
    assert ("cpu.cfs_quota_us", "150000") in by_folder[f"/cg/cpu/potluck-{box.id}"]
    assert ("pids.max", "77") in by_folder[f"/cg/pids/potluck-{box.id}"]


def test_where_the_kernel_does_not_hold_the_limits_they_are_watched(tmp_path: Path) -> None:
    box = a_box(tmp_path, "true", memory_bytes=10**9, pids=77)

    watched = limits.watch(box, Groups(0, {}, ""))
    held = limits.watch(box, Groups(2, {"memory": "/cg", "pids": "/cg"}, ""))

    assert (watched["memory"], watched["pids"]) == (10**9, 77)
    assert (held["memory"], held["pids"]) == (0, 0)


# --- how it ended, in words

END = {"exit": 0, "why": "", "told": None, "wall_s": 1.0, "cpu_s": 0.5, "peak": 0, "oom": 0, "added": 0}


@pytest.mark.parametrize(
    ("result", "code", "signal", "kind", "reason"),
    [
        ({"exit": 0}, 0, "", "", "exit code 0"),
        ({"exit": -11}, 139, "SIGSEGV", "", "ended by SIGSEGV"),
        ({"exit": 134}, 134, "SIGABRT", "", "ended by SIGABRT"),
        ({"exit": 137, "peak": 1_990_000_000}, 137, "SIGKILL", "memory", "killed by the memory limit: asked 2 GB, used 2.0 GB"),
        ({"exit": 137, "told": "2026-01-01 10:00:00 +0000 UTC true"}, 137, "SIGKILL", "memory", "killed by the memory limit: asked 2 GB"),
        ({"exit": 137, "peak": 10**8}, 137, "SIGKILL", "", "killed from outside (SIGKILL), as the operating system does when memory runs out"),
        ({"exit": 1, "oom": 1, "peak": 2 * 10**9}, 1, "", "memory", "exit code 1, after one of its processes was killed by the memory limit: asked 2 GB, used 2.0 GB"),
        ({"exit": -15, "why": "timeout"}, 143, "SIGTERM", "timeout", "stopped after its time limit of 2 h"),
        ({"exit": 0, "why": "timeout"}, 0, "", "timeout", "stopped after its time limit of 2 h"),
        ({"exit": -9, "why": "disk", "added": 5_200_000_000}, 137, "SIGKILL", "disk", "stopped by the disk limit: asked 5 GB, wrote 5.2 GB"),
        ({"exit": -9, "why": "full"}, 137, "SIGKILL", "disk", "stopped because the machine's disk is nearly full"),
        ({"exit": -15, "why": "ended"}, 143, "SIGTERM", "ended", "stopped by ann"),
    ],
)  # fmt: skip
def test_an_end_is_a_sentence(
    tmp_path: Path, result: dict[str, object], code: int, signal: str, kind: str, reason: str
) -> None:
    box = a_box(tmp_path, "true", memory_bytes=2 * 10**9, disk_bytes=5 * 10**9, timeout_s=7200)

    ended = how_it_ended(box, {**END, **result}, asked="stopped by ann")

    assert (ended.exit_code, ended.signal, ended.code, ended.reason) == (code, signal, kind, reason)


def test_a_container_that_never_started_says_it_in_the_engines_words(tmp_path: Path) -> None:
    box = a_box(tmp_path, "true", image="img:1")

    ended = how_it_ended(box, {**END, "exit": 125, "told": ""}, said=["Error: img:1: image not known"])

    assert (ended.exit_code, ended.code) == (None, "image")
    assert ended.reason == "the container could not be started: Error: img:1: image not known"


def test_sizes_and_times_read_well() -> None:
    assert [size(2 * 10**9), size(1_500_000), size(999)] == ["2 GB", "1.5 MB", "999 B"]
    assert size(2_040_000_000, places=1) == "2.0 GB"
    assert [span(7200), span(5400), span(45), span(0.3), span(90061)] == [
        "2 h",
        "1 h 30 min",
        "45 s",
        "0.3 s",
        "1 d 1 h",
    ]


# --- on this machine


def here(name: str) -> executors.Executor:
    found = {one.name: one for one in executors.found()}[name]
    if not found.works:
        pytest.skip(found.reason)
    return executors.ALL[name]


SANDBOXES = ["bubblewrap", "podman"]


@pytest.mark.parametrize("name", SANDBOXES)
def test_a_sandbox_runs_the_machines_python_with_its_environment_and_folders(tmp_path: Path, name: str) -> None:
    script = (
        "import os, pathlib, sys, getpass; pathlib.Path(os.environ['OUT'], 'made').write_text('x');"
        "print(os.getcwd(), os.environ['SONG'], os.getuid() != 0, os.environ.get('HOME'), sys.stdin.read() == '')"
    )
    plain = a_box(tmp_path)
    box = a_box(tmp_path, *python(script), env={"OUT": str(plain.output), "SONG": "it's\nover"}, network=False)

    job = start(box, executor=here(name))

    assert job.ended().exit_code == 0, job.said
    assert job.said == f"{box.work} it's\nover True {box.scratch}/home True\n"
    assert (box.output / "made").read_text() == "x"


@pytest.mark.parametrize("name", SANDBOXES)
def test_a_sandbox_gives_the_commands_exit_code_and_signal(tmp_path: Path, name: str) -> None:
    plain = start(a_box(tmp_path, "sh", "-c", "exit 7", network=False, id="one"), executor=here(name)).ended()
    crashed = start(a_box(tmp_path, "sh", "-c", "kill -SEGV $$", network=False, id="two"), executor=here(name)).ended()
    missing = start(a_box(tmp_path, "no-such-program", network=False, id="three"), executor=here(name)).ended()

    assert (plain.exit_code, plain.reason) == (7, "exit code 7")
    assert (crashed.exit_code, crashed.signal, crashed.reason) == (139, "SIGSEGV", "ended by SIGSEGV")
    assert missing.exit_code == 127 and "no-such-program: not found" in missing.reason


SAVES = """
import signal, sys, time
def save(*_):
    open("checkpoint", "w").write("saved")
    sys.exit(5)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", SANDBOXES)
def test_a_training_in_a_script_in_a_sandbox_hears_that_it_shall_end(tmp_path: Path, name: str) -> None:
    box = a_box(tmp_path, "sh", "-c", '"$@"; exit $?', "sh", *python(SAVES), network=False)
    job = start(box, executor=here(name))
    job.says("ready")

    job.running.end(30.0, "stopped by ann")

    ended = job.ended()
    assert (ended.exit_code, ended.reason) == (5, "stopped by ann")
    assert (box.work / "checkpoint").read_text() == "saved"


@pytest.mark.parametrize("name", SANDBOXES)
def test_three_gigabytes_are_refused_by_a_limit_of_two_hundred_megabytes(tmp_path: Path, name: str) -> None:
    box = a_box(tmp_path, *python("held = bytearray(b'x') * 3_000_000_000"), memory_bytes=200_000_000, network=False)

    ended = start(box, executor=here(name)).ended()

    assert (ended.exit_code, ended.signal, ended.code) == (137, "SIGKILL", "memory")
    assert ended.reason.startswith("killed by the memory limit: asked 200 MB, used 2")


@pytest.mark.parametrize("name", SANDBOXES)
def test_what_an_agent_left_behind_is_swept_by_the_next(tmp_path: Path, name: str) -> None:
    executor = here(name)
    box = a_box(tmp_path)
    lock = box.output / "lock"
    box = a_box(tmp_path, *python(DAEMON + "time.sleep(60)", str(lock)), network=False)
    job = start(box, executor=executor)
    job.says("ready")
    os.kill(job.running.pid, 9)

    executors.sweep({box.id: tmp_path})

    assert until(lambda: is_free(lock))
    if name == "podman":
        left = subprocess.run(
            [*here(name).cleanup("x")[0][:-3], "ps", "--all", "--quiet", "--filter", f"label=potluck.box={box.id}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert left.stdout == ""


def test_an_image_that_cannot_be_pulled_says_why() -> None:
    said: list[str] = []

    with pytest.raises(NotFound, match=r"the image localhost:1/nothing:1 cannot be pulled: .*refused"):
        here("podman").pull("localhost:1/nothing:1", stop=threading.Event(), say=said.append)

    assert said == ["the image localhost:1/nothing:1 is being pulled"]


def test_an_image_that_is_not_here_is_not_the_commands_failure(tmp_path: Path) -> None:
    ended = start(a_box(tmp_path, "true", image="localhost/nothing:1", network=False), executor=here("podman")).ended()

    assert (ended.exit_code, ended.code) == (None, "image")
    assert ended.reason.startswith("the container could not be started: Error: localhost/nothing:1: image not known")


def test_an_image_without_a_shell_is_not_the_commands_failure(tmp_path: Path) -> None:
    podman = here("podman")
    podman.prepare(a_box(tmp_path, "true"))
    box = a_box(tmp_path, "true", image=podman.skeleton_name(), network=False)  # type: ignore[attr-defined]

    ended = start(box, executor=podman).ended()

    assert (ended.exit_code, ended.code) == (None, "image")
    assert "sh" in ended.reason and "not found" in ended.reason


def test_an_image_that_is_here_is_not_pulled_again(tmp_path: Path) -> None:
    podman = here("podman")
    name = podman.skeleton_name()  # type: ignore[attr-defined]

    assert len(podman.pull(name, stop=threading.Event(), say=pytest.fail)) >= 12


@pytest.mark.skipif(not shutil.which("setpriv") or sys.platform != "linux", reason="needs setpriv")
def test_an_agent_that_is_root_runs_nothing_as_root(tmp_path: Path) -> None:
    executor = here("bubblewrap")
    job = start(a_box(tmp_path, "sh", "-c", "id -u; touch mine", network=False), executor=executor)

    assert job.ended().exit_code == 0
    assert int(job.said) != 0
    assert (job.box.work / "mine").stat().st_uid == int(job.said)


def test_the_base_python_of_the_tests_is_no_virtual_environment() -> None:
    assert Path(PYTHON).exists() and "venv" not in PYTHON
