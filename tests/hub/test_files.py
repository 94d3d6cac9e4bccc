"""Do bytes arrive whole, piece by piece, and is nothing else ever stored?"""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from hub_kit import Hub
from potluck.errors import BadInput, Conflict, NotFound
from potluck.hub.commands import files
from potluck.protocol import Blob


def blob_of(content: bytes) -> Blob:
    return Blob(hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def hub(embedded_hub: Hub) -> Hub:
    return embedded_hub


def test_an_upload_goes_on_where_it_was_even_on_another_hub(hub: Hub) -> None:
    content = bytes(range(256)) * 10
    begun = hub.run(files.begin(hub.desk, blob_of(content)))
    assert (begun.offset, begun.done) == (0, False)
    hub.run(files.append(hub.desk, begun.upload_id, 0, content[:1000]))
    hub.restart()

    status = hub.run(files.begin(hub.desk, blob_of(content)))
    assert (status.offset, status.upload_id) == (1000, begun.upload_id)
    done = hub.run(files.append(hub.desk, status.upload_id, 1000, content[1000:]))

    assert done.done
    assert hub.blobs.read(blob_of(content).hash) == content
    assert hub.one("SELECT size_bytes FROM blobs") == len(content)


def test_what_is_here_already_is_not_sent_again(hub: Hub) -> None:
    blob = hub.put(b"once")

    answer = hub.run(files.begin(hub.desk, blob))

    assert (answer.done, answer.offset) == (True, 4)
    again = hub.run(files.append(hub.desk, answer.upload_id, 0, b"once"))
    assert again.done


def test_a_wrong_offset_is_told_the_right_one(hub: Hub) -> None:
    blob = blob_of(b"abcdef")
    upload = hub.run(files.begin(hub.desk, blob))
    hub.run(files.append(hub.desk, upload.upload_id, 0, b"abc"))

    for offset, piece in ((0, b"ab"), (4, b"ef"), (1, b"bcd")):
        with pytest.raises(Conflict, match="offset 3"):
            hub.run(files.append(hub.desk, upload.upload_id, offset, piece))

    again = hub.run(files.append(hub.desk, upload.upload_id, 0, b"abc"))  # its answer was lost
    assert (again.offset, again.done) == (3, False)
    assert hub.run(files.append(hub.desk, upload.upload_id, 3, b"def")).done


def test_bytes_of_another_hash_are_thrown_away(hub: Hub) -> None:
    blob = blob_of(b"right")
    upload = hub.run(files.begin(hub.desk, blob))

    with pytest.raises(BadInput, match="damaged"):
        hub.run(files.append(hub.desk, upload.upload_id, 0, b"wrong"))

    assert not hub.blobs.has(blob.hash)
    assert hub.one("SELECT count(*) FROM blobs") == 0
    assert hub.run(files.append(hub.desk, upload.upload_id, 0, b"right")).done


def test_more_bytes_than_announced_are_refused(hub: Hub) -> None:
    upload = hub.run(files.begin(hub.desk, Blob("a" * 64, 3)))

    with pytest.raises(BadInput, match="longer"):
        hub.run(files.append(hub.desk, upload.upload_id, 0, b"four"))


def test_an_empty_blob_is_a_blob(hub: Hub) -> None:
    assert hub.put(b"").size_bytes == 0
    assert hub.blobs.read(hashlib.sha256(b"").hexdigest()) == b""


@pytest.mark.parametrize(
    "upload_id", ["", "x", "a" * 64, "a" * 64 + "-", "a" * 64 + "-²", "../" * 22 + "-5", "A" * 64 + "-5"]
)
def test_an_upload_that_cannot_be_is_not_found(hub: Hub, upload_id: str) -> None:
    with pytest.raises((NotFound, BadInput)):
        hub.run(files.status(hub.desk, upload_id))


@pytest.mark.parametrize("size", [-1, files.MAX_BLOB_BYTES + 1])
def test_a_blob_of_absurd_size_is_refused(hub: Hub, size: int) -> None:
    with pytest.raises(BadInput):
        hub.run(files.begin(hub.desk, Blob("a" * 64, size)))


@pytest.mark.parametrize("hash_", ["", "../../etc/passwd", "g" * 64, "a" * 63])
def test_a_hash_that_is_none_never_becomes_a_path(hub: Hub, hash_: str) -> None:
    with pytest.raises((NotFound, BadInput)):
        hub.run(files.begin(hub.desk, Blob(hash_, 5)))


def test_the_same_piece_twice_at_once_is_written_once(hub: Hub) -> None:
    content = b"z" * 5000
    upload = hub.run(files.begin(hub.desk, blob_of(content)))

    async def send() -> bool:
        try:
            return (await files.append(hub.desk, upload.upload_id, 0, content)).done
        except (Conflict, NotFound):
            return hub.blobs.has(blob_of(content).hash)

    assert any(hub.together(send(), send(), send()))
    assert hub.blobs.read(blob_of(content).hash) == content


def test_an_upload_that_was_never_begun_cannot_be_larger_than_any_blob(hub: Hub) -> None:
    for size in (files.MAX_BLOB_BYTES + 1, 10**18):
        with pytest.raises(BadInput, match="at most"):
            hub.run(files.append(hub.desk, f"{'0' * 64}-{size}", 0, b"x"))
    with pytest.raises(NotFound):
        hub.run(files.append(hub.desk, f"{'0' * 64}-{'9' * 5000}", 0, b"x"))


def test_the_sweep_forgets_uploads_that_nobody_went_on_with(hub: Hub) -> None:
    old, young = "a" * 64, "b" * 64
    for hash_ in (old, young):
        hub.run(files.append(hub.desk, f"{hash_}-10", 0, b"some"))
    day_ago = time.time() - 25 * 3600
    os.utime(hub.blobs.part(old), (day_ago, day_ago))

    assert hub.run(files.sweep(hub.desk)) == 1

    assert hub.blobs.part_size(old) == 0
    assert hub.blobs.part_size(young) == 4
