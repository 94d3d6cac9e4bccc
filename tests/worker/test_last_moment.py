"""What does a job gain that swaps links, pipes and folders while its agent reads what it leaves? Nothing.

A process of the job does nothing else than swapping, as fast as it can, while the agent reads again and again.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_job_points import record, scalar

from potluck.protocol import Blob, Point, Tree
from potluck.worker.jobs import outputs
from potluck.worker.jobs.checkpoints import Watcher
from potluck.worker.jobs.points import Points, take_picture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are checked and then used")

ROUNDS = 300
SECRET = b"\x89PNG\r\n\x1a\n the owner's"
SWAP = """
import os, sys
folder, owners = sys.argv[1:]
os.chdir(folder)
print("begun", flush=True)
n = 0
while True:
    n += 1
    kind = n % 4
    os.mkdir("new") if kind == 0 else os.symlink(owners, "new") if kind == 1 else None
    if kind == 2:
        os.mkfifo("new")
    if kind == 3:
        open("new", "w").close()
    if kind == 0:
        for name in os.listdir(owners):
            open("new/" + name, "w").write("mine")
    try:
        os.rename("pictures", "old")
    except FileNotFoundError:
        pass
    os.rename("new", "pictures")
    if os.path.isdir("old") and not os.path.islink("old"):
        for name in os.listdir("old"):
            os.unlink("old/" + name)
        os.rmdir("old")
    elif os.path.lexists("old"):
        os.unlink("old")
    # And a name that is now a file, now a link to the owner's.
    for source in ("mine", os.path.join(owners, "key.png")):
        os.symlink(source, "link") if source != "mine" else open("link", "w").write("mine")
        os.replace("link", "key.png")
    os.mkfifo("pipe")
    os.replace("pipe", "key.png")
"""


@pytest.fixture
def owners(tmp_path: Path) -> Path:
    """A folder of the machine's owner, with things that the job would like to have."""
    folder = tmp_path / "owners"
    folder.mkdir()
    (folder / "key.png").write_bytes(SECRET)
    (folder / "events.out.tfevents.1").write_bytes(record(scalar(1, "secret", 42.0)))
    return folder


@pytest.fixture
def swapped(tmp_path: Path, owners: Path) -> Iterator[Path]:
    """A folder of the job's, in which everything changes all the time."""
    folder = tmp_path / "job"
    folder.mkdir()
    swapper = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", SWAP, str(folder), str(owners)], stdout=subprocess.PIPE
    )
    assert swapper.stdout is not None and swapper.stdout.readline() == b"begun\n"
    yield folder
    assert swapper.poll() is None, "it gave up, and nothing was tried"
    swapper.kill()
    swapper.wait()
    swapper.stdout.close()


def test_outputs_are_the_jobs_own_bytes(swapped: Path, owners: Path, tmp_path: Path) -> None:
    secrets = {hashlib.sha256(path.read_bytes()).hexdigest() for path in owners.iterdir()}
    seen = set()

    for number in range(ROUNDS):
        tree = outputs.collect(swapped, into=tmp_path / "copy" / str(number))
        seen |= {file.blob.hash for file in tree.files}

    assert seen and not seen & secrets
    copies = {path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert SECRET not in copies


def test_a_checkpoint_has_the_jobs_own_bytes(swapped: Path, tmp_path: Path) -> None:
    sent: list[bytes] = []

    def send(folder: Path, tree: Tree) -> None:
        sent.extend((folder / file.path).read_bytes() for file in tree.files)

    watcher = Watcher(swapped, snapshots=tmp_path / "snapshots", send=send, say=lambda text: None, quiet_s=0.0)
    for number in range(ROUNDS):
        watcher.look(float(number))
        watcher.finish(whole=True, now=float(number))

    assert SECRET not in sent


def test_figures_come_from_the_jobs_own_folders(swapped: Path) -> None:
    found: list[Point] = []
    for _ in range(ROUNDS):
        points = Points(
            swapped,
            folders=[swapped],
            keep=lambda png: Blob(hashlib.sha256(png).hexdigest(), len(png)),
            say=lambda text: None,
            clock=iter(range(0, 10**9, 10)).__next__,
        )
        for _ in range(30):
            found += points.read()

    assert not any("secret" in name for point in found for name in point.values)


def test_a_picture_is_the_jobs_own(swapped: Path) -> None:
    for _ in range(10 * ROUNDS):
        assert take_picture(swapped, "key.png") != SECRET
