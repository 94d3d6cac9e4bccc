"""Are data sets fetched over the Hugging Face Hub's protocol, and are its refusals explained?

The hub here is a double of the calls that a download makes, as a real HTTP server; huggingface_hub is the real one.
"""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from potluck.errors import DataError
from potluck.protocol import Blob
from potluck.train.places import what_to_take
from potluck.train.sources import ImageFormat, Source, open_source, pack

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves `repos[owner/name][path] = content`; those in `private` only to the token hf_test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.fetched: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            repo, what, revision = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision", parts[5:6]
        else:
            repo, what, revision = "/".join(parts[1:3]), parts[3], parts[4:5]
        files = self.server.repos.get(repo)
        hidden = repo in self.server.private and self.headers.get("Authorization") != "Bearer hf_test"
        if files is None or hidden:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if revision and revision[0] not in ("main", COMMIT):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            card = {"license": "cc0-1.0"}
            return self.json({"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": card, "private": False})
        if what == "tree":
            return self.json([{"type": "file", "path": n, "size": len(c), "oid": git(c)} for n, c in files.items()])
        content = files.get("/".join(parts[5:]))
        if content is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.fetched.append("/".join(parts[5:]))
        return self.send(200, content, {"ETag": f'"{git(content)}"', "X-Repo-Commit": COMMIT})

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def opened(address: str, cache: Path) -> Source:
    return open_source(address, images=ImageFormat(8, 3), cache_dir=cache, say=lambda _: None)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def packed_samples(source: Source) -> int:
    return pack(source, lambda content: Blob(hashlib.sha256(content).hexdigest(), len(content))).samples


def test_a_repository_of_pictures(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["cook/pots"] = {
        "README.md": b"# pots",
        "a/1.png": png(1),
        "a/2 [x].png": png(2),
        "b/3.png": png(3),
        "notes.txt": b"",
    }

    source = opened("hf://datasets/cook/pots", tmp_path)

    assert packed_samples(source) == 3
    assert (source.name, list(source.labels), source.licence) == ("pots", ["a", "b"], "cc0-1.0")
    assert source.origin == f"hf://datasets/cook/pots@{COMMIT[:12]}"
    assert sorted(hub.fetched) == ["a/1.png", "a/2 [x].png", "b/3.png"], "only what is trained on"


def test_what_is_here_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["cook/pots"] = {"1.png": png(1), "2.png": png(2)}
    opened("hf://datasets/cook/pots", tmp_path)
    hub.fetched.clear()

    assert opened("hf://datasets/cook/pots@main", tmp_path).count == 2
    assert hub.fetched == []


def test_a_folder_or_file_of_a_repository(hub: FakeHub, tmp_path: Path) -> None:
    arrays = io.BytesIO()
    np.savez(arrays, x=np.zeros((5, 8, 8, 3), np.uint8), y=np.arange(5))
    hub.repos["cook/pots"] = {"set/a.npz": arrays.getvalue(), "set/b.npz": arrays.getvalue(), "other/1.png": png(1)}

    both = opened("hf://datasets/cook/pots/set", tmp_path)
    one = opened("hf://datasets/cook/pots/set/b.npz", tmp_path)
    picture = opened("hf://datasets/cook/pots/other/1.png", tmp_path)

    assert (both.count, one.count, picture.count) == (10, 5, 1)
    assert list(both.labels) == ["0", "1", "2", "3", "4"]
    assert packed_samples(both) == 10


def test_parquet_tables_are_taken_by_their_training_split(hub: FakeHub, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    def table(values: list[int]) -> bytes:
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"image": [{"bytes": png(v), "path": ""} for v in values]}), file)
        return file.getvalue()

    hub.repos["cook/pots"] = {
        "data/train-00000-of-00002.parquet": table([1, 2]),
        "data/train-00001-of-00002.parquet": table([3]),
        "data/test-00000-of-00001.parquet": table([4]),
        "preview.png": png(9),
    }

    assert packed_samples(opened("hf://datasets/cook/pots", tmp_path)) == 3
    assert packed_samples(opened("hf://datasets/cook/pots/data/test-00000-of-00001.parquet", tmp_path)) == 1


def test_a_private_repository_needs_the_token(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["cook/secret"] = {"1.png": png(1)}
    hub.private.add("cook/secret")

    with pytest.raises(DataError, match="set HF_TOKEN if it is private"):
        opened("hf://datasets/cook/secret", tmp_path)

    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert opened("hf://datasets/cook/secret", tmp_path).count == 1


def test_refusals_are_explained(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["cook/text"] = {"a.txt": b"x", "README.md": b""}

    for address, said in {
        "hf://datasets/cook/none": "there is no data set cook/none",
        "hf://datasets/cook/text@v9": "no revision v9",
        "hf://datasets/cook/text": "nothing to train on there.*a.txt",
        "hf://datasets/cook/text/pictures": "has no pictures; it has a.txt",
        "hf://datasets/cook": "write hf://datasets/OWNER/NAME",
        "hf://models/cook/text": "write hf://datasets/OWNER/NAME",
    }.items():
        with pytest.raises(DataError, match=said):
            opened(address, tmp_path)


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url)

    with pytest.raises(DataError, match=f"could not be fetched from {url}.*Is this machine online"):
        opened("hf://datasets/cook/pots", tmp_path)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["a.png", "data/train-0.parquet", "data/test-0.parquet"], ["data/train-0.parquet"]),
        (["b.parquet", "a.parquet"], ["a.parquet", "b.parquet"]),
        (["a.png", "b.jpg", "c.md"], ["a.png", "b.jpg"]),
        (["a.png", "b.zip"], ["b.zip"]),
        (["c.md"], []),
    ],
)
def test_what_is_taken_of_a_repository(names: list[str], taken: list[str]) -> None:
    assert what_to_take(names) == taken
