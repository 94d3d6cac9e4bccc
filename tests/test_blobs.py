from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.blobs import BlobStore, disk_errors, hash_bytes
from potluck.errors import BadInput, DiskFull, NotFound


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def test_bytes_and_files_are_found_by_their_hash(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")

    blob = store.add_bytes(b"hello")
    again = store.add_file(tmp_path / "file")

    assert blob == again
    assert blob.hash == hashlib.sha256(b"hello").hexdigest()
    assert blob.size_bytes == 5
    assert store.path(blob.hash) == store.root / blob.hash[:2] / blob.hash[2:4] / blob.hash
    assert store.read(blob.hash) == b"hello"
    assert list(store.hashes()) == [blob.hash]
    assert not list((store.root / "tmp").iterdir())


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n", "٠" * 64, "/" * 64])
def test_a_path_is_only_ever_made_of_a_hash(store: BlobStore, name: str) -> None:
    for call in (store.path, store.has, store.part, store.remove, store.commit):
        with pytest.raises(BadInput, match="64 hexadecimal"):
            call(name)


@given(content=st.binary(max_size=300), cuts=st.lists(st.integers(1, 80), max_size=10))
def test_a_blob_arrives_in_pieces_and_a_wrong_offset_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cuts: list[int]
) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    blob = hash_bytes(content)
    at = 0
    for cut in [*cuts, len(content) + 1]:
        assert store.append(blob.hash, at + 1, b"wrong") == at
        at = store.append(blob.hash, at, content[at : at + cut])
        assert store.part_size(blob.hash) == at

    path = store.commit(blob.hash)

    assert path.read_bytes() == content
    assert store.part_size(blob.hash) == 0
    assert store.commit(blob.hash) == path  # a second finisher finds it done


def test_damaged_bytes_are_thrown_away(store: BlobStore) -> None:
    blob = hash_bytes(b"the right ones")
    store.append(blob.hash, 0, b"the wrong ones")

    with pytest.raises(BadInput, match="damaged"):
        store.commit(blob.hash)

    assert not store.has(blob.hash)
    assert store.part_size(blob.hash) == 0


def test_what_is_not_here_is_said(store: BlobStore) -> None:
    for call in (store.blob, store.read, store.touch, store.commit):
        with pytest.raises(NotFound):
            call("0" * 64)


def test_eviction_takes_what_was_not_used_for_longest(store: BlobStore) -> None:
    blobs = [store.add_bytes(bytes([i]) * 100) for i in range(5)]
    for age, blob in enumerate(blobs):
        os.utime(store.path(blob.hash), (1000 + age, 1000 + age))
    store.touch(blobs[0].hash)

    freed = store.evict(250, keep={blobs[1].hash})

    assert freed == 300
    assert {blob.hash for blob in blobs if store.has(blob.hash)} == {blobs[0].hash, blobs[1].hash}


def test_eviction_clears_parts_that_nobody_went_on_with(store: BlobStore) -> None:
    old, new = hash_bytes(b"old").hash, hash_bytes(b"new").hash
    store.append(old, 0, b"o")
    store.append(new, 0, b"n")
    os.utime(store.part(old), (1000, 1000))

    store.evict(10**9)

    assert store.part_size(old) == 0
    assert store.part_size(new) == 1


def test_a_full_disk_is_a_sentence_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=rf"{tmp_path}.*MB free") as raised, disk_errors(tmp_path / "x" / "y"):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert raised.value.exit_code == 74


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_part_on_a_full_disk_keeps_its_length(store: BlobStore) -> None:
    blob = hash_bytes(b"x" * 5000)
    store.part(blob.hash).parent.mkdir(parents=True)
    store.part(blob.hash).symlink_to("/dev/full")

    with pytest.raises(DiskFull):
        store.append(blob.hash, 0, b"x" * 5000)


def test_many_threads_may_add_the_same_blob(store: BlobStore) -> None:
    content = os.urandom(200_000)
    failures: list[BaseException] = []

    def add() -> None:
        try:
            store.add_bytes(content)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads: list[Any] = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failures
    assert store.read(hash_bytes(content).hash) == content
