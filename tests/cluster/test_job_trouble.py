"""Jobs on machines as they are: clocks that are wrong, full disks, copied folders, output without end. Real processes.

One hub, over TLS, for the whole file; each test brings workers of its own and says by label that its jobs go there.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from job_kit import COUNTING, PLAIN, process_of

from potluck.domain.job import JobSpec, Resources
from potluck.protocol import JobView
from potluck.testing import LocalCluster

MB = 1_000_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    environment = {"POTLUCK_TLS": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    folder = tmp_path_factory.mktemp("trouble")
    with LocalCluster(folder / "c", house_worker=False, environment=environment) as running:
        assert running.hub.address.startswith("https://")
        yield running


@contextmanager
def worker(cluster: LocalCluster, name: str, *arguments: str, inside: tuple[str, ...] = ()) -> Iterator[None]:
    """A worker that takes what is labelled for it, until the test is over."""
    cluster.add_worker(name, arguments=(*PLAIN, *arguments), inside=inside)
    try:
        yield
    finally:
        print(cluster.log(name)[-3000:])
        stop(cluster, name)


def stop(cluster: LocalCluster, name: str) -> None:
    process = cluster.processes[name].popen
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    cluster.interrupt(name)
    _, alive = psutil.wait_procs(family, timeout=10)
    for each in alive:
        each.kill()
    process.wait(10)


def sh(script: str, room: str, **more: object) -> JobSpec:
    return JobSpec(
        ["/bin/sh", "-c", script],
        resources=Resources(cpu="0.1", memory="100MB", disk=str(more.pop("disk", "50MB")), labels={"room": room}),
        **more,  # type: ignore[arg-type]
    )


def started(cluster: LocalCluster, name: str) -> None:
    cluster.until(lambda: "works for" in cluster.log(name), timeout_s=60, what=f"{name} to be at work")


# --- clocks


FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


@pytest.mark.skipif(FAKETIME is None, reason="Debian's libfaketime is not installed")
@pytest.mark.parametrize("shift", ["+1h", "-1h"])
def test_a_worker_whose_clock_is_an_hour_wrong_is_a_worker_like_any(cluster: LocalCluster, shift: str) -> None:
    name = "ahead" if shift == "+1h" else "behind"
    lines = "for i in 1 2 3 4 5 6 7 8; do echo line $i; sleep 0.2; done"
    wrong = ("env", f"LD_PRELOAD={FAKETIME}", f"FAKETIME={shift}")
    before = datetime.now(UTC)

    with worker(cluster, name, "--label", f"room={name}", inside=wrong):
        job = cluster.submit(sh(f"{lines}; echo kept > $POTLUCK_OUTPUT_DIR/result", name, patience_s=10))
        cluster.until(lambda: "line 3\n" in cluster.output(job), timeout_s=60, what="its first lines")
        was_live = cluster.job(job).state == "running"
        ended = cluster.job_ends(job)
        now = next(each for each in cluster.hub.workers() if each.name == name)

    after = datetime.now(UTC)
    assert was_live, "its output came all at once, at its end"
    assert ended.state == "succeeded", ended.reason
    assert len(ended.attempts) == 1
    assert cluster.output(job).splitlines() == [f"line {i + 1}" for i in range(8)]
    assert [file.path for file in cluster.hub.tree(job, "outputs", 0).files] == ["result"]
    said = {e.at for e in cluster.hub.events(run_id=job)} | {now.last_seen, *times(ended)}
    assert all(before - timedelta(seconds=2) <= datetime.fromisoformat(at) <= after for at in said), said
    assert 1 < ended.attempts[0].usage.wall_s < (after - before).total_seconds()
    skewed(cluster, name, shift)


def times(job: JobView) -> set[str]:
    attempt = job.attempts[0]
    all_ = {job.created_at, job.started_at, job.ended_at, attempt.placed_at, attempt.started_at, attempt.ended_at}
    assert None not in all_
    return {at for at in all_ if at}


def skewed(cluster: LocalCluster, name: str, shift: str) -> None:
    """Its own log shows that its clock really was wrong."""
    hours, minutes = map(int, re.findall(r"^(\d\d):(\d\d):\d\d ", cluster.log(name), re.MULTILINE)[0])
    here = datetime.now()
    off = (hours * 60 + minutes - here.hour * 60 - here.minute + 720) % 1440 - 720
    assert (off > 50) if shift == "+1h" else (off < -50), f"{name}'s clock is {off} minutes off"


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 40 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small disk takes root on Linux")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_job_that_finds_the_disk_full_goes_elsewhere_and_says_why(cluster: LocalCluster, small_disk: Path) -> None:
    noise = random.Random(7).randbytes(24 * MB).hex()  # 48 MB that nothing makes smaller
    with worker(cluster, "full", "--label", "room=disk", "--home", str(small_disk / "home")):
        job = cluster.submit(sh("wc -c < big; df -P . | tail -1", "disk", disk="1MB"), {"big": noise})
        cluster.until(lambda: bool(cluster.job(job).attempts), timeout_s=60, what="its first attempt")
        cluster.until(lambda: cluster.job(job).attempts[0].ended_at is not None, timeout_s=60, what="its return")
        returned = cluster.job(job)

        with worker(cluster, "roomy", "--label", "room=disk"):
            ended = cluster.job_ends(job)

    assert returned.state in ("queued", "placed"), returned
    assert "disk" in returned.attempts[0].reason and "full" in returned.attempts[0].reason, returned.attempts[0]
    assert ended.state == "succeeded", ended.reason
    assert [attempt.worker for attempt in ended.attempts] == ["full", "roomy"]
    assert cluster.output(job).startswith(f"{48 * MB}\n")


# --- copied machines


def test_a_second_agent_in_the_same_folder_is_refused_and_the_first_works_on(cluster: LocalCluster) -> None:
    with worker(cluster, "only", "--label", "room=only"):
        started(cluster, "only")
        cluster.spawn("second", ["join", "--home", str(cluster.folder / "workers" / "only"), "--no-screen"])
        cluster.until(lambda: cluster.exit_code("second") is not None, timeout_s=60, what="the second's end")
        ended = cluster.job_ends(cluster.submit(sh("echo still here", "only")))

    assert cluster.exit_code("second") == 5
    assert "another agent" in cluster.log("second") and "--name" in cluster.log("second")
    assert ended.state == "succeeded", ended.reason


def test_a_copied_credential_lets_no_job_run_twice_and_the_copy_is_told_what_to_do(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    homes = cluster.folder / "workers"
    spec = JobSpec(
        [sys.executable, "counting.py"],
        env={"SHARED": str(tmp_path), "STEPS": "30"},
        resources=Resources(cpu="0.1", labels={"room": "twin"}),
    )
    with worker(cluster, "twin", "--label", "room=twin"):
        started(cluster, "twin")
        running = cluster.submit(spec, {"counting.py": COUNTING})
        cluster.until(lambda: process_of(tmp_path, running) is not None, timeout_s=60, what="its process")
        shutil.copytree(homes / "twin", homes / "copy", ignore=shutil.ignore_patterns("lock", "jobs", "shared"))
        cluster.come_back("copy")
        try:
            cluster.until(lambda: "one machine" in cluster.log("copy"), timeout_s=60, what="what the copy is told")
            first = cluster.job_ends(running)
            later = [cluster.submit(spec, {"counting.py": COUNTING}) for _ in range(2)]
            ended = [first, *(cluster.job_ends(job) for job in later)]
            cluster.kill("twin")  # now the copy is the only one: it may take over

            last = cluster.job_ends(cluster.submit(spec, {"counting.py": COUNTING}), timeout_s=60)
        finally:
            print(cluster.log("copy"))
            cluster.kill("copy")

    assert [(job.state, len(job.attempts)) for job in [*ended, last]] == [("succeeded", 1)] * 4, ended
    assert not list(tmp_path.glob("*.twice"))


# --- output without end


FLOOD = """
import sys, time
line = b"x" * 99 + b"\\n"
begin = time.monotonic()
for tenth in range(80):
    sys.stdout.buffer.write(line * 10_000)
    sys.stdout.buffer.flush()
    time.sleep(max(0, begin + (tenth + 1) / 10 - time.monotonic()))
print("the flood is over", flush=True)
"""


def test_a_job_that_writes_ten_megabytes_a_second_drowns_neither_its_neighbour_nor_the_agent_nor_the_hub(
    cluster: LocalCluster,
) -> None:
    with worker(cluster, "river", "--label", "room=river", "--max-tasks", "2"):
        started(cluster, "river")
        quiet = cluster.submit(sh("for i in 1 2 3 4 5 6 7 8 9 10; do echo $i; sleep 1; done; echo end", "river"))
        cluster.until(lambda: "1\n" in cluster.output(quiet), timeout_s=60, what="the quiet one's first line")
        watched = [psutil.Process(cluster.processes[name].popen.pid) for name in ("river", "hub")]
        before = [process.memory_info().rss for process in watched]
        flood = JobSpec(
            [sys.executable, "flood.py"], resources=Resources(cpu="0.1", memory="200MB", labels={"room": "river"})
        )
        loud = cluster.submit(flood, {"flood.py": FLOOD})
        most = list(before)

        def is_over() -> bool:
            for i, process in enumerate(watched):
                most[i] = max(most[i], process.memory_info().rss)
            return all(cluster.job(job).ended_at is not None for job in (quiet, loud))

        cluster.until(is_over, timeout_s=90, what="both ends")

    ends = [cluster.job(job) for job in (quiet, loud)]
    assert [job.state for job in ends] == ["succeeded", "succeeded"], [job.reason for job in ends]
    assert cluster.output(quiet).splitlines() == [*(str(i + 1) for i in range(10)), "end"]
    tail = cluster.hub.log(loud, offset=max(0, ends[1].attempts[0].log_bytes - 2000)).text
    assert tail.endswith("the flood is over\n")
    grown = [(now - then) / MB for now, then in zip(most, before, strict=True)]
    assert max(grown) < 150, f"agent and hub grew by {grown} MB for 80 MB of output"


# --- strange bytes, too many of them


def test_bytes_that_are_no_text_ansi_and_html_arrive_and_harm_nobody(cluster: LocalCluster) -> None:
    evil = "<script>alert(1)</script>"
    script = (
        rf"printf 'a\377\376b\n\033[31mred\033[0m\033]0;title\007\n\000nul\n{evil}\nz\303'; printf '\274\n\r99%%\n'"
    )
    with worker(cluster, "plain", "--label", "room=bytes"):
        job = cluster.submit(sh(script, "bytes"))
        ended = cluster.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    text = cluster.output(job)
    shown = cluster.run_cli("logs", job)

    assert text.split("\n")[0] == "a\ufffd\ufffdb"
    assert f"\n{evil}\n" in text and "zü\n" in text  # the letter was written in two halves
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout and "\x07" not in shown.stdout and "\x00" not in shown.stdout
    assert "red" in shown.stdout and evil in shown.stdout


def test_a_project_over_the_limit_is_refused_before_anything_is_sent(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print(1)\n")
    (tmp_path / "data").mkdir()
    for name, size in (("huge.bin", 2_100 * MB), ("small.bin", MB)):
        with (tmp_path / "data" / name).open("wb") as file:
            file.truncate(size)  # a hole: no disk is filled
    blobs = cluster.data_dir / "blobs"
    kept = sum(1 for path in blobs.rglob("*") if path.is_file())

    done = cluster.run_cli("run", "--folder", str(tmp_path), "--", "python", "train.py")

    assert done.returncode == 2, done.stderr
    assert "huge.bin" in done.stderr and "at most 2" in done.stderr and ".potluckignore" in done.stderr, done.stderr
    assert sum(1 for path in blobs.rglob("*") if path.is_file()) == kept
