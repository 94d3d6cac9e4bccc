"""What does `potluck run --gang` send, say and return? Against a hub that answers over real HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hub_double import HubDouble, make_attempt, make_gang, make_job, make_link, make_member, make_worker

from potluck.cli.init import write_templates
from potluck.domain.job import GangSpec, JobSpec
from potluck.protocol import JobReport, LogPiece, Near, Outlook

Potluck = Callable[..., tuple[int, str, str]]

QUEUED = make_gang(
    state="queued",
    reason="lab-1 cannot reach lab-3: refused",
    engine="",
    started_at=None,
    members=[make_member(n, state="queued", worker="", address="") for n in (1, 2)],
)
TRAINS = make_gang(reason="2 of 2..3 machines", members=[make_member(1), make_member(2)])
DONE = make_gang(
    state="succeeded",
    reason="all members are done",
    exit_code=0,
    members=[make_member(1, state="succeeded"), make_member(2, state="succeeded")],
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tiny"
    write_templates(folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def lab(hub: HubDouble) -> HubDouble:
    """A hub that takes projects, and whose gang trains at once and is done soon."""
    hub.takes_projects()
    hub.knows_gangs(DONE)
    states = [TRAINS, DONE]
    hub.routes["POST", "/gangs"] = lambda _: QUEUED
    hub.routes["GET", "/gangs/faces-g1/wait"] = lambda _: states.pop(0) if len(states) > 1 else states[0]
    for member, text in zip(DONE.members, ("step 1\nstep 2\n", "step 1\n"), strict=True):
        hub.prints(make_job(id_=member.job), 1, text)
    return hub


def sent(lab: HubDouble, path: str = "/gangs") -> dict[str, Any]:
    bodies = [body for method, asked, body in lab.asked if (method, asked) == ("POST", path)]
    assert len(bodies) == 1
    found: dict[str, Any] = bodies[0]
    return found


def test_run_gang_submits_one_spec_for_all_members_and_watches_them(
    lab: HubDouble, potluck: Potluck, project: Path
) -> None:
    code, out, err = potluck("run", "--gang", "2..3", "--batch", "64", "--gang-policy", "uniform", "--", "python", "-V")

    spec = msgspec.convert(sent(lab)["spec"], JobSpec)
    assert spec.gang == GangSpec(2, 3, batch=64, policy="uniform")
    assert (spec.command, spec.retries, spec.retry_on) == (["python", "-V"], 10, "any")
    assert (code, sorted(out.splitlines())) == (0, ["lab-1 | step 1", "lab-1 | step 2", "lab-2 | step 1"])
    assert err.splitlines()[1:] == [
        "faces-g1: queued: lab-1 cannot reach lab-3: refused",
        "faces-g1: running: 2 of 2..3 machines",
        "faces-g1: lab-1, lab-2: training",
        "faces-g1: succeeded: all members are done",
        "faces-g1: lab-1, lab-2: done",
        "What its members left: potluck pull faces-g1",
    ]


def test_the_same_submission_twice_has_the_same_key(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    potluck("run", "--gang", "2", "--detach")

    assert [path for method, path, _ in lab.asked if method == "POST" and path.endswith("gangs")] == ["/gangs"]


def test_detached_it_says_where_it_stands_and_how_to_come_back(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    code, out, err = potluck("run", "--gang", "2", "--detach")

    assert (code, out) == (0, "faces-g1: queued: lab-1 cannot reach lab-3: refused\n")
    assert err.splitlines()[-1] == "Watch it with `potluck logs -f faces-g1`, end it with `potluck stop faces-g1`."


def test_json_is_the_gang_that_has_ended(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    code, out, err = potluck("run", "--gang", "2", "--json")

    assert (code, err) == (0, "")
    assert (json.loads(out)["mode"], json.loads(out)["state"]) == ("gang", "succeeded")


@pytest.mark.parametrize(
    ("gang", "job", "code"),
    [
        ({"exit_code": 3}, {}, 3),
        ({"exit_code": None}, {"attempts": [make_attempt(exit_code=None, signal="SIGKILL")]}, 137),
        (
            {"exit_code": None, "state": "cancelled"},
            {"attempts": [make_attempt(exit_code=None, signal="SIGTERM")]},
            143,
        ),
        ({"exit_code": None}, {"attempts": [make_attempt(exit_code=None)], "exit_code": None}, 1),
    ],
)
def test_the_exit_code_is_the_gangs(
    gang: dict[str, Any], job: dict[str, Any], code: int, lab: HubDouble, potluck: Potluck, project: Path
) -> None:
    members = [make_member(1, state="failed"), make_member(2, state="failed")]
    ended = make_gang(**({"state": "failed", "members": members} | gang))
    lab.routes["GET", "/gangs/faces-g1/wait"] = lambda _: ended
    for member in members:
        lab.prints(make_job(id_=member.job), 1, "")
        lab.routes["GET", f"/jobs/{member.job}"] = lambda _, member=member: make_job(
            id_=member.job, **({"state": "failed", "exit_code": None} | job)
        )

    assert potluck("run", "--gang", "2")[0] == code


def test_a_member_that_is_lost_and_comes_back_is_told_and_its_next_attempt_is_shown(
    lab: HubDouble, potluck: Potluck, project: Path
) -> None:
    lost = replace(make_member(2), state="queued", worker="", reason="lab-2 fell silent")
    moved = replace(make_member(2), worker="lab-9")
    views = [
        TRAINS,
        replace(TRAINS, members=[make_member(1), lost]),
        replace(TRAINS, members=[make_member(1), moved]),
        replace(DONE, members=[DONE.members[0], replace(DONE.members[1], worker="lab-9")]),
    ]
    lab.routes["GET", "/gangs/faces-g1/wait"] = lambda _: views.pop(0) if len(views) > 1 else views[0]
    lab.prints(make_job(id_="faces-g1-2"), 2, "back again\n")

    code, out, err = potluck("run", "--gang", "2..3")

    assert code == 0
    assert "lab-9 | back again" in out
    assert "faces-g1: faces-g1-2: back in the line: lab-2 fell silent" in err
    assert "faces-g1: lab-9: training" in err


def test_what_members_print_cannot_steer_the_terminal_and_lines_stay_whole(
    lab: HubDouble, potluck: Potluck, project: Path
) -> None:
    pieces = {
        "faces-g1-1": [LogPiece(1, 0, 5, "half ", False), LogPiece(1, 5, 20, "\x1b[2Jline\n\x1b]0;x\x07end", True)],
        "faces-g1-2": [LogPiece(1, 0, 6, "whole\n", True)],
    }
    for job, given in pieces.items():
        lab.routes["GET", f"/jobs/{job}/log"] = lambda _, given=given: (
            given.pop(0) if given else (404, "not_found", "no such attempt")
        )

    _, out, _ = potluck("run", "--gang", "2..3")

    assert sorted(out.splitlines()) == ["lab-1 | end", "lab-1 | half line", "lab-2 | whole"]


def test_a_hub_that_restarts_does_not_end_the_watching(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    answers: list[Any] = [(503, "ledger", "the ledger restarts."), TRAINS, DONE]
    lab.routes["GET", "/gangs/faces-g1/wait"] = lambda _: answers.pop(0) if len(answers) > 1 else answers[0]

    code, _, err = potluck("run", "--gang", "2..3")

    assert code == 0
    assert "the ledger restarts. Trying again; the gang goes on." in err


def test_wait_at_most_leaves_the_gang_alone(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    lab.routes["GET", "/gangs/faces-g1/wait"] = lambda _: TRAINS
    for member in TRAINS.members:
        lab.routes["GET", f"/jobs/{member.job}/log"] = lambda _: LogPiece(1, 0, 0, "", False)

    code, _, err = potluck("run", "--gang", "2..3", "--wait-at-most", "0.2s")

    assert code == 124
    assert "faces-g1 is running after 0 s; it goes on." in err


def test_ctrl_c_leaves_the_gang_alone(lab: HubDouble, project: Path) -> None:
    lab.routes["GET", "/gangs/faces-g1/wait"] = lambda _: TRAINS
    lab.routes["GET", "/jobs/faces-g1-1/log"] = lambda _: LogPiece(1, 0, 6, "first\n", False)
    lab.routes["GET", "/jobs/faces-g1-2/log"] = lambda _: LogPiece(1, 0, 0, "", False)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from potluck.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "--gang", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "lab-1 | first\n"

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)

    assert process.returncode == 130
    assert "Left faces-g1, which is running and goes on." in err
    assert [path for method, path, _ in lab.asked if method == "POST" and "stop" in path] == []


# --- flags and the file


def test_flags_go_into_the_gang_of_the_file(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    (project / "potluck.yaml").write_text("command: python train.py\ngang: 2..8\n")

    assert potluck("run", "--batch", "512", "--detach")[0] == 0
    assert msgspec.convert(sent(lab)["spec"], JobSpec).gang == GangSpec(2, 8, batch=512)


def test_a_flag_wins_over_the_file(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    (project / "potluck.yaml").write_text("command: python train.py\ngang: {members: 2..8, batch: 512}\n")

    assert potluck("run", "--gang", "4", "--gang-engine", "plain", "--detach")[0] == 0
    assert msgspec.convert(sent(lab)["spec"], JobSpec).gang == GangSpec(4, 4, batch=512, engine="plain")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gang", "8..2"], "--gang: gang: members is 8..2, which counts down: write 2..8"),
        (["--gang", "many"], "--gang: gang: members is 'many': write how many machines"),
        (["--gang", "1"], "for one machine leave gang out"),
        (["--gang", "2..8", "--batch", "4"], "--batch: gang: batch is 4, which cannot feed 8 machines"),
        (["--gang", "2", "--batch", "lots"], "--batch: gang: batch is 'lots': it is a whole number of samples"),
        (["--gang", "2..4", "--gang-compat"], "--gang-compat: gang: compat needs a fixed number of machines"),
        (["--gang", "2", "--gang-engine", "nccl"], "--gang-engine: gang: engine is 'nccl': it must be one of"),
        (["--gang", "2", "--gang-policy", "fair"], "--gang-policy: gang: policy is 'fair': it must be one of"),
        (["--gang", "2", "--procs", "2"], "--procs: procs is 2, and a gang has one process on each machine"),
        (["--batch", "64"], "--batch is for a gang: say how many machines, --gang 2..8"),
        (["--gang-compat"], "--gang-compat is for a gang: say how many machines"),
        (["--detach"], "--detach is for a gang"),
        (["--gang", "2", "--detach", "--wait"], "--detach only submits"),
        (["--gang", "2", "--detach", "--wait-at-most", "5s"], "--detach does not watch"),
        (["--gang", "2", "--", "python", "trian.py"], "there is no file trian.py in the project"),
    ],
)
def test_a_slip_is_told_with_its_flag_before_anything_is_sent(
    args: list[str], words: str, lab: HubDouble, potluck: Potluck, project: Path
) -> None:
    code, _, err = potluck("run", *args)

    assert code == 2
    assert words in err
    assert [path for method, path, _ in lab.asked if method == "POST"] == []


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("gang: 8..2", "line 2, column 7: gang: members is 8..2"),
        ("gang: {members: 2..8, batch: 4}", "line 2, column 30: gang: batch is 4, which cannot feed 8"),
        ("gang: {membres: 2}", "line 2, column 8: no key `membres`: did you mean `members`?"),
        ("gang: {batch: 64}", "how many machines"),
        ("batch: 64", "it belongs below `gang:`, as `gang: {batch: …}`"),
        ("gang: {members: 2, compat: perhaps}", "line 2, column 28: gang: compat is 'perhaps'"),
    ],
)
def test_a_slip_in_the_file_is_told_with_its_place(
    yaml: str, words: str, lab: HubDouble, potluck: Potluck, project: Path
) -> None:
    (project / "potluck.yaml").write_text(f"command: python train.py\n{yaml}\n")

    code, _, err = potluck("run")

    assert code == 2
    assert words in err


# --- where would it train?


def asks_each(lab: HubDouble, takes: dict[str, bool]) -> None:
    """These workers are here; the placement says which of them would take a member."""
    workers = [make_worker(name, rules={"accept": "all"}) for name in takes]
    lab.routes["GET", "/workers"] = lambda _: [
        *workers,
        make_worker("pool-only", rules={"accept": "pool"}),
        make_worker("drained", rules={"accept": "all"}, draining=True),
        make_worker("away", rules={"accept": "all"}, state="away"),
        make_worker("never-asked"),
    ]

    def outlook(body: Any) -> Outlook:
        assert body["spec"]["gang"] is None
        name = body["spec"]["resources"]["labels"]["worker_id"].removeprefix("w-")
        if takes[name]:
            return Outlook("", 0, name, "it has room")
        return Outlook("", 1, "", "no machine has 4 cores free", "", [Near(name, "has 2 cores free, the job wants 4")])

    lab.routes["POST", "/jobs/outlook"] = outlook


def test_dry_run_says_which_machines_would_train_together(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    asks_each(lab, {"lab-1": True, "lab-2": True, "lab-3": False, "lab-4": True})
    lab.routes["GET", "/links"] = lambda _: [
        make_link("lab-1", "lab-2"),
        make_link("lab-1", "lab-4", "", "nothing answered at 10.0.0.4"),
    ]

    code, out, err = potluck("run", "--gang", "2..4", "--dry-run")

    assert code == 0
    assert out.splitlines()[0] in {
        "would train now on lab-2, lab-4 (2 of 2..4 machines)",
        "would train now on lab-1, lab-2 (2 of 2..4 machines)",
    }
    assert out.splitlines()[1:] == [
        "  lab-3: has 2 cores free, the job wants 4",
        "  lab-1 cannot reach lab-4: nothing answered at 10.0.0.4",
    ]
    assert "nothing was sent" in err
    assert lab.blobs == {}


def test_dry_run_of_a_gang_that_would_wait_leaves_with_75(lab: HubDouble, potluck: Potluck, project: Path) -> None:
    asks_each(lab, {"lab-1": True, "lab-2": False})

    code, out, _ = potluck("run", "--gang", "2..4", "--dry-run")
    as_json = potluck("run", "--gang", "2..4", "--dry-run", "--json")

    assert code == as_json[0] == 75
    assert out.splitlines() == [
        "would wait: 1 of at least 2 machines could train it together now",
        "  lab-2: has 2 cores free, the job wants 4",
        "It needs 1 more: `potluck invite` lets a machine join",
    ]
    assert json.loads(as_json[1])["lacks"] == {"lab-2": "has 2 cores free, the job wants 4"}


# --- here


@pytest.fixture
def asked_here(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    from types import ModuleType

    seen: dict[str, Any] = {}

    def run_local(spec: JobSpec, folder: Path, out: Path, **more: Any) -> JobReport:
        seen.update(spec=spec)
        return JobReport("exited", exit_code=0)

    module = ModuleType("potluck.worker.jobs.local")
    module.run_local = run_local  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "potluck.worker.jobs.local", module)
    return seen


def test_local_is_a_gang_of_one_with_the_same_batch(
    asked_here: dict[str, Any], potluck: Potluck, project: Path
) -> None:
    from potluck.train.gang import place

    assert potluck("run", "--local", "--gang", "2..8", "--batch", "512", "--gang-policy", "uniform")[0] == 0

    spec = asked_here["spec"]
    found = place.read(spec.env)
    assert spec.gang is None
    assert found.is_alone
    assert (found.batch, found.policy, found.least) == (512, "uniform", 1)


def test_local_of_a_compat_script_has_a_world_of_one(
    asked_here: dict[str, Any], potluck: Potluck, project: Path
) -> None:
    assert potluck("run", "--local", "--gang", "4", "--gang-compat")[0] == 0

    env = asked_here["spec"].env
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert 0 < int(env["MASTER_PORT"]) < 65536
