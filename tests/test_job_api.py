"""What does `potluck.log` do in a training script, whatever it is given?"""

from __future__ import annotations

import ast
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import potluck
from potluck import job


@pytest.fixture
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job's folder of points."""
    monkeypatch.setenv("POTLUCK_METRICS_DIR", str(tmp_path))
    monkeypatch.setattr(job, "_complaints", set())
    monkeypatch.setattr(job, "_files", {})
    return tmp_path


def lines(metrics: Path) -> list[dict[str, Any]]:
    path = metrics / job.LINES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def picture(metrics: Path) -> Any:
    """The pixels of the one picture that was logged, as another program reads the PNG."""
    [file] = lines(metrics)[-1]["images"].values()
    with Image.open(metrics / job.PICTURES / file) as image:
        return np.asarray(image)


def test_numbers_of_all_kinds_become_figures(metrics: Path) -> None:
    potluck.log(
        torch.tensor(7),  # type: ignore[arg-type]
        a=1,
        b=2.5,
        c=np.float32(0.5),
        d=torch.tensor(3.0, requires_grad=True),
        e=np.array([4]),
        f=torch.tensor([[5]], dtype=torch.bfloat16),
        g=Decimal("6.5"),
        h=True,
    )

    [line] = lines(metrics)
    assert line["step"] == 7
    assert line["values"] == {"a": 1, "b": 2.5, "c": 0.5, "d": 3, "e": 4, "f": 5, "g": 6.5, "h": 1}


def test_outside_of_a_job_it_does_nothing_and_says_so_once(
    metrics: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("POTLUCK_METRICS_DIR")

    potluck.log(1, loss=1.0)
    potluck.log(2, loss=1.0)

    assert capsys.readouterr().err == "potluck.log: this is not a Potluck job, so nothing is recorded\n"


class Hostile:
    """An object that fails whatever one does with it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __str__(self) -> str:
        raise RuntimeError("not even a text")


@pytest.mark.parametrize(
    "value",
    [
        *("text", b"bytes", None, [1, 2], {"a": 1}, object(), 1j, Hostile(), float("nan"), float("inf"), 10**400),
        *(np.zeros((2, 2, 2, 2)), np.zeros((0, 4)), np.array(["a", "b"]), np.zeros((5, 7, 2)), np.array([])),
        *(
            np.array([[object(), None]]),
            np.zeros((3000, 3000), dtype=np.uint8),
            torch.zeros(4, 4, dtype=torch.complex64),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_recorded_is_said_once_and_the_rest_is_recorded(
    metrics: Path, capsys: pytest.CaptureFixture[str], value: object
) -> None:
    potluck.log(1, loss=0.5, strange=value)
    potluck.log(2, loss=0.25, strange=value)

    assert len(capsys.readouterr().err.splitlines()) == 1
    if not isinstance(value, Hostile):
        assert [line["values"] for line in lines(metrics)] == [{"loss": 0.5}, {"loss": 0.25}]


@pytest.mark.parametrize("step", ["3", 1.5, None, float("nan"), 1 << 60, [1], torch.zeros(2)])
def test_a_step_that_is_no_whole_number_is_said(metrics: Path, capsys: pytest.CaptureFixture[str], step: Any) -> None:
    potluck.log(step, loss=1.0)

    assert lines(metrics) == []
    assert "the step must be a whole number" in capsys.readouterr().err


def test_it_does_not_raise_when_stderr_is_closed_or_the_folder_cannot_be_written(
    metrics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = io.StringIO()
    closed.close()
    (metrics / "file").write_text("")
    monkeypatch.setenv("POTLUCK_METRICS_DIR", str(metrics / "file" / "below"))
    monkeypatch.setattr(sys, "stderr", closed)

    potluck.log(1, loss=1.0)


COLOURS = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)


@pytest.mark.parametrize(
    "image",
    [
        COLOURS,
        COLOURS.transpose(2, 0, 1),
        COLOURS.astype(np.float64) / 255,
        COLOURS.astype(np.int64),
        torch.tensor(COLOURS).permute(2, 0, 1),
        torch.tensor(COLOURS).permute(2, 0, 1).float().requires_grad_() / 255,
        Image.fromarray(COLOURS),
    ],
    ids=["HWC bytes", "CHW bytes", "HWC floats", "HWC ints", "torch bytes", "torch floats", "PIL"],
)
def test_pictures_keep_their_pixels(metrics: Path, image: object) -> None:
    potluck.log(1, sample=image)

    assert np.array_equal(picture(metrics), COLOURS)


def test_without_numpy_loaded_pictures_come_out_the_same(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)

    potluck.log(1, sample=torch.tensor(COLOURS).permute(2, 0, 1).float() / 255)
    floats = picture(metrics)
    potluck.log(2, sample=torch.tensor(COLOURS))
    bytes_ = picture(metrics)
    potluck.log(3, sample=np.asfortranarray(COLOURS))  # through the buffer protocol, lying in another order

    assert np.array_equal(floats, COLOURS)
    assert np.array_equal(bytes_, COLOURS)
    assert np.array_equal(picture(metrics), COLOURS)


def test_grey_pictures_and_floats_out_of_range_are_clipped(metrics: Path) -> None:
    potluck.log(1, sample=np.array([[-1.0, 0.5], [2.0, float("nan")]]))

    assert picture(metrics).tolist() == [[0, 128], [255, 0]]


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 4]), st.randoms(use_true_random=False))
def test_any_png_is_read_back_by_another_program(width: int, height: int, channels: int, random: Any) -> None:
    pixels = random.randbytes(width * height * channels)

    with Image.open(io.BytesIO(job.encode_png(width, height, channels, pixels))) as image:
        assert image.size == (width, height)
        assert image.tobytes() == pixels


def test_a_call_with_many_long_names_becomes_lines_that_are_each_one_write(metrics: Path) -> None:
    names = [f"{number:04}" + "😀" * 96 for number in range(900)]

    potluck.log(3, **dict.fromkeys(names, 1.0))

    found = lines(metrics)
    assert all(len(line) < job.MAX_LINE_BYTES for line in (metrics / job.LINES).read_bytes().splitlines())
    assert {line["step"] for line in found} == {3}
    assert [name for line in found for name in line["values"]] == names


def _log_much(number: int) -> None:
    for step in range(300):
        potluck.log(step, **{f"from {number}": step, "filler " + "x" * 90: 1.0})


def test_processes_and_threads_at_once_lose_and_mix_nothing(metrics: Path) -> None:
    potluck.log(0, before=1.0)  # the open file is inherited by a fork
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers: list[Any] = [context.Process(target=_log_much, args=(number,)) for number in range(3)]
    workers += [threading.Thread(target=_log_much, args=(number,)) for number in range(3, 6)]

    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    found = lines(metrics)
    for number in range(6):
        assert [line["step"] for line in found if f"from {number}" in line["values"]] == list(range(300))


def test_it_loads_neither_numpy_nor_torch_and_works_from_its_two_files_alone(tmp_path: Path) -> None:
    package = Path(potluck.__file__).parent
    (tmp_path / "potluck").mkdir()
    for name in ("__init__.py", "job.py"):
        (tmp_path / "potluck" / name).write_bytes((package / name).read_bytes())
    code = "import sys, potluck; potluck.log(1, a=2); print({'numpy', 'torch', 'msgspec'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "POTLUCK_METRICS_DIR": str(tmp_path / "made")}

    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True, check=False)

    assert (done.stdout, done.stderr) == ("set()\n", "")
    assert lines(tmp_path / "made")[0]["values"] == {"a": 2}


def test_its_files_can_be_read_by_python_3_8() -> None:
    for name in ("__init__.py", "job.py"):
        ast.parse((Path(potluck.__file__).parent / name).read_text(), feature_version=(3, 8))


def test_another_name_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lgo'"):
        _ = potluck.lgo


DOC = Path(__file__).parent.parent / "docs" / "job-api.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_what_the_documentation_shows_runs_in_a_job_and_alone(tmp_path: Path, code: str) -> None:
    folders = {f"POTLUCK_{name}_DIR": str(tmp_path / name.lower()) for name in ("OUTPUT", "CHECKPOINT", "METRICS")}
    for folder in folders.values():
        Path(folder).mkdir()
    alone = {name: value for name, value in os.environ.items() if not name.startswith("POTLUCK_")}

    for env in ({**alone, **folders}, alone):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") == (env is alone and "potluck.log" in code)
    assert any(any(Path(folder).iterdir()) for folder in folders.values())


def test_the_documentation_shows_each_part() -> None:
    assert len(SNIPPETS) == 4
