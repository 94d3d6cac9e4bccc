"""What could be done to TrainForge's server without a token, tried on ours: every one of them is refused.

The list is the end of the predecessors' study: list jobs, download anyone's code, claim a finished job twice, set the
status "banana", forge logs, overwrite results, delete workers. Each is tried by nobody, and again by somebody who has a
credential but no right.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec
import pytest
from test_access import serving

from hub_kit import open_hub
from ledger_fixture import fresh_database
from potluck.client import Hub, project
from potluck.domain.job import JobSpec
from potluck.errors import NotAllowed
from potluck.hub import upkeep
from potluck.hub.app import make_app
from potluck.hub.commands import people
from potluck.hub.commands.desk import Desk
from potluck.hub.store import Ledger
from potluck.protocol import (
    JobLease,
    JobProgress,
    JobReport,
    JobRequest,
    MachineNow,
    OrdersRequest,
    Rules,
)

SECRET_CODE = "the_answer = 42  # nobody else's business\n"


@dataclass
class Room:
    """A hub with two members and two workers; ann's job has run on `box`."""

    address: str
    tokens: dict[str, str]
    job: str
    lease: JobLease
    project: str
    tree: str

    def as_(self, who: str) -> Hub:
        return Hub(self.address, self.tokens[who])

    def ask(self, method: str, path: str, who: str = "", **request: Any) -> int:
        headers = {"Authorization": f"Bearer {self.tokens[who]}"} if who else {}
        with httpx2.Client(base_url=self.address, timeout=30) as http:
            return http.request(method, f"/api/v1{path}", headers=headers, **request).status_code


def orders(agent: str = "agent-1", holding: list[str] | None = None) -> OrdersRequest:
    machine = MachineNow(cpu_cores=4, memory_bytes=8 << 30, memory_free_bytes=8 << 30, disk_free_bytes=1 << 40)
    return OrdersRequest(agent, holding or [], machine, Rules(runtime="any"), ["process"])


@pytest.fixture(scope="module")
def room(embedded_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with contextlib.ExitStack() as stack:
        dsn = stack.enter_context(fresh_database(embedded_dsn))
        hub = stack.enter_context(open_hub(dsn, tmp_path_factory.mktemp("blobs")))
        tokens = {name: hub.join_with_token(name, role="member")[1] for name in ("ann", "bob")}
        tokens |= {name: hub.join_with_token(name)[1] for name in ("box", "spy")}
        tokens["viewer"] = hub.join_with_token("viewer", role="viewer")[1]
        tokens["admin"] = secrets.token_urlsafe(32)
        hub.run(people.put_admin(hub.desk, tokens["admin"]))
        desk = Desk(Ledger(dsn), hub.blobs)
        app = make_app(desk, lambda: upkeep.hear(desk), lambda: upkeep.run_forever(desk))
        address = stack.enter_context(serving(app))
        folder = tmp_path_factory.mktemp("project")
        (folder / "hush.py").write_text(SECRET_CODE)
        with Hub(address, tokens["ann"]) as ann, Hub(address, tokens["box"]) as box:
            box.orders(orders(), 0)
            tree = ann.upload_tree(folder, project.pack(folder))
            job = ann.submit(JobRequest(JobSpec(["python", "train.py"], name="ann's"), tree)).id
            lease = _claimed(box)
            box.progress(lease.id, JobProgress("running", executor="process"))
            box.send_log(lease.id, 0, b"loss 0.5\n")
            box.end(lease.id, JobReport("exited", exit_code=0, outputs=tree))
        code = next(file.blob.hash for file in project.pack(folder).files)
        yield Room(address, tokens, job, lease, code, tree.hash)


def _claimed(box: Hub) -> JobLease:
    for _ in range(20):
        if leases := box.orders(orders(), 5).leases:
            return leases[0]
    raise AssertionError("the job was not placed")


@pytest.mark.parametrize("who", ["viewer", "bob", "spy"])
def test_nothing_that_a_stranger_may_read_names_a_hash_or_a_file_of_a_job(room: Room, who: str) -> None:
    """A blob is given to anybody with a credential who names its hash: so nobody else may ever hear of one."""
    headers = {"Authorization": f"Bearer {room.tokens[who]}"}
    secret = [room.project, room.tree, "hush.py", "loss 0.5"]
    with httpx2.Client(base_url=room.address, timeout=30, headers=headers) as http:
        paths = [path for path, methods in http.get("/api/v1/openapi.json").json()["paths"].items() if "get" in methods]
        filled = [re.sub(r"\{[^}]+\}", room.job, path) for path in paths if "/schemas/" not in path]
        told = {}
        for path in (*filled, "/", "/queue", "/workers", f"/jobs/{room.job}", f"/jobs/{room.job}/log.txt"):
            answer = http.get(path)
            assert answer.status_code < 500, path
            told[path] = answer.text
        for query in (f"job={room.job}", "show=queue", "show=workers", ""):
            with http.stream("GET", f"/live?{query}") as answer:
                pieces = (piece for piece in answer.iter_text() if "event: page" in piece)
                told[f"/live?{query}"] = next(pieces) if answer.status_code == 200 else ""

    assert room.job in told["/api/v1/jobs"]
    assert [(path, word) for path, text in told.items() for word in secret if word in text] == []


@pytest.mark.parametrize("path", ["/jobs", "/queue", "/workers", "/runs", "/events"])
def test_nobody_lists_jobs_or_machines(room: Room, path: str) -> None:
    assert room.ask("GET", path) == 401


def test_nobody_and_no_other_member_reads_somebodys_code_logs_or_results(room: Room) -> None:
    for path in (f"/jobs/{room.job}", f"/blobs/{room.project}"):
        assert room.ask("GET", path) == 401
    for path in (f"/jobs/{room.job}/log", f"/jobs/{room.job}/tree?what=project", f"/jobs/{room.job}/points"):
        assert room.ask("GET", path) == 401
        assert room.ask("GET", path, "viewer") == 403
        assert room.ask("GET", path, "bob") == 403
        assert room.ask("GET", path, "spy") == 403
        assert room.ask("GET", path, "ann") == 200


def test_another_member_sees_that_a_job_is_there_and_nothing_of_what_is_in_it(room: Room) -> None:
    with room.as_("bob") as bob:
        seen = bob.job(room.job)

    assert (seen.mine, seen.spec, seen.project, seen.git, seen.attempts) == (False, None, None, None, [])
    assert room.project not in msgspec.json.encode(seen).decode()


def test_a_finished_job_cannot_be_claimed_again(room: Room) -> None:
    with room.as_("box") as box, room.as_("spy") as spy:
        assert box.orders(orders(), 0).leases == []
        assert spy.orders(orders("agent-2", [room.lease.id]), 0).leases == []
        assert spy.orders(orders("agent-2", [room.lease.id]), 0).drop == [room.lease.id]


@pytest.mark.parametrize("state", ["banana", "succeeded", "queued"])
def test_nobody_sets_a_state_that_is_not_theirs_to_set(room: Room, state: str) -> None:
    body = {"state": state}

    assert room.ask("POST", f"/leases/{room.lease.id}/progress", json=body) == 401
    assert room.ask("POST", f"/leases/{room.lease.id}/progress", "ann", json=body) == 403
    assert room.ask("POST", f"/leases/{room.lease.id}/progress", "box", json=body) in (409, 422)
    with room.as_("ann") as ann:
        assert ann.job(room.job).state == "succeeded"


def test_logs_cannot_be_forged(room: Room) -> None:
    path = f"/leases/{room.lease.id}/log?offset=9"

    assert room.ask("POST", path, content=b"loss 0.0\n") == 401
    assert room.ask("POST", path, "bob", content=b"loss 0.0\n") == 403
    assert room.ask("POST", path, "spy", content=b"loss 0.0\n") in (403, 404, 409)
    assert room.ask("POST", path, "box", content=b"loss 0.0\n") in (403, 409)  # its own, but over
    with room.as_("ann") as ann:
        assert ann.log(room.job).text == "loss 0.5\n"


def test_results_cannot_be_overwritten(room: Room) -> None:
    report = msgspec.to_builtins(JobReport("exited", exit_code=1, reason="overwritten"))
    path = f"/leases/{room.lease.id}/end"

    assert room.ask("POST", path, json=report) == 401
    assert room.ask("POST", path, "ann", json=report) == 403
    for who in ("spy", "box"):
        with room.as_(who) as worker, contextlib.suppress(NotAllowed):
            assert not worker.end(room.lease.id, JobReport("exited", exit_code=1)).accepted
    with room.as_("ann") as ann:
        after = ann.job(room.job)
    assert (after.state, after.exit_code) == ("succeeded", 0)


def test_nobody_deletes_or_drains_workers_or_stops_jobs_of_others(room: Room) -> None:
    with room.as_("admin") as admin:
        box = next(worker for worker in admin.workers() if worker.name == "box").id
    for who, status in (("", 401), ("viewer", 403), ("bob", 403), ("spy", 403)):
        assert room.ask("DELETE", f"/workers/{box}", who) == status
        assert room.ask("POST", f"/workers/{box}/drain", who, json={"reason": ""}) == status
        assert room.ask("POST", f"/jobs/{room.job}/retry", who) == status
        assert room.ask("POST", f"/jobs/{room.job}/stop", who) == status


def test_another_members_secret_is_neither_shown_nor_taken(room: Room) -> None:
    with room.as_("ann") as ann, room.as_("bob") as bob:
        ann.set_secret("API_KEY", "xyzzy-plugh")
        assert [secret.name for secret in ann.secrets()] == ["API_KEY"]
        assert bob.secrets() == []
        assert "xyzzy" not in msgspec.json.encode(ann.secrets()).decode()
