"""Does a folder or an archive from a browser become exactly the project that was meant, and nothing else?"""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import msgspec
import pytest

from dashboard_room import Room, open_room
from ledger_fixture import fresh_database
from potluck.errors import BadInput
from potluck.hub.commands import giving, jobs
from potluck.hub.commands.unzip import Archive
from potluck.hub.entrance import form_token


@pytest.fixture(scope="module")
def room(embedded_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    folder: Path = tmp_path_factory.mktemp("room")
    with fresh_database(embedded_dsn) as dsn, open_room(dsn, folder) as room:
        yield room


@pytest.fixture(scope="module")
def ada(room: Room) -> httpx.Client:
    return room.browser("member", "Ada")


@pytest.fixture(scope="module")
def bob(room: Room) -> httpx.Client:
    return room.browser("member", "Bob")


# --- giving files


def give(browser: httpx.Client, path: str, **request: Any) -> httpx.Response:
    return browser.post(path, headers={"Potluck-Page": "1"}, **request)


def give_folder(browser: httpx.Client, content: dict[str, bytes]) -> httpx.Response:
    head = msgspec.json.encode([len(body) for body in content.values()]) + b"\n"
    given = give(browser, "/submit/batch", content=head + b"".join(content.values())).json()
    files = [{"path": path, **each} for path, each in zip(content, given, strict=True)]
    return give(browser, "/submit/tree", json={"files": files})


def test_a_folder_from_a_browser_is_the_project_of_the_job(room: Room, ada: httpx.Client) -> None:
    content = {"train.py": b"print(1)", "run.sh": b"#!/bin/sh\n", "requirements.txt": b"numpy", "a/empty": b""}

    given = give_folder(ada, content).json()
    token = form_token(ada.cookies["potluck_session"])
    job = ada.post("/submit", data={"form_token": token, "command": "sh run.sh", "project": given["project"]})

    assert given["says"] == "4 files, 23 B"
    assert given["requirements"] == "requirements.txt"
    view = room.do(jobs.show(room.desk, room.who(ada), job.headers["location"].rpartition("/")[2]))
    assert view.project is not None
    tree = msgspec.json.decode(room.desk.blobs.read(view.project.hash))
    assert {file["path"]: room.desk.blobs.read(file["blob"]["hash"]) for file in tree["files"]} == content
    assert [file["path"] for file in tree["files"] if file["executable"]] == ["run.sh"]


def test_a_large_file_comes_in_pieces_and_nobody_goes_on_with_anothers(
    room: Room, ada: httpx.Client, bob: httpx.Client
) -> None:
    content, upload = b"0123456789" * 100, "ab" * 32

    def piece(browser: httpx.Client, offset: int, size: int = 500) -> httpx.Response:
        query = {"upload": upload, "offset": offset, "size": len(content)}
        return give(browser, "/submit/piece", params=query, content=content[offset : offset + size])

    assert piece(ada, 0).json() is None
    assert piece(bob, 500).status_code == 409
    assert piece(ada, 400).status_code == 409
    done = piece(ada, 500).json()

    assert room.desk.blobs.read(done["hash"]) == content
    assert piece(ada, 0, 2_000).status_code == 200
    longer = {"upload": upload, "offset": 0, "size": 3}
    assert give(ada, "/submit/piece", params=longer, content=b"1234").status_code == 422
    assert give(ada, "/submit/piece", params={**longer, "size": 3 << 30}, content=b"").status_code == 422


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a\\b", "a\x00b", "C:/x", "", "a//b", "x" * 2000])
def test_a_path_that_leads_elsewhere_is_refused(ada: httpx.Client, path: str) -> None:
    answer = give_folder(ada, {path: b"x"})

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


def test_ignore_files_mean_what_they_mean_to_git() -> None:
    paths = [
        "train.py",
        "data/big.bin",
        "data/keep.txt",
        "out/a",
        "x/out/a",
        "x/.env",
        ".git/config",
        "notes.log",
        "a/b.log",
    ]
    ignores = {
        ".gitignore": "*.log\n/out\n.env\ndata/*\n",
        ".potluckignore": "!data/keep.txt\n",
        "a/.gitignore": "!b.log",
    }

    plan = giving._plan([(path, 1) for path in paths], ignores)

    assert [paths[index] for index in plan.keep] == ["train.py", "data/keep.txt", "x/out/a", "a/b.log"]


def test_a_folder_that_is_too_large_or_a_pattern_that_is_too_wild_is_said() -> None:
    with pytest.raises(BadInput, match=r"2\.50 GB large.*video\.mp4"):
        giving._plan([("video.mp4", 2_500_000_000)], {})
    plan = giving._plan([("aaaa", 1)], {".gitignore": "*a*a*a*a*a*a*b"})
    assert plan.keep == [0]
    assert "too wild" in plan.skipped[0]


def test_ignore_files_are_not_so_many_that_reading_them_is_work() -> None:
    with pytest.raises(BadInput, match="ignore files are longer than 256 kB"):
        giving._plan([("a", 1)], {f"{n}/.gitignore": "*.log\n" * 5000 for n in range(10)})


# --- archives


def packed(
    entries: dict[str, bytes], *, modes: dict[str, int] | None = None, method: int = zipfile.ZIP_DEFLATED
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.external_attr = (modes or {}).get(name, stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)
    return out.getvalue()


def give_zip(browser: httpx.Client, content: bytes) -> httpx.Response:
    upload = "cd" * 32
    query = {"upload": upload, "offset": 0, "size": len(content), "keep": 1}
    assert give(browser, "/submit/piece", params=query, content=content).status_code == 200
    return give(browser, "/submit/zip", params={"upload": upload, "size": len(content)})


def test_a_zip_is_a_project_without_its_outer_folder_and_what_it_ignores(room: Room, ada: httpx.Client) -> None:
    content = {
        "p/train.py": b"x",
        "p/.gitignore": b"*.tmp",
        "p/a.tmp": b"",
        "p/run": b"!",
        "__MACOSX/p/x": b"",
        "p/.git/config": b"",
    }
    before = {*room.desk.blobs.root.glob("parts/*.part")}

    given = give_zip(ada, packed(content, modes={"p/run": stat.S_IFREG | 0o755})).json()

    tree = msgspec.json.decode(room.desk.blobs.read(given["project"].partition("-")[0]))
    assert {file["path"]: file["executable"] for file in tree["files"]} == {
        ".gitignore": False,
        "run": True,
        "train.py": False,
    }
    assert {*room.desk.blobs.root.glob("parts/*.part")} == before, "the archive itself is not kept"


def _altered(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


BOMB = packed({"zeros": bytes(60_000_000)})
REFUSED: dict[str, tuple[bytes, str]] = {
    "a way out": (packed({"../../x": b"x"}), "leads out"),
    "a way out by backslashes": (packed({"..\\..\\x": b"x"}), "leads out"),
    "an absolute path": (packed({"/etc/passwd": b"x"}), "absolute"),
    "a drive": (packed({"C:\\x": b"x"}), "absolute"),
    "a link": (packed({"l": b"/etc/passwd"}, modes={"l": stat.S_IFLNK | 0o777}), "symbolic link"),
    "a device": (packed({"d": b""}, modes={"d": stat.S_IFCHR | 0o666}), "not a plain file"),
    "a bomb": (BOMB, "no project does that"),
    "odd compression": (packed({"x": b"x" * 99}, method=zipfile.ZIP_LZMA), "ordinary zip"),
    "damage": (
        _altered(packed({"x": b"hello " * 9}, method=zipfile.ZIP_STORED), b"hello hello", b"hello jello"),
        "damaged",
    ),
    "no zip": (b"hello", "not a zip file"),
    "an empty file": (b"", "not a zip file"),
    "control characters": (packed({"a\nb": b""}), "plain text"),
    "a file that is a folder": (packed({"a": b"", "a/b": b""}), "below it"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_archive_is_refused_for(ada: httpx.Client, what: str) -> None:
    content, words = REFUSED[what]

    answer = give_zip(ada, content)

    assert answer.status_code == 422, answer.text
    assert words in answer.json()["detail"]


def test_an_archive_that_lies_about_its_sizes_gives_no_more_than_it_says(tmp_path: Path) -> None:
    liar = tmp_path / "liar.zip"
    liar.write_bytes(BOMB.replace((60_000_000).to_bytes(4, "little"), (1_000).to_bytes(4, "little")))

    with Archive(liar, limit_bytes=1_000_000) as archive, pytest.raises(BadInput):
        archive.text(archive.entries[0])


def test_an_archive_with_an_endless_list_is_not_read(tmp_path: Path) -> None:
    """The end says that the list is 13 MB long, as it would be with hundreds of thousands of files."""
    path = tmp_path / "list.zip"
    size = 13 << 20
    end = b"PK\x05\x06" + bytes(4) + (60_000).to_bytes(2, "little") * 2 + size.to_bytes(4, "little") + bytes(6)
    path.write_bytes(b"PK\x01\x02" + bytes(size - 4) + end)

    with pytest.raises(BadInput, match="list of files is too long"):
        Archive(path, limit_bytes=1 << 30)
