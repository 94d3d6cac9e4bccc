"""Does a person at a terminal get a gang: profiled, trained, looked at and its results here?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from potluck.testing import LocalCluster

pytestmark = pytest.mark.slow

TRAIN = """
import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import potluck

torch.manual_seed(0)
gang = potluck.gang.join()
loader = gang.loader(TensorDataset(torch.randn(512, 20), torch.randint(0, 3, (512,))), batch_size=64)
model = nn.Linear(20, 3)
model, optimizer = gang.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
for epoch in gang.epochs(3):
    for x, y in loader:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    print("epoch", epoch, flush=True)
Path(os.environ["POTLUCK_OUTPUT_DIR"], "done.txt").write_text(str(gang.steps))
"""


@pytest.fixture
def room(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "c", house_worker=False) as cluster:
        for name in ("ann", "bob"):
            cluster.add_worker(name)
        cluster.until(lambda: len(cluster.hub.links()) == 2, timeout_s=90, what="both to have reached one another")
        yield cluster


def test_a_gang_from_profile_to_results(room: LocalCluster, tmp_path: Path) -> None:
    project = tmp_path / "digits"
    project.mkdir()
    (project / "train.py").write_text(TRAIN)
    at = ("--folder", str(project))
    script = ("--", "python", "train.py")

    profile = room.run_cli("gang", "profile", "--steps", "12", "--json", *at, *script, timeout_s=300)
    dry = room.run_cli("run", "--gang", "2..3", "--dry-run", *at, *script)
    ran = room.run_cli("run", "--gang", "2..3", "--batch", "128", "--wait-at-most", "4m", *at, *script, timeout_s=300)
    shown = room.run_cli("gang", "show", "last", "--json")
    pulled = room.run_cli("pull", "last", "done.txt", "--to", str(tmp_path / "left"))

    found = json.loads(profile.stdout)
    assert set(found["alone"]) == {"ann", "bob"}, profile.stderr
    assert sum(found["forecast"]["shares"].values()) == found["forecast"]["batch"]
    assert dry.returncode == 0 and dry.stdout.startswith("would train now on ann, bob"), dry.stdout
    assert ran.returncode == 0, ran.stderr
    assert {"ann | epoch 2", "bob | epoch 2"} <= set(ran.stdout.splitlines())
    assert json.loads(shown.stdout)["state"] == "succeeded"
    assert pulled.returncode == 0, pulled.stderr
    left = {path.parent.name[2:]: path.read_text() for path in (tmp_path / "left").rglob("done.txt")}
    assert left == {"ann": "12", "bob": "12"}  # 512 samples in steps of 128, three times
