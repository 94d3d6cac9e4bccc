"""Does a gang's member meet the others, find them again when they meet elsewhere, and is it ended when it hangs?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_kit import answers, until
from fake_hub import FakeHub

from potluck.domain.job import GangSpec
from potluck.protocol import JobLease, JobReport, MeetOrder, Membership, Rules
from potluck.train.gang import place as gang_place
from potluck.worker import addresses, hardware
from potluck.worker.jobs import executors, gangs
from potluck.worker.jobs.gangs import Member
from potluck.worker.jobs.house import House

HERE = "127.0.0.1"
TWO = House(Rules(max_tasks=2), executor="process")
# Says where its gang meets, whenever that changes; writes a pulse as the library does.
LOOKS = """
import json, os, pathlib, socket, time
place = json.loads(os.environ["POTLUCK_GANG"])
host, _, port = place["store"].rpartition(":")
socket.create_connection((host, int(port)), timeout=10).close()
pathlib.Path(place["pulse"]).write_text(json.dumps(
    {"phase": "meet", "step": 0, "since": time.time(), "patience_s": 0.0, "pid": os.getpid()}))
seen = ""
while True:
    where = pathlib.Path(place["where"]).read_text()
    if where != seen:
        seen = where
        print(place["member"], where, flush=True)
    time.sleep(0.02)
"""


def membership(member: int, *, address: str = HERE, engine: str = "plain") -> Membership:
    return Membership("gang-1", "blobs", member, f"lab-{member}", address, engine)


def a_member(
    edge: FakeHub,
    script: str,
    number: int,
    *,
    gang: GangSpec | None = None,
    address: str = HERE,
    engine: str = "plain",
    **more: Any,
) -> JobLease:
    """A lease of a gang's member that runs this script."""
    return edge.job(
        *("python", "main.py"),
        files={"main.py": script},
        spec={"gang": gang or GangSpec(2, 2), **more.pop("spec", {})},
        gang=membership(number, address=address, engine=engine),
        **more,
    )


def report_of(edge: FakeHub, lease: JobLease) -> JobReport:
    until(lambda: edge.job_report(lease), f"the end of {lease.name}", timeout_s=120)  # torch may be slow to come
    report = edge.job_report(lease)
    assert report is not None
    return report


def opened(edge: FakeHub, lease: JobLease, turn: int) -> str:
    """The address that the worker says, when the gang is to meet at this member's."""
    edge.meets(MeetOrder(lease.id, host=True, turn=turn))

    def told() -> str:
        meeting = edge.meeting_of(lease)
        return meeting.address if meeting is not None and (meeting.turn, meeting.host) == (turn, True) else ""

    return until(told, "the meeting place")


def says(edge: FakeHub, lease: JobLease, words: str) -> None:
    until(lambda: words.encode() in edge.log(lease), f"{words} in {edge.log(lease)!r}")


def needs(executor: str) -> None:
    found = {one.name: one for one in executors.found()}[executor]
    if not found.works:
        pytest.skip(found.reason)


# --- at work for a hub


@pytest.mark.parametrize("executor", ["process", "bubblewrap", pytest.param("podman", marks=pytest.mark.slow)])
def test_members_begin_when_the_gang_meets_and_follow_it_to_another_place(
    edge: FakeHub, start: Any, executor: str
) -> None:
    needs(executor)
    first, second = a_member(edge, LOOKS, 1), a_member(edge, LOOKS, 2)

    start(house=replace(TWO, executor=executor))
    edge.place(first, second)
    says(edge, second, "waiting for the gang to meet")
    old = opened(edge, first, 1)
    edge.meets(MeetOrder(second.id, address=old, turn=1))
    for lease in (first, second):
        says(edge, lease, f'{lease.gang.name} {{"store": "{old}"}}' if lease.gang else "")

    edge.meets(MeetOrder(first.id, turn=2))
    new = opened(edge, second, 2)
    edge.meets(MeetOrder(first.id, address=new, turn=2))

    says(edge, first, f'lab-1 {{"store": "{new}"}}')
    says(edge, second, f'lab-2 {{"store": "{new}"}}')
    assert new != old
    until(lambda: not answers(old), "the end of the old place")
    assert answers(new)
    for lease in (first, second):
        edge.end_job(lease)
        assert report_of(edge, lease).executor == executor
    until(lambda: not answers(new), "the end of the new place")


def test_no_member_begins_before_it_is_known_where_the_gang_meets(edge: FakeHub, start: Any) -> None:
    lease = a_member(edge, "print('it ran')", 2)

    start(house=TWO)
    edge.place(lease)
    says(edge, lease, "waiting for the gang to meet")
    meeting = until(lambda: edge.meeting_of(lease))
    edge.end_job(lease, "stopped by ann")

    assert (meeting.turn, meeting.address, meeting.host) == (0, "", False)
    report = report_of(edge, lease)
    assert (report.outcome, report.reason, report.exit_code) == ("cancelled", "stopped by ann", None)
    assert b"it ran" not in edge.log(lease)


def test_a_member_that_computes_for_longer_than_it_may_is_killed_and_the_other_goes_on(
    edge: FakeHub, start: Any
) -> None:
    hangs = """
import json, os, signal
from potluck.train.gang.pulse import Pulse
place = json.loads(os.environ["POTLUCK_GANG"])
Pulse(place["pulse"]).beat("compute", 7, 0.5)
print("begun", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""
    first, second = a_member(edge, LOOKS, 1), a_member(edge, hangs, 2)

    start(house=TWO)
    edge.place(first, second)
    address = opened(edge, first, 1)
    edge.meets(MeetOrder(second.id, address=address, turn=1))

    report = report_of(edge, second)
    assert (report.outcome, report.code, report.signal) == ("failed", "hung", "SIGKILL")
    assert report.reason == "hung: it computes step 7 for longer than 0.5 s, and the others wait for it"
    assert edge.job_report(first) is None
    assert answers(address)


def test_a_meeting_place_that_cannot_be_opened_is_the_members_failure(edge: FakeHub, start: Any) -> None:
    lease = a_member(edge, LOOKS, 1, address="203.0.113.77")  # no machine has this one

    start(house=TWO)
    edge.place(lease)
    until(lambda: edge.meeting_of(lease))
    edge.meets(MeetOrder(lease.id, host=True, turn=1))

    report = report_of(edge, lease)
    assert (report.outcome, report.code) == ("failed", "gang")
    assert "cannot be opened on this machine" in report.reason


def test_an_unmodified_torchrun_script_gets_what_torchrun_would_give_it(edge: FakeHub, start: Any) -> None:
    script = """
import os
names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GLOO_SOCKET_IFNAME".split()
print(*(f"{name}={os.environ[name]}" for name in names), os.environ.get("POTLUCK_GANG"), flush=True)
"""
    pair = GangSpec(2, 2, compat=True)
    first, second = (a_member(edge, script, n, gang=pair, engine="") for n in (1, 2))

    start(house=TWO)
    edge.place(first, second)
    host, _, port = opened(edge, first, 1).rpartition(":")
    edge.meets(MeetOrder(second.id, address=f"{host}:{port}", turn=1))

    for lease, rank in ((first, 0), (second, 1)):
        assert report_of(edge, lease).exit_code == 0
        expected = f"RANK={rank} WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR={HERE} MASTER_PORT={port}"
        assert f"{expected} GLOO_SOCKET_IFNAME=lo None".encode() in edge.log(lease)


def test_what_the_member_does_not_need_is_said_to_no_ordinary_job(edge: FakeHub, start: Any) -> None:
    lease = edge.job("python", "main.py", files={"main.py": "import os\nprint(os.environ.get('POTLUCK_GANG'))"})

    start(house=TWO)
    edge.place(lease)

    assert report_of(edge, lease).exit_code == 0
    assert edge.log(lease) == b"None\n"
    assert all(request.meetings == [] for request in edge.orders)


TRAINS = """
import sys, torch, potluck
from torch.utils.data import TensorDataset

torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 5), torch.randn(64, 1))
model = torch.nn.Linear(5, 1)
gang = potluck.gang.join()
loader = gang.loader(data, batch_size=16)
model, optimizer = gang.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
for epoch in gang.epochs(3):
    for x, y in loader:
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
print("trained by", *sorted(gang.members), gang.steps, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "executor"),
    [("plain", "bubblewrap"), ("plain", "podman"), ("torchft", "bubblewrap"), ("torchft", "process")],
)
def test_two_members_train_together(edge: FakeHub, start: Any, engine: str, executor: str) -> None:
    needs(executor)
    if engine not in hardware.engines():
        pytest.skip(f"{engine} is not installed here")
    first, second = (a_member(edge, TRAINS, n, engine=engine) for n in (1, 2))

    start(house=replace(TWO, executor=executor))
    edge.place(first, second)
    address = opened(edge, first, 1)
    edge.meets(MeetOrder(second.id, address=address, turn=1))

    for lease in (first, second):
        assert report_of(edge, lease).exit_code == 0, edge.log(lease)
        assert b"trained by lab-1 lab-2 12" in edge.log(lease)


SUMS = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(x)
print("sum", int(x), "of", dist.get_world_size(), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["process", "bubblewrap", "podman"])
def test_an_unmodified_torchrun_script_finds_its_peers(edge: FakeHub, start: Any, executor: str) -> None:
    needs(executor)
    pytest.importorskip("torch")
    pair = GangSpec(2, 2, compat=True)
    own = next(address for address in addresses.here() if ":" not in address)
    first, second = (a_member(edge, SUMS, n, gang=pair, engine="", address=own) for n in (1, 2))

    start(house=replace(TWO, executor=executor))
    edge.place(first, second)
    edge.meets(MeetOrder(second.id, address=opened(edge, first, 1), turn=1))

    for lease in (first, second):
        assert report_of(edge, lease).exit_code == 0, edge.log(lease)
        assert b"sum 3 of 2" in edge.log(lease)


# --- what a member is told


def a_lease(edge: FakeHub, gang: GangSpec, **more: Any) -> JobLease:
    return replace(a_member(edge, "", 2), spec=replace(a_member(edge, "", 2).spec, gang=gang), **more)


def joined(edge: FakeHub, tmp_path: Path, gang: GangSpec, **more: Any) -> Member:
    lease = a_lease(edge, gang, **more)
    return Member(lease, root=tmp_path / "job", scratch=tmp_path / "job" / "scratch")


def test_the_library_understands_what_a_member_is_told(edge: FakeHub, tmp_path: Path) -> None:
    member = joined(edge, tmp_path, GangSpec(2, 8, batch=512, policy="uniform"))
    member.prepare()

    assert not member.wait(0)
    assert member.order(MeetOrder("x", address="192.0.2.7:4123", turn=3))
    assert member.wait(0)
    found = gang_place.read(member.variables())

    assert (found.member, found.address, found.store, found.lighthouse) == ("lab-2", HERE, "192.0.2.7:4123", "")
    assert (found.least, found.most, found.batch, found.policy, found.engine) == (2, 8, 512, "uniform", "plain")
    assert not found.is_alone
    member.order(MeetOrder("x", address="http://192.0.2.8:9", turn=4))
    assert found.now().lighthouse == "http://192.0.2.8:9"
    member.close()


def test_all_members_of_a_gang_draw_from_the_same_seed(edge: FakeHub) -> None:
    leases = [replace(a_member(edge, "", n), gang=membership(n)) for n in (1, 2)]
    other = replace(leases[0], gang=replace(membership(1), gang="gang-2"))

    seeds = [gangs.place(lease)["seed"] for lease in (*leases, other)]

    assert seeds[0] == seeds[1] != seeds[2]
    assert 0 <= seeds[0] < 1 << 31


def test_an_older_word_about_the_meeting_place_is_not_believed(edge: FakeHub, tmp_path: Path) -> None:
    member = joined(edge, tmp_path, GangSpec())

    assert member.order(MeetOrder("x", address="192.0.2.7:1", turn=2))
    assert not member.order(MeetOrder("x", address="192.0.2.7:1", turn=2))
    assert not member.order(MeetOrder("x", address="192.0.2.9:1", turn=1))

    assert (member.meeting().turn, member.meeting().address) == (2, "192.0.2.7:1")


def test_while_nobody_says_where_the_gang_meets_now_the_last_place_stays(edge: FakeHub, tmp_path: Path) -> None:
    member = joined(edge, tmp_path, GangSpec())
    member.prepare()
    member.order(MeetOrder("x", address="192.0.2.7:1", turn=1))
    where = Path(json.loads(member.variables()["POTLUCK_GANG"])["where"])

    member.order(MeetOrder("x", turn=2))

    assert (member.meeting().turn, member.meeting().address) == (2, "")
    assert json.loads(where.read_text()) == {"store": "192.0.2.7:1"}
    member.close()


def test_a_member_that_is_over_opens_no_meeting_place_any_more(edge: FakeHub, tmp_path: Path) -> None:
    member = joined(edge, tmp_path, GangSpec())
    member.close()

    assert not member.order(MeetOrder("x", host=True, turn=1))
    assert not member.is_opening


def test_without_a_hub_a_gang_is_one_machine() -> None:
    found = gang_place.read(gangs.alone(GangSpec(2, 8, batch=64, policy="proportional")))
    compat = gangs.alone(GangSpec(compat=True))

    assert found.is_alone
    assert (found.batch, found.policy, found.least) == (64, "proportional", 1)
    assert (compat["RANK"], compat["WORLD_SIZE"], compat["MASTER_ADDR"]) == ("0", "1", HERE)


def test_the_machine_says_which_engines_its_python_has(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: name if name in there else None)

    def engines(*names: str) -> list[str]:
        there.clear()
        there.update(names)
        hardware.engines.cache_clear()
        return hardware.engines()

    assert engines() == engines("torchft") == []
    assert engines("torch") == ["plain"]
    assert engines("torch", "torchft") == ["plain", "torchft"]
    hardware.engines.cache_clear()
