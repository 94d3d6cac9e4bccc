"""The examples of gangs: three lines more than on one machine, and the same curve."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from gang_kit import Nursery, Process

from potluck.train.gang.meeting import Meeting

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"gang_classifier": ["--epochs", "2"], "gang_charlm": ["--epochs", "1", "--stride", "64"]}


def started(nursery: Nursery, script: Path, folder: Path, name: str, **place: object) -> Process:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")}
    environment["OMP_NUM_THREADS"] = "1"
    if place:
        environment["POTLUCK_GANG"] = json.dumps({"member": name, "engine": "plain", "most": 2, **place})
    arguments = [str(script), *SMALL[script.parent.name], "--double", "--curve", str(folder / f"{name}.json")]
    return nursery.start("script", folder / f"{name}.log", environment, arguments=arguments)


def curve(folder: Path, name: str, process: Process) -> list[float]:
    assert process.wait() == 0, (folder / f"{name}.log").read_text()[-2000:]
    losses: list[float] = json.loads((folder / f"{name}.json").read_text())
    return losses


@pytest.mark.parametrize("example", SMALL)
def test_without_its_three_lines_an_example_is_ordinary_pytorch(example: str) -> None:
    source = (EXAMPLES / example / "train.py").read_text()
    lines = source.splitlines(keepends=True)
    ours = [line.strip() for line in lines if "gang." in line and "    " in line and "potluck run" not in line]
    single = "".join(line for line in lines if line.strip() not in [*ours, "import potluck"])

    assert len(ours) == 3 and "potluck.gang.join()" in ours[0]
    assert "gang." not in single.partition('"""\n')[2].partition("def main")[2]
    assert "DataLoader(" in single
    compile(single, example, "exec")


@pytest.mark.parametrize("example", ["gang_classifier", pytest.param("gang_charlm", marks=pytest.mark.slow)])
def test_an_example_has_the_same_curve_on_two_machines_as_on_one(
    nursery: Nursery, example: str, tmp_path: Path
) -> None:
    script = EXAMPLES / example / "train.py"
    meeting = Meeting("127.0.0.1", least=2)
    try:
        store = f"127.0.0.1:{meeting.port}"
        two = {name: started(nursery, script, tmp_path, name, store=store, least=2) for name in "ab"}
        one = started(nursery, script, tmp_path, "alone")
        curves = {name: curve(tmp_path, name, process) for name, process in {**two, "alone": one}.items()}
    finally:
        meeting.close()

    assert curves["a"] == curves["b"]
    assert curves["a"] == pytest.approx(curves["alone"], abs=1e-12)
    assert curves["a"][-1] < 3.2


@pytest.mark.slow
@pytest.mark.parametrize("example", SMALL)
def test_what_is_left_without_the_three_lines_trains(nursery: Nursery, example: str, tmp_path: Path) -> None:
    folder = tmp_path / example
    folder.mkdir()
    for path in (EXAMPLES / example).iterdir():
        if path.suffix in (".png", ".txt"):
            (folder / path.name).write_bytes(path.read_bytes())
    lines = (EXAMPLES / example / "train.py").read_text().splitlines(keepends=True)
    script = folder / "train.py"
    script.write_text("".join(line for line in lines if "gang." not in line and line != "import potluck\n"))

    losses = curve(tmp_path, "single", started(nursery, script, tmp_path, "single"))

    assert losses[-1] < 3.2
