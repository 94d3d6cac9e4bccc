"""Do ls, show, logs, stop and pull know gangs, by whatever name? Against a hub that answers over real HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_double import HubDouble, job_of, make_attempt, make_gang, make_job, make_member, make_run

from potluck.protocol import Event, GangView, LogPiece, Why

Potluck = Callable[..., tuple[int, str, str]]


def prints(hub: HubDouble, gang: GangView, *texts: str) -> None:
    """Each member's only attempt has printed this."""
    for member, text in zip(gang.members, texts, strict=False):
        job = replace(job_of(gang, member), attempts=[make_attempt(worker=member.worker, log_bytes=len(text))])
        hub.routes["GET", f"/jobs/{job.id}"] = lambda _, job=job: job
        hub.prints(job, 1, text)


# --- ls, show


def test_ls_lists_gangs_with_their_machines_and_speed(hub: HubDouble, potluck: Potluck) -> None:
    ended = make_gang("old", "old-g0", state="succeeded", reason="", created_at="2026-01-01T09:00:00+00:00")
    hub.knows_gangs(make_gang(), ended)

    lines = potluck("gang", "ls")[1].splitlines()

    assert [line.split()[0] for line in lines] == ["GANG", "old", "faces"]
    assert "2 of 2..3" in lines[2] and " 100 " in lines[2]
    assert "2..3" in lines[1] and "of 2..3" not in lines[1]
    assert json.loads(potluck("gang", "ls", "--json")[1])[0]["mode"] == "gang"
    potluck("gang", "ls", "--open")
    assert hub.queries[-1]["state"] == "open"


def test_ls_without_gangs_says_how_to_start_one(hub: HubDouble, potluck: Potluck) -> None:
    assert potluck("gang", "ls")[1] == "No gangs. Start one: potluck run --gang 2..8 -- python train.py\n"


def test_show_tells_members_shares_and_what_the_gang_reaches(hub: HubDouble, potluck: Potluck) -> None:
    gang = make_gang()
    hub.knows_gangs(gang)
    hub.routes["GET", "/runs/faces-g1/events"] = lambda _: [
        Event(1, "2026-01-01T11:00:00+00:00", "gang.running", "faces-g1", "formed of 2", "hub")
    ]

    code, out, _ = potluck("show", "faces")

    assert code == 0
    assert potluck("gang", "show", "last")[1] == out
    lines = out.splitlines()
    assert lines[0] == "faces (faces-g1): a gang of ada"
    assert "  machines  2 of 2..3" in lines
    assert "  engine    plain, meeting at lab-1" in lines
    assert "  batch     64, shared out: dynamic" in lines
    assert "  speed     100 samples/s together, 91% of the 110 that its members would do alone" in lines
    assert any(
        line.split()[:8] == ["1", "faces-g1-1", "running", "lab-1", "10.0.0.1", "0", "48", "75"] for line in lines
    )
    assert any(line.split()[:3] == ["3", "faces-g1-3", "queued"] and "no machine is free" in line for line in lines)
    assert "formed of 2" in out


def test_show_follow_leaves_with_the_gangs_exit_code(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows_gangs(make_gang())
    hub.routes["GET", "/gangs/faces-g1/wait"] = lambda _: make_gang(state="failed", exit_code=7, reason="exit code 7")

    code, out, err = potluck("show", "-f", "faces-g1")

    assert code == 7
    assert "faces-g1: failed: exit code 7" in err
    assert "state     failed: exit code 7" in out


def test_ps_tells_a_gang_in_one_line_instead_of_its_members(hub: HubDouble, potluck: Potluck) -> None:
    gang = make_gang()
    hub.knows_gangs(gang)
    members = [job_of(gang, member) for member in gang.members]
    hub.routes["GET", "/jobs"] = lambda _: [make_job(), *members]

    lines = potluck("ps")[1].splitlines()
    known = {entry["id"]: entry["mode"] for entry in json.loads(potluck("ps", "--json")[1])}

    assert [line.split()[1] for line in lines[1:]] == ["tiny-k3f2", "faces-g1"]
    assert "gang of ada: 2 of 2..3 machines" in lines[2] and "lab-1, lab-2" in lines[2]
    assert known == {"faces-g1": "gang", "tiny-k3f2": "job"} | {member.id: "job" for member in members}


# --- which one is meant?


def test_last_is_the_newest_of_jobs_and_gangs(hub: HubDouble, potluck: Potluck) -> None:
    gang = make_gang()
    old, new = make_job(), make_job("later", "later-1", created_at="2026-01-01T12:00:00+00:00")
    hub.knows_gangs(gang)
    prints(hub, gang, "of the gang\n")
    for job, text in ((old, "of the job\n"), (new, "of the later job\n")):
        hub.prints(job, 1, text)

    hub.knows_jobs(old)
    assert potluck("logs", "last")[1] == "lab-1 | of the gang\n"
    hub.knows_jobs(new, old)
    assert potluck("logs", "last")[1] == "of the later job\n"
    member = job_of(gang, gang.members[0])
    hub.routes["GET", "/jobs/last"] = lambda _: replace(member, created_at="2026-01-01T11:00:00.5+00:00")
    assert potluck("logs", "last")[1] == "lab-1 | of the gang\n"


def test_the_front_of_a_gangs_id_is_the_gang_though_its_members_begin_the_same(
    hub: HubDouble, potluck: Potluck
) -> None:
    gang = make_gang()
    hub.knows_gangs(gang)
    prints(hub, gang, "x\n", "y\n")
    hub.routes["GET", "/gangs/faces-g"] = lambda _: gang
    hub.routes["GET", "/jobs/faces-g"] = lambda _: job_of(gang, gang.members[0])

    assert potluck("logs", "faces-g")[1] == "lab-1 | x\nlab-2 | y\n"


def test_of_a_job_and_a_gang_with_one_name_the_newer_is_meant_and_a_vague_front_is_asked_about(
    hub: HubDouble, potluck: Potluck
) -> None:
    hub.knows_gangs(make_gang("tiny", "tiny-gang"))
    hub.knows_jobs(make_job("tiny", "tiny-job"))
    hub.routes["GET", "/gangs/ti"] = lambda _: make_gang("tiny", "tiny-gang")
    hub.routes["GET", "/jobs/ti"] = lambda _: make_job("tiny", "tiny-job")

    assert potluck("show", "tiny")[1].startswith("tiny (tiny-gang): a gang")
    assert potluck("show", "tiny-job")[1].startswith("tiny (tiny-job): a job")
    assert potluck("show", "ti")[2] == (
        "bad_input: `ti` could be the gang tiny-gang or the job tiny-job: write a little more of it\n"
    )


def test_a_hub_that_knows_no_gangs_is_still_of_use(hub: HubDouble, potluck: Potluck) -> None:
    del hub.routes["GET", "/gangs"]
    hub.knows(make_run())
    hub.knows_jobs(make_job())

    assert potluck("ps")[0] == potluck("show", "last")[0] == potluck("show", "tiny")[0] == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["retry", "faces-g1"], "`faces-g1` is a gang, and this is for jobs: `potluck show faces-g1`"),
        (["gang", "show", "tiny-k3f2"], "`tiny-k3f2` is a job, and this is for gangs"),
        (["gang", "show", "faxes"], "no run `faxes`: did you mean `faces`?"),
        (["logs", "faces", "--member", "9"], "faces-g1 has the members 1 to 3, and no member 9"),
        (["logs", "faces", "--attempt", "1"], "faces-g1 is a gang: which member? Say --member 1"),
        (["logs", "tiny", "--member", "1"], "--member is for gangs, and tiny-k3f2 is a job"),
        (["pull", "tiny", "--member", "1"], "--member is for gangs, and tiny-k3f2 is a job"),
        (["pull", "faces", "--attempt", "2"], "faces-g1 is a gang: whose attempt 2?"),
        (["gang", "logs", "faces", "--timeout", "5s"], "--timeout is for --follow"),
        (["gang", "top", "--once", "--timeout", "5s"], "--once leaves at once"),
    ],
)
def test_a_slip_is_told_with_what_to_do(args: list[str], words: str, hub: HubDouble, potluck: Potluck) -> None:
    hub.knows_gangs(make_gang())
    hub.knows_jobs(make_job())

    code, _, err = potluck(*args)

    assert code in (2, 3)
    assert words in err


# --- logs


def test_logs_prefix_each_line_with_its_machine(hub: HubDouble, potluck: Potluck) -> None:
    gang = make_gang()
    hub.knows_gangs(gang)
    prints(hub, gang, "one\ntwo\nthree", "eins\n")

    assert potluck("gang", "logs", "faces")[1].splitlines() == [
        *["lab-1 | one", "lab-1 | two", "lab-1 | three", "lab-2 | eins"]
    ]
    assert potluck("logs", "faces", "--tail", "1")[1].splitlines() == ["lab-1 | three", "lab-2 | eins"]
    assert potluck("logs", "faces", "--member", "2")[1] == "eins\n"
    assert potluck("gang", "logs", "faces", "--member", "1", "--tail", "2")[1] == "two\nthree\n"


def test_logs_follow_begins_where_the_tail_ends_and_stops_with_the_gang(hub: HubDouble, potluck: Potluck) -> None:
    gang = make_gang(members=make_gang().members[:2])
    hub.knows_gangs(gang)
    prints(hub, gang, "old\nnew\n", "alt\nneu\n")
    done = replace(
        gang, state="succeeded", exit_code=0, members=[replace(one, state="succeeded") for one in gang.members]
    )
    hub.routes["GET", "/gangs/faces-g1/wait"] = lambda _: done

    code, out, _ = potluck("logs", "-f", "faces", "--tail", "1")

    assert code == 0
    assert sorted(out.splitlines()) == ["lab-1 | new", "lab-2 | neu"]


def test_logs_of_a_gang_that_waits_say_so(hub: HubDouble, potluck: Potluck) -> None:
    waiting = make_gang(state="queued", members=[make_member(n, state="queued", worker="") for n in (1, 2)])
    hub.knows_gangs(waiting)

    code, out, err = potluck("logs", "faces")

    assert (code, out) == (0, "")
    assert "faces-g1 is queued and has not begun: `potluck why faces-g1`" in err


def test_why_tells_where_the_gang_stands_what_waits_and_what_would_help(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows_gangs(make_gang())
    hub.routes["GET", "/why/faces-g1-3"] = lambda _: Why("faces-g1-3", "it waits", "Let another machine join.")

    assert potluck("why", "faces")[1].splitlines() == [
        "faces-g1 is running: 2 machines",
        "member 3 waits: no machine is free",
        "Let another machine join.",
    ]


# --- stop


def test_stop_ends_all_members_and_can_wait_for_that(hub: HubDouble, potluck: Potluck) -> None:
    gang = make_gang(members=make_gang().members[:2])
    stopped = replace(gang, state="cancelled", members=[replace(one, state="cancelled") for one in gang.members])
    hub.knows_gangs(gang)
    hub.routes["POST", "/gangs/faces-g1/stop"] = lambda _: stopped
    still: list[Any] = [make_attempt(ended_at=None), make_attempt()]
    for member in gang.members:
        hub.routes["GET", f"/jobs/{member.job}"] = lambda _: make_job(
            attempts=[still.pop(0) if len(still) > 1 else still[0]]
        )

    assert potluck("stop", "faces")[1] == "faces-g1 is cancelled. Its members on lab-1, lab-2 are being ended.\n"
    assert potluck("gang", "stop", "last", "--wait")[0] == 0
    assert len(still) == 1


def test_stop_that_takes_too_long_names_the_machine(hub: HubDouble, potluck: Potluck) -> None:
    gang = make_gang(members=make_gang().members[:1])
    hub.knows_gangs(gang)
    hub.routes["POST", "/gangs/faces-g1/stop"] = lambda _: gang
    hub.routes["GET", "/jobs/faces-g1-1"] = lambda _: make_job(attempts=[make_attempt(ended_at=None)])

    code, _, err = potluck("stop", "faces", "--timeout", "0.1s")

    assert code == 124
    assert "faces-g1 is still being ended on lab-1" in err


# --- pull


@pytest.fixture
def left(hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubDouble:
    """A gang whose members 1 and 2 left files."""
    monkeypatch.chdir(tmp_path)
    gang = make_gang()
    hub.knows_gangs(gang)
    jobs = [job_of(gang, member) for member in gang.members]
    hub.gives_tree(jobs[0], {"model.pt": b"weights", "logs/rank_0.json": b"{}"})
    hub.gives_tree(jobs[1], {"logs/rank_1.json": b"{}"})
    return hub


def test_pull_brings_each_members_artefacts_into_a_folder_of_its_own(left: HubDouble, potluck: Potluck) -> None:
    code, out, _ = potluck("pull", "faces")

    assert code == 0
    assert Path("outputs/faces-g1/1-lab-1/model.pt").read_bytes() == b"weights"
    assert Path("outputs/faces-g1/2-lab-2/logs/rank_1.json").exists()
    assert out.splitlines()[1] == "faces-g1-2: 1 file(s), 2 B, in outputs/faces-g1/2-lab-2"


def test_pull_of_one_member_or_one_file(left: HubDouble, potluck: Potluck) -> None:
    potluck("pull", "faces", "--member", "1", "--to", "here")
    found = json.loads(potluck("pull", "faces", "model.pt", "--to", "there", "--json")[1])

    assert Path("here/model.pt").exists()
    assert [(one["job"], [file["path"] for file in one["files"]]) for one in found["members"]] == [
        ("faces-g1-1", ["model.pt"])
    ]
    assert Path("there/1-lab-1/model.pt").exists()


def test_pull_of_what_nobody_left_names_what_there_is(left: HubDouble, potluck: Potluck) -> None:
    code, _, err = potluck("pull", "faces", "modl.pt")

    assert code == 3
    assert "faces-g1-1 left no `modl.pt`: did you mean `model.pt`?" in err


def test_pull_refuses_to_overwrite_before_it_fetches_anything(left: HubDouble, potluck: Potluck) -> None:
    changed = Path("outputs/faces-g1/2-lab-2/logs/rank_1.json")
    changed.parent.mkdir(parents=True)
    changed.write_text("mine")

    assert potluck("pull", "faces")[0] == 5
    assert not Path("outputs/faces-g1/1-lab-1").exists()
    assert potluck("pull", "faces", "--force")[0] == 0
    assert changed.read_text() == "{}"


def test_the_output_of_a_member_that_was_cut_is_told(hub: HubDouble, potluck: Potluck) -> None:
    gang = make_gang(state="succeeded", exit_code=0, members=[make_member(1, state="succeeded")])
    hub.knows_gangs(gang)
    pieces: list[Any] = [LogPiece(1, 8_000_000, 8_000_004, "end\n", True)]
    hub.routes["GET", "/jobs/faces-g1-1/log"] = lambda _: pieces.pop() if pieces else (404, "not_found", "none")

    assert "… 8.0 MB of lab-1 are no longer kept" in potluck("logs", "-f", "faces")[2]
