"""Does the client's side of gangs fit the hub's, over real HTTP?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hub_kit import open_hub
from ledger_fixture import fresh_database
from potluck.client import Hub
from potluck.client.project import pack
from potluck.domain.job import GangSpec, JobSpec, Resources
from potluck.errors import BadInput, Conflict, NotAllowed, NotFound
from potluck.hub import upkeep
from potluck.hub.app import make_app
from potluck.hub.commands.desk import Desk
from potluck.hub.store import Ledger
from potluck.protocol import (
    Blob,
    Door,
    GangRequest,
    JobRequest,
    MachineNow,
    OrdersAnswer,
    OrdersRequest,
    Reached,
    Rules,
)
from serving import serving


@dataclass
class Room:
    olga: Hub
    otto: Hub  # somebody else
    boxes: dict[str, Hub]  # workers, by name
    ids: dict[str, str]


@pytest.fixture(scope="module")
def room(embedded_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with ExitStack() as stack:
        dsn = stack.enter_context(fresh_database(embedded_dsn))
        inside = stack.enter_context(open_hub(dsn, tmp_path_factory.mktemp("room") / "blobs"))
        people = [inside.join_with_token(name, role="member")[1] for name in ("olga", "otto")]
        workers = {name: inside.join_with_token(name) for name in ("ann", "bob")}
        desk = Desk(Ledger(dsn), inside.blobs)
        app = make_app(desk, lambda: upkeep.hear(desk), lambda: upkeep.run_forever(desk))
        address = stack.enter_context(serving(app))
        olga, otto = [stack.enter_context(Hub(address, token)) for token in people]
        boxes = {name: stack.enter_context(Hub(address, token)) for name, (_, token) in workers.items()}
        yield Room(olga, otto, boxes, {name: caller.subject for name, (caller, _) in workers.items()})


@pytest.fixture
def project(room: Room, tmp_path: Path) -> Blob:
    (tmp_path / "train.py").write_text("print('hi')\n")
    return room.olga.upload_tree(tmp_path, pack(tmp_path))


def request(project: Blob, name: str = "faces", *, least: int = 2, most: int = 3, batch: int = 0) -> GangRequest:
    return GangRequest(JobSpec(["python", "train.py"], name=name, gang=GangSpec(least, most, batch)), project)


def arrive(room: Room, name: str, *, reached: list[Reached] | None = None) -> OrdersAnswer:
    """The worker asks for orders once, with a door on which nobody really knocks."""
    door = Door(4000, f"key-of-{name}", [f"10.0.0.{len(name)}"])
    now = MachineNow(cpu_cores=4, memory_bytes=8 << 30, memory_free_bytes=8 << 30, disk_free_bytes=1 << 40)
    return room.boxes[name].orders(
        OrdersRequest("agent-1", now=now, rules=Rules(), executors=["bubblewrap"], door=door, reached=reached or []),
        0.0,
    )


def test_a_gang_is_submitted_once_found_by_every_name_and_stopped(room: Room, project: Blob) -> None:
    gang = room.olga.submit_gang(request(project), key="k")
    again = room.olga.submit_gang(request(project), key="k")

    assert again.id == gang.id
    assert (gang.state, gang.least, gang.most, gang.mine) == ("queued", 2, 3, True)
    assert [member.member for member in gang.members] == [1, 2, 3]
    for ref in (gang.id, gang.id[:-1], "faces", "last"):
        assert room.olga.gang(ref).id == gang.id
    assert [one.id for one in room.olga.gangs(10, "open")] == [gang.id]
    assert room.olga.wait_gang(gang.id, "running", 5).state == "queued"
    assert room.olga.wait_gang(gang.id, "queued", 0.05).state == "queued"

    stopped = room.olga.stop_gang(gang.id)

    assert stopped.state == "cancelled"
    assert {member.state for member in stopped.members} == {"cancelled"}
    assert room.olga.wait_gang(gang.id, "queued", 5).state == "cancelled"
    assert room.olga.gangs(10, "open") == []


def test_a_members_job_says_whose_it_is_and_the_gang_is_no_job(room: Room, project: Blob) -> None:
    gang = room.olga.submit_gang(request(project, "voices"))

    jobs = [room.olga.job(member.job) for member in gang.members]

    assert [(job.gang, job.member) for job in jobs] == [(gang.id, 1), (gang.id, 2), (gang.id, 3)]
    with pytest.raises(NotFound):
        room.olga.job(gang.id)
    room.olga.stop_gang(gang.id)


def test_what_the_hub_refuses_comes_back_as_our_errors(room: Room, project: Blob) -> None:
    gang = room.olga.submit_gang(request(project, "mine"))

    with pytest.raises(NotFound, match="no gang `nothing`"):
        room.olga.gang("nothing")
    with pytest.raises(NotAllowed, match="somebody else's"):
        room.otto.stop_gang(gang.id)
    with pytest.raises(BadInput, match="counts down"):
        room.olga.submit_gang(request(project, least=3, most=2))
    with pytest.raises(BadInput, match="cannot feed 3 machines"):
        room.olga.submit_gang(request(project, batch=2))
    with pytest.raises(BadInput, match="gang"):
        room.olga.submit(JobRequest(request(project).spec, project))
    with pytest.raises(NotAllowed):
        room.boxes["ann"].submit_gang(request(project))
    assert room.otto.gang(gang.id).spec is None
    room.olga.stop_gang(gang.id)
    assert room.olga.stop_gang(gang.id).state == "cancelled"


def test_links_tell_what_workers_found_of_one_another(room: Room) -> None:
    found = {
        "ann": Reached(room.ids["bob"], "10.0.0.3", 0.0004, 112e6),
        "bob": Reached(room.ids["ann"], reason="nothing answered at 10.0.0.3"),
    }
    arrive(room, "bob")
    for _ in range(20):  # the hub asks for knocks in one of the next answers, and takes only what it asked for
        asked = {name: arrive(room, name).knock for name in room.boxes}
        for name in (name for name in room.boxes if asked[name]):
            arrive(room, name, reached=[found[name]])
        if len(links := room.olga.links()) == 2:
            break

    by_pair = {(link.source, link.target): link for link in links}
    assert (by_pair["ann", "bob"].address, by_pair["ann", "bob"].bytes_per_s) == ("10.0.0.3", 112e6)
    assert by_pair["bob", "ann"].address == ""
    assert by_pair["bob", "ann"].reason == "nothing answered at 10.0.0.3"
    assert by_pair["ann", "bob"].seconds_ago < 60


def test_a_job_can_ask_for_one_very_machine(room: Room, project: Blob) -> None:
    for name in room.boxes:
        arrive(room, name)
    spec = replace(request(project).spec, gang=None)

    by_name = room.olga.outlook(JobRequest(replace(spec, resources=Resources(labels={"worker": "bob"})), project))
    by_id = replace(spec, resources=Resources(labels={"worker_id": room.ids["ann"]}))

    assert by_name.would_run_on == "bob", by_name
    assert room.olga.outlook(JobRequest(by_id, project)).would_run_on == "ann"


def test_a_gang_that_has_ended_cannot_be_ended_otherwise(room: Room, project: Blob) -> None:
    gang = room.olga.submit_gang(request(project, "over"))
    room.olga.stop_gang(gang.id)

    with pytest.raises(Conflict):
        room.olga.retry_job(gang.members[0].job)
