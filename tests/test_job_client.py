"""Does the client's side of jobs fit the hub's, over real HTTP: folders, logs, points, secrets, and every other route?"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from hub_kit import Hub as Ledgered
from hub_kit import open_hub
from keeping_kit import Placed, end, placed_job
from ledger_fixture import fresh_database
from potluck.blobs import BlobStore
from potluck.client import Hub, jobs, trees
from potluck.client.project import pack
from potluck.domain.job import JobSpec, Resources
from potluck.errors import BadInput, Conflict, Fenced, NotAHub, NotAllowed, NotFound
from potluck.hub import upkeep
from potluck.hub.app import make_app
from potluck.hub.commands import people
from potluck.hub.commands.desk import Caller, Desk
from potluck.hub.store import Ledger
from potluck.protocol import (
    Blob,
    CheckpointReport,
    JobProgress,
    JobReport,
    JobRequest,
    MachineNow,
    OrdersRequest,
    Point,
    QueueMove,
    Quota,
    Rules,
    Tree,
    TreeFile,
)
from serving import serving


@dataclass
class Room:
    inside: Ledgered
    address: str
    olga: Caller
    ann: Caller
    owner: Hub
    worker: Hub  # whose jobs are written straight into the ledger
    admin: Hub
    box: Hub  # a worker that asks for orders
    box_id: str
    box_token: str


@pytest.fixture(scope="module")
def room(embedded_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with ExitStack() as stack:
        dsn = stack.enter_context(fresh_database(embedded_dsn))
        inside = stack.enter_context(open_hub(dsn, tmp_path_factory.mktemp("room") / "blobs"))
        olga, owner_token = inside.join_with_token("olga", role="member")
        ann, worker_token = inside.join_with_token("ann")
        box, box_token = inside.join_with_token("box")
        admin_token = secrets.token_urlsafe(32)
        inside.run(people.put_admin(inside.desk, admin_token))
        desk = Desk(Ledger(dsn), inside.blobs)
        app = make_app(desk, lambda: upkeep.hear(desk), lambda: upkeep.run_forever(desk))
        address = stack.enter_context(serving(app))
        clients = [stack.enter_context(Hub(address, t)) for t in (owner_token, worker_token, admin_token, box_token)]
        yield Room(inside, address, olga, ann, *clients, box.subject, box_token)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for path, content in {
        "train.py": os.urandom(20),
        "pkg/__init__.py": b"",
        "pkg/empty.txt": b"",
        "pkg/deep/er/x.bin": os.urandom(100_000),
        "data/big.bin": os.urandom(900_000),
        "run.sh": os.urandom(10),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "run.sh").chmod(0o755)
    return root


# --- folders


def test_a_folder_goes_to_the_hub_and_comes_back_the_same(room: Room, folder: Path, tmp_path: Path) -> None:
    tree = pack(folder)
    heard: list[tuple[int, int]] = []

    blob = room.owner.upload_tree(folder, tree, progress=lambda done, total: heard.append((done, total)))
    back = room.worker.read_tree(blob)
    room.worker.fetch_tree(back, tmp_path / "back")
    room.worker.fetch_tree(back, tmp_path / "cached", BlobStore(tmp_path / "cache"))

    assert back == tree
    assert pack(tmp_path / "back") == tree == pack(tmp_path / "cached")
    assert heard[-1] == (tree.size_bytes, tree.size_bytes)
    assert trees.PARTS not in os.listdir(tmp_path / "back")


def test_a_second_upload_sends_only_what_changed(room: Room, folder: Path) -> None:
    before = room.owner.bytes_up
    room.owner.upload_tree(folder, pack(folder))
    first = room.owner.bytes_up - before
    (folder / "train.py").write_bytes(b"print('changed')")

    room.owner.upload_tree(folder, pack(folder))
    second = room.owner.bytes_up - before - first

    assert first > 1_000_000
    assert second < 5_000


def test_a_second_fetch_brings_only_what_is_not_there(room: Room, folder: Path, tmp_path: Path) -> None:
    tree = pack(folder)
    room.owner.upload_tree(folder, tree)
    out = tmp_path / "out"
    room.owner.fetch_tree(tree, out)
    (out / "train.py").write_bytes(b"damaged")
    (out / "run.sh").chmod(0o644)
    (out / "mine.txt").write_text("not in the tree")
    before = room.owner.bytes_down

    room.owner.fetch_tree(tree, out)

    assert room.owner.bytes_down - before < 1000
    assert (out / "mine.txt").read_text() == "not in the tree"
    (out / "mine.txt").unlink()
    assert pack(out) == tree


def test_a_fetch_goes_on_where_it_was_cut(room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the parts of large files too: they are kept until the whole tree is there."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "a.txt").write_bytes(os.urandom(1000))
    (folder / "big.bin").write_bytes(os.urandom(2_000_000))
    tree = pack(folder)
    room.owner.upload_tree(folder, tree)
    big = next(file.blob for file in tree.files if file.path == "big.bin")
    half = (folder / "big.bin").read_bytes()[:1_000_000]
    BlobStore(out / trees.PARTS).append(big.hash, 0, half)  # what a fetch that was killed leaves
    before = room.owner.bytes_down

    room.owner.fetch_tree(tree, out)

    assert room.owner.bytes_down - before < 1_100_000
    assert pack(out) == tree


def test_thousands_of_small_files_need_few_requests(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    salt = os.urandom(8)
    for number in range(1500):
        (folder / f"{number}.txt").write_bytes(salt + str(number).encode())
    tree = pack(folder)
    calls: list[str] = []
    real = Hub._send

    def counted(self: Hub, method: str, path: str, **more: object) -> object:
        calls.append(f"{method} {path}")
        return real(self, method, path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Hub, "_send", counted)
    monkeypatch.setattr(trees, "ASK_BLOBS", 1000)
    room.owner.upload_tree(folder, tree)
    up = len(calls)
    room.owner.fetch_tree(tree, tmp_path / "back")

    assert calls[:4] == ["POST /blobs/missing"] * 2 + ["POST /blobs/batch"] * 2
    assert up == 6
    assert calls[up:] == ["POST /blobs/many"] * 2
    assert pack(tmp_path / "back") == tree


def test_a_file_that_changes_meanwhile_is_said(room: Room, folder: Path) -> None:
    tree = pack(folder)
    (folder / "train.py").write_bytes(b"changed")
    with pytest.raises(Conflict, match=r"train\.py changed while"):
        room.owner.upload_tree(folder, tree)

    tree = pack(folder)
    (folder / "data" / "big.bin").write_bytes(os.urandom(900_000))
    with pytest.raises(Conflict, match=r"data/big\.bin changed while"):
        room.owner.upload_tree(folder, tree)

    (folder / "new.txt").write_bytes(os.urandom(10))
    tree = pack(folder)
    (folder / "new.txt").unlink()
    with pytest.raises(NotFound, match=r"new\.txt"):
        room.owner.upload_tree(folder, tree)


def test_a_link_that_appears_meanwhile_is_not_followed(room: Room, folder: Path, tmp_path: Path) -> None:
    tree = pack(folder)
    (tmp_path / "secret").write_bytes((folder / "train.py").read_bytes())
    (folder / "train.py").unlink()
    (folder / "train.py").symlink_to(tmp_path / "secret")

    with pytest.raises(BadInput, match="symbolic link"):
        room.owner.upload_tree(folder, tree)


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "a/../../evil", f"{trees.PARTS}/evil"])
def test_a_tree_from_a_hub_is_not_believed(room: Room, tmp_path: Path, path: str) -> None:
    blob = room.owner.upload(b"evil")

    with pytest.raises(BadInput):
        room.owner.fetch_tree(Tree([TreeFile(path, blob)]), tmp_path / "deep" / "out")

    assert not list(tmp_path.rglob("evil"))


def test_nothing_is_fetched_through_a_link(room: Room, tmp_path: Path) -> None:
    blob = room.owner.upload(b"evil")
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (out / "link").symlink_to(outside)

    with pytest.raises(BadInput, match="link"):
        room.owner.fetch_tree(Tree([TreeFile("link/evil", blob)]), out)

    assert not os.listdir(outside)


def test_bytes_that_a_hub_makes_up_are_refused(room: Room, tmp_path: Path) -> None:
    small, big = room.owner.upload(b"good"), room.owner.upload(os.urandom(300_000))
    room.inside.blobs.path(small.hash).write_bytes(b"evil")
    room.inside.blobs.path(big.hash).write_bytes(os.urandom(300_000))

    for blob in (small, big):
        with pytest.raises(BadInput, match="hash"):
            room.owner.fetch_tree(Tree([TreeFile("file", blob)]), tmp_path / "out", patience_s=0)
    room.inside.blobs.path(small.hash).write_bytes(b"more than was promised")
    with pytest.raises((BadInput, NotAHub)):
        room.owner.fetch_tree(Tree([TreeFile("file", small)]), tmp_path / "out", patience_s=0)

    assert not (tmp_path / "out" / "file").exists()


def test_a_tree_that_is_none_is_said(room: Room) -> None:
    with pytest.raises(BadInput, match="not a list of files"):
        room.owner.read_tree(room.owner.upload(b"[1, 2, 3]"))
    with pytest.raises(BadInput, match="at most"):
        room.owner.read_tree(Blob("0" * 64, 1 << 30))
    with pytest.raises(NotFound):
        room.owner.read_tree(Blob("0" * 64, 10))


# --- what a job leaves


@pytest.fixture
def placed(room: Room) -> Placed:
    return placed_job(room.inside, room.olga, room.ann)


def test_a_log_streams_from_worker_to_owner(room: Room, placed: Placed) -> None:
    heard = []

    def follow() -> None:
        offset = 0
        while True:
            piece = room.owner.log(placed.run_id, attempt=1, offset=offset, wait_s=20)
            heard.append(piece.text)
            offset = piece.next_offset
            if piece.over:
                return

    follower = threading.Thread(target=follow)
    follower.start()
    offset = 0
    for number in range(20):
        offset = room.worker.send_log(placed.lease_id, offset, f"line {number} €\n".encode())
    end(room.inside, placed)
    follower.join(30)

    assert "".join(heard) == "".join(f"line {number} €\n" for number in range(20))


def test_a_lost_answer_and_a_gap_lead_to_the_right_offset(room: Room, placed: Placed) -> None:
    assert room.worker.send_log(placed.lease_id, 0, b"0123456789") == 10
    assert room.worker.send_log(placed.lease_id, 0, b"0123456789") == 10
    assert room.worker.send_log(placed.lease_id, 50, b"later") == 10
    assert room.worker.send_log(placed.lease_id, 50, b"later", skip=True) == 55
    assert room.owner.log(placed.run_id, offset=10).text == "later"

    end(room.inside, placed)
    with pytest.raises(Fenced):
        room.worker.send_log(placed.lease_id, 55, b"x")


def test_a_piece_that_is_too_long_is_refused(room: Room, placed: Placed) -> None:
    with pytest.raises(BadInput, match="1,048,576"):
        room.worker.send_log(placed.lease_id, 0, bytes((1 << 20) + 1))
    assert room.worker.send_log(placed.lease_id, 0, bytes(1 << 20)) == 1 << 20


def test_points_go_through(room: Room, placed: Placed) -> None:
    picture = room.worker.upload(b"\x89PNG\r\n\x1a\n" + os.urandom(20))
    sent = [Point(n, 1.0, {"loss": 0.5}, {"sample": picture}, seq=n) for n in range(3)]

    room.worker.send_points(placed.lease_id, sent)
    found = room.owner.points(placed.run_id)

    assert [(p.seq, p.values, p.images, p.attempt) for p in found] == [
        (n, {"loss": 0.5}, {"sample": picture}, 1) for n in range(3)
    ]
    assert [p.seq for p in room.owner.points(placed.run_id, after_seq=0, limit=1)] == [1]
    for body in (b"[", b'[{"step": 1, "at": NaN}]', b'[{"step": 1, "at": 1e999}]', b"{}", b"\xff"):
        with pytest.raises(BadInput):
            room.worker._send("POST", f"/leases/{placed.lease_id}/points", content=body)


def test_the_project_of_a_job_can_be_read_back(room: Room, placed: Placed) -> None:
    assert [file.path for file in room.owner.tree(placed.run_id, "project").files] == ["train.py"]
    with pytest.raises(NotFound, match="POTLUCK_OUTPUT_DIR"):
        room.owner.tree(placed.run_id)
    with pytest.raises(NotAllowed):
        room.worker.tree(placed.run_id)


def test_secrets_are_set_listed_and_removed(room: Room) -> None:
    set_ = room.owner.set_secret("HF_TOKEN", "very secret")

    assert [view.name for view in room.owner.secrets()] == ["HF_TOKEN"]
    assert set_ == room.owner.secrets()[0]
    assert room.admin.secrets() == []
    with pytest.raises(BadInput):
        room.owner.set_secret("no such name", "x")
    room.owner.remove_secret("HF_TOKEN")
    assert room.owner.secrets() == []


def test_the_schema_is_open_to_editors(room: Room) -> None:
    answer = httpx2.get(f"{room.address}/api/v1/schemas/potluck.yaml.json")

    assert answer.status_code == 200
    assert answer.json()["$schema"]


# --- a whole life, through every route


def orders(*holding: str, agent: str = "agent-1") -> OrdersRequest:
    machine = MachineNow(4, 8 << 30, 8 << 30, 1 << 40, os="linux", arch="x86_64")
    return OrdersRequest(agent, list(holding), machine, Rules(runtime="any"), ["process"])


def test_a_job_lives_through_every_route(room: Room, folder: Path) -> None:
    room.box.orders(orders(), 0)
    tree = room.owner.upload_tree(folder, pack(folder))
    request = JobRequest(JobSpec(["true"], name="whole life", secrets=["TOKEN"]), tree)
    with pytest.raises(BadInput, match="potluck secret set TOKEN"):
        room.owner.submit(request)
    room.owner.set_secret("TOKEN", "very secret")
    assert room.owner.outlook(request).would_run_on == "box"

    job = room.owner.submit(request, "the key")
    assert room.owner.submit(request, "the key").id == job.id
    leases = []
    for _ in range(20):
        if leases := room.box.orders(orders(), 5).leases:
            break
    (lease,) = leases
    assert lease.secrets == {"TOKEN": "very secret"}
    assert lease.project == tree
    room.box.progress(lease.id, JobProgress("running", executor="process"))
    assert room.owner.wait_job(job.id, "placed", 5).state == "running"
    offset = room.box.send_log(lease.id, 0, b"hello\n")
    room.box.checkpoint(lease.id, CheckpointReport(tree, 1, 1))
    assert room.box.end(lease.id, JobReport("exited", exit_code=0, outputs=tree, log_bytes=offset)).accepted

    assert room.owner.job("whole life").state == "succeeded"
    assert job.id in [one.id for one in room.owner.jobs()]
    assert room.owner.tree(job.id) == pack(folder) == room.owner.tree(job.id, "checkpoint")
    assert room.owner.log(job.id).text == "hello\n"
    assert room.owner.retry_job(job.id).state in ("queued", "placed")
    assert room.owner.stop_job(job.id).state == "cancelled"
    room.owner.remove_secret("TOKEN")


def until(what: Callable[[], bool]) -> None:
    """The hub may answer from a plan that is a moment old."""
    end_ = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end_
        time.sleep(0.05)


def test_the_queue_and_the_machines_answer(room: Room, folder: Path) -> None:
    room.box.orders(orders(), 0)
    assert room.admin.drain(room.box_id, "a new fan").draining
    tree = room.owner.upload_tree(folder, pack(folder))
    jobs_ = [room.owner.submit(JobRequest(JobSpec(["true"], resources=Resources(cpu="1")), tree)) for _ in range(2)]
    ids = [job.id for job in jobs_]
    until(lambda: {one.job for one in room.owner.queue()} >= set(ids))
    room.admin.move_in_queue(QueueMove(ids[1]))
    until(lambda: room.owner.queue()[0].job == ids[1])
    for job in jobs_:
        room.owner.stop_job(job.id)

    assert not room.admin.undrain(room.box_id).draining
    assert room.admin.label(room.box_id, {"room": "cellar"}).labels["room"] == "cellar"
    assert room.owner.own(room.box_token).id == room.box_id
    assert room.admin.set_quota(Quota(room.olga.subject, running=7))[0].running == 7
    assert room.admin.quotas()[0].running == 7
    room.admin.set_quota(Quota(room.olga.subject))


def test_every_method_of_the_client_was_called_here() -> None:
    routes = {name for name in vars(jobs.JobRoutes) if not name.startswith("_")}
    text = Path(__file__).read_text()

    assert {name for name in routes if not re.search(rf"\.{name}\(", text)} == set()
