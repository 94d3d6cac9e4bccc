"""The notebook for Colab and Kaggle: is it one, and does it work against a real hub?"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potluck.domain.job import JobSpec
from potluck.protocol import InviteRequest
from potluck.testing import LocalCluster

PATH = Path(__file__).parents[2] / "notebooks" / "worker.ipynb"


def notebook() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return found


def code() -> list[str]:
    """The code cells as Python: without what only a notebook understands."""
    cells = ["".join(cell["source"]) for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    return ["\n".join(line for line in cell.splitlines() if not line.startswith("%")) for cell in cells]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "c", house_worker=False) as running:
        yield running
        print(running.tails())


def run_cells(
    cluster: LocalCluster, tmp_path: Path, *changes: tuple[str, str], link: str = ""
) -> subprocess.Popen[str]:
    """All code cells, one after the other, in one Python, as a kernel runs them. `changes`: what the person edits."""
    text = "\n".join(code())
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "cells.py"
    path.write_text(text)
    link = link or cluster.hub.invite(InviteRequest("worker", uses=1)).url
    return subprocess.Popen(
        [sys.executable, str(path)],
        env={**cluster.environment, "POTLUCK_JOIN_LINK": link},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


MAY = ("I_MAY_RUN_A_WORKER_HERE = False", "I_MAY_RUN_A_WORKER_HERE = True")
SHORT = ('FOR = "3h"', 'FOR = "8s"')
JOBS = ('RULES = "--accept pool"', 'RULES = "--accept jobs --runtime any --yes --executor process"')


def test_it_is_a_notebook_of_format_4_without_outputs() -> None:
    found = notebook()

    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert set(found) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in found["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", each) for each in ids)
    for cell in found["cells"]:
        assert isinstance(cell["metadata"], dict) and all(isinstance(line, str) for line in cell["source"])
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            wanted |= {"outputs", "execution_count"}
        assert set(cell) == wanted


def test_its_code_parses_and_holds_no_link() -> None:
    for cell in code():
        ast.parse(cell)

    assert not re.search(r"/j/[a-z]-|pl[wmva]_", PATH.read_text(encoding="utf-8"))


def test_it_says_what_the_services_forbid_before_it_asks_for_anything() -> None:
    cells = notebook()["cells"]
    terms = next(i for i, cell in enumerate(cells) if "free of charge: no" in "".join(cell["source"]))

    assert terms < min(i for i, cell in enumerate(cells) if cell["cell_type"] == "code")


def test_without_a_yes_nothing_is_joined(cluster: LocalCluster, tmp_path: Path) -> None:
    done = run_cells(cluster, tmp_path)

    said, _ = done.communicate(timeout=60)
    assert done.returncode == 1 and "set I_MAY_RUN_A_WORKER_HERE = True" in said
    assert cluster.hub.workers() == []


def test_it_joins_works_and_leaves_when_its_time_is_over(cluster: LocalCluster, tmp_path: Path) -> None:
    job = cluster.submit(JobSpec(["/bin/sh", "-c", "echo from a notebook"]))

    done = run_cells(cluster, tmp_path, MAY, SHORT, JOBS)

    said, _ = done.communicate(timeout=120)
    assert done.returncode == 0, said
    assert "The worker has left." in said
    ended = cluster.job_ends(job, timeout_s=30)
    assert (ended.state, ended.worker) == ("succeeded", "notebook"), ended.reason
    assert cluster.output(job) == "from a notebook\n"


def test_stop_lets_it_leave_in_good_order(cluster: LocalCluster, tmp_path: Path) -> None:
    done = run_cells(cluster, tmp_path, MAY)
    assert done.stdout is not None
    said = ""
    while "works for" not in said:
        line = done.stdout.readline()
        assert line, said
        said += line
    cluster.until(lambda: bool(cluster.hub.workers()[0].machine), timeout_s=60, what="its first request for orders")

    os.kill(done.pid, signal.SIGINT)  # the kernel alone, as some services do

    said, _ = done.communicate(timeout=120)
    assert done.returncode == 0 and "The worker has left." in said, said
    assert "Traceback" not in said
    assert [worker.state for worker in cluster.hub.workers()] == ["left"]
