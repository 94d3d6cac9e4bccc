"""What a member says of its steps: points, events, the file at the end, the bottleneck, and how fast it is alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from gang_kit import Nursery, until

from potluck.errors import BadInput
from potluck.train.gang import journal as journal_module
from potluck.train.gang import machine, trial
from potluck.train.gang.journal import Journal, Standing
from potluck.train.gang.profile import PHASES, Event, Profile, StepRecord, Times, bottleneck

SCRIPT = """
import os, sys, torch, potluck
gang = potluck.gang.join()
loader = gang.loader(torch.utils.data.TensorDataset(torch.randn(640, 20)), batch_size=32)
model = torch.nn.Linear(20, 1)
model, optimizer = gang.wrap(model, torch.optim.SGD(model.parameters(), 0.01))
for epoch in gang.epochs(int(sys.argv[1])):
    for (x,) in loader:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gang.log(loss=loss.item())
    if epoch == 1: print("two epochs", flush=True)
"""


def environment(**more: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")}
    return {**clean, "OMP_NUM_THREADS": "1", **more}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Still:
    """A machine that always says the same."""

    def __init__(self, **figures: float) -> None:
        self.figures = figures
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def record(step: int, shares: dict[str, int], **times: float) -> StepRecord:
    return StepRecord(step, 0, 0, shares, True, False, Times(**times), {}, 0.0)


def journal_of(tmp_path: Path | None, clock: Clock, machine: Still | None = None) -> tuple[Journal, list[Any]]:
    points: list[Any] = []
    made = Journal(
        "lab-1",
        "my gang/7",
        machine=machine or Still(cpu=0.5, memory_bytes=3 << 20, gpu=0.25, gpu_memory_bytes=1 << 20),  # type: ignore[arg-type]
        standing=lambda: Standing(rank=1, members=2, batch=40, alone_per_s=123.0, noise_scale=0.0),
        loss=lambda: {"loss": 0.5},
        log=lambda step, **values: points.append((step, values)),
        output=tmp_path,
        clock=clock,
    )
    return made, points


def test_a_point_a_second_tells_the_means_of_the_steps_since() -> None:
    clock = Clock()
    journal, points = journal_of(None, clock)

    for step in range(5):
        clock.now += 0.25
        journal(record(step, {"lab-2": 10, "lab-1": 30}, load_s=0.1, sum_s=0.02 * step))

    ((step, values),) = points
    assert step == 4
    assert values["gang/rank"] == 1 and values["gang/members"] == 2 and values["gang/share"] == 30
    assert values["gang/samples_per_s"] == pytest.approx(120) and values["gang/total_per_s"] == pytest.approx(160)
    assert values["gang/load_s"] == pytest.approx(0.1) and values["gang/sum_s"] == pytest.approx(0.03)
    assert values["gang/step_s"] == pytest.approx(0.13) and values["gang/alone_per_s"] == 123
    assert values["gang/cpu"] == 0.5 and values["gang/gpu"] == 0.25 and "gang/noise_scale" not in values
    assert set(values) >= {f"gang/{phase}" for phase in PHASES} and "gang/temperature_c" not in values


def test_the_file_has_the_names_and_units_of_its_readers_and_steps_given_up_do_not_count(tmp_path: Path) -> None:
    clock, still = Clock(), Still(cpu=0.5, memory_bytes=3 << 20, gpu=0.25, gpu_memory_bytes=1 << 20)
    journal, _ = journal_of(tmp_path, clock, still)
    given_up = StepRecord(3, 0, 0, {"lab-1": 40}, False, False, Times(load_s=9.0), {}, 0.0)
    journal(record(0, {"lab-1": 40}, load_s=0.5, forward_s=0.25, outside_s=0.25))
    journal(given_up)
    journal(Event(1, "replan", "lab-2 is 3.0× slower than before"))
    clock.now += 2.0

    journal.close()

    (found,) = json.loads((tmp_path / "experiments/my-gang-7/logs/rank_1_metrics.json").read_text())
    assert (found["rank"], found["world_size"], found["iteration"], found["batch_size"]) == (1, 2, 1, 40)
    assert (found["data_loading_time"], found["forward_time"], found["iteration_time"]) == (0.5, 0.25, 1.0)
    assert (found["throughput"], found["total_throughput"], found["loss"]) == (20, 20, 0.5)
    assert (found["gpu_utilization"], found["cpu_percent"], found["gpu_memory_used_mb"]) == (25, 50, 1)
    (line,) = (tmp_path / "gang-events.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert (event["member"], event["step"], event["kind"]) == ("lab-1", 1, "replan") and "3.0×" in event["text"]
    assert still.is_closed


def test_a_long_training_leaves_records_further_apart_instead_of_a_file_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MOST_RECORDS", 100)
    clock = Clock()
    journal, points = journal_of(tmp_path, clock)

    for step in range(300):
        clock.now += 1.0
        journal(record(step, {"lab-1": 40}, load_s=0.5))
        points.clear()
    journal.close()

    found = json.loads((tmp_path / "experiments/my-gang-7/logs/rank_1_metrics.json").read_text())
    steps = [one["iteration"] for one in found]
    assert 50 < len(found) <= 100
    assert max(b - a for a, b in pairwise(steps)) <= 4


# --- a real process ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["at its end", "by SIGTERM"])
def ended(request: pytest.FixtureRequest, nursery: Nursery, tmp_path: Path) -> tuple[Path, int, str]:
    """The folder of a script that has ended, with what, and how."""
    script, log = tmp_path / "train.py", tmp_path / "log"
    script.write_text(SCRIPT)
    by_signal = request.param == "by SIGTERM"
    process = nursery.start(
        "script",
        log,
        environment(POTLUCK_OUTPUT_DIR=str(tmp_path), POTLUCK_METRICS_DIR=str(tmp_path)),
        arguments=[str(script), "1000000" if by_signal else "3"],
    )
    try:
        if by_signal:
            until(lambda: log.exists() and "two epochs" in log.read_text(), "it trains")
            os.kill(process.pid, signal.SIGTERM)
        code = process.wait()
    finally:
        process.kill()
    return tmp_path, code, request.param


def test_the_file_is_written_however_a_member_ends(ended: tuple[Path, int, str]) -> None:
    folder, code, how = ended

    records = json.loads((folder / "experiments/gang/logs/rank_0_metrics.json").read_text())
    points = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    assert code == (-signal.SIGTERM if how == "by SIGTERM" else 0)
    assert records[-1]["world_size"] == 1 and records[-1]["throughput"] > 0
    ours = [point for point in points if "gang/share" in point["values"]]
    assert ours[-1]["values"]["gang/share"] == 32 and ours[-1]["step"] == records[-1]["iteration"]
    assert any("loss" in point["values"] for point in points)


# --- the bottleneck ------------------------------------------------------------------------------------------------


def spans(**seconds: float) -> dict[str, float]:
    return {**dict.fromkeys(PHASES, 0.0), **seconds}


def test_the_bottleneck_is_what_takes_most_on_the_member_that_all_wait_for() -> None:
    told = {
        "lab-1": spans(forward_s=0.2, backward_s=0.3, sum_s=0.5),
        "lab-3": spans(load_s=0.61, forward_s=0.2, backward_s=0.15, sum_s=0.04),
    }
    profile = Profile()
    profile.hear({"lab-1": spans(), "lab-3": told["lab-3"]})
    profile.hear(told)
    profile.hear({**told, "new": spans()})

    assert profile.sentence() == "the loader: 61% of the step on lab-3"
    assert set(profile.members) == {"lab-1", "lab-3"}
    profile.hear({"lab-1": told["lab-1"]})
    assert set(profile.members) == {"lab-1"}


def test_where_even_the_slowest_waits_it_is_nobodys_fault() -> None:
    found = bottleneck({"a": spans(forward_s=0.2, sum_s=0.8), "b": spans(forward_s=0.3, sum_s=0.7)})

    assert (found.phase, found.member) == ("sum_s", "")
    assert found.sentence == "waiting for the sum of the gradients: 70% of the step on all members"


# --- the machine ---------------------------------------------------------------------------------------------------


def test_a_machine_tells_what_it_knows_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine.Machine(torch.device("cpu"))
    try:
        sum(i * i for i in range(200_000))
        here.look()
        figures = dict(here.figures)
        monkeypatch.setitem(sys.modules, "psutil", None)
        bare = machine.Machine(torch.device("cpu"))
        bare.look()
    finally:
        here.close()
    bare.close()

    assert 0 < figures["cpu"] <= 1.5 and figures["memory_bytes"] > 1e7
    assert set(bare.figures) == {"cpu"}


def test_a_gpu_is_asked_by_what_it_is_and_not_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=37),
        nvmlDeviceGetTemperature=lambda handle, sensor: 71,
        NVML_TEMPERATURE_GPU=0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)

    figures = machine._Gpu(torch.device("cuda:1")).figures()

    assert asked == ["GPU-abc"]
    assert figures == {"gpu": 0.37, "temperature_c": 71.0, "gpu_memory_bytes": 5.0}


# --- alone ---------------------------------------------------------------------------------------------------------


def test_a_users_script_is_measured_alone_with_several_batches_and_then_ends(nursery: Nursery, tmp_path: Path) -> None:
    script, log = tmp_path / "train.py", tmp_path / "log"
    script.write_text(SCRIPT.replace("loss.backward()", "loss.backward(); print(len(x))") + "print('never')\n")
    place = json.dumps({"store": "127.0.0.1:1", "least": 2, "most": 8, "batch": 64})

    process = nursery.start(
        "script",
        log,
        environment(POTLUCK_GANG_SOLO="30", POTLUCK_GANG=place),
        arguments=[str(script), "1000000"],
    )

    assert process.wait() == 0
    *sizes, line = log.read_text().splitlines()
    found = json.loads(line)
    assert set(found) == {"fixed_s", "per_sample_s", "samples_per_s", "device", "gradient_bytes"}
    assert found["device"] == "cpu" and found["gradient_bytes"] == 21 * 4 and found["samples_per_s"] > 0
    assert len(sizes) == 30 and set(sizes) >= {"64", "32", "16"}


def test_a_line_through_the_medians_tells_the_fixed_cost_from_each_samples() -> None:
    seen = [(b, 0.02 + 0.001 * b + (0.5 if i == 4 else 0)) for i in range(9) for b in (64, 32, 16)] + [(7, 3.0)]

    fixed_s, sample_s = trial.line(seen)

    assert fixed_s == pytest.approx(0.02) and sample_s == pytest.approx(0.001)
    assert trial.line([(64, 0.64)]) == (0.0, 0.01)
    assert trial.line([(64, 1.0), (32, 1.1)])[1] == 0  # larger is not slower: all of it is fixed


def test_the_standard_model_is_measured_by_one_command(nursery: Nursery, tmp_path: Path) -> None:
    main = str(Path(trial.__file__).with_name("__main__.py"))

    process = nursery.start("script", tmp_path / "log", environment(), arguments=[main, "solo", "--seconds", "0.1"])

    assert process.wait() == 0
    found = json.loads((tmp_path / "log").read_text())
    assert found["samples_per_s"] > 0 and found["gradient_bytes"] > 1e6
    with pytest.raises(BadInput, match="must be a number of steps"):
        trial.read({trial.VARIABLE: "many"})
