"""A job on another machine, as far as this one can play two: a network namespace of its own, with a cable to cut.

Needs root and `ip`; the container test also podman. The hub listens on the cable's address, so it is TLS as in a real
network. nsenter and not `ip netns exec`: the latter mounts another /sys, in which a container runtime finds no cgroups.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from potluck.domain.job import JobSpec, Resources
from potluck.testing import LocalCluster

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter"),
    reason="another network namespace takes root and iproute2",
)
PLAIN = ("--runtime", "any", "--yes", "--executor", "process")


@dataclass(frozen=True)
class Elsewhere:
    """A machine at the other end of a cable: a network namespace and a pair of virtual interfaces."""

    name: str
    ours: str  # the hub's address
    theirs: str

    @property
    def inside(self) -> tuple[str, ...]:
        return ("nsenter", f"--net=/var/run/netns/{self.name}")

    def lay(self) -> None:
        near, far = f"{self.name}a", f"{self.name}b"
        ip("netns", "add", self.name)
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", self.name)
        ip("addr", "add", f"{self.ours}/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", self.name, "addr", "add", f"{self.theirs}/30", "dev", far)
        ip("-n", self.name, "link", "set", far, "up")
        ip("-n", self.name, "link", "set", "lo", "up")

    def cut(self) -> None:
        """As if somebody stepped on the cable: nothing arrives, and nobody is told."""
        ip("link", "set", f"{self.name}a", "down")

    def mend(self) -> None:
        ip("link", "set", f"{self.name}a", "up")

    def remove(self) -> None:
        subprocess.run(["ip", "link", "del", f"{self.name}a"], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    number = os.getpid() % 4000  # side by side with another test process
    high, low = divmod(number * 4, 256)
    place = Elsewhere(f"pl{number}", f"10.213.{high}.{low + 1}", f"10.213.{high}.{low + 2}")
    try:
        place.lay()
    except AssertionError as error:
        place.remove()
        pytest.skip(f"no network namespaces here: {error}")
    try:
        yield place
    finally:
        place.remove()


@pytest.fixture
def cluster(tmp_path: Path, elsewhere: Elsewhere) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "c", bind=elsewhere.ours, house_worker=False) as running:
        yield running
        print(running.tails())


def go_on_through_a_cut(cluster: LocalCluster, elsewhere: Elsewhere, *, seconds: int, patience_s: float) -> None:
    cluster.add_worker("far", arguments=PLAIN, inside=elsewhere.inside)
    script = f"for i in $(seq {seconds * 4}); do echo tick $i; sleep 0.25; done; echo done"
    job = cluster.submit(JobSpec(["/bin/sh", "-c", script], patience_s=patience_s))
    cluster.until(lambda: "tick 4\n" in cluster.output(job), timeout_s=60, what="its first output")

    elsewhere.cut()
    cluster.until(
        lambda: cluster.hub.info() is not None and not _heard_lately(cluster, seconds),
        timeout_s=seconds + 60,
        what="a silence",
    )
    assert cluster.job(job).state == "running"
    elsewhere.mend()

    ended = cluster.job_ends(job)
    assert ended.state == "succeeded", ended.reason
    assert len(ended.attempts) == 1
    lines = cluster.output(job).splitlines()
    assert lines == [f"tick {i + 1}" for i in range(seconds * 4)] + ["done"]


def _heard_lately(cluster: LocalCluster, seconds: float) -> bool:
    from datetime import UTC, datetime, timedelta

    worker = next(worker for worker in cluster.hub.workers() if worker.name == "far")
    return datetime.fromisoformat(worker.last_seen) > datetime.now(UTC) - timedelta(seconds=seconds)


def test_a_job_goes_on_while_its_network_is_cut_and_nothing_it_wrote_is_missing(
    cluster: LocalCluster, elsewhere: Elsewhere
) -> None:
    go_on_through_a_cut(cluster, elsewhere, seconds=20, patience_s=120)


@pytest.mark.slow
def test_a_cut_of_a_whole_minute(cluster: LocalCluster, elsewhere: Elsewhere) -> None:
    go_on_through_a_cut(cluster, elsewhere, seconds=60, patience_s=120)


@pytest.mark.skipif(not shutil.which("podman") or not shutil.which("runc"), reason="podman and runc are not installed")
def test_a_container_on_another_machine_is_ended_by_its_memory_limit_which_is_said(
    cluster: LocalCluster, elsewhere: Elsewhere
) -> None:
    cluster.add_worker("far", arguments=("--executor", "podman"), inside=elsewhere.inside)
    greedy = "hoard = []\nfor i in range(48):\n    hoard.append(b'x' * (64 << 20))\n    print(i, flush=True)\n"
    resources = Resources(memory="1GB")

    fine = cluster.submit(JobSpec([sys.executable, "-c", "print(6 * 7)"], resources=resources))
    killed = cluster.submit(JobSpec([sys.executable, "greedy.py"], resources=resources), {"greedy.py": greedy})

    first, second = cluster.job_ends(fine), cluster.job_ends(killed)
    assert first.state == "succeeded", first.reason
    assert first.attempts[0].executor == "podman"
    assert cluster.output(fine) == "42\n"
    assert (second.state, second.exit_code) == ("failed", 137)
    assert "memory limit" in second.reason and "1 GB" in second.reason, second.reason
