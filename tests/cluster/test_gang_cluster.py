"""A gang as its user meets it: a real hub and real agents on three machines, each with an address and a cable of its own.

test_gang_network.py has the same without a hub. The training script keeps diaries (gang_train.py) in a folder that the
plain process executor lets it see, and what they must say is in gang_diary.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from gang_diary import Diaries, Life
from gang_net import Cable, Network, what_is_missing
from job_kit import PLAIN

from potluck.domain.job import GangSpec, JobSpec, Resources
from potluck.errors import TimedOut
from potluck.protocol import GangView, JobView
from potluck.testing import LocalCluster

MISSING = what_is_missing()
pytestmark = [pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.timeout(400)]
CABLES = {"a": Cable(100, 100, 0.0005), "b": Cable(40, 100, 0.001), "c": Cable(20, 50, 0.003)}
SCRIPT = (Path(__file__).parent / "gang_train.py").read_text()
SHORT = {"length": 320, "batch": 32, "epochs": 6}
LONG = {"length": 960, "batch": 96, "epochs": 30}
EXACT = 1e-12


@dataclass
class Room:
    """A hub in our own namespace, and an agent on each machine that was asked in."""

    cluster: LocalCluster
    network: Network
    diaries: Diaries
    names: list[str] = field(default_factory=list)

    def join(self, *names: str) -> None:
        for name in names:
            self.cluster.add_worker(name, arguments=PLAIN, inside=self.network[name].inside)
            self.names.append(name)
        homes = [self.cluster.folder / "workers" / name for name in names]
        self.until(lambda: all((home / "credential.json").exists() for home in homes), f"{names} join")

    def come_back(self, name: str) -> None:
        home = self.cluster.folder / "workers" / name
        self.cluster.spawn(name, ["join", "--home", str(home), "--no-screen"], inside=self.network[name].inside)

    def begin(self, *, least: int = 2, most: int = 3, engine: str = "auto", **changes: Any) -> str:
        spec = JobSpec(
            [sys.executable, "gang_train.py"],
            env={"TASK": json.dumps(self.diaries.task), "OMP_NUM_THREADS": "1"},
            gang=GangSpec(least=least, most=most, engine=engine),
            resources=Resources(cpu="1"),
            **{"retries": 10, "retry_on": "any", "grace_s": 2, "patience_s": 20, **changes},
        )
        return self.cluster.gang(spec, {"gang_train.py": SCRIPT})

    def gang(self, ref: str) -> GangView:
        return self.cluster.hub.gang(ref)

    def jobs(self, ref: str) -> list[JobView]:
        return [self.cluster.job(member.job) for member in self.gang(ref).members]

    def until(self, condition: Any, what: str, timeout_s: float = 120) -> None:
        try:
            self.cluster.until(condition, timeout_s=timeout_s, what=what)
        except TimedOut as error:
            views = [(gang.state, gang.reason, gang.members) for gang in self.cluster.hub.gangs()]
            raise AssertionError(f"{error}\n--- gangs: {views}\n--- links: {self.cluster.hub.links()}") from error

    def until_reached(self, step: int, *names: str) -> None:
        self.until(lambda: self.diaries.newest(*names) >= step, f"{names or 'somebody'} at step {step}")

    def go_on(self, *names: str, steps: int = 8) -> None:
        self.until_reached(self.diaries.newest() + steps, *names)

    def life(self, name: str) -> Life:
        return self.diaries.lives(name)[-1]

    def another_life(self, name: str, before: Life) -> Life:
        self.until(lambda: self.life(name) != before and bool(self.life(name).committed), f"{name} takes part again")
        return self.life(name)

    def share(self, name: str, steps: int = 20) -> float:
        """Of the newest whole batches, on average."""
        newest = max(self.diaries.lives(), key=lambda life: life.newest).committed[-steps:]
        whole = [record["shares"] for record in newest if sum(record["shares"].values()) == self.diaries.batch]
        return sum(int(shares.get(name, 0)) for shares in whole) / max(len(whole), 1)

    def ends_well(self, ref: str, *, timeout_s: float = 240) -> GangView:
        ended = self.cluster.gang_ends(ref, timeout_s=timeout_s)
        assert (ended.state, ended.exit_code) == ("succeeded", 0), f"{ended}\n{self.cluster.tails()}"
        self.diaries.assert_exactly_once()
        self.diaries.assert_as_on_one_machine(within=EXACT)
        return ended


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(CABLES) as network:
        yield network


def open_room(folder: Path, network: Network, task: dict[str, int]) -> Iterator[Room]:
    diaries = folder / "diaries"
    diaries.mkdir()
    with LocalCluster(folder / "c", bind=network.hub_address, house_worker=False) as cluster:
        yield Room(cluster, network, Diaries(diaries, task["length"], task["batch"], task["epochs"]))
        print(cluster.tails())


@pytest.fixture
def short(tmp_path: Path, network: Network) -> Iterator[Room]:
    yield from open_room(tmp_path, network, SHORT)


@pytest.fixture
def long(tmp_path: Path, network: Network) -> Iterator[Room]:
    yield from open_room(tmp_path, network, LONG)


def test_a_gang_of_two_machines_trains_what_one_would_though_a_member_is_killed(short: Room) -> None:
    short.join("a", "b")
    gang = short.begin(least=2, most=2, engine="plain")
    short.until_reached(8, "a", "b")
    killed = short.life("b")

    os.kill(killed.pid, signal.SIGKILL)

    ended = short.ends_well(gang)
    assert {(m.worker, m.address) for m in ended.members} == {(n, short.network[n].address) for n in "ab"}
    (b,) = [job for job in short.jobs(gang) if job.worker == "b"]
    assert b.attempts[0].signal == "SIGKILL" and b.attempts[1].state == "succeeded"
    assert short.life("b") != killed and short.life("b").events("healed")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchft", "plain"])
def test_the_loss_curve_is_that_of_one_machine_through_a_join_a_kill_a_freeze_and_a_slow_down(
    long: Room, engine: str
) -> None:
    if engine == "torchft":
        pytest.importorskip("torchft")
    for name, cores in {"a": 0.6, "b": 0.5, "c": 0.4}.items():
        long.network[name].limit(cores)
    long.join("a", "b")
    gang = long.begin(engine=engine, patience_s=90)  # c will be silent for a while
    long.until_reached(5, "a", "b")

    long.join("c")
    long.until(lambda: bool(long.diaries.lives("c")) and long.life("c").committed, "c takes part")

    killed = long.life("b")
    os.kill(killed.pid, signal.SIGKILL)
    long.go_on("a", "c")
    long.another_life("b", killed)

    long.cluster.freeze("c")  # the whole machine: nobody fences it
    long.go_on("a", "b")
    long.cluster.thaw("c")
    long.go_on("a", "b", "c", steps=20)

    before = long.share("b")
    long.network["b"].limit(0.5 / 3)
    if long.network.can_limit:
        long.until(lambda: 0 < long.share("b") < 0.8 * before, f"b gets less than {before:.0f}")

    ended = long.ends_well(gang)
    assert ended.engine == engine
    assert long.life("c").events("healed")


@pytest.mark.slow
def test_a_member_that_hangs_is_ended_by_its_agent_and_comes_back(long: Room) -> None:
    long.join("a", "b", "c")
    gang = long.begin()
    long.until_reached(8, "a", "b", "c")
    hung = long.life("c")

    os.kill(hung.pid, signal.SIGSTOP)

    long.go_on("a", "b")
    long.until(lambda: not psutil.pid_exists(hung.pid), "its agent ends it")
    long.another_life("c", hung)
    long.ends_well(gang)
    (c,) = [job for job in long.jobs(gang) if job.worker == "c"]
    assert "hung" in c.attempts[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchft", "plain"])
def test_the_machine_where_the_gang_meets_dies_and_it_meets_elsewhere(long: Room, engine: str) -> None:
    if engine == "torchft":
        pytest.importorskip("torchft")
    long.join("a", "b", "c")
    gang = long.begin(engine=engine)
    long.until_reached(8, "a", "b", "c")
    host = long.gang(gang).host
    others = sorted({"a", "b", "c"} - {host})

    long.network.isolate(host)  # no kernel says goodbye
    long.cluster.kill(host)

    long.go_on(*others)
    assert long.gang(gang).host in others
    ended = long.ends_well(gang)
    assert {member.state for member in ended.members if member.worker in others} == {"succeeded"}


@pytest.mark.slow
def test_a_killed_agent_takes_its_member_along_and_both_come_back(long: Room) -> None:
    long.join("a", "b", "c")
    gang = long.begin()
    long.until_reached(8, "a", "b", "c")
    host = long.gang(gang).host
    victim = next(name for name in "cb" if name != host)
    before = long.life(victim)

    long.cluster.kill(victim)
    long.until(lambda: not psutil.pid_exists(before.pid), "its member is gone, too")
    long.go_on(*sorted({"a", "b", "c"} - {victim}))
    long.come_back(victim)

    long.another_life(victim, before)
    long.ends_well(gang)


@pytest.mark.slow
def test_the_gang_trains_on_while_the_hub_is_dead(long: Room) -> None:
    long.join("a", "b", "c")
    gang = long.begin(patience_s=120)
    long.until_reached(8, "a", "b", "c")

    long.cluster.kill_hub()
    long.go_on("a", "b", "c", steps=40)
    long.cluster.start_hub()

    long.ends_well(gang)
    assert [len(job.attempts) for job in long.jobs(gang)] == [1, 1, 1]


@pytest.mark.slow
def test_a_gang_that_is_stopped_leaves_nothing_behind(long: Room) -> None:
    long.join("a", "b", "c")
    gang = long.begin()
    long.until_reached(8, "a", "b", "c")
    pids = [life.pid for life in long.diaries.lives()]

    long.cluster.hub.stop_gang(gang)

    ended = long.cluster.gang_ends(gang)
    assert ended.state == "cancelled"
    long.until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the members end")
    long.until(lambda: not meetings(long), "the meeting place is closed")
    assert {member.state for member in ended.members} == {"cancelled"}


def meetings(room: Room) -> list[int]:
    """The meeting places below this cluster's agents."""
    agents = [room.cluster.processes[name].popen.pid for name in room.names]
    below = [child for pid in agents for child in psutil.Process(pid).children(recursive=True)]
    return [child.pid for child in below if "potluck.train.gang" in said(child)]


def said(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has just ended


@pytest.mark.slow
def test_two_machines_that_cannot_reach_each_other_are_named_and_the_gang_waits_until_they_can(short: Room) -> None:
    short.network.cut("a", "c")
    short.join("a", "b", "c")

    gang = short.begin(least=3)

    named = ("`a` cannot reach `c`", "`c` cannot reach `a`")
    short.until(lambda: any(words in short.gang(gang).reason for words in named), "the pair is named")
    assert {member.state for member in short.gang(gang).members} == {"queued"}
    assert not short.diaries.lives()
    short.network.mend("a", "c")
    short.ends_well(gang)


@pytest.mark.slow
def test_a_gang_takes_the_machines_that_reach_each_other(short: Room) -> None:
    short.network.cut("a", "c")
    short.join("a", "b", "c")

    gang = short.begin(least=2, most=2)

    ended = short.ends_well(gang)
    workers = {member.worker for member in ended.members}
    assert workers in ({"a", "b"}, {"b", "c"})


COMPAT = """
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)
model = DistributedDataParallel(nn.Linear(20, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(20):
    loss = nn.functional.cross_entropy(model(torch.randn(16, 20)), torch.randint(0, 3, (16,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    once = Path(os.environ["SHARED"], "killed")
    if rank == 1 and step == 10 and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
print(f"rank {rank} of {size}: {sum(p.double().sum().item() for p in model.parameters()):.12f}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_an_unmodified_script_of_torchrun_runs_and_all_begin_again_when_one_member_dies(
    short: Room, tmp_path: Path
) -> None:
    short.join("a", "b", "c")
    spec = JobSpec(
        [sys.executable, "ddp.py"],
        env={"SHARED": str(tmp_path), "OMP_NUM_THREADS": "1"},
        gang=GangSpec(least=3, most=3, compat=True),
        resources=Resources(cpu="1"),
        retries=3,
        retry_on="any",
        grace_s=2,
    )

    gang = short.cluster.gang(spec, {"ddp.py": COMPAT})

    ended = short.cluster.gang_ends(gang)
    assert ended.state == "succeeded", f"{ended}\n{short.cluster.tails()}"
    assert ended.engine == "compat"
    said = short.cluster.gang_output(gang)
    lines = {member: text.strip().splitlines()[-1] for member, text in said.items()}
    assert [line.partition(":")[0] for line in lines.values()] == [f"rank {rank} of 3" for rank in range(3)]
    assert len({line.partition(":")[2] for line in lines.values()}) == 1  # the same weights everywhere
    assert [len(job.attempts) for job in short.jobs(gang)] == [2, 2, 2]
