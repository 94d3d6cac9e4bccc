"""What do the commands about jobs print, send and return? Against a hub that answers over real HTTP."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_double import HubDouble, make_attempt, make_job, make_run, make_worker

from potluck.cli.watch import exit_code
from potluck.errors import BadInput
from potluck.protocol import Event, GpuNow, MachineNow, Near, Outlook, SecretView, Tree, TreeFile, Usage, Why

Potluck = Callable[..., tuple[int, str, str]]


# --- lists and single ones


def test_ps_shows_runs_and_jobs_in_one_table_by_time(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run("faces", created_at="2026-01-01T11:00:00+00:00"))
    hub.knows_jobs(
        make_job("late", "job-b", created_at="2026-01-01T12:00:00+00:00", state="failed", exit_code=3, reason="boom"),
        make_job("early\x1b[31m", "job-a", created_at="2026-01-01T10:00:00+00:00"),
    )

    code, out, _ = potluck("ps")

    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["RUN", "early", "faces", "late"]
    assert "failed (exit 3)" in out
    assert "1 min, boom" in out
    assert "job of ada: 1 core, 2 GB of memory" in out


def test_ps_json_keeps_the_shape_of_runs_and_tells_the_mode_of_jobs(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run())
    hub.knows_jobs(make_job())

    run, job = json.loads(potluck("ps", "--json")[1])

    assert (run["mode"], run["fates"]["applied"]) == ("pool", 450)
    assert (job["mode"], job["id"], job["worker"]) == ("job", "tiny-k3f2", "lab-1")


def test_show_tells_a_jobs_life(hub: HubDouble, potluck: Potluck) -> None:
    first = make_attempt(state="lost", reason="lab-2 fell silent", worker="lab-2", exit_code=None, usage=Usage())
    job = make_job(attempts=[first, make_attempt(2, log_bytes=1200, signal="SIGKILL", exit_code=None)])
    tree = hub.gives_tree(job, {"model.pt": b"x" * 2000, "sample\x1b[2J.txt": b"hello"})
    job = replace(job, attempts=[first, replace(job.attempts[1], outputs=hub.add_blob(b"tree"))])
    hub.knows_jobs(job)
    hub.routes["GET", "/runs/tiny-k3f2/events"] = lambda _: [
        Event(1, "2026-01-01T10:00:30+00:00", "job.queued", "tiny-k3f2", "lab-2 fell silent: it is queued again", "hub")
    ]

    code, out, _ = potluck("show", "tiny-k3f2")

    assert code == 0
    assert "python train.py --epochs 3" in out
    assert "python 3.11.2, 2 packages" in out
    assert "lab-2 fell silent: it is queued again  hub" in out
    assert "SIGKILL (137)" in out
    assert "512 MB" in out
    assert f"model.pt  2.0 kB  {tree.files[0].blob.hash[:12]}" in out
    assert "potluck pull tiny-k3f2" in out
    assert "\x1b" not in out


def test_show_follow_tells_the_states_and_returns_the_jobs_exit_code(hub: HubDouble, potluck: Potluck) -> None:
    states = [
        make_job(state="running", reason="", attempts=[make_attempt(state="running", ended_at=None)]),
        make_job(state="failed", reason="exit code 9", exit_code=9),
    ]
    hub.knows_jobs(make_job(state="queued", reason="all machines are busy", attempts=[]))
    hub.routes["GET", "/jobs/tiny-k3f2/wait"] = lambda _: states.pop(0)

    code, out, err = potluck("show", "tiny-k3f2", "--follow", "--json")

    assert code == 9
    assert json.loads(out)["state"] == "failed"
    assert err.splitlines() == [
        "tiny-k3f2: queued: all machines are busy",
        "tiny-k3f2: running on lab-1",
        "tiny-k3f2: failed: exit code 9",
    ]


def test_last_is_the_newest_of_runs_and_jobs(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run("faces", created_at="2026-01-01T09:00:00+00:00"))
    hub.knows_jobs(make_job(created_at="2026-01-01T10:00:00+00:00"))

    assert json.loads(potluck("show", "last", "--json")[1])["mode"] == "job"


def test_a_job_that_is_too_old_for_the_list_is_found_by_the_hub(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows_jobs(make_job())
    hub.routes["GET", "/jobs"] = lambda _: []

    assert json.loads(potluck("show", "tiny-k3f2", "--json")[1])["id"] == "tiny-k3f2"


def test_what_is_only_for_the_other_kind_says_so(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run("faces"))
    hub.knows_jobs(make_job())

    paused, logged = potluck("pause", "tiny-k3f2"), potluck("logs", "faces")

    assert paused[::2] == (
        2,
        "bad_input: `tiny-k3f2` is a job, and this is for runs of the pool: `potluck show tiny-k3f2`\n",
    )
    assert logged[::2] == (
        2,
        "bad_input: `faces` is a run of the pool, and this is for jobs: `potluck show dcgan-aaaa`\n",
    )


def test_an_unknown_job_names_the_nearest(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows_jobs(make_job())

    assert potluck("logs", "tiny-k3f3")[::2] == (3, "not_found: no run `tiny-k3f3`: did you mean `tiny-k3f2`?\n")


def test_why_finds_a_job_by_its_name(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows_jobs(make_job())
    hub.routes["GET", "/why/tiny-k3f2"] = lambda _: Why("tiny-k3f2", "It waits for a GPU of 24 GB.", "ask for 16 GB")

    assert potluck("why", "tiny-k3f2")[1] == "It waits for a GPU of 24 GB.\nask for 16 GB\n"


# --- ending and beginning again


def test_stop_says_where_the_job_is_being_ended(hub: HubDouble, potluck: Potluck) -> None:
    job = make_job(state="cancelled", attempts=[make_attempt(state="running", ended_at=None)])
    hub.knows_jobs(job)
    hub.routes["POST", "/jobs/tiny-k3f2/stop"] = lambda _: job

    code, out, _ = potluck("stop", "tiny-k3f2")

    assert (code, out) == (
        0,
        "tiny-k3f2 is cancelled. It is being ended on lab-1: SIGTERM now, and SIGKILL if it needs longer than 10 s.\n",
    )


def test_stop_wait_returns_when_nothing_of_the_job_runs_any_more(hub: HubDouble, potluck: Potluck) -> None:
    going = make_job(state="cancelled", attempts=[make_attempt(state="running", ended_at=None)])
    views = [going, going, make_job(state="cancelled")]
    hub.knows_jobs(going)
    hub.routes["POST", "/jobs/tiny-k3f2/stop"] = lambda _: going
    hub.routes["GET", "/jobs/tiny-k3f2"] = lambda _: views.pop(0)

    code, out, _ = potluck("stop", "tiny-k3f2", "--wait")

    assert (code, out, views) == (0, "tiny-k3f2 is cancelled; nothing of it runs any more.\n", [])


def test_retry_queues_it_again(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows_jobs(make_job(state="failed"))
    hub.routes["POST", "/jobs/tiny-k3f2/retry"] = lambda _: make_job(state="queued")

    code, out, _ = potluck("retry", "last")

    assert code == 0
    assert out.startswith("tiny-k3f2 is queued again.")


@pytest.mark.parametrize(
    ("changes", "attempt", "code"),
    [
        ({"state": "succeeded"}, {}, 0),
        ({"state": "failed", "exit_code": 7}, {"exit_code": 7}, 7),
        ({"state": "failed", "exit_code": None}, {"exit_code": None, "signal": "SIGKILL"}, 137),
        ({"state": "cancelled", "exit_code": None}, {"exit_code": None, "signal": "SIGTERM"}, 143),
        ({"state": "cancelled", "exit_code": 0}, {"exit_code": 0}, 1),
        ({"state": "lost", "exit_code": None}, {"exit_code": None}, 1),
        ({"state": "failed", "exit_code": None}, {"exit_code": None, "signal": "nonsense"}, 1),
    ],
)
def test_the_exit_code_is_the_jobs_own(changes: dict[str, Any], attempt: dict[str, Any], code: int) -> None:
    assert exit_code(make_job(**changes, attempts=[make_attempt(**attempt)])) == code


# --- artefacts


def test_pull_brings_the_artefacts(hub: HubDouble, potluck: Potluck, tmp_path: Path) -> None:
    job = make_job()
    hub.knows_jobs(job)
    hub.gives_tree(job, {"model.pt": b"weights", "samples/a.txt": b"a", "samples/b.txt": b"b"})

    code, out, _ = potluck("pull", "tiny-k3f2", "--to", tmp_path / "here")

    assert code == 0
    assert out == f"tiny-k3f2: 3 file(s), 9 B, in {tmp_path / 'here'}\n"
    assert (tmp_path / "here" / "samples" / "b.txt").read_bytes() == b"b"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("model.pt", ["model.pt"]),
        ("samples", ["samples/a.txt", "samples/b.txt"]),
        ("samples/", ["samples/a.txt", "samples/b.txt"]),
        ("*.txt", ["samples/a.txt", "samples/b.txt"]),
    ],
)
def test_pull_brings_a_part(path: str, found: list[str], hub: HubDouble, potluck: Potluck, tmp_path: Path) -> None:
    job = make_job()
    hub.knows_jobs(job)
    hub.gives_tree(job, {"model.pt": b"weights", "samples/a.txt": b"a", "samples/b.txt": b"b"})

    code, out, _ = potluck("pull", "last", path, "--to", tmp_path / "x", "--json")

    assert code == 0
    assert [file["path"] for file in json.loads(out)["files"]] == found
    assert sorted(str(p.relative_to(tmp_path / "x")) for p in (tmp_path / "x").rglob("*") if p.is_file()) == found


def test_pull_names_the_nearest_file(hub: HubDouble, potluck: Potluck, tmp_path: Path) -> None:
    job = make_job()
    hub.knows_jobs(job)
    hub.gives_tree(job, {"model.pt": b"weights"})

    assert potluck("pull", "last", "modle.pt", "--to", tmp_path)[::2] == (
        3,
        "not_found: tiny-k3f2 left no `modle.pt`: did you mean `model.pt`?\n",
    )


def test_pull_overwrites_nothing_that_was_changed_unless_forced(
    hub: HubDouble, potluck: Potluck, tmp_path: Path
) -> None:
    job = make_job()
    hub.knows_jobs(job)
    hub.gives_tree(job, {"model.pt": b"weights", "same.txt": b"same"})
    (tmp_path / "model.pt").write_bytes(b"mine!!!")
    (tmp_path / "same.txt").write_bytes(b"same")

    refused = potluck("pull", "last", "--to", tmp_path)
    kept = (tmp_path / "model.pt").read_bytes()
    forced = potluck("pull", "last", "--to", tmp_path, "--force")

    assert refused[0] == 5
    assert "1 file(s)" in refused[2] and "model.pt" in refused[2] and "--force" in refused[2]
    assert kept == b"mine!!!"
    assert forced[0] == 0
    assert (tmp_path / "model.pt").read_bytes() == b"weights"


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "a\x1b/b"])
def test_pull_believes_no_path(path: str, hub: HubDouble, potluck: Potluck, tmp_path: Path) -> None:
    job = make_job()
    hub.knows_jobs(job)
    hub.gives_tree(job, {"x": b"x"})
    hub.routes["GET", "/jobs/tiny-k3f2/tree"] = lambda _: Tree([TreeFile(path, hub.add_blob(b"evil"))])

    for extra in ((), ("--force",)):
        assert potluck("pull", "last", "--to", tmp_path / "in", *extra)[0] == BadInput.exit_code
    assert not (tmp_path / "evil").exists()


# --- the queue


def test_queue_lists_who_waits_and_why(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows_jobs(make_job(state="queued", ended_at=None))
    hub.routes["GET", "/queue"] = lambda _: [Outlook("tiny-k3f2", 1, "", "no machine has 24 GB of GPU memory free")]

    code, out, _ = potluck("queue")

    assert code == 0
    assert re.search(r"1\s+tiny-k3f2\s+ada\s+0\s+1 core, 2 GB of memory.*no machine has 24 GB", out)


def test_queue_move(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows_jobs(make_job(), make_job("big", "job-b"))
    hub.routes["POST", "/queue/move"] = lambda _: [Outlook("tiny-k3f2", 1, "", ""), Outlook("job-b", 2, "", "")]

    code, out, _ = potluck("queue", "move", "tiny-k3f2", "--before", "big")

    assert (code, out) == (0, "tiny-k3f2 is now number 1 of 2 in the queue.\n")
    assert hub.asked[-1][2] == {"job": "tiny-k3f2", "before": "job-b"}
    assert potluck("queue", "move", "tiny-k3f2")[0] == 2
    assert potluck("queue", "move", "tiny-k3f2", "--first", "--before", "big")[0] == 2
    assert potluck("queue", "move", "tiny-k3f2", "--first")[0] == 0
    assert hub.asked[-1][2] == {"job": "tiny-k3f2", "before": ""}


# --- secrets


def test_a_secret_comes_from_standard_input_and_is_never_printed(
    hub: HubDouble, potluck: Potluck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import io

    hub.routes["PUT", "/secrets/HF_TOKEN"] = lambda _: SecretView("HF_TOKEN", "2026-01-01T10:00:00+00:00")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hf_swordfish\n")))

    code, out, err = potluck("secret", "set", "HF_TOKEN")

    assert code == 0
    assert hub.asked[-1][2] == {"value": "hf_swordfish"}
    assert "swordfish" not in out + err


def test_a_secret_comes_from_a_file_as_it_is(hub: HubDouble, potluck: Potluck, tmp_path: Path) -> None:
    hub.routes["PUT", "/secrets/KEY"] = lambda _: SecretView("KEY", "2026-01-01T10:00:00+00:00")
    (tmp_path / "key").write_bytes(b"-----BEGIN\nabc\n-----END\r\n")

    assert potluck("secret", "set", "KEY", "--file", tmp_path / "key")[0] == 0
    assert hub.asked[-1][2] == {"value": "-----BEGIN\nabc\n-----END"}


@pytest.mark.parametrize(("content", "word"), [(b"", "empty"), (b"\n", "empty"), (b"\xff\xfe", "UTF-8")])
def test_a_secret_that_is_none_is_refused(
    content: bytes, word: str, hub: HubDouble, potluck: Potluck, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(content)

    code, _, err = potluck("secret", "set", "KEY", "--file", tmp_path / "key")

    assert code == 2
    assert word in err
    assert hub.asked == []


def test_no_secret_is_taken_from_the_command_line(hub: HubDouble, potluck: Potluck) -> None:
    assert potluck("secret", "set", "KEY", "swordfish")[0] == 2
    assert potluck("secret", "set", "KEY=swordfish", "--file", "/nonexistent")[0] == 2
    assert hub.asked == []


def test_secrets_are_listed_by_name_and_forgotten(hub: HubDouble, potluck: Potluck) -> None:
    hub.routes["GET", "/secrets"] = lambda _: [SecretView("HF_TOKEN", "2026-01-01T10:00:00+00:00")]
    hub.routes["DELETE", "/secrets/HF_TOKEN"] = lambda _: b""

    assert "HF_TOKEN" in potluck("secret", "list")[1]
    assert json.loads(potluck("secret", "list", "--json")[1]) == [
        {"name": "HF_TOKEN", "changed_at": "2026-01-01T10:00:00+00:00"}
    ]
    assert potluck("secret", "rm", "HF_TOKEN")[:2] == (0, "HF_TOKEN is forgotten.\n")


# --- machines


def test_top_once_shows_machines_with_what_is_free_and_what_runs(hub: HubDouble, potluck: Potluck) -> None:
    import msgspec

    gpu = GpuNow(0, "NVIDIA RTX 4090", 24_000_000_000, 18_000_000_000, 0.35, 61.0)
    machine = MachineNow(16, 64_000_000_000, 48_000_000_000, 900_000_000_000, 2.5, [gpu])
    hub.routes["GET", "/workers"] = lambda _: [
        make_worker("lab-1", machine=msgspec.to_builtins(machine), jobs=["tiny-k3f2 on gpu 0"], labels={"room": "B12"}),
        make_worker("lab-2", draining=True),
        make_worker("gone", state="left"),
    ]
    hub.routes["GET", "/queue"] = lambda _: [Outlook("big-1", 1, "", "no GPU is free", near=[Near("lab-1", "…")])]

    code, out, _ = potluck("top", "--once")

    assert code == 0
    assert "48.0 GB of 64.0 GB" in out
    assert "0: NVIDIA RTX 4090 18.0 GB free, 35% busy 61 °C" in out
    assert "tiny-k3f2 on gpu 0" in out and "room=B12" in out and "draining" in out
    assert "gone" not in out
    assert "1 job(s) wait:\n  1. big-1: no GPU is free" in out


def test_drain_undrain_and_label(hub: HubDouble, potluck: Potluck) -> None:
    hub.routes["GET", "/workers"] = lambda _: [make_worker("lab-1")]
    hub.routes["POST", "/workers/w-lab-1/drain"] = lambda _: make_worker("lab-1", draining=True, jobs=["tiny-k3f2"])
    hub.routes["POST", "/workers/w-lab-1/undrain"] = lambda _: make_worker("lab-1")
    hub.routes["PUT", "/workers/w-lab-1/labels"] = lambda body: make_worker("lab-1", labels=body)

    drained = potluck("workers", "drain", "lab-1", "--reason", "moves")
    sent = hub.asked[-1][2]

    assert (drained[0], sent) == (0, {"reason": "moves"})
    assert "takes no new jobs. Still there: tiny-k3f2." in drained[1]
    assert potluck("workers", "undrain", "lab-1")[1] == "lab-1 takes jobs again.\n"
    assert potluck("workers", "label", "lab-1", "room=B12", "n=1")[1] == "lab-1 has the labels n=1, room=B12.\n"
    assert hub.asked[-1][2] == {"room": "B12", "n": "1"}
    assert potluck("workers", "label", "lab-1", "--clear")[1] == "lab-1 has no labels.\n"
    assert potluck("workers", "label", "lab-1")[0] == 2
    assert potluck("workers", "label", "lab-1", "room")[0] == 2
