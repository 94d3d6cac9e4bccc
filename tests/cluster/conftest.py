from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from potluck.testing import LocalCluster

TINY = str(Path(__file__).parent / "tiny.py") + ":Tiny"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    path = tmp_path / "pictures.npz"
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.integers(0, 256, (2000, 1, 8, 8), dtype=np.uint8))
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "c") as running:
        yield running
        print(running.tails())


@pytest.fixture
def houseless(tmp_path: Path) -> Iterator[LocalCluster]:
    """Without a house worker, so that every job goes to the worker that the test will kill."""
    with LocalCluster(tmp_path / "c", house_worker=False) as running:
        yield running
        print(running.tails())


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder
