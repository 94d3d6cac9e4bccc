"""Is what a job prints there once, in order, at once, and never more than the disk can take?"""

from __future__ import annotations

import asyncio
import errno
import itertools
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_kit import Hub
from keeping_kit import Placed, end, job, place, placed_job
from potluck.errors import BadInput, Conflict, DiskFull, Fenced, NotAllowed, NotFound
from potluck.hub.commands import keeping
from potluck.hub.commands.desk import Caller
from potluck.hub.store import logs
from potluck.hub.store.logs import LogStore
from potluck.protocol import LogPiece


@pytest.fixture
def store(tmp_path: Path) -> LogStore:
    return LogStore(tmp_path / "logs", segment_bytes=100, keep_bytes=300)


# --- the store


def test_a_piece_that_is_sent_again_is_there_once(store: LogStore) -> None:
    assert store.append("run", 1, 0, b"hello ") == 6
    assert store.append("run", 1, 6, b"world") == 11

    assert store.append("run", 1, 0, b"hello ") == 11
    assert store.append("run", 1, 6, b"world, again") == 18

    assert store.read("run", 1, 0, 1000).content == b"hello world, again"
    assert store.end("run", 1) == 18


def test_a_gap_writes_nothing_and_says_where_to_go_on(store: LogStore) -> None:
    store.append("run", 1, 0, b"hello")

    assert store.append("run", 1, 9, b"later") == 5
    assert store.read("run", 1, 0, 1000).content == b"hello"

    assert store.append("run", 1, 9, b"later", skip=True) == 14
    assert store.read("run", 1, 0, 1000).content == b"hello"
    behind = store.read("run", 1, 5, 1000)
    assert (behind.offset, behind.content) == (9, b"later")


def test_only_the_newest_is_kept_and_offsets_stay(store: LogStore) -> None:
    stream = bytes(i % 251 for i in range(1000))
    for offset in range(0, 1000, 70):
        store.append("run", 1, offset, stream[offset : offset + 70])

    first = store.read("run", 1, 0, 10)
    everything = b""
    offset = first.offset
    while piece := store.read("run", 1, offset, 64):
        if not piece.content:
            break
        everything += piece.content
        offset = piece.next_offset

    assert first.offset == 700
    assert everything == stream[700:]
    assert store.end("run", 1) == 1000
    assert sum(f.stat().st_size for f in (store.root / "run" / "1").glob("*.log")) <= 400


@given(cuts=st.lists(st.integers(0, 500), max_size=12), reads=st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_whatever_the_pieces_the_stream_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], reads: list[int]
) -> None:
    store = LogStore(tmp_path_factory.mktemp("logs"), segment_bytes=64, keep_bytes=10_000)
    stream = bytes(i % 253 for i in range(500))
    edges = sorted({0, 500, *cuts})
    for lo, hi in itertools.pairwise(edges):
        store.append("run", 1, max(0, lo - 7), stream[max(0, lo - 7) : hi])

    found, number = b"", 0
    while len(found) < 500:
        found += store.read("run", 1, len(found), reads[number % len(reads)]).content
        number += 1

    assert found == stream


def test_attempts_and_runs_are_apart_and_names_cannot_lead_elsewhere(store: LogStore) -> None:
    store.append("run", 1, 0, b"one")
    store.append("run", 2, 0, b"two")

    assert store.read("run", 2, 0, 10).content == b"two"
    assert store.read("other", 1, 0, 10).content == b""
    for run in ("../run", "", "a/b", "a" * 80, ".."):
        with pytest.raises(BadInput):
            store.append(run, 1, 0, b"x")
    with pytest.raises(BadInput):
        store.append("run", 0, 0, b"x")
    with pytest.raises(BadInput):
        store.append("run", 1, 1 << 62, b"x", skip=True)


def test_two_who_write_the_same_piece_at_once_write_it_once(store: LogStore) -> None:
    threads = [threading.Thread(target=store.append, args=("run", 1, 0, b"x" * 90)) for _ in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert store.end("run", 1) == 90


def test_a_full_disk_leaves_whole_pieces(store: LogStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append("run", 1, 0, b"whole")

    class Full(FileIO):
        def write(self, piece: Any) -> int:
            super().write(piece[:2])
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("potluck.hub.store.logs.FileIO", Full)
    with pytest.raises(DiskFull):
        store.append("run", 1, 5, b"half")
    monkeypatch.undo()

    assert store.append("run", 1, 5, b" again") == 11
    assert store.read("run", 1, 0, 100).content == b"whole again"


# --- writing, by lease


@pytest.fixture
def owner(embedded_hub: Hub) -> Caller:
    return embedded_hub.join("olga", role="member")


@pytest.fixture
def worker(embedded_hub: Hub) -> Caller:
    return embedded_hub.join("ann")


@pytest.fixture
def placed(embedded_hub: Hub, owner: Caller, worker: Caller) -> Placed:
    return placed_job(embedded_hub, owner, worker)


def send(hub: Hub, worker: Caller, placed: Placed, offset: int, piece: bytes, *, skip: bool = False) -> int:
    return hub.run(keeping.add_log(hub.desk, worker, placed.lease_id, offset, piece, skip=skip))["offset"]


def read(hub: Hub, who: Caller, placed: Placed, offset: int = 0, attempt: int = 0, limit: int = 65536) -> LogPiece:
    return hub.run(keeping.log(hub.desk, who, placed.run_id, offset=offset, attempt=attempt, limit=limit))


def test_what_a_worker_sends_the_owner_reads(embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed) -> None:
    assert send(embedded_hub, worker, placed, 0, b"epoch 1\n") == 8
    assert send(embedded_hub, worker, placed, 0, b"epoch 1\nepoch 2\n") == 16

    piece = read(embedded_hub, owner, placed, 8)

    assert piece == LogPiece(1, 8, 16, "epoch 2\n", False)
    with pytest.raises(Conflict, match="offset 16"):
        send(embedded_hub, worker, placed, 99, b"lost")


def test_only_the_holder_of_a_live_lease_writes(
    embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed
) -> None:
    other = embedded_hub.join("bob")
    with pytest.raises(Fenced, match="another worker"):
        send(embedded_hub, other, placed, 0, b"forged")
    for odd in ("nonsense", "00000000-0000-4000-8000-000000000000", "\0"):
        with pytest.raises(NotFound):
            embedded_hub.run(keeping.add_log(embedded_hub.desk, worker, odd, 0, b"x"))
    with pytest.raises(BadInput, match="several"):
        send(embedded_hub, worker, placed, 0, b"x" * ((1 << 20) + 1))

    embedded_hub.sql("UPDATE runs SET state = 'cancelled' WHERE id = %(r)s", r=placed.run_id)
    assert send(embedded_hub, worker, placed, 0, b"last words") == 10  # the lease is live until it reports
    end(embedded_hub, placed)

    with pytest.raises(Fenced, match="ended"):
        send(embedded_hub, worker, placed, 10, b"too late")


def test_only_owner_and_admin_read(embedded_hub: Hub, worker: Caller, owner: Caller, placed: Placed) -> None:
    send(embedded_hub, worker, placed, 0, b"private")
    stranger, viewer = embedded_hub.join("mia", role="member"), embedded_hub.join("vic", role="viewer")

    for who in (stranger, viewer):
        with pytest.raises(NotAllowed, match="somebody else's"):
            read(embedded_hub, who, placed)
    assert read(embedded_hub, Caller("admin", "admin-x", "root"), placed).text == "private"
    with pytest.raises(NotFound):
        embedded_hub.run(keeping.log(embedded_hub.desk, owner, "no-such-job"))


# --- reading


def test_characters_are_never_cut(embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed) -> None:
    euro = "€".encode()
    send(embedded_hub, worker, placed, 0, b"a" + euro[:2])

    half = read(embedded_hub, owner, placed)
    send(embedded_hub, worker, placed, 3, euro[2:] + b"\xffb" + euro[:1])
    rest = read(embedded_hub, owner, placed, half.next_offset)
    short = read(embedded_hub, owner, placed, 0, limit=4)
    end(embedded_hub, placed)
    last = read(embedded_hub, owner, placed, rest.next_offset)

    assert (half.text, half.next_offset) == ("a", 1)
    assert (rest.text, rest.next_offset) == ("€\ufffdb", 6)
    assert short.text == "a€"
    assert last == LogPiece(1, 6, 7, "\ufffd", True)


def test_the_end_is_said_when_all_was_read(embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed) -> None:
    send(embedded_hub, worker, placed, 0, b"0123456789")
    end(embedded_hub, placed)

    first = read(embedded_hub, owner, placed, 0, limit=4)
    second = read(embedded_hub, owner, placed, 4, limit=100)

    assert not first.over
    assert second.over
    assert read(embedded_hub, owner, placed, 10) == LogPiece(1, 10, 10, "", True)


def test_a_reader_is_woken_by_the_next_piece(embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed) -> None:
    desk = embedded_hub.desk

    async def scene() -> tuple[LogPiece, bool]:
        reader = asyncio.create_task(keeping.log(desk, owner, placed.run_id, wait_s=30))
        while not desk.news._waiting:
            await asyncio.sleep(0)
        early = reader.done()
        await keeping.add_log(desk, worker, placed.lease_id, 0, b"now")
        # far less than the two seconds of the next look: it was the news that woke the reader
        async with asyncio.timeout(1.5):
            return await reader, early

    piece, early = embedded_hub.run(scene())

    assert piece.text == "now"
    assert not early
    assert not desk.news._waiting


def test_a_reader_is_woken_by_the_end_of_the_attempt(
    embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed
) -> None:
    desk = embedded_hub.desk

    async def scene() -> LogPiece:
        reader = asyncio.create_task(keeping.log(desk, owner, placed.run_id, wait_s=30))
        while not desk.news._waiting:
            await asyncio.sleep(0)
        await asyncio.to_thread(end, embedded_hub, placed)
        desk.news.tell(f"job:{placed.run_id}")
        async with asyncio.timeout(1.5):
            return await reader

    assert embedded_hub.run(scene()).over


def test_the_next_attempt_can_be_waited_for(embedded_hub: Hub, owner: Caller, worker: Caller) -> None:
    run_id = job(embedded_hub, owner)
    waiting = Placed(run_id, "", 0)

    assert read(embedded_hub, owner, waiting) == LogPiece(0, 0, 0, "", False)
    assert read(embedded_hub, owner, waiting, attempt=1) == LogPiece(1, 0, 0, "", False)
    with pytest.raises(NotFound, match="newest is 0"):
        read(embedded_hub, owner, waiting, attempt=2)

    first = place(embedded_hub, run_id, worker)
    send(embedded_hub, worker, first, 0, b"first")
    end(embedded_hub, first, finished=False)
    second = place(embedded_hub, run_id, worker)
    send(embedded_hub, worker, second, 0, b"second")

    assert read(embedded_hub, owner, second).text == "second"
    assert read(embedded_hub, owner, second, attempt=1) == LogPiece(1, 0, 5, "first", True)
    embedded_hub.sql("UPDATE jobs SET finished = true WHERE run_id = %(r)s", r=run_id)
    assert read(embedded_hub, owner, second, attempt=3).over


def test_a_reader_behind_the_rotation_goes_on_with_the_oldest(
    embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed
) -> None:
    small = LogStore(embedded_hub.desk.logs.root, segment_bytes=100, keep_bytes=200)
    embedded_hub.desk.__dict__["logs"] = small
    for offset in range(0, 1000, 50):
        send(embedded_hub, worker, placed, offset, b"%049d\n" % offset)

    piece = read(embedded_hub, owner, placed, 50)

    assert piece.offset == 800
    assert piece.text.startswith(f"{800:049}")


def test_a_writer_whose_disk_is_slow_stops_nobody_else(
    embedded_hub: Hub, owner: Caller, worker: Caller, placed: Placed
) -> None:
    desk = embedded_hub.desk
    other = placed_job(embedded_hub, owner, worker, "other")
    send(embedded_hub, worker, other, 0, b"quick")
    let_go = threading.Event()

    class Slow(LogStore):
        def append(self, run_id: str, *args: Any, **more: Any) -> int:
            assert let_go.wait(60)
            return super().append(run_id, *args, **more)

    async def scene() -> tuple[str, bool]:
        writer = asyncio.create_task(keeping.add_log(desk, worker, placed.lease_id, 0, b"x" * (1 << 20)))
        piece = await keeping.log(desk, owner, other.run_id)
        stuck = not writer.done()
        let_go.set()
        await writer
        return piece.text, stuck

    desk.__dict__["logs"] = Slow(desk.logs.root)

    assert embedded_hub.run(scene()) == ("quick", True)
    assert desk.logs.end(placed.run_id, 1) == 1 << 20


def test_a_worker_that_skips_and_skips_leaves_few_files(store: LogStore) -> None:
    for n in range(500):
        store.append("run", 1, n * 2, b"x", skip=True)

    assert len(list((store.root / "run" / "1").glob("*.log"))) <= logs.MAX_SEGMENTS
    assert store.end("run", 1) == 999
    assert store.read("run", 1, 998, 10).content == b"x"
