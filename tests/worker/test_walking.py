"""Can the agent go through, measure and remove whatever a job has made of its folders?"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest

from potluck.worker.jobs import reports
from potluck.worker.jobs.walking import DEEPEST, remove_tree, size_of, walk

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs handles of folders")


def nest(folder: Path, floors: int) -> None:
    """Folders inside one another, deeper than any path can say."""
    handle = os.open(folder, os.O_RDONLY)
    for _ in range(floors):
        os.mkdir("d", dir_fd=handle)
        below = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = below
    os.close(os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=handle))
    os.close(handle)


def test_every_folder_is_visited_with_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("123")
    (tmp_path / "left out" / "c").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")

    seen = {}
    for path, folders, others, _ in walk(tmp_path):
        folders[:] = [name for name in folders if name != "left out"]
        seen[path] = (folders, others)

    assert seen == {"": (["a"], ["link"]), "a/": (["b"], ["file"]), "a/b/": ([], [])}


def test_a_folder_that_is_a_link_or_gone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    said: list[str] = []

    assert list(walk(tmp_path / "link", unreadable=lambda path, error: said.append(path))) == []
    assert list(walk(tmp_path / "gone")) == []
    assert said == [""]


@POSIX
def test_a_pipe_put_in_place_of_a_folder_keeps_nobody_waiting(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    seen = []

    for path, _, _, _ in walk(tmp_path):
        seen.append(path)
        if path == "":
            (tmp_path / "folder").rmdir()
            os.mkfifo(tmp_path / "folder")

    assert seen == [""]


@POSIX
@pytest.mark.parametrize("floors", [DEEPEST, DEEPEST + 1, 5000])
def test_folders_nested_without_end_are_removed_with_few_descriptors(tmp_path: Path, floors: int) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    nest(folder, floors)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(name) for name in os.listdir("/proc/self/fd")) + 200, most[1]))

    try:
        assert size_of(folder) >= 2
        reports.remove(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)

    assert not folder.exists()


@POSIX
def test_what_was_made_unwritable_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    (folder / "closed" / "in").mkdir(parents=True)
    (folder / "closed" / "in" / "file").touch()
    (folder / "closed" / "in").chmod(0)
    (folder / "closed").chmod(0o500)

    assert remove_tree(folder)


@POSIX
def test_a_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "owners").mkdir()
    (tmp_path / "owners" / "thesis").touch()
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "link").symlink_to(tmp_path / "owners")

    assert remove_tree(tmp_path / "job")
    assert (tmp_path / "owners" / "thesis").exists()


@POSIX
def test_no_descriptor_is_left_open_when_the_caller_stops_early(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    before = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()

    for path, _, _, _ in walk(tmp_path):
        if path == "a/":
            break

    after = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
    assert after == before
