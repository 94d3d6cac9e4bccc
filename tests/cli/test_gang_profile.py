"""Does `potluck gang profile` measure each machine once, and say what a gang of them would reach?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hub_double import HubDouble, make_attempt, make_job, make_link, make_worker

from potluck.cli.gangprofile import read_solo
from potluck.domain.forecast import Solo
from potluck.domain.job import JobSpec
from potluck.protocol import Near, Outlook, Tree

Potluck = Callable[..., tuple[int, str, str]]


def line(samples_per_s: float, fixed_s: float = 0.001, **more: Any) -> str:
    values = {
        "fixed_s": fixed_s,
        "per_sample_s": 1 / samples_per_s,
        "samples_per_s": samples_per_s,
        "device": "cpu",
        "gradient_bytes": 400_000,
    }
    return json.dumps(values | more)


class Lab:
    """Machines that measure at once; what each printed."""

    def __init__(self, hub: HubDouble, printed: dict[str, str]) -> None:
        self.hub = hub
        self.specs: dict[str, JobSpec] = {}
        self.projects: list[str] = []
        self.printed = printed
        hub.takes_projects()
        hub.routes["GET", "/workers"] = lambda _: [make_worker(name, rules={"accept": "all"}) for name in printed]
        hub.routes["POST", "/jobs/outlook"] = self.outlook
        hub.routes["POST", "/jobs"] = self.submit

    def outlook(self, body: Any) -> Outlook:
        name = body["spec"]["resources"]["labels"]["worker_id"].removeprefix("w-")
        if self.printed[name] == "busy":
            return Outlook("", 1, "", "all are busy", "", [Near(name, "runs other jobs")])
        return Outlook("", 0, name, "it has room")

    def submit(self, body: Any) -> Any:
        spec = msgspec.convert(body["spec"], JobSpec)
        name = spec.resources.labels["worker_id"].removeprefix("w-")
        self.specs[name] = spec
        self.projects.append(body["project"]["hash"])
        text = self.printed[name]
        state = "running" if text == "hangs" else "failed" if "Error" in text else "succeeded"
        reason = "exit code 1" if state == "failed" else ""
        attempts = [make_attempt(worker=name, log_bytes=len(text))]
        job = make_job("gang-profile", f"measure-{name}", state=state, reason=reason, attempts=attempts)
        self.hub.routes["GET", f"/jobs/{job.id}"] = lambda _: job
        self.hub.routes["GET", f"/jobs/{job.id}/wait"] = lambda _: job
        self.hub.routes["POST", f"/jobs/{job.id}/stop"] = lambda _: job
        self.hub.prints(job, 1, text)
        return job


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_machine_is_measured_by_a_job_of_its_own_and_the_gang_is_predicted(
    hub: HubDouble, potluck: Potluck, here: Path
) -> None:
    lab = Lab(hub, {"a": line(4000), "b": line(2000), "c": line(1000) + "\ngoodbye\n", "d": line(1000)})
    hub.routes["GET", "/links"] = lambda _: [make_link(x, y, bytes_per_s=1e9) for x in "abcd" for y in "abcd" if x != y]

    code, out, err = potluck("gang", "profile", "--batch", "512")

    assert code == 0
    assert "measuring a, b, c, d …" in err
    assert {spec.resources.labels["worker_id"] for spec in lab.specs.values()} == {"w-a", "w-b", "w-c", "w-d"}
    spec = lab.specs["a"]
    assert spec.command == ["python", "-m", "potluck.train.gang", "solo", "--seconds", "8"]
    assert (spec.gang, spec.retries) == (None, 0)
    assert msgspec.json.decode(lab.hub.blobs[lab.projects[0]], type=Tree).files == []
    lines = out.splitlines()
    assert lines[0].split() == ["FROM", "TO", "ADDRESS", "RTT", "PER", "S", "FOUND"]
    assert lines[1].split()[:6] == ["a", "b", "10.0.0.9", "0.4", "ms", "1.0"]
    assert any(row.split()[:2] == ["a", "cpu"] and row.endswith("256 of 512") for row in lines)
    assert "With a batch of 512, a, b, c, d would train" in out
    assert "Equal shares would give" in out


def test_a_script_of_ones_own_is_measured_with_its_project_and_demands(
    hub: HubDouble, potluck: Potluck, here: Path
) -> None:
    lab = Lab(hub, {"a": line(4000)})
    (here / "train.py").write_text("print('hi')\n")
    (here / "potluck.yaml").write_text(
        "command: python other.py\ngang: {members: 2..4, batch: 96}\nresources: {memory: 2GB}\nenv: {SEED: 7}\n"
    )

    code, out, err = potluck("gang", "profile", "--steps", "20", "--cpu", "2", "--", "python", "train.py")

    assert code == 0, err
    spec = lab.specs["a"]
    assert spec.command == ["env", "POTLUCK_GANG_SOLO=20", "python", "train.py"]
    assert (spec.resources.memory, spec.resources.cpu, spec.env) == ("2GB", "2", {"SEED": "7"})
    tree = msgspec.json.decode(hub.blobs[lab.projects[0]], type=Tree)
    assert "train.py" in [file.path for file in tree.files]
    assert "With a batch of 96, a alone is faster than any gang" in out


def test_who_could_not_be_measured_is_named_with_the_reason(hub: HubDouble, potluck: Potluck, here: Path) -> None:
    lab = Lab(hub, {"a": line(4000), "b": "busy", "c": "ModuleNotFoundError: No module named 'torch'", "d": "hangs"})

    code, out, _ = potluck("gang", "profile", "--timeout", "0.3s")

    assert code == 0
    assert "b was not measured: runs other jobs" in out
    assert "c was not measured: its measurement gave no answer (exit code 1): potluck logs measure-c" in out
    assert "d was not measured: it had not ended after 0 s: potluck logs measure-d" in out
    stopped = [path for method, path, _ in lab.hub.asked if method == "POST" and path.endswith("/stop")]
    assert stopped == ["/jobs/measure-d/stop"]
    assert "Nobody has tried yet how the machines reach one another" in out


def test_json_has_all_of_it(hub: HubDouble, potluck: Potluck, here: Path) -> None:
    Lab(hub, {"a": line(3000), "b": line(1000), "c": "busy"})
    hub.routes["GET", "/links"] = lambda _: [make_link("a", "b"), make_link("b", "a"), make_link("a", "c")]

    code, out, err = potluck("gang", "profile", "--json")

    found = json.loads(out)
    assert (code, err) == (0, "")
    assert sum(found["forecast"]["shares"].values()) == found["forecast"]["batch"] == 128
    assert found["alone"]["a"]["samples_per_s"] == 3000
    assert found["not_measured"] == {"c": "runs other jobs"}
    assert len(found["links"]) == 3


def test_a_pair_that_cannot_reach_one_another_is_named(hub: HubDouble, potluck: Potluck, here: Path) -> None:
    Lab(hub, {"a": line(3000), "b": line(1000)})
    hub.routes["GET", "/links"] = lambda _: [make_link("a", "b", "", "refused at 10.0.0.2")]

    out = potluck("gang", "profile")[1]

    assert "a cannot reach b (refused at 10.0.0.2): b would have to stay out." in out


def test_without_a_machine_that_answers_it_fails_and_says_so(hub: HubDouble, potluck: Potluck, here: Path) -> None:
    Lab(hub, {})

    code, out, _ = potluck("gang", "profile")

    assert code == 1
    assert "No machine could be measured." in out


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"epoch 1\n{line(100)}\nbye\n", Solo(0.001, 0.01, 100.0, 400_000, "cpu")),
        (f"{line(100)}\n{line(200, fixed_s=0)}\n", Solo(0.0, 0.005, 200.0, 400_000, "cpu")),
        (line(100, device="\x1b[2Jgpu"), Solo(0.001, 0.01, 100.0, 400_000, "gpu")),
        ('{"loss": 1}\n[1]\nnull\n"x"\n', None),
        (line(100, per_sample_s=0), Solo(0.001, 0.0005, 100.0, 400_000, "cpu")),  # noise: nothing is for nothing
        (line(100).replace('"samples_per_s": 100', '"samples_per_s": 0'), None),
        (line(100, fixed_s=float("inf")), None),
        (line(100, per_sample_s=float("inf")), None),
        (line(100, per_sample_s="x"), None),
        ("", None),
    ],
)
def test_the_measurement_is_the_last_line_that_is_one(text: str, found: Solo | None) -> None:
    assert read_solo(text) == found
