"""Does `potluck init` write a job that really trains, by itself and as a job?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from potluck.cli.init import FILES, text_of, write_templates

Potluck = Callable[..., tuple[int, str, str]]


def test_init_writes_what_run_needs_and_says_the_next_step(potluck: Potluck, tmp_path: Path) -> None:
    code, out, _ = potluck("init", tmp_path / "new" / "project")

    assert code == 0
    assert sorted(p.name for p in (tmp_path / "new" / "project").iterdir()) == sorted(FILES)
    assert "potluck run --wait" in out


def test_init_overwrites_nothing_and_then_writes_nothing(potluck: Potluck, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("mine")

    code, _, err = potluck("init", tmp_path)

    assert code == 5
    assert "train.py is already in" in err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir() if p.name != "home"] == [("train.py", "mine")]


def test_init_into_a_file_says_so(potluck: Potluck, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert potluck("init", tmp_path / "file")[0] == 2


def test_the_schema_line_names_the_hub_that_is_known(potluck: Potluck, tmp_path: Path, hub: object) -> None:
    potluck("init", tmp_path / "x")

    first = (tmp_path / "x" / "potluck.yaml").read_text().splitlines()[0]
    assert re.fullmatch(
        r"# yaml-language-server: \$schema=http://127\.0\.0\.1:\d+/api/v1/schemas/potluck\.yaml\.json", first
    )


def test_without_a_hub_there_is_no_schema_line(tmp_path: Path) -> None:
    write_templates(tmp_path / "x")

    assert "(schema)" in text_of("potluck.yaml")
    assert "schema" not in (tmp_path / "x" / "potluck.yaml").read_text()


# --- the script, for real


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_templates(tmp_path / "project")
    return tmp_path / "project"


def train(project: Path, *options: str, **env: Path) -> str:
    done = subprocess.run(
        [sys.executable, "train.py", *options],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in env.items()}},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss (\d+\.\d+)  ", printed)]


SMALL = ("--steps", "20", "--batch", "16", "--length", "32", "--hidden", "64")


def test_the_script_learns_resumes_and_leaves_its_results(project: Path) -> None:
    first = train(project, "--epochs", "2", *SMALL)
    second = train(project, "--epochs", "3", *SMALL)

    assert losses(first)[-1] < losses(first)[0] - 0.3
    assert "resumed from step 40" in second
    assert re.findall(r"step +(\d+)/60", second) == ["50", "60"]
    assert (project / "outputs" / "model.pt").stat().st_size > 10_000
    assert (project / "outputs" / "sample.txt").read_text().startswith("def ")


@pytest.mark.slow
def test_the_script_is_the_same_with_the_same_seed(project: Path, tmp_path: Path) -> None:
    runs = [
        train(
            project, "--epochs", "1", *SMALL, POTLUCK_OUTPUT_DIR=tmp_path / name, POTLUCK_CHECKPOINT_DIR=tmp_path / name
        )
        for name in ("a", "b")
    ]

    assert losses(runs[0]) == losses(runs[1])


def test_as_a_job_it_uses_the_folders_that_it_is_given(project: Path, tmp_path: Path) -> None:
    output, one, two = tmp_path / "out", tmp_path / "one", tmp_path / "two"
    train(project, "--epochs", "1", *SMALL, POTLUCK_OUTPUT_DIR=output, POTLUCK_CHECKPOINT_DIR=one)

    printed = train(
        *[project, "--epochs", "2", *SMALL],
        POTLUCK_OUTPUT_DIR=output,
        POTLUCK_CHECKPOINT_DIR=two,
        POTLUCK_RESUME_FROM=one,
    )

    assert "resumed from step 20" in printed
    assert (two / "checkpoint.pt").is_file()
    assert sorted(p.name for p in output.iterdir()) == ["model.pt", "sample.txt"]
    assert not (project / "outputs").exists()
