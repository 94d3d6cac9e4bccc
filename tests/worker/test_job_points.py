"""Which points come out of what a job wrote, be it honest or not?"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import potluck
from potluck import job
from potluck.blobs import hash_bytes
from potluck.protocol import Blob, Point
from potluck.worker.jobs import points as points_module
from potluck.worker.jobs.points import Points
from potluck.worker.jobs.tfevents import EventFile, crc32c, masked_crc32c, read_event

PNG = job.encode_png(1, 1, 1, b"x")


class Room:
    """A job's folders, and a reader of its points."""

    def __init__(self, top: Path) -> None:
        self.metrics, self.work, self.output = top / "metrics", top / "work", top / "output"
        for folder in (self.metrics, self.work, self.output):
            folder.mkdir()
        self.kept: list[bytes] = []
        self.said: list[str] = []
        self.now = 0.0

    def keep(self, png: bytes) -> Blob:
        self.kept.append(png)
        return hash_bytes(png)

    def reader(self) -> Points:
        return Points(
            self.metrics,
            folders=[self.work, self.output],
            keep=self.keep,
            say=self.said.append,
            clock=lambda: self.now,
        )

    def write(self, *lines: bytes) -> None:
        with (self.metrics / job.LINES).open("ab") as file:
            for line in lines:
                file.write(line + b"\n")

    def pictures(self) -> Path:
        (self.metrics / job.PICTURES).mkdir(exist_ok=True)
        return self.metrics / job.PICTURES


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def line(step: Any = 1, **more: Any) -> bytes:
    return json.dumps({"step": step, "at": 5.0, "values": {"a": 1.0}, **more}).encode()


# --- potluck.log


def test_what_was_logged_comes_out_with_numbers_in_a_row(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_METRICS_DIR", str(room.metrics))
    reader = room.reader()

    assert reader.read() == []
    potluck.log(1, loss=0.5)
    [first] = reader.read()
    potluck.log(2, loss=0.25, sample=memoryview(b"\0\x80\xff\0").cast("B", (2, 2)))
    [second] = reader.read()

    assert (first.step, first.values, first.seq) == (1, {"loss": 0.5}, 0)
    assert (second.step, second.values, second.seq) == (2, {"loss": 0.25}, 1)
    assert second.images == {"sample": hash_bytes(room.kept[0])}
    assert list((room.metrics / job.PICTURES).iterdir()) == []


def test_a_line_is_read_when_it_is_whole_and_the_last_one_even_without_its_end(room: Room) -> None:
    reader = room.reader()
    text = line(1) + b"\n" + line(2)
    seen = []
    with (room.metrics / job.LINES).open("ab", buffering=0) as file:
        for start in range(0, len(text), 7):
            file.write(text[start : start + 7])
            seen += reader.read()

    assert [point.step for point in seen] == [1]
    assert [point.step for batch in reader.finish() for point in batch] == [2]


def test_a_long_backlog_comes_in_batches_of_the_size_asked_for(room: Room) -> None:
    room.write(*(line(step) for step in range(5000)))

    batches = list(room.reader().finish(limit=300))

    assert {len(batch) for batch in batches} <= {300, 5000 % 300}
    assert [point.seq for batch in batches for point in batch] == list(range(5000))


HOSTILE = [
    *(b"", b"{", b"null", b"[]", b"\xff\xfe", b"\0" * 100, b'{"step": 1}', b"[" * 100_000, b'{"a":' * 50_000),
    *(line("1"), line(1.5), line(1 << 60), line(10**400), line(1, values={}), line(1, values={"a": "b"})),
    *(
        line(1, values={"a": float("nan")}),
        line(1, values={"a": 1e400}),
        line(1, values={"\x1b": 1.0}),
        line(1, values=[1]),
    ),
    *(b"x" * 300_000, line(1, values={"a" * 300_000: 1.0}), line(1, at="now"), line(1, values={"a": [1]})),
]


@pytest.mark.parametrize("bad", HOSTILE, ids=range(len(HOSTILE)))
def test_a_line_that_makes_no_sense_is_left_out_and_the_next_is_read(room: Room, bad: bytes) -> None:
    room.write(line(1), bad, line(3))

    assert [point.step for batch in room.reader().finish() for point in batch] == [1, 3]


def test_a_line_without_end_costs_no_memory(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points_module, "_AT_ONCE_BYTES", 100_000)
    reader = room.reader()
    room.write(b"x" * 1_000_000, line(2))

    sizes, seen = [], []
    for _ in range(20):
        seen += reader.read()
        sizes.append(len(reader._lines._rest))

    assert [point.step for point in seen] == [2]
    assert max(sizes) <= points_module.MAX_LINE_BYTES


def test_names_are_cleaned_and_values_counted(room: Room) -> None:
    room.write(
        line(1, values={"\x1b[31mred\x1b[0m\n" + "x" * 200: 1.0}), line(2, values={str(n): n for n in range(1500)})
    )

    first, second = room.reader().read()

    assert list(first.values) == ["red " + "x" * 95 + "…"]
    assert len(second.values) == job.MAX_VALUES


def test_a_file_that_is_no_file_is_not_waited_for(room: Room) -> None:
    os.mkfifo(room.metrics / job.LINES)

    assert room.reader().read() == []


@pytest.mark.parametrize(
    "file",
    [
        "../secret.png",
        "/etc/hosts.png",
        "link.png",
        "folder.png",
        "gone.png",
        "text.png",
        "pipe.png",
        "\0.png",
        "large.png",
    ],
)
def test_a_picture_that_is_not_one_of_its_own_is_not_taken(room: Room, file: str) -> None:
    (room.metrics / "secret.png").write_bytes(PNG)
    (room.pictures() / "link.png").symlink_to(room.metrics / "secret.png")
    (room.pictures() / "folder.png").mkdir()
    (room.pictures() / "text.png").write_bytes(b"no picture")
    (room.pictures() / "large.png").write_bytes(PNG + b"\0" * job.MAX_PNG_BYTES)
    os.mkfifo(room.pictures() / "pipe.png")
    room.write(line(1, images={"sample": file}))

    [point] = room.reader().read()

    assert (point.images, room.kept) == ({}, [])
    assert (room.metrics / "secret.png").exists()


def test_a_folder_of_pictures_that_is_a_link_is_not_followed(room: Room) -> None:
    (room.work / "host.png").write_bytes(PNG)
    (room.metrics / job.PICTURES).symlink_to(room.work)
    room.write(line(1, images={"sample": "host.png"}))

    [point] = room.reader().read()

    assert point.images == {}
    assert (room.work / "host.png").exists()


def test_pictures_and_points_without_end_are_cut_off_and_it_is_said(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points_module, "MAX_PICTURES", 2)
    monkeypatch.setattr(points_module, "MAX_POINTS", 4)
    for number in range(6):
        (room.pictures() / f"{number}.png").write_bytes(PNG)
        room.write(line(number, images={"sample": f"{number}.png"}))

    found = room.reader().read()

    assert [len(point.images) for point in found] == [1, 1, 0, 0]
    assert len(room.said) == 2


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60), max_size=8), st.integers(1, 50))
def test_whatever_bytes_are_written_in_whatever_pieces_reading_never_fails(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], limit: int
) -> None:
    room = Room(tmp_path_factory.mktemp("any"))
    reader = room.reader()
    (room.work / "events.out.tfevents.1").touch()
    room.now = 10.0
    for piece in pieces:
        for path in (room.metrics / job.LINES, room.work / "events.out.tfevents.1", room.work / "b.tfevents"):
            with path.open("ab") as file:
                file.write(piece)
        assert len(reader.read(limit)) <= limit
    list(reader.finish(limit))


# --- TensorBoard


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def number_of(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def event(step: int, value: bytes, at: float = 1.7e9) -> bytes:
    return b"\x09" + struct.pack("<d", at) + number_of(2, step) + message(5, message(1, value))


def scalar(step: int, tag: str, value: float) -> bytes:
    return event(step, message(1, tag.encode()) + b"\x15" + struct.pack("<f", value))


def image(step: int, tag: str, png: bytes = PNG) -> bytes:
    return event(step, message(1, tag.encode()) + message(4, number_of(1, 1) + number_of(2, 1) + message(4, png)))


def tensor(step: int, tag: str, proto: bytes) -> bytes:
    return event(step, message(1, tag.encode()) + message(8, proto))


def record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))


VERSION = record(b"\x09" + struct.pack("<d", 1.7e9) + message(3, b"brain.Event:2"))


def test_the_checksum_is_the_one_of_the_standard() -> None:
    # RFC 3720, appendix B.4.
    assert crc32c(b"\0" * 32) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_figures_and_pictures_are_read_as_they_are_written(room: Room) -> None:
    reader = room.reader()
    room.now = 10.0
    text = VERSION + b"".join(
        record(one)
        for one in (
            *(scalar(1, "loss", 0.5), scalar(1, "accuracy", 0.25), image(1, "sample"), scalar(2, "loss", float("nan"))),
            *(scalar(2, "loss", 0.125), scalar(-3, "loss", 1.0)),
        )
    )
    folder = room.work / "runs" / "Nov22"
    folder.mkdir(parents=True)
    found: list[Point] = []
    with (folder / "events.out.tfevents.1.host").open("ab", buffering=0) as file:
        for start in range(0, len(text), 50):
            file.write(text[start : start + 50])
            found += reader.read()
    found += [point for batch in reader.finish() for point in batch]

    values: dict[int, dict[str, float]] = {}
    for point in found:
        values.setdefault(point.step, {}).update(point.values)
    assert values == {1: {"loss": 0.5, "accuracy": 0.25}, 2: {"loss": 0.125}, -3: {"loss": 1.0}}
    assert [blob for point in found for blob in point.images.values()] == [hash_bytes(PNG)]
    assert {point.at for point in found} == {1.7e9}


@pytest.mark.parametrize(
    ("proto", "value"),
    [
        (number_of(1, 1) + message(4, struct.pack("<f", 1.5)), 1.5),
        (number_of(1, 1) + message(5, struct.pack("<f", 1.5)), 1.5),
        (number_of(1, 1) + b"\x2d" + struct.pack("<f", 1.5), 1.5),
        (number_of(1, 2) + message(6, struct.pack("<d", 0.1)), 0.1),
        (number_of(1, 2) + b"\x31" + struct.pack("<d", 0.1), 0.1),
        (number_of(1, 3) + message(7, varint(42)), 42.0),
        (number_of(1, 9) + number_of(10, -5), -5.0),
        (number_of(1, 19) + message(4, struct.pack("<e", 0.5)), 0.5),
        (number_of(1, 1) + message(4, struct.pack("<2f", 1, 2)), None),
    ],
)
def test_figures_in_tensors_are_read_if_they_are_one(proto: bytes, value: float | None) -> None:
    found = read_event(tensor(1, "loss", proto))

    assert (found.values if found else {}) == ({} if value is None else {"loss": value})


def test_pictures_in_tensors_are_read() -> None:
    strings = b"".join(message(8, text) for text in (b"1", b"1", PNG))

    found = read_event(tensor(4, "sample", number_of(1, 7) + strings))

    assert found is not None and found.images == {"sample": PNG}


def test_files_that_were_in_the_project_before_are_not_the_jobs_own(room: Room) -> None:
    (room.work / "events.out.tfevents.old").write_bytes(VERSION + record(scalar(1, "old", 1.0)))
    reader = room.reader()
    (room.work / "events.out.tfevents.new").write_bytes(VERSION + record(scalar(1, "new", 1.0)))

    assert [point.values for batch in reader.finish() for point in batch] == [{"new": 1.0}]


def test_several_runs_keep_their_figures_apart(room: Room) -> None:
    reader = room.reader()
    for where in ("a", "a/val", "b"):
        (room.output / where).mkdir()
        (room.output / where / "events.out.tfevents.1").write_bytes(VERSION + record(scalar(1, "loss", 1.0)))

    names = [name for batch in reader.finish() for point in batch for name in point.values]

    assert names == ["loss", "val/loss", "b/loss"]


def test_links_are_not_followed(room: Room, tmp_path: Path) -> None:
    reader = room.reader()
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "events.out.tfevents.1").write_bytes(VERSION + record(scalar(1, "secret", 1.0)))
    (room.work / "folder").symlink_to(tmp_path / "host")
    (room.work / "events.out.tfevents.2").symlink_to(tmp_path / "host" / "events.out.tfevents.1")
    os.mkfifo(room.work / "events.out.tfevents.3")

    assert list(reader.finish()) == []


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def huge() -> bytes:
    length = struct.pack("<Q", 1 << 62)
    return length + struct.pack("<I", masked_crc32c(length))


@pytest.mark.parametrize(
    "bad",
    [
        *(damaged(record(scalar(2, "b", 1.0)), at) for at in (0, 7, 9, 15, -2)),
        *(huge(), b"\x89PNG" + b"x" * 100),
    ],
)
def test_after_damage_a_file_is_given_up_and_what_came_before_counts(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "file").write_bytes(VERSION + record(scalar(1, "a", 1.0)) + bad + record(scalar(3, "c", 1.0)))
    file = EventFile(tmp_path, "file")

    assert [one.values for one in file.read()] == [{"a": 1.0}]
    assert file.broken
    assert file.read() == []


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\xff" * 20, message(5, b"\x0a\xff"), message(5, message(1, b"\x0a\x7f")), b"\x2f"]
)
def test_an_event_that_cannot_be_read_is_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(record(content) + record(scalar(3, "c", 1.0)))

    assert [one.values for one in EventFile(tmp_path, "file").read()] == [{"c": 1.0}]


@given(st.binary(max_size=200))
def test_any_event_is_read_or_passed_over(content: bytes) -> None:
    read_event(content)
    read_event(event(1, content))
    read_event(tensor(1, "a", content))


def test_a_large_file_is_read_in_pieces(tmp_path: Path) -> None:
    count = 30_000
    (tmp_path / "file").write_bytes(b"".join(record(scalar(step, "loss", 1.0)) for step in range(count)))
    file = EventFile(tmp_path, "file")

    first = file.read()
    behind = file.behind
    rest = file.read()
    while file.behind:
        rest += file.read()

    assert behind and 0 < len(first) < count
    assert [one.step for one in first + rest] == list(range(count))


def test_the_real_writer_is_understood(room: Room) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs the package tensorboard")
    import numpy as np

    reader = room.reader()
    writer = tensorboard.SummaryWriter(room.work / "runs")
    for step in range(20):
        writer.add_scalar("loss", 1 / (step + 1), step)
        writer.add_scalar("lr", 0.5, step, new_style=True)
    writer.add_image("sample", np.zeros((3, 8, 8), dtype=np.uint8), 3)
    writer.add_histogram("weights", np.arange(100), 3)
    writer.add_text("note", "words", 3)
    writer.close()

    values: dict[str, dict[int, float]] = {}
    images: list[str] = []
    for batch in reader.finish():
        for point in batch:
            images += point.images
            for name, value in point.values.items():
                values.setdefault(name, {})[point.step] = value

    assert values["loss"] == {step: pytest.approx(1 / (step + 1)) for step in range(20)}
    assert values["lr"] == dict.fromkeys(range(20), 0.5)
    assert set(values) == {"loss", "lr"}
    assert images == ["sample"]
