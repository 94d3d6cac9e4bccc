"""Do many blobs come whole or not at all, are trees what they say, and do points and secrets keep to their bounds?"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from hub_kit import Hub, update_file
from keeping_kit import Placed, end, placed_job, tree_of
from potluck.blobs import hash_bytes
from potluck.errors import BadInput, Conflict, Fenced, LedgerError, NotAllowed, NotFound
from potluck.hub.commands import bundles, files, keeping, secrets, trees
from potluck.hub.commands.desk import Caller
from potluck.protocol import Blob, Point, SecretValue, Tree, TreeFile


@pytest.fixture
def owner(embedded_hub: Hub) -> Caller:
    return embedded_hub.join("olga", role="member")


@pytest.fixture
def worker(embedded_hub: Hub) -> Caller:
    return embedded_hub.join("ann")


@pytest.fixture
def placed(embedded_hub: Hub, owner: Caller, worker: Caller) -> Placed:
    return placed_job(embedded_hub, owner, worker)


def bundle(pieces: Sequence[bytes], blobs: Sequence[Any] | None = None) -> bytes:
    head = [hash_bytes(piece) for piece in pieces] if blobs is None else list(blobs)
    return msgspec.json.encode(head) + b"\n" + b"".join(pieces)


# --- bundles


def test_a_bundle_comes_in_and_goes_out_the_same(embedded_hub: Hub) -> None:
    pieces = [b"one", b"", b"two\nlines", bytes(range(256)) * 50, b"one"]
    hashes = [hash_bytes(piece).hash for piece in pieces]
    wanted = [hash_bytes(piece) for piece in pieces]
    assert embedded_hub.run(bundles.missing(embedded_hub.desk, wanted)).hashes == list(dict.fromkeys(hashes))

    embedded_hub.run(bundles.take(embedded_hub.desk, bundle(pieces)))

    assert embedded_hub.run(bundles.missing(embedded_hub.desk, wanted)).hashes == []
    assert embedded_hub.run(bundles.give(embedded_hub.desk, hashes)) == bundle(pieces)
    assert embedded_hub.one("SELECT count(*) FROM blobs WHERE hash = ANY(%(h)s)", h=hashes) == 4


GOOD = hash_bytes(b"good")
OTHER = hash_bytes(b"other")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "line of JSON"),
        (b"[]", ""),
        (b"{}\n", "line of JSON"),
        (b"\xff\n", "line of JSON"),
        (b"[" * 100_000, "line of JSON"),
        (bundle([b"good"], [OTHER]), "lists 5 bytes and holds 4"),
        (bundle([b"good"], [Blob(OTHER.hash, 4)]), "do not have the hash"),
        (bundle([b"good"], [GOOD, Blob(OTHER.hash, 0)]), "do not have the hash"),
        (bundle([b"good"], [Blob(GOOD.hash, 5)]), "lists 5 bytes and holds 4"),
        (bundle([b"good"], [Blob(GOOD.hash, 9), Blob(OTHER.hash, -5)]), "a blob of -5 bytes"),
        (bundle([b"good"], [Blob(GOOD.hash, 1 << 70)]), "at most"),
        (bundle([b"good"], [Blob(GOOD.hash, 1 << 60)]), "at most"),
        (bundle([b"good"], [Blob("../../etc/passwd", 4)]), "not a blob's hash"),
        (bundle([b"good", b"left over"], [GOOD]), "lists 4 bytes and holds 13"),
        (bundle([], [Blob(hash_bytes(b"").hash, 0)] * 1001), "at most 1,000"),
        (bundle([bytes(8 << 20)]), "at most 8,388,608 bytes"),
    ],
)
def test_a_bundle_that_lies_leaves_nothing(embedded_hub: Hub, content: bytes, why: str) -> None:
    if not why:
        embedded_hub.run(bundles.take(embedded_hub.desk, content))  # nothing in it, nothing wrong
    else:
        with pytest.raises(BadInput, match=why):
            embedded_hub.run(bundles.take(embedded_hub.desk, content))

    assert list(embedded_hub.blobs.hashes()) == []
    assert embedded_hub.one("SELECT count(*) FROM blobs") == 0


def test_one_bad_blob_spoils_the_whole_bundle(embedded_hub: Hub) -> None:
    content = bundle([b"good", b"evil!"], [GOOD, OTHER])

    with pytest.raises(BadInput, match="hash"):
        embedded_hub.run(bundles.take(embedded_hub.desk, content))

    assert not embedded_hub.blobs.has(GOOD.hash)


def test_nobody_asks_for_too_much_at_once(embedded_hub: Hub) -> None:
    big = [embedded_hub.put(bytes([number]) * (5 << 20)).hash for number in range(2)]
    desk = embedded_hub.desk

    with pytest.raises(BadInput, match="ask for at most 8,388,608"):
        embedded_hub.run(bundles.give(desk, big))
    with pytest.raises(BadInput, match="at most 1,000"):
        embedded_hub.run(bundles.give(desk, big[:1] * 1001))
    with pytest.raises(NotFound):
        embedded_hub.run(bundles.give(desk, ["0" * 64]))
    with pytest.raises(BadInput, match="not a blob's hash"):
        embedded_hub.run(bundles.give(desk, ["../../../etc/passwd"]))
    with pytest.raises(BadInput, match="at most 5,000"):
        embedded_hub.run(bundles.missing(desk, [GOOD] * 5001))
    for blob in (Blob("0" * 64, -1), Blob("0" * 64, 1 << 50), Blob("x", 1)):
        with pytest.raises(BadInput):
            embedded_hub.run(bundles.missing(desk, [blob]))


def test_a_blob_whose_bytes_are_gone_is_missing_again(embedded_hub: Hub) -> None:
    blob = embedded_hub.put(b"swept by a careless hand")
    embedded_hub.blobs.remove(blob.hash)

    assert embedded_hub.run(bundles.missing(embedded_hub.desk, [blob])).hashes == [blob.hash]
    with pytest.raises(BadInput, match="has 24 bytes, not 5"):
        embedded_hub.run(bundles.missing(embedded_hub.desk, [Blob(blob.hash, 5)]))


# --- trees


def put_tree(hub: Hub, *files: TreeFile) -> Blob:
    return hub.put(msgspec.json.encode(Tree(list(files))))


def test_a_whole_tree_is_read(embedded_hub: Hub) -> None:
    blob, tree = tree_of(embedded_hub, {"train.py": b"print(1)", "data/a b.txt": b"", "ü/€.txt": b"x"})

    assert embedded_hub.run(trees.read_tree(embedded_hub.desk, blob)) == tree


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../up", "a/../../b", "a//b", "a/", "./a", "a/./b", "..", ".", "a\x00b", "a\nb", "\x1b[2J"],
)
def test_a_path_that_leads_elsewhere_is_refused(embedded_hub: Hub, path: str) -> None:
    blob = put_tree(embedded_hub, TreeFile("fine.txt", embedded_hub.put(b"x")), TreeFile(path, embedded_hub.put(b"x")))

    with pytest.raises(BadInput):
        embedded_hub.run(trees.read_tree(embedded_hub.desk, blob))


def test_a_tree_must_be_whole_and_honest(embedded_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    here = embedded_hub.put(b"here")
    read = lambda blob: embedded_hub.run(trees.read_tree(embedded_hub.desk, blob))  # noqa: E731

    with pytest.raises(BadInput, match=r"gone\.txt: its bytes .* are not here"):
        read(put_tree(embedded_hub, TreeFile("a.txt", here), TreeFile("gone.txt", Blob("0" * 64, 5))))
    with pytest.raises(BadInput, match=r"small\.txt: its bytes .* are 4, not 1"):
        read(put_tree(embedded_hub, TreeFile("small.txt", Blob(here.hash, 1))))
    with pytest.raises(BadInput, match=r"a\.txt"):
        read(put_tree(embedded_hub, TreeFile("a.txt", here), TreeFile("a.txt", here)))
    with pytest.raises(BadInput, match="not a list of files"):
        read(here)
    with pytest.raises(BadInput, match="is not here"):
        read(Blob("1" * 64, 10))
    monkeypatch.setattr(trees, "MAX_FILES", 1)
    with pytest.raises(BadInput, match="2 files"):
        read(put_tree(embedded_hub, TreeFile("a", here), TreeFile("b", here)))
    monkeypatch.undo()
    blob, _ = tree_of(embedded_hub, {"small": b"1", "large.bin": b"123456"})
    with pytest.raises(BadInput, match=r"large\.bin"):
        embedded_hub.run(trees.read_tree(embedded_hub.desk, blob, limit_bytes=5))


def test_what_belongs_to_a_job_is_never_swept(embedded_hub: Hub) -> None:
    """Even if an update of a pool run has the very same bytes."""
    house, ann = embedded_hub.join("house", trusted=True), embedded_hub.join("ann")
    run_id = embedded_hub.start_run(house)
    for seed in (1, 2):
        unit = embedded_hub.unit(ann, run_id)
        embedded_hub.report(ann, unit, embedded_hub.unit_report(unit, seed=seed))
    blob, _ = tree_of(embedded_hub, {"model.bin": update_file(1)})
    embedded_hub.run(trees.read_tree(embedded_hub.desk, blob))
    embedded_hub.sql(
        "UPDATE updates SET fate = 'rejected', reported_at = now() - interval '1 hour' WHERE run_id = %(r)s", r=run_id
    )

    swept = embedded_hub.run(files.sweep(embedded_hub.desk))

    assert swept == 1
    assert not embedded_hub.blobs.has(hash_bytes(update_file(2)).hash)
    embedded_hub.run(trees.read_tree(embedded_hub.desk, blob))
    assert embedded_hub.blobs.read(hash_bytes(update_file(1)).hash) == update_file(1)


def test_the_trees_of_a_job_are_for_its_owner(embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed) -> None:
    blob, outputs = tree_of(embedded_hub, {"model.bin": b"weights"})
    encoded = msgspec.json.encode(blob).decode()
    embedded_hub.sql("UPDATE attempts SET outputs = %(t)s::jsonb WHERE run_id = %(r)s", t=encoded, r=placed.run_id)
    tree = lambda who, what, attempt=0: embedded_hub.run(  # noqa: E731
        keeping.tree(embedded_hub.desk, who, placed.run_id, what, attempt)
    )

    assert tree(owner, "outputs") == outputs == tree(owner, "outputs", 1)
    assert [file.path for file in tree(owner, "project").files] == ["train.py"]
    with pytest.raises(NotFound, match="POTLUCK_CHECKPOINT_DIR"):
        tree(owner, "checkpoint")
    with pytest.raises(NotFound, match="attempt 7"):
        tree(owner, "outputs", 7)
    with pytest.raises(BadInput, match="nothing that a job has"):
        tree(owner, "secrets")
    with pytest.raises(NotAllowed):
        tree(embedded_hub.join("mia", role="member"), "outputs")


# --- points


def send(hub: Hub, worker: Caller, placed: Placed, *points: Point) -> None:
    hub.run(keeping.add_points(hub.desk, worker, placed.lease_id, list(points)))


def test_points_are_kept_once_and_read_in_order(
    embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed
) -> None:
    picture = embedded_hub.put(b"\x89PNG\r\n\x1a\n...")
    points = [Point(n * 10, 1.5, {"loss": 1 / (n + 1)}, seq=n) for n in range(5)]
    points[4] = Point(40, 1.5, {"loss": 0.2, "bad": math.inf, "worse": math.nan}, {"sample": picture}, seq=4)

    send(embedded_hub, worker, placed, *points[:3])
    send(embedded_hub, worker, placed, *points[1:])
    send(embedded_hub, worker, placed, Point(999, 0, {"loss": 9.0}, seq=0))
    found = embedded_hub.run(keeping.points(embedded_hub.desk, owner, placed.run_id))
    later = embedded_hub.run(keeping.points(embedded_hub.desk, owner, placed.run_id, after_seq=3, attempt=1))

    assert [(p.seq, p.step, p.attempt) for p in found] == [(n, n * 10, 1) for n in range(5)]
    assert later == found[4:]
    assert later[0].values == {"loss": 0.2}
    assert later[0].images == {"sample": picture}
    assert embedded_hub.one("SELECT kept FROM blobs WHERE hash = %(h)s", h=picture.hash)


@pytest.mark.parametrize(
    "point",
    [
        Point(0, 0, {"loss": 1.0}, seq=-1),
        Point(1 << 63, 0, {"loss": 1.0}),
        Point(0, math.nan, {"loss": 1.0}),
        Point(0, 0, {"": 1.0}),
        Point(0, 0, {"x" * 101: 1.0}),
        Point(0, 0, {"a\x1b[31m": 1.0}),
        Point(0, 0, {"a\x00": 1.0}),
        Point(0, 0, {str(n): 1.0 for n in range(1001)}),
        Point(0, 0, {}, {"sample": Blob("0" * 64, 10)}),
        Point(0, 0, {}, {"sample": Blob("0" * 64, 5 << 20)}),
        Point(0, 0, {}, {"sample": Blob("0" * 64, -1)}),
        Point(0, 0, {}, {str(n): Blob("0" * 64, 1) for n in range(65)}),
    ],
    ids=str,
)
def test_a_point_out_of_bounds_is_refused(embedded_hub: Hub, worker: Caller, placed: Placed, point: Point) -> None:
    with pytest.raises(BadInput):
        send(embedded_hub, worker, placed, point)

    assert embedded_hub.one("SELECT count(*) FROM points") == 0


def test_points_are_bounded_and_the_job_says_so(
    embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MAX_POINTS", 3)
    send(embedded_hub, worker, placed, *(Point(n, 0, {"loss": 1.0}, seq=n) for n in range(6)))

    assert len(embedded_hub.run(keeping.points(embedded_hub.desk, owner, placed.run_id))) == 3
    assert "more than 3 points" in embedded_hub.one("SELECT text FROM events WHERE kind = 'job.points'")
    with pytest.raises(BadInput, match="at once"):
        send(embedded_hub, worker, placed, *[Point(0, 0)] * 1001)


def test_points_are_fenced_and_private(embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed) -> None:
    with pytest.raises(Fenced):
        send(embedded_hub, embedded_hub.join("bob"), placed, Point(0, 0, {"loss": 1.0}))
    with pytest.raises(NotAllowed):
        embedded_hub.run(keeping.points(embedded_hub.desk, embedded_hub.join("mia", role="member"), placed.run_id))
    end(embedded_hub, placed)
    with pytest.raises(Fenced):
        send(embedded_hub, worker, placed, Point(0, 0, {"loss": 1.0}))
    assert embedded_hub.run(keeping.points(embedded_hub.desk, owner, placed.run_id, wait_s=30)) == []


def test_a_reader_of_points_is_woken(embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed) -> None:
    desk = embedded_hub.desk

    async def scene() -> list[Point]:
        reader = asyncio.create_task(keeping.points(desk, owner, placed.run_id, wait_s=30))
        while not desk.news._waiting:
            await asyncio.sleep(0)
        await keeping.add_points(desk, worker, placed.lease_id, [Point(7, 0, {"loss": 1.0})])
        async with asyncio.timeout(1.5):
            return await reader

    assert [point.step for point in embedded_hub.run(scene())] == [7]


# --- secrets


def put(hub: Hub, who: Caller, name: str, value: str) -> None:
    hub.run(secrets.put(hub.desk, who, name, SecretValue(value)))


def values(hub: Hub, who: Caller, *names: str) -> dict[str, str]:
    async def scene() -> dict[str, str]:
        async with hub.desk.ledger.transaction() as tx:
            return await secrets.values(hub.desk, tx, who.subject, names)

    return hub.run(scene())


def test_a_secret_is_set_replaced_listed_and_removed(embedded_hub: Hub, owner: Caller) -> None:
    put(embedded_hub, owner, "HF_TOKEN", "first")
    put(embedded_hub, owner, "HF_TOKEN", "söcond\n€")
    put(embedded_hub, owner, "_other", "x" * (64 << 10))

    listed = embedded_hub.run(secrets.mine(embedded_hub.desk, owner))

    assert [view.name for view in listed] == ["HF_TOKEN", "_other"]
    assert values(embedded_hub, owner, "HF_TOKEN", "nothing") == {"HF_TOKEN": "söcond\n€"}
    embedded_hub.run(secrets.remove(embedded_hub.desk, owner, "HF_TOKEN"))
    assert values(embedded_hub, owner, "HF_TOKEN") == {}
    with pytest.raises(NotFound):
        embedded_hub.run(secrets.remove(embedded_hub.desk, owner, "HF_TOKEN"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "x"),
        ("1A", "x"),
        ("A-B", "x"),
        ("A B", "x"),
        ("Ä", "x"),
        ("A\n", "x"),
        ("A" * 129, "x"),
        ("A", ""),
        ("A", "a\0b"),
        ("A", "\ud800"),
        ("A", "€" * 30_000),
    ],
)
def test_a_secret_that_no_variable_can_hold_is_refused(embedded_hub: Hub, owner: Caller, name: str, value: str) -> None:
    with pytest.raises(BadInput) as raised:
        put(embedded_hub, owner, name, value)

    assert len(value) < 2 or value not in str(raised.value)
    assert embedded_hub.run(secrets.mine(embedded_hub.desk, owner)) == []


def test_secrets_belong_to_their_owner(embedded_hub: Hub, owner: Caller) -> None:
    mia = embedded_hub.join("mia", role="member")
    put(embedded_hub, owner, "TOKEN", "olga's")
    put(embedded_hub, mia, "TOKEN", "mia's")

    assert values(embedded_hub, owner, "TOKEN") == {"TOKEN": "olga's"}
    embedded_hub.run(secrets.remove(embedded_hub.desk, mia, "TOKEN"))
    assert values(embedded_hub, owner, "TOKEN") == {"TOKEN": "olga's"}

    async def check(*names: str) -> None:
        async with embedded_hub.desk.ledger.transaction() as tx:
            await secrets.check_there(tx, owner.subject, names)

    embedded_hub.run(check("TOKEN"))
    with pytest.raises(BadInput, match="potluck secret set NOPE"):
        embedded_hub.run(check("TOKEN", "NOPE"))


def test_a_row_that_was_moved_does_not_open(embedded_hub: Hub, owner: Caller) -> None:
    mia = embedded_hub.join("mia", role="member")
    put(embedded_hub, owner, "TOKEN", "olga's")

    embedded_hub.sql("UPDATE secrets SET owner = %(m)s", m=mia.subject)
    with pytest.raises(Conflict, match="Set it again"):
        values(embedded_hub, mia, "TOKEN")
    embedded_hub.sql("UPDATE secrets SET owner = %(o)s, name = 'OTHER'", o=owner.subject)
    with pytest.raises(Conflict):
        values(embedded_hub, owner, "OTHER")
    embedded_hub.sql("UPDATE secrets SET name = 'TOKEN'")

    assert values(embedded_hub, owner, "TOKEN") == {"TOKEN": "olga's"}


def test_a_lost_key_is_said_and_reading_never_makes_another(embedded_hub: Hub, owner: Caller) -> None:
    put(embedded_hub, owner, "TOKEN", "olga's")
    key = embedded_hub.desk.keys.path.read_text()
    embedded_hub.desk.keys.path.unlink()

    with pytest.raises(LedgerError, match="backup"):
        values(embedded_hub, owner, "TOKEN")
    assert not embedded_hub.desk.keys.path.exists()
    embedded_hub.desk.keys.path.write_text("not a key")
    with pytest.raises(LedgerError, match="not a key"):
        values(embedded_hub, owner, "TOKEN")
    embedded_hub.desk.keys.path.write_text(key)

    assert values(embedded_hub, owner, "TOKEN") == {"TOKEN": "olga's"}


def test_nobody_hoards_secrets(embedded_hub: Hub, owner: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "MAX_SECRETS", 2)
    put(embedded_hub, owner, "A", "1")
    put(embedded_hub, owner, "B", "1")

    with pytest.raises(BadInput, match="which is the most"):
        put(embedded_hub, owner, "C", "1")
    put(embedded_hub, owner, "B", "2")


def test_an_answer_with_points_has_a_bounded_size_and_always_one(
    embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MAX_ANSWER_BYTES", 500)
    large = {f"value {n}": 1.0 for n in range(100)}
    send(
        embedded_hub, worker, placed, Point(0, 0, large, seq=0), *(Point(n, 0, {"a": 1.0}, seq=n) for n in range(1, 9))
    )

    found, pieces, after = [], 0, -1
    while piece := embedded_hub.run(keeping.points(embedded_hub.desk, owner, placed.run_id, after_seq=after)):
        found += piece
        pieces, after = pieces + 1, piece[-1].seq
        if pieces == 9:
            end(embedded_hub, placed)

    assert [point.seq for point in found] == list(range(9))
    assert pieces == 2


@pytest.mark.parametrize("content", [b'{"x":' + b"[" * 100_000, b'{"x":' + b'{"x":' * 100_000, b"\xff", b"[]"])
def test_a_tree_that_is_none_is_bad_input(embedded_hub: Hub, content: bytes) -> None:
    with pytest.raises(BadInput, match="not a list of files"):
        embedded_hub.run(trees.read_tree(embedded_hub.desk, embedded_hub.put(content)))
