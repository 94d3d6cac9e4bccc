"""What is collected of a folder that a job has left, and when is a checkpoint taken?"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from potluck.errors import HubUnreachable
from potluck.protocol import Tree
from potluck.worker.jobs import checkpoints, outputs
from potluck.worker.jobs.checkpoints import Watcher, is_cut
from potluck.worker.jobs.outputs import collect

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def shown(tree: Tree) -> dict[str, str]:
    return {file.path: file.blob.hash for file in tree.files}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- outputs


def test_every_file_has_its_hash_and_the_order_is_that_of_the_paths(tmp_path: Path) -> None:
    put(tmp_path, {"b/z.txt": b"z", "b.txt": b"b", "a/c/d": b"", "ü 😀.bin": b"\0" * 3_000_000})
    (tmp_path / "run.sh").write_text("x")
    (tmp_path / "run.sh").chmod(0o755)

    tree = collect(tmp_path)

    assert [file.path for file in tree.files] == sorted(["b/z.txt", "b.txt", "a/c/d", "ü 😀.bin", "run.sh"])
    assert shown(tree)["ü 😀.bin"] == sha(b"\0" * 3_000_000)
    assert [file.path for file in tree.files if file.executable] == ["run.sh"]
    assert tree.size_bytes == 3_000_003
    assert tree.skipped == []


def test_links_devices_and_strange_names_are_left_out_with_a_note(tmp_path: Path) -> None:
    secret = put(tmp_path, {"outside/secret": b"s", "outside/more/secret": b"s"}) / "outside"
    folder = put(tmp_path / "out", {"good": b"g", "line\nbreak": b"x"})
    (folder / "link").symlink_to(secret / "secret")
    (folder / "folder").symlink_to(secret)
    (folder / "nowhere").symlink_to("nowhere at all")
    os.mkfifo(folder / "pipe")
    (folder / os.fsdecode(b"caf\xe9")).write_bytes(b"latin 1")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(folder, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/socket") if sys.platform == "linux" else None
        os.close(here)

        tree = collect(folder)

    assert list(shown(tree)) == ["good"]
    notes = "\n".join(tree.skipped)
    for words in ("link: a symbolic link", "folder: a symbolic link", "nowhere: a symbolic link", "pipe: a device"):
        assert words in notes
    assert "not UTF-8" in notes and "caf\\udce9" in notes
    assert "line break: " in notes


def test_a_folder_that_became_a_link_gives_nothing(tmp_path: Path) -> None:
    put(tmp_path, {"host/secret": b"s"})
    (tmp_path / "out").symlink_to(tmp_path / "host")

    assert collect(tmp_path / "out").files == []
    assert collect(tmp_path / "never made").files == []


def test_what_is_too_much_is_left_out_and_the_rest_is_taken(tmp_path: Path) -> None:
    put(tmp_path, {"a": b"12345", "c": b"123", "d": b"12"})
    with (tmp_path / "b-sparse").open("wb") as file:
        file.truncate(1 << 40)

    tree = collect(tmp_path, limit_bytes=9)
    few = collect(tmp_path, limit_files=1)

    assert [file.path for file in tree.files] == ["a", "c"]
    assert "b-sparse: 1099.5 GB: with it, more than" in tree.skipped[0]
    assert tree.skipped[1].startswith("d: ")
    assert [file.path for file in few.files] == ["a"]
    assert any(note.startswith("c: more than 1 files") for note in few.skipped)


def test_folders_without_end_end(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d"] * 60)
    put(deep, {"bottom": b"x"})

    tree = collect(tmp_path)

    assert tree.files == []
    assert tree.skipped == ["/".join(["d"] * 41) + ": deeper than 40 folders"]


def test_a_thousand_links_make_a_list_that_ends(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"link-{number:04}").symlink_to("x")

    skipped = collect(tmp_path).skipped

    assert len(skipped) == 501
    assert skipped[-1] == "… and 500 more"


@pytest.mark.parametrize("times", [1, 99])
def test_a_file_that_changes_while_it_is_read_is_tried_again_then_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    path = put(tmp_path, {"moving": b"first"}) / "moving"
    real, left = outputs._read, [times]

    def read_and_change(file: object, size: int, copy: Path | None) -> object:
        blob = real(file, size, copy)  # type: ignore[arg-type]
        if left[0]:
            left[0] -= 1
            path.write_bytes(path.read_bytes() + b"+")
        return blob

    monkeypatch.setattr(outputs, "_read", read_and_change)
    tree = collect(tmp_path)

    if times == 1:
        assert shown(tree) == {"moving": sha(b"first+")}
    else:
        assert tree == Tree([], ["moving: it changed each time while it was read"])


def test_a_file_put_in_place_of_another_or_a_link_put_in_place_of_a_file_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"secret": b"s", "out/file": b"f"})
    real = outputs.Entry.open

    def swap_then_open(entry: outputs.Entry) -> int:
        (tmp_path / "out" / "file").unlink(missing_ok=True)
        (tmp_path / "out" / "file").symlink_to(tmp_path / "secret")
        return real(entry)

    monkeypatch.setattr(outputs.Entry, "open", swap_then_open)
    tree = collect(tmp_path / "out")

    assert tree.files == []
    assert "cannot be read" in tree.skipped[0]


# --- checkpoints


class Hub:
    """Gets checkpoints, and keeps what they held."""

    def __init__(self) -> None:
        self.got: list[dict[str, bytes]] = []
        self.away = False

    def send(self, folder: Path, tree: Tree) -> None:
        if self.away:
            raise HubUnreachable("the hub cannot be reached")
        content = {file.path: (folder / file.path).read_bytes() for file in tree.files}
        assert {path: sha(bytes_) for path, bytes_ in content.items()} == shown(tree)
        self.got.append(content)


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    return made


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def watcher(tmp_path: Path, hub: Hub, folder: Path, said: list[str]) -> Iterator[Watcher]:
    yield Watcher(folder, snapshots=tmp_path / "snapshots", send=hub.send, say=said.append)
    assert list((tmp_path / "snapshots").glob("*")) == []


def test_a_checkpoint_is_sent_once_after_it_was_quiet(watcher: Watcher, hub: Hub, folder: Path) -> None:
    assert not watcher.look(0)
    put(folder, {"step-1/model": b"one", "step-1/optimizer": b"two"})

    assert [watcher.look(now) for now in (1, 3, 5, 6.5, 12, 100)] == [False, False, False, True, False, False]
    assert hub.got == [{"step-1/model": b"one", "step-1/optimizer": b"two"}]


def test_a_change_starts_the_wait_again_and_the_next_checkpoint_is_sent_too(
    watcher: Watcher, hub: Hub, folder: Path
) -> None:
    put(folder, {"a": b"1"})
    watcher.look(0)
    put(folder, {"b": b"2"})
    assert [watcher.look(now) for now in (4, 8, 9)] == [False, False, True]

    (folder / "a").unlink()
    put(folder, {"b": b"3"})
    assert [watcher.look(now) for now in (10, 16)] == [False, True]
    assert hub.got == [{"a": b"1", "b": b"2"}, {"b": b"3"}]


def test_a_single_file_that_is_saved_without_a_pause_is_taken_between_two_saves(
    watcher: Watcher, hub: Hub, folder: Path
) -> None:
    for second in range(40):
        put(folder, {".part": b"%d" % second})
        (folder / ".part").replace(folder / "state")
        watcher.look(second)

    assert hub.got == [{"state": b"16"}, {"state": b"32"}]


def test_of_several_files_that_are_saved_without_a_pause_none_is_taken(
    watcher: Watcher, hub: Hub, folder: Path
) -> None:
    for second in range(40):
        put(folder, {"model": b"%d" % second, "optimizer": b"%d" % second})
        watcher.look(second)

    assert hub.got == []


def test_an_emptied_folder_does_not_replace_the_checkpoint(watcher: Watcher, hub: Hub, folder: Path) -> None:
    put(folder, {"a": b"1"})
    watcher.look(0)
    watcher.look(10)
    (folder / "a").unlink()

    assert not any([watcher.look(20), watcher.look(30), watcher.finish(whole=True)])
    assert len(hub.got) == 1


@LINUX
def test_a_file_that_is_open_for_writing_is_waited_for_however_long(watcher: Watcher, hub: Hub, folder: Path) -> None:
    with (folder / "model").open("wb") as file:
        file.write(b"half")
        file.flush()
        assert not any(watcher.look(now) for now in range(0, 1000, 10))
        file.write(b" and half")

    assert [watcher.look(2000), watcher.look(2006)] == [False, True]
    assert hub.got == [{"model": b"half and half"}]


@LINUX
def test_a_log_that_stays_open_does_not_hold_a_checkpoint_up(watcher: Watcher, hub: Hub, folder: Path) -> None:
    with (folder / "train.log").open("wb", buffering=0) as log, (folder / "events.out.tfevents.1").open("wb") as events:
        log.write(b"one line\n")
        put(folder, {"model": b"m"})
        watcher.look(0)
        log.write(b"another\n")

        assert watcher.look(5)
        assert not watcher.look(20)
    assert events.closed
    assert hub.got == [{"model": b"m", "train.log": b"one line\nanother\n", "events.out.tfevents.1": b""}]


def test_what_moves_while_it_is_copied_is_not_sent(
    watcher: Watcher, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, {"a": b"old", "b": b"old"})
    real = checkpoints.outputs.collect

    def collect_while_it_moves(*args: object, **more: object) -> Tree:
        tree = real(*args, **more)  # type: ignore[arg-type]
        put(folder, {"a": b"new"})
        return tree

    watcher.look(0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.outputs, "collect", collect_while_it_moves)
        assert not watcher.look(5)
    put(folder, {"b": b"new"})

    assert [watcher.look(6), watcher.look(12)] == [False, True]
    assert hub.got == [{"a": b"new", "b": b"new"}]


def test_a_hub_that_is_away_is_said_once_and_tried_again_later(
    watcher: Watcher, hub: Hub, folder: Path, said: list[str]
) -> None:
    put(folder, {"a": b"1"})
    hub.away = True
    watcher.look(0)
    assert not any([watcher.look(5), watcher.look(6), watcher.look(36)])
    hub.away = False

    assert not watcher.look(40)
    assert watcher.look(70)
    assert said == ["The checkpoint could not be sent: the hub cannot be reached"]


@pytest.mark.parametrize(("whole", "sent"), [(True, True), (False, False)])
def test_at_the_end_a_new_checkpoint_counts_only_if_the_command_left_by_itself(
    watcher: Watcher, hub: Hub, folder: Path, whole: bool, sent: bool
) -> None:
    watcher.look(0)
    put(folder, {"a": b"perhaps half"})
    watcher.look(1)

    assert watcher.finish(whole=whole, now=100) is sent
    assert len(hub.got) == sent


def test_after_a_crash_a_checkpoint_that_was_whole_before_is_still_sent(
    watcher: Watcher, hub: Hub, folder: Path
) -> None:
    put(folder, {"a": b"whole"})
    hub.away = True
    watcher.look(0)
    watcher.look(5)
    hub.away = False

    assert watcher.finish(whole=False, now=6)
    assert hub.got == [{"a": b"whole"}]


def test_a_file_of_a_known_format_without_its_end_is_seen_through(
    tmp_path: Path, watcher: Watcher, hub: Hub, folder: Path, said: list[str]
) -> None:
    torch.save({"w": torch.zeros(3000)}, tmp_path / "model.pt")
    save_file({"w": torch.zeros(3000), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        whole = (tmp_path / name).read_bytes()
        assert not is_cut(tmp_path / name)
        for size in (9, 100, len(whole) // 2, len(whole) - 1):
            assert is_cut(put(tmp_path, {f"cut-{name}": whole[:size]}) / f"cut-{name}"), (name, size)
    for junk in (b"", b"1234567", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b"\x05\0\0\0\0\0\0\0{" + b'"a":'):
        assert is_cut(put(tmp_path, {"junk.safetensors": junk}) / "junk.safetensors")

    put(folder, {"model.pt": (tmp_path / "model.pt").read_bytes()[:-50]})

    assert not watcher.finish(whole=True)
    assert "the end of model.pt is missing" in said[0]


def test_the_loop_ends_when_it_is_told_to(watcher: Watcher) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=watcher.watch, args=(stop,))
    thread.start()

    stop.set()
    thread.join(10)

    assert not thread.is_alive()


# What a writer does to get from one checkpoint to the next, one step at a time, and looks at any moment in between.
STEPS = st.lists(st.tuples(st.sampled_from(["in place", "renamed", "folder"]), st.integers(1, 4)), max_size=4)


@LINUX
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, st.data())
def test_half_a_checkpoint_is_never_sent(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], data: st.DataObject
) -> None:
    top = tmp_path_factory.mktemp("never")
    folder, hub, now = top / "checkpoint", Hub(), 0.0
    folder.mkdir()
    watcher = Watcher(folder, snapshots=top / "snapshots", send=hub.send, say=lambda sentence: None)

    def moment(*, open_file: bool) -> None:
        """Time passes. While nothing is open in the middle of a checkpoint, a writer goes on within the quiet time."""
        nonlocal now
        for _ in range(data.draw(st.integers(0, 3))):
            now += data.draw(st.sampled_from([0.5, 4.0, 60.0] if open_file else [0.1, 0.4]))
            watcher.look(now)

    def write(path: Path, pieces: list[bytes]) -> None:
        with path.open("wb") as file:
            for piece in pieces:
                _put(file, piece)
                moment(open_file=True)

    for version, (how, pieces) in enumerate(steps):
        content = [f"{version}:{piece}/{pieces};".encode() for piece in range(pieces)]
        if how == "in place":
            write(folder / "model", content)
            moment(open_file=False)
            write(folder / "optimizer", content)
        elif how == "renamed":
            for name in ("model", "optimizer"):
                write(folder / f"{name}.new", content)
                moment(open_file=False)
                (folder / f"{name}.new").replace(folder / name)
        else:
            (folder / "new").mkdir()
            for name in ("model", "optimizer"):
                write(folder / "new" / name, content)
            for name in ("model", "optimizer"):
                (folder / "new" / name).replace(folder / name)
            (folder / "new").rmdir()
        for _ in range(data.draw(st.integers(0, 3))):
            now += 6
            watcher.look(now)
    watcher.finish(whole=True, now=now)

    for got in hub.got:
        assert set(got) == {"model", "optimizer"}
        assert got["model"] == got["optimizer"]
        number, of = json.loads(f"[{got['model'].rsplit(b';', 2)[-2].decode().split(':')[1].replace('/', ',')}]")
        assert number == of - 1
    assert bool(hub.got) == bool(steps)


def _put(file: BinaryIO, piece: bytes) -> None:
    file.write(piece)
    file.flush()
