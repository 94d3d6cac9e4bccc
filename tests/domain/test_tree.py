from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.domain.tree import check_path, check_tree, clashes


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("C:/x", "absolute"),
        ("c:x", "absolute"),
        ("\\\\host\\share", "absolute"),
        ("a\\..\\b", "backslash"),
        ("../x", "leads out"),
        ("a/../../x", "leads out"),
        ("a/..", "leads out"),
        ("./a", "only a dot"),
        ("a//b", "empty part"),
        ("a/", "empty part"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\x7f", "control"),
        ("\ud800", "not valid text"),
        ("a/con/b", "device"),
        ("NUL.txt", "device"),
        ("com1", "device"),
        ("aux .py", ""),
        ("nul .", "device"),
        ("é" * 128, "part that is longer"),
        ("/".join(["abcdefgh"] * 200), "longer than 1000"),
    ],
)
def test_a_path_that_is_refused_says_why(path: str, says: str) -> None:
    why = check_path(path)

    assert says in why
    assert bool(why) == bool(says)


@pytest.mark.parametrize(
    "path", ["a", "a/b.py", ".gitignore", "..a", "a..", "console.py", "e\u0301.txt", "ü/日本", "a b"]
)
def test_a_path_that_people_use_is_taken(path: str) -> None:
    assert check_path(path) == ""


@given(st.text(max_size=30))
def test_what_is_taken_stays_in_the_folder(path: str) -> None:
    if check_path(path) == "":
        pure = PurePosixPath(path)
        assert not pure.is_absolute()
        assert ".." not in pure.parts
        assert str(pure) == path  # nothing that another reader would understand otherwise


def test_a_tree_has_each_path_once_and_no_file_is_a_folder() -> None:
    assert check_tree(["a", "b/c", "b/d"]) == ""
    assert "there twice" in check_tree(["a", "b", "a"])
    assert check_tree(["a/b", "x", "a"]) == "`a` is a file, and `a/b` is below it"
    assert check_tree(["a", "a/b/c"]) == "`a` is a file, and `a/b/c` is below it"
    assert "leads out" in check_tree(["a", "../b"])


def test_names_that_are_one_on_other_systems_are_told() -> None:
    assert clashes(["Read.me", "read.me", "b", "e\u0301", "é"]) == [("Read.me", "read.me"), ("e\u0301", "é")]
    assert clashes(["a", "b/a"]) == []
