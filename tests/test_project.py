"""Does a project take along what its owner means, and do files from elsewhere stay where they belong?"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from potluck.blobs import BlobStore, hash_bytes
from potluck.client import project
from potluck.client.places import Place, open_below
from potluck.client.project import copy, git_state, pack, unpack, without_credentials
from potluck.errors import BadInput, NotFound
from potluck.protocol import Blob, Tree, TreeFile

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
not_as_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root reads everything")


def put(folder: Path, path: str, text: str = "x") -> Path:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


def paths(tree: Tree) -> list[str]:
    return [file.path for file in tree.files]


# --- what belongs to it


def test_a_project_is_its_files_with_their_hashes(tmp_path: Path) -> None:
    put(tmp_path, "train.py", "print(1)")
    put(tmp_path, "data/a b.txt", "")
    put(tmp_path, "ü/€.txt", "x")
    put(tmp_path, "run.sh", "#!/bin/sh").chmod(0o755)

    tree = pack(tmp_path)

    assert paths(tree) == ["data/a b.txt", "run.sh", "train.py", "ü/€.txt"]
    assert tree.files[2] == TreeFile("train.py", hash_bytes(b"print(1)"))
    assert [file.path for file in tree.files if file.executable] == ["run.sh"]
    assert pack(tmp_path) == tree


def test_what_is_never_part_of_a_project(tmp_path: Path) -> None:
    for path in (
        ".git/config",
        "a/.git/HEAD",
        "__pycache__/x.pyc",
        "a/__pycache__/y.pyc",
        ".venv/bin/python",
        "b/.venv/x",
    ):
        put(tmp_path, path)
    put(tmp_path, ".potluckignore", "!.git\n!.venv\n!__pycache__\n")
    put(tmp_path, "train.py")

    assert paths(pack(tmp_path)) == [".potluckignore", "train.py"]


def test_ignore_files_mean_what_they_mean_to_git(tmp_path: Path) -> None:
    put(tmp_path, ".gitignore", "*.log\n!keep.log\n/only-here.txt\nbuild/\n# a comment\n\n**/deep/*.tmp\n")
    put(tmp_path, "sub/.gitignore", "secret.txt\n!loud.log\n")
    for path in ("a.log", "keep.log", "only-here.txt", "sub/only-here.txt", "build/x", "sub/build/y", "builder/z"):
        put(tmp_path, path)
    for path in ("x/deep/a.tmp", "x/a.tmp", "sub/secret.txt", "secret.txt", "sub/loud.log", "sub/quiet.log"):
        put(tmp_path, path)

    assert paths(pack(tmp_path)) == [
        ".gitignore", "builder/z", "keep.log", "secret.txt", "sub/.gitignore", "sub/loud.log", "sub/only-here.txt", "x/a.tmp",
    ]  # fmt: skip


@needs_git
def test_git_itself_agrees(tmp_path: Path) -> None:
    rules = "*.o\n!b.o\ndata/*\n!data/keep/\n/top\nfoo/**/bar\n\\#odd\ntrailing\\ \n[ab].c\n?.d\nx/y/\n"
    put(tmp_path, ".gitignore", rules)
    put(tmp_path, "n/.gitignore", "!*.o\n/inner\n*.txt\n")
    names = "a.o b.o n/a.o n/inner n/m/inner data/x data/keep/y top n/top foo/bar foo/1/bar foo/1/2/bar #odd a.c c.c n/b.c e.d ee.d x/y/z x/z n/a.txt n/m/b.txt"
    for name in names.split():
        put(tmp_path, name)
    git(tmp_path, "init", "-q")

    listed = git(tmp_path, "-c", "core.quotepath=false", "ls-files", "-co", "--exclude-standard").splitlines()

    assert paths(pack(tmp_path)) == sorted(listed)


def test_potluckignore_has_the_last_word(tmp_path: Path) -> None:
    put(tmp_path, ".gitignore", "data/\n*.bin\n")
    put(tmp_path, ".potluckignore", "!data/\nnotes/\n!tiny.bin\n")
    put(tmp_path, "sub/.gitignore", "tiny.bin\n")
    for path in ("data/set.csv", "notes/todo.md", "big.bin", "tiny.bin", "sub/tiny.bin"):
        put(tmp_path, path)

    found = paths(pack(tmp_path, more_ignores=["*.csv"]))

    assert found == [".gitignore", ".potluckignore", "sub/.gitignore", "sub/tiny.bin", "tiny.bin"]


def test_a_part_of_a_repository_follows_the_rules_above_it(tmp_path: Path) -> None:
    put(tmp_path, ".gitignore", "*.ckpt\n/exp/one/raw/\n/raw/\n")
    (tmp_path / ".git").mkdir()
    folder = tmp_path / "exp" / "one"
    for path in ("train.py", "a.ckpt", "raw/x", "sub/raw/y"):
        put(folder, path)

    assert paths(pack(folder)) == ["sub/raw/y", "train.py"]
    put(tmp_path, ".gitignore", "*.ckpt\n/exp/\n")
    assert len(pack(folder).files) == 4, "a folder that git ignores may be submitted all the same"


def test_links_and_special_files_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    outside = put(tmp_path, "outside/secret.txt", "secret")
    put(folder, "train.py")
    (folder / "link.txt").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    (folder / "inside").symlink_to(folder / "train.py")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket is short
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        tree = pack(folder)

    assert paths(tree) == ["train.py"]
    assert tree.skipped == [
        "inside: a symbolic link",
        "link.txt: a symbolic link",
        "linked: a symbolic link",
        "pipe: not a plain file",
        "socket: not a plain file",
    ]


def test_names_that_nobody_can_read_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "train.py")
    put(tmp_path, "new\nline")
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb") as file:
        file.write(b"x")

    tree = pack(tmp_path)

    assert paths(tree) == ["train.py"]
    assert len(tree.skipped) == 2
    assert "control characters" in tree.skipped[0] and "not valid text" in tree.skipped[1]
    assert all(note.isprintable() for note in tree.skipped)


def test_a_project_that_is_too_large_names_the_largest(tmp_path: Path) -> None:
    for size in (10, 500, 3000, 2000, 1000):
        put(tmp_path, f"data/{size}.bin", "x" * size)

    with pytest.raises(BadInput, match=r"data/3000\.bin.*data/2000\.bin.*data/1000\.bin.*potluckignore") as raised:
        pack(tmp_path, limit_bytes=5000)

    assert "500.bin" not in str(raised.value)


def test_too_many_files_name_the_fullest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "MAX_FILES", 5)
    for number in range(6):
        put(tmp_path, f"frames/{number}.txt")
    put(tmp_path, "train.py")

    with pytest.raises(BadInput, match=r"7 files.*6, are in frames"):
        pack(tmp_path)


def test_a_folder_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a folder"):
        pack(tmp_path / "nowhere")


def test_a_pattern_that_is_none_names_its_file(tmp_path: Path) -> None:
    put(tmp_path, ".potluckignore", "good\n***/[z-a]\n")

    with pytest.raises(BadInput, match=r"\.potluckignore"):
        pack(tmp_path)


@not_as_root
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    put(tmp_path, "closed.txt").chmod(0)

    with pytest.raises(BadInput, match=r"closed\.txt"):
        pack(tmp_path)


def test_a_file_that_may_not_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `test_a_file_that_cannot_be_read_is_named`, where the test runs as root and may read everything."""
    put(tmp_path, "closed.txt")
    real = Place._open

    def refuse(self: Place, parent: int | Path, name: str, flags: int) -> int:
        if name == "closed.txt":
            raise PermissionError(13, "Permission denied")
        return real(self, parent, name, flags)

    monkeypatch.setattr(Place, "_open", refuse)

    with pytest.raises(BadInput, match=r"closed\.txt may not be read"):
        pack(tmp_path)


# --- where it comes from


def git(folder: Path, *words: str) -> str:
    env = {**os.environ, "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    argv = [
        "git",
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@t",
        "-c",
        "init.defaultBranch=main",
        "-C",
        str(folder),
        *words,
    ]
    return subprocess.run(argv, check=True, capture_output=True, text=True, env=env).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    put(tmp_path, "train.py", "one\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


@needs_git
def test_the_commit_and_what_changed_since_are_recorded(repository: Path) -> None:
    clean, nothing = git_state(repository)
    put(repository, "train.py", "two\n")
    git(repository, "remote", "add", "origin", "https://ann:ghp_secret@github.com/ann/net.git")
    changed, diff = git_state(repository)

    assert clean is not None and changed is not None
    assert (clean.branch, clean.dirty, clean.diff, nothing) == ("main", False, None, b"")
    assert clean.commit == git(repository, "rev-parse", "HEAD").strip()
    assert changed.dirty
    assert changed.diff == hash_bytes(diff)
    assert b"-one" in diff and b"+two" in diff
    assert changed.remote == "https://github.com/ann/net.git"


@needs_git
def test_a_long_diff_is_cut(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "MAX_DIFF_BYTES", 5000)
    put(repository, "train.py", "".join(f"line {n}\n" for n in range(100_000)))

    state, diff = git_state(repository)

    assert len(diff) == 5000
    assert diff.endswith(b"longer than 5 MB\n")
    assert state is not None and state.diff == hash_bytes(diff)


@needs_git
def test_a_folder_that_is_no_repository_has_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == (None, b"")
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == (None, b"")  # nothing was committed
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == (None, b"")


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("https://user:pass@host:8443/a/b.git?token=x#y", "https://host:8443/a/b.git"),
        ("https://ghp_abc@github.com/a/b", "https://github.com/a/b"),
        ("ssh://git@host/a", "ssh://host/a"),
        ("git@github.com:a/b.git", "github.com:a/b.git"),
        ("user:pa@ss@host:a", "host:a"),
        ("/home/ann/net", ""),
        ("http://[broken", ""),
        ("", ""),
    ],
)
def test_a_remote_is_recorded_without_credentials(url: str, clean: str) -> None:
    assert without_credentials(url) == clean


# --- files from elsewhere


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "store")


def test_a_tree_becomes_a_folder_again(tmp_path: Path, store: BlobStore) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    put(source, "a/b/c.txt", "deep")
    put(source, "run.sh").chmod(0o755)
    tree = pack(source)
    for file in tree.files:
        store.add_file(source / file.path)

    unpack(tree, out, store)
    copy(tree, source, tmp_path / "copy")

    assert pack(out) == tree == pack(tmp_path / "copy")
    put(out, "run.sh", "changed").chmod(0o600)
    unpack(tree, out, store)
    assert pack(out) == tree
    assert not [name for name in os.listdir(out) if name.startswith(".potluck")]


@pytest.mark.parametrize(
    "path", ["../evil", "/tmp/evil", "a/../../evil", "", ".", "..", "a//b", "a/.", "a\x00b", "a\nb", "a/"]
)
def test_a_name_that_leads_out_is_refused(tmp_path: Path, store: BlobStore, path: str) -> None:
    tree = Tree([TreeFile(path, store.add_bytes(b"evil"))])

    with pytest.raises(BadInput):
        unpack(tree, tmp_path / "deep" / "out", store)

    assert not list(tmp_path.rglob("*evil*"))


def test_nothing_is_written_through_a_link(tmp_path: Path, store: BlobStore) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    target = put(outside, "target.txt", "untouched")
    (out / "folder").symlink_to(outside)
    (out / "file.txt").symlink_to(target)
    evil = store.add_bytes(b"evil")

    with pytest.raises(BadInput, match=r"folder/target\.txt"):
        unpack(Tree([TreeFile("folder/target.txt", evil)]), out, store)
    with pytest.raises(BadInput):
        unpack(Tree([TreeFile("folder/new/x.txt", evil)]), out, store)
    unpack(Tree([TreeFile("file.txt", evil)]), out, store)

    assert target.read_text() == "untouched"
    assert os.listdir(outside) == ["target.txt"]
    assert not (out / "file.txt").is_symlink()
    assert (out / "file.txt").read_text() == "evil"


def test_nothing_is_read_through_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    secret = put(tmp_path, "outside/secret.txt", "secret")
    folder.mkdir()
    (folder / "file").symlink_to(secret)
    (folder / "folder").symlink_to(secret.parent)
    os.mkfifo(folder / "pipe")

    for path in ("file", "folder/secret.txt", "pipe", "../outside/secret.txt", "folder"):
        with pytest.raises(BadInput), open_below(folder, path):
            pass
    with pytest.raises(NotFound), open_below(folder, "nothing"):
        pass


def test_a_file_where_a_folder_should_be_is_said(tmp_path: Path, store: BlobStore) -> None:
    blob = store.add_bytes(b"x")

    with pytest.raises(BadInput, match="a/b"):
        unpack(Tree([TreeFile("a", blob), TreeFile("a/b", blob)]), tmp_path / "out", store)
    put(tmp_path, "out/a")
    with pytest.raises(BadInput, match="a/b"):
        unpack(Tree([TreeFile("a/b", blob)]), tmp_path / "out", store)
    (tmp_path / "out" / "dir").mkdir()
    with pytest.raises(BadInput, match="dir"):
        unpack(Tree([TreeFile("dir", blob)]), tmp_path / "out", store)


def test_damaged_bytes_never_get_a_name(tmp_path: Path, store: BlobStore) -> None:
    blob = store.add_bytes(b"good")
    store.path(blob.hash).write_bytes(b"evil")

    with pytest.raises(BadInput, match=r"a\.txt"):
        unpack(Tree([TreeFile("a.txt", blob)]), tmp_path / "out", store)
    with pytest.raises(NotFound):
        unpack(Tree([TreeFile("b.txt", Blob("0" * 64, 4))]), tmp_path / "out", store)

    assert os.listdir(tmp_path / "out") == []
