"""Which files does a project's list of requirements reach, and which lines are refused?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from potluck.worker.jobs.interpreters import EnvironmentFailed
from potluck.worker.jobs.requirements import Asked, logical_lines, read


def test_lines_are_read_as_pip_reads_them() -> None:
    text = "a==1 \\\n  --hash=sha256:00 # why\n\n# c\nb @ https://x/y#egg=b\n  c\\\n"

    assert list(logical_lines(text)) == [(1, "a==1   --hash=sha256:00"), (5, "b @ https://x/y#egg=b"), (6, "c")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-e .", "line 1: `-e .` installs a link"),
        ("numpy\n--editable=./lib", "line 2"),
        ("--edit ./lib", "installs a link"),
        ("-r ../other.txt", "outside of the project"),
        ("-r/etc/passwd", "outside of the project"),
        ("--requirement=/etc/passwd", "outside of the project"),
        ("-c link.txt", "outside of the project"),
        ("--no-index -f /etc", "outside of the project"),
        ("--index-url https://ok --find-links file:///etc", "a place on your own machine"),
        ("../wheel.whl", "outside of the project"),
        ("/root/wheel.whl", "outside of the project"),
        ("pkg @ file:///root/x", "a place on your own machine"),
        ("pkg@file:///root/x", "a place on your own machine"),
        ("pkg[extra] @ ../x", "outside of the project"),
        ("git+file:///root/repo", "a place on your own machine"),
        ("FILE:///root/x.whl", "a place on your own machine"),
        ("../lib[extra]; python_version > '3'", "outside of the project"),
        ("-i https://u:${SECRET_TOKEN}@host/simple", "are not filled in"),
        ("-r gone.txt", "there is no `gone.txt` in the project"),
        ("gone-1.0.whl", "there is no `gone-1.0.whl` in the project"),
    ],
)
def test_what_leads_out_of_the_project_or_is_not_there_is_refused_with_its_line(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "link.txt").symlink_to("/etc/hostname")

    with pytest.raises(EnvironmentFailed, match=re.escape(words)):
        read_of(tmp_path, text)


def test_files_that_include_one_another_are_read_once_and_a_long_chain_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("-r b.txt\n")
    (tmp_path / "b.txt").write_text("-c a.txt\n")
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"-r {number + 1}.txt\n")

    assert [name for name, _ in read_of(tmp_path, "-r a.txt").digests] == ["a.txt", "b.txt", "requirements.txt"]
    with pytest.raises(EnvironmentFailed, match="include one another"):
        read_of(tmp_path, "-r 0.txt")


@pytest.mark.parametrize(
    ("text", "direct"),
    [
        ("numpy", False),
        ("./here.whl", False),
        ("./here", True),
        ("x @ https://x/y.whl#sha256=00", False),
        ("x @ https://x/y.tar.gz", True),
        ("git+https://x/y.whl@main", True),
    ],
)
def test_it_is_known_whether_something_has_to_be_built(tmp_path: Path, text: str, direct: bool) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here.whl").touch()

    assert read_of(tmp_path, text).direct_sources is direct


def test_a_package_that_lies_in_the_project_counts_with_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "lib" / "deep").mkdir(parents=True)
    (tmp_path / "lib" / "deep" / "code.py").write_text("1")
    first = read_of(tmp_path, "./lib")
    (tmp_path / "lib" / "deep" / "code.py").write_text("2")

    assert [name for name, _ in first.digests] == ["lib/deep/code.py", "requirements.txt"]
    assert first.digest != read_of(tmp_path, "./lib").digest


@pytest.mark.parametrize(
    "name", ["../requirements.txt", "/etc/hostname", "gone.txt", "folder", "latin.txt", "link.txt"]
)
def test_a_requirements_file_that_is_not_one_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "link.txt").symlink_to("/etc/hostname")

    with pytest.raises(EnvironmentFailed):
        read(tmp_path, name)


def read_of(project: Path, text: str) -> Asked:
    (project / "requirements.txt").write_text(text)
    return read(project, "requirements.txt")


@pytest.mark.parametrize(
    "text",
    [
        "numpy>=2; python_version<'4'",
        "a[b]==1",
        "pkg @ https://x/y.whl",
        "git+https://x/y@z",
        "--extra-index-url https://x/",
    ],
)
def test_what_comes_from_an_index_or_the_net_is_left_to_the_tool(tmp_path: Path, text: str) -> None:
    assert [name for name, _ in read_of(tmp_path, text).digests] == ["requirements.txt"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[project", "not valid TOML"),
        ("[tool.poetry]\n", "no [project] table"),
        ('[project]\ndynamic = ["dependencies"]', "`dynamic`"),
        ("[project]\ndependencies = [1]", "list of texts"),
        ('[project]\ndependencies = ["-e ."]', "is no dependency"),
        ('[project]\ndependencies = ["x @ file:///etc"]', "own machine"),
    ],
)
def test_a_pyproject_that_does_not_say_its_dependencies_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)

    with pytest.raises(EnvironmentFailed, match=re.escape(words)):
        read(tmp_path, "pyproject.toml")


@pytest.mark.parametrize("kind", ["directory", "path", "editable", "virtual"])
def test_a_lock_that_leads_out_of_the_project_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]")
    (tmp_path / "uv.lock").write_text(f'[[package]]\nname = "x"\nsource = {{ {kind} = "../x" }}\n')

    with pytest.raises(EnvironmentFailed, match="outside of the project"):
        read(tmp_path, "pyproject.toml")
