"""What does `potluck run` send, say and return? Against a hub that answers over real HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hub_double import HubDouble, make_attempt, make_job

from potluck.cli.init import write_templates
from potluck.domain.job import JobSpec
from potluck.protocol import JobReport, LogPiece, Near, Outlook, Tree, Why

Potluck = Callable[..., tuple[int, str, str]]

WAITS = make_job(state="queued", reason="", attempts=[], worker="", started_at=None, ended_at=None, exit_code=None)
PLACED = make_job(state="placed", reason="it has the most free cores", attempts=[make_attempt(state="placed")])
DONE = make_job(attempts=[make_attempt(log_bytes=6)])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tiny"
    write_templates(folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def lab(hub: HubDouble) -> HubDouble:
    """A hub that takes projects, and places a job at once."""
    hub.takes_projects()
    hub.knows_jobs(DONE)
    hub.routes["POST", "/jobs"] = lambda _: WAITS
    hub.routes["GET", "/jobs/tiny-k3f2/wait"] = lambda _: PLACED
    return hub


def submitted(lab: HubDouble, path: str = "/jobs") -> dict[str, Any]:
    bodies = [body for method, asked, body in lab.asked if (method, asked) == ("POST", path)]
    assert len(bodies) == 1
    found: dict[str, Any] = bodies[0]
    return found


# --- submitting


def test_run_sends_the_folder_and_says_what_it_did(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    first = potluck("run")
    size = sum(p.stat().st_size for p in project.iterdir())

    assert (first[0], first[1]) == (0, "tiny-k3f2: placed on lab-1: it has the most free cores\n")
    assert first[2].splitlines() == [
        f"project: 3 files, {size / 1000:.1f} kB; 3 new, {size / 1000:.1f} kB",
        "Watch it with `potluck logs -f tiny-k3f2`, end it with `potluck stop tiny-k3f2`.",
    ]
    request = submitted(lab)
    assert request["spec"]["command"] == ["/bin/sh", "-c", "python train.py --epochs 3"]
    assert request["spec"]["name"] == "tiny"
    tree = msgspec.json.decode(lab.blobs[request["project"]["hash"]], type=Tree)
    assert [file.path for file in tree.files] == [".potluckignore", "potluck.yaml", "train.py"]
    assert all(lab.blobs[file.blob.hash] == (project / file.path).read_bytes() for file in tree.files)


def test_a_second_run_sends_only_what_changed(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    potluck("run")
    (project / "data.txt").write_text("12345")

    _, _, err = potluck("run")

    assert "project: 4 files" in err and "; 1 new, 5 B" in err
    assert "; nothing new to send" in potluck("run")[2]


def test_what_is_behind_the_dashes_is_the_command_word_by_word(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    words = ["python", "train.py", "--epochs", "3", "a b", "$HOME", "*", "--json", "--", "-f"]

    code, _, err = potluck("run", "--gpu", "24GB..:2", "--retries", "0", "--", *words)

    assert code == 0, err
    spec = submitted(lab)["spec"]
    assert spec["command"] == words
    assert (spec["resources"]["gpu"], spec["resources"]["memory"], spec["retries"]) == ("24GB..:2", "2GB", 0)


def test_without_dashes_the_first_word_begins_the_command(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    assert potluck("run", "--cpu", "2", "python", "train.py", "--epochs", "1", "--wait")[0] == 0
    assert submitted(lab)["spec"]["command"] == ["python", "train.py", "--epochs", "1", "--wait"]


def test_every_flag_reaches_the_job(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    (project / "potluck.yaml").unlink()
    (project / "requirements.txt").write_text("torch\n")
    flags = {
        "--gpu": "1",
        "--cpu": "4",
        "--memory": "8GB",
        "--disk": "20GB",
        "--requirements": "requirements.txt",
        "--python": "3.12",
        "--name": "night",
        "--priority": "-5",
        "--retries": "1",
        "--retry-on": "any",
        "--timeout": "2h",
        "--grace": "1m",
        "--env": "SEED=7",
        "--secret": "HF_TOKEN",
        "--on": "room=B12",
        "--procs": "2",
    }

    code, _, err = potluck("run", *(word for pair in flags.items() for word in pair), "--", "python", "train.py")

    assert code == 0, err
    spec = msgspec.convert(submitted(lab)["spec"], JobSpec)
    assert (spec.resources.gpu, spec.resources.cpu, spec.resources.memory) == ("1", "4", "8GB")
    assert (spec.resources.disk, spec.resources.labels) == ("20GB", {"room": "B12"})
    assert (spec.requirements, spec.python, spec.name, spec.priority) == ("requirements.txt", "3.12", "night", -5)
    assert (spec.retries, spec.retry_on, spec.timeout_s, spec.grace_s) == (1, "any", 7200.0, 60.0)
    assert (spec.env, spec.secrets, spec.procs) == ({"SEED": "7"}, ["HF_TOKEN"], 2)


def test_json_is_one_object(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    code, out, err = potluck("run", "--json")

    assert (code, err) == (0, "")
    assert (json.loads(out)["mode"], json.loads(out)["state"]) == ("job", "placed")


def test_a_job_that_must_wait_says_why_and_what_would_help(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    lab.routes["GET", "/jobs/tiny-k3f2/wait"] = lambda _: WAITS
    lab.routes["GET", "/why/tiny-k3f2"] = lambda _: Why(
        "tiny-k3f2", "tiny-k3f2 waits: no machine has 24 GB of GPU memory free", "Ask for 16 GB: lab-1 has that."
    )

    assert potluck("run")[:2] == (
        0,
        "tiny-k3f2 waits: no machine has 24 GB of GPU memory free\nAsk for 16 GB: lab-1 has that.\n",
    )


def test_wait_says_once_why_nothing_begins(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    views = [WAITS, WAITS, make_job()]
    lab.routes["GET", "/jobs/tiny-k3f2/wait"] = lambda _: views.pop(0)
    lab.routes["GET", "/why/tiny-k3f2"] = lambda _: Why("tiny-k3f2", "tiny-k3f2 waits: all machines are busy")
    lab.prints(make_job(), 1, "")

    code, _, err = potluck("run", "--wait")

    assert code == 0
    assert err.splitlines()[1:] == [
        "tiny-k3f2: queued",
        "tiny-k3f2 waits: all machines are busy",
        "tiny-k3f2: succeeded: exit code 0",
    ]


def test_where_the_code_comes_from_is_recorded(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(project)]
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (project / "train.py").write_text("print('changed')\n")

    code, _, err = potluck("run")

    state = submitted(lab)["git"]
    assert code == 0
    assert f"git main {state['commit'][:8]} with changes" in err
    assert b"+print('changed')" in lab.blobs[state["diff"]["hash"]]


# --- which file, which folder


def test_the_project_is_where_we_are_or_where_the_file_is(
    lab: HubDouble, potluck: Potluck, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "jobs").mkdir()
    (project / "jobs" / "big.yaml").write_text("command: python train.py\nname: big\n")

    assert potluck("run", "-f", "jobs/big.yaml")[0] == 0  # inside: all of the project goes
    monkeypatch.chdir(tmp_path)
    assert potluck("run", "-f", "tiny/potluck.yaml", "--folder", "tiny")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert potluck("run", "-f", "../tiny/potluck.yaml")[0] == 0  # not ours: its folder goes

    requests = [body for method, path, body in lab.asked if (method, path) == ("POST", "/jobs")]
    assert [request["spec"]["name"] for request in requests] == ["big", "tiny", "tiny"]
    assert len({request["project"]["hash"] for request in requests}) == 1


def test_without_a_file_the_command_is_enough(
    lab: HubDouble, potluck: Potluck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "My Code").mkdir()
    monkeypatch.chdir(tmp_path / "My Code")

    assert potluck("run", "--", "nvidia-smi")[0] == 0
    assert submitted(lab)["spec"]["name"] == "my-code"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--wait-at-most", "5m"], "--wait-at-most is for --wait"),
        (["--local", "--dry-run"], "--dry-run is about a hub's machines"),
        (["--local", "--wait"], "--wait is about a hub's machines"),
        (["--dry-run", "--wait"], "take one of them"),
        (["--to", "x"], "--to is for --local"),
        (["-f", "absent.yaml"], "there is no such file"),
        (["--folder", "absent"], "there is no such folder"),
        (["--", "python train.py"], "write the command without quotes"),
        (["--memory", "8X"], "--memory: "),
        (["--", "python", "trian.py"], "there is no file trian.py in the project: did you mean `train.py`?"),
        (["--requirements", "requirements.txt"], "there is no file requirements.txt in the project"),
        (["--", "python", "outputs/x.py"], "outputs/x.py is here, but .gitignore or .potluckignore keeps it"),
    ],
)
def test_a_slip_is_told_before_anything_is_sent(
    args: list[str], words: str, lab: HubDouble, potluck: Potluck, project: Path
) -> None:
    (project / "outputs").mkdir()
    (project / "outputs" / "x.py").write_text("")

    code, _, err = potluck("run", *args)

    assert code == 2
    assert words in err
    assert [path for method, path, _ in lab.asked if method == "POST"] == []


def test_without_a_command_it_says_how_to_give_one(
    lab: HubDouble, potluck: Potluck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    code, _, err = potluck("run")

    assert code == 2
    assert "which command?" in err and "`potluck init`" in err


def test_a_whole_home_is_not_sent(
    lab: HubDouble, potluck: Potluck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    code, _, err = potluck("run", "--", "ls")

    assert code == 2
    assert "go into the project's folder" in err


# --- where would it run?


def test_dry_run_says_where_and_sends_nothing(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    lab.routes["POST", "/jobs/outlook"] = lambda _: Outlook("", 0, "lab-1", "it has 2 free cores and nothing to do")

    code, out, err = potluck("run", "--dry-run")

    assert (code, out) == (0, "would run now on lab-1: it has 2 free cores and nothing to do\n")
    assert "nothing was sent" in err
    assert lab.blobs == {}
    assert submitted(lab, "/jobs/outlook")["spec"]["name"] == "tiny"


def test_dry_run_says_why_not_and_what_would_help(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    lab.routes["POST", "/jobs/outlook"] = lambda _: Outlook(
        *["", 3, "", "no machine has 24 GB of GPU memory free", "Ask for 16 GB: lab-1 has that."],
        [Near("lab-1", "has 16 GB of GPU memory free, the job wants 24 GB")],
    )

    code, out, _ = potluck("run", "--dry-run", "--gpu", "24GB")

    assert code == 75
    assert out.splitlines() == [
        "would wait: no machine has 24 GB of GPU memory free",
        "  lab-1 has 16 GB of GPU memory free, the job wants 24 GB",
        "Ask for 16 GB: lab-1 has that.",
    ]


def test_what_no_machine_could_ever_hold_is_refused_by_the_hub(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    lab.routes["POST", "/jobs"] = lambda _: (422, "bad_input", "no machine here has 900 cores; the largest has 64")

    code, _, err = potluck("run", "--cpu", "900")

    assert code == 2
    assert err.splitlines()[-1] == "bad_input: no machine here has 900 cores; the largest has 64"


# --- waiting


def test_wait_streams_the_output_and_returns_the_jobs_exit_code(
    lab: HubDouble, potluck: Potluck, project: Path
) -> None:
    running = make_job(state="running", reason="", attempts=[make_attempt(state="running", ended_at=None)])
    failed = make_job(
        state="failed",
        reason="exit code 3",
        exit_code=3,
        attempts=[make_attempt(exit_code=3, outputs=lab.add_blob(b"tree"))],
    )
    states = [PLACED, running]
    lab.routes["GET", "/jobs/tiny-k3f2/wait"] = lambda _: states.pop(0) if states else running
    lab.routes["GET", "/jobs/tiny-k3f2"] = lambda _: failed
    pieces = [LogPiece(1, 0, 7, "step 1\n", False), LogPiece(1, 7, 11, "oh\r\n", True)]
    lab.routes["GET", "/jobs/tiny-k3f2/log"] = lambda _: pieces.pop(0)

    code, out, err = potluck("run", "--wait")

    assert (code, out) == (3, "step 1\noh\n")
    assert err.splitlines()[1:] == [
        "tiny-k3f2: queued",
        "tiny-k3f2: placed on lab-1: it has the most free cores",
        "tiny-k3f2: failed: exit code 3",
        "Its artefacts: potluck pull tiny-k3f2",
    ]


def test_wait_with_json_prints_the_ended_job_only(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    killed = make_job(state="failed", exit_code=None, attempts=[make_attempt(exit_code=None, signal="SIGKILL")])
    lab.routes["GET", "/jobs/tiny-k3f2/wait"] = lambda _: killed

    code, out, err = potluck("run", "--wait", "--json")

    assert (code, err) == (137, "")
    assert json.loads(out)["state"] == "failed"


def test_wait_at_most_leaves_the_job_and_says_how_to_come_back(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    lab.routes["GET", "/jobs/tiny-k3f2/wait"] = lambda _: WAITS

    code, _, err = potluck("run", "--wait", "--wait-at-most", "0.2s")

    assert code == 124
    assert "it goes on. Watch it with `potluck logs -f tiny-k3f2`" in err


# --- here


@pytest.fixture
def asked_here(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`--local` with an executor that only writes down what it was asked, and prints."""
    import sys
    from types import ModuleType

    seen: dict[str, Any] = {}

    def run_local(spec: JobSpec, folder: Path, out: Path, **more: Any) -> JobReport:
        seen.update(spec=spec, folder=folder, out=out, **more)
        more["say"]("preparing")
        for piece in (b"loss \xc3", b"\xa9 \x1b[31mred", b" \xff\r\n"):
            more["on_output"](piece)
        report: JobReport = seen.get("report", JobReport("exited", exit_code=0))
        return report

    module = ModuleType("potluck.worker.jobs.local")
    module.run_local = run_local  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "potluck.worker.jobs.local", module)
    return seen


def test_local_runs_here_and_asks_no_hub(
    asked_here: dict[str, Any], potluck: Potluck, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "swordfish")

    code, out, err = potluck("run", "--local", "--secret", "HF_TOKEN", "--", "python", "train.py")

    assert (code, out) == (0, "loss é red �\n")
    assert err.splitlines() == ["tiny: python train.py", "preparing", "tiny: exit code 0. Its results are in outputs"]
    assert asked_here["spec"].command == ["python", "train.py"]
    assert (asked_here["folder"], asked_here["out"]) == (Path(), Path("outputs"))
    assert asked_here["secrets"] == {"HF_TOKEN": "swordfish"}
    assert isinstance(asked_here["stop"], threading.Event)


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (JobReport("exited", exit_code=5), 5),
        (JobReport("exited", signal="SIGKILL", reason="killed by the memory limit: asked 2 GB, used 2.0"), 137),
        (JobReport("failed", reason="torch: no such version", code="environment"), 1),
    ],
)
def test_local_returns_the_commands_exit_code(
    report: JobReport, code: int, asked_here: dict[str, Any], potluck: Potluck, project: Path
) -> None:
    asked_here["report"] = report

    found, _, err = potluck("run", "--local", "--to", "results")

    assert found == code
    assert err.splitlines()[-1].startswith(f"tiny: {report.reason or 'exit code 5'}. Its results are in results")


def test_local_wants_secrets_from_the_environment(asked_here: dict[str, Any], potluck: Potluck, project: Path) -> None:
    assert "ABSENT_SECRET" not in os.environ

    code, _, err = potluck("run", "--local", "--secret", "ABSENT_SECRET")

    assert code == 2
    assert "with --local it comes from there" in err
    assert asked_here == {}
