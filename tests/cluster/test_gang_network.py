"""A gang over three machines with addresses, cables and CPUs of their own: what one machine would have trained?

The members are started directly, without a hub; test_gang_cluster.py has the same with one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from gang_diary import Diaries, Life
from gang_net import Cable, Machine, Network, what_is_missing

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from gang_kit import Nursery, Process, until

MISSING = what_is_missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
CABLES = {"a": Cable(100, 100, 0.0005), "b": Cable(40, 100, 0.001), "c": Cable(20, 50, 0.003)}
SHORT = {"length": 320, "batch": 32, "epochs": 10}
LONG = {"length": 960, "batch": 96, "epochs": 24}
TOLERANCE = {"float64": 1e-12, "float32": 1e-4}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery(Path(__file__).with_name("gang_elsewhere.py"))
    yield nursery
    nursery.close()


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(CABLES) as network:
        yield network


@dataclass
class Direct:
    """A gang whose members and meeting are started by the test."""

    nursery: Nursery
    network: Network
    engine: str
    diaries: Diaries
    folder: Path
    least: int = 2
    processes: list[Process] = field(default_factory=list)
    meeting: Process | None = None

    @property
    def where(self) -> Path:
        return self.folder / "where.json"

    def meet_on(self, machine: Machine) -> None:
        log = self.folder / f"meeting-{machine.name}.log"
        given = {"host": machine.address, "port": 0, "least": self.least}
        self.meeting = self.nursery.start(self.engine, log, self._environment(machine), **given)
        address = until(lambda: log.exists() and log.read_text().strip(), "the meeting starts")
        part = self.where.with_suffix(".part")
        part.write_text(json.dumps({"lighthouse" if self.engine == "torchft" else "store": address}))
        part.replace(self.where)

    def start(self, name: str) -> Process:
        machine = self.network[name]
        place = {
            **json.loads(self.where.read_text()),
            "member": name,
            "address": machine.address,
            "where": str(self.where),
            "engine": self.engine,
            "least": self.least,
            "most": 3,
            "policy": "dynamic",
            "wait_s": 120,
        }
        asked = {"POTLUCK_GANG": json.dumps(place), "TASK": json.dumps(self.diaries.task)}
        log = self.folder / f"{name}-{len(self.processes)}.log"
        self.processes.append(self.nursery.start("train", log, self._environment(machine) | asked))
        return self.processes[-1]

    def _environment(self, machine: Machine) -> dict[str, str]:
        ours = {key: value for key, value in os.environ.items() if key != "POTLUCK_METRICS_DIR"}
        return {**ours, "OMP_NUM_THREADS": "1", "BED": json.dumps(machine.bed)}

    def until_reached(self, step: int, *names: str) -> None:
        """All of these have committed this step in their present lives."""
        until(lambda: self.diaries.newest(*names) >= step or self._fallen(), f"{names} at step {step}: {self.tails()}")

    def go_on(self, *names: str, steps: int = 5) -> None:
        self.until_reached(self.diaries.newest() + steps, *names)

    def life(self, name: str) -> Life:
        return self.diaries.lives(name)[-1]

    def share(self, name: str) -> int:
        """Of the newest whole batch, where it takes part."""
        whole = [r["shares"] for r in self.life("a").committed if sum(r["shares"].values()) == self.diaries.batch]
        return int(whole[-1].get(name, 0)) if whole else 0

    def all_end(self, *processes: Process) -> None:
        for process in processes:
            assert process.wait() == 0, self.tails()

    def _fallen(self) -> bool:
        fallen = [p for p in self.processes if p.poll() not in (None, 0, -signal.SIGKILL)]
        assert not fallen, self.tails()
        return False

    def tails(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in logs)

    def close(self) -> None:
        for process in [*self.processes, *([self.meeting] if self.meeting else [])]:
            process.kill()
            process.wait()


@pytest.fixture(params=["torchft", "plain"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "torchft":
        pytest.importorskip("torchft")
    return str(request.param)


def open_gang(
    nursery: Nursery, network: Network, engine: str, folder: Path, task: dict[str, int], dtype: str = "float64"
) -> Direct:
    (folder / "diaries").mkdir()
    gang = Direct(nursery, network, engine, Diaries(folder / "diaries", **task, dtype=dtype), folder)
    gang.meet_on(network["a"])
    return gang


def test_the_cables_are_as_long_and_as_narrow_as_was_asked_and_can_be_cut(network: Network) -> None:
    listen = "import socket\ns = socket.create_server(('', 5000))\nprint(flush=True)\nc, _ = s.accept()\n"
    echo = "c.sendall(c.recv(1))\nleft = 500_000\nwhile left: left -= len(c.recv(left))\nc.sendall(b'x')\nc.recv(1)\n"
    ask = (
        "import socket, sys, time\nbegan = time.perf_counter()\n"
        "c = socket.create_connection((sys.argv[1], 5000))\nc.sendall(b'x')\nc.recv(1)\nmet = time.perf_counter()\n"
        "c.sendall(bytes(500_000))\nc.recv(1)\nprint(met - began, time.perf_counter() - met)\n"
    )
    from subprocess import PIPE, Popen

    with Popen([*network["c"].inside, sys.executable, "-c", listen + echo], stdout=PIPE) as server:
        assert server.stdout is not None and server.stdout.readline()
        met_s, sent_s = map(float, network["b"].run(sys.executable, "-c", ask, network["c"].address).split())
    reach = f"import socket\nsocket.create_connection(('{network['b'].address}', 9), timeout=1)"
    network.cut("a", "b")

    assert met_s >= 2 * 2 * (0.001 + 0.003)  # two round trips
    assert sent_s >= 0.9 * 500_000 * 8 / 40e6  # b's way up is the narrowest; a few packets fit into the cable
    with pytest.raises(AssertionError, match="timed out"):
        network["a"].run(sys.executable, "-c", reach)
    with pytest.raises(AssertionError, match="refused"):
        network["c"].run(sys.executable, "-c", reach)


@pytest.mark.slow
def test_three_machines_train_what_one_would_though_one_comes_late_and_one_is_killed(
    nursery: Nursery, network: Network, engine: str, tmp_path: Path
) -> None:
    gang = open_gang(nursery, network, engine, tmp_path, SHORT)
    try:
        a, b = gang.start("a"), gang.start("b")
        gang.until_reached(8, "a", "b")
        c = gang.start("c")
        gang.until_reached(12, "a", "b", "c")
        b.kill()
        b.wait()
        gang.go_on("a", "c")
        b = gang.start("b")

        gang.all_end(a, b, c)
    finally:
        gang.close()

    gang.diaries.assert_exactly_once()
    gang.diaries.assert_as_on_one_machine(within=TOLERANCE["float64"])
    assert gang.life("b").events("healed") and gang.life("c").committed[0]["step"] >= 8


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_loss_curve_is_that_of_one_machine_through_a_kill_a_freeze_a_join_and_a_slow_down(
    nursery: Nursery, network: Network, engine: str, tmp_path: Path, dtype: str
) -> None:
    gang = open_gang(nursery, network, engine, tmp_path, LONG, dtype)
    for name, cores in {"a": 0.5, "b": 0.4, "c": 0.3}.items():
        network[name].limit(cores)
    try:
        a, b = gang.start("a"), gang.start("b")
        gang.until_reached(10, "a", "b")
        c = gang.start("c")  # it joins
        gang.until_reached(20, "a", "b", "c")

        b.kill()
        b.wait()
        gang.go_on("a", "c")
        b = gang.start("b")
        until(lambda: gang.life("b").committed, f"b takes part again: {gang.tails()}")

        os.kill(c.pid, signal.SIGSTOP)
        gang.go_on("a", "b", steps=8)  # they let it go
        os.kill(c.pid, signal.SIGCONT)
        gang.go_on("a", "b", "c", steps=20)

        before = gang.share("b")
        network["b"].limit(0.4 / 3)
        if network.can_limit:
            until(lambda: 0 < gang.share("b") < 0.7 * before, f"b gets less than {before}: {gang.tails()}")

        gang.all_end(a, b, c)
    finally:
        gang.close()

    gang.diaries.assert_exactly_once()
    gang.diaries.assert_as_on_one_machine(within=TOLERANCE[dtype])
    assert gang.life("c").events("healed")
    assert gang.life("a").events("replan")


@pytest.mark.slow
def test_the_machine_with_the_meeting_dies_and_the_gang_meets_elsewhere(
    nursery: Nursery, network: Network, engine: str, tmp_path: Path
) -> None:
    gang = open_gang(nursery, network, engine, tmp_path, SHORT | {"epochs": 16})
    try:
        a, b, c = gang.start("a"), gang.start("b"), gang.start("c")
        gang.until_reached(8, "a", "b", "c")
        assert gang.meeting is not None
        network.isolate("a")  # no kernel says goodbye
        a.kill()
        gang.meeting.kill()
        gang.meeting.wait()

        gang.meet_on(network["b"])
        gang.all_end(b, c)
    finally:
        gang.close()

    gang.diaries.assert_exactly_once()
    gang.diaries.assert_as_on_one_machine(within=TOLERANCE["float64"])


@pytest.mark.slow
def test_a_member_whose_cable_is_cut_is_let_go_and_heals_when_it_is_mended(
    nursery: Nursery, network: Network, engine: str, tmp_path: Path
) -> None:
    gang = open_gang(nursery, network, engine, tmp_path, LONG | {"epochs": 30})
    try:
        a, b, c = gang.start("a"), gang.start("b"), gang.start("c")
        gang.until_reached(8, "a", "b", "c")
        network.isolate("c")
        gang.go_on("a", "b", steps=8)
        network.rejoin("c")
        gang.go_on("a", "b", "c", steps=8)

        gang.all_end(a, b, c)
    finally:
        gang.close()

    gang.diaries.assert_exactly_once()
    gang.diaries.assert_as_on_one_machine(within=TOLERANCE["float64"])
