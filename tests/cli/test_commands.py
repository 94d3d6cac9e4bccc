"""What do commands print, send and return? Against a hub that answers over real HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_double import HubDouble, make_run

from potluck.protocol import Event, InviteAnswer, Why

Potluck = Callable[..., tuple[int, str, str]]


def test_ps_lists_runs_plainly_where_there_is_no_terminal(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run("faces"), make_run("digits\x1b[31m\nevil", "clf-1", state="done"))

    code, out, _ = potluck("ps")

    assert code == 0
    header, first, second = out.splitlines()
    assert header.split()[:5] == ["RUN", "ID", "WHAT", "STATE", "WHERE"]
    assert "25%" in first
    assert "digits evil" in second


def test_every_list_speaks_json(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run())
    hub.routes["GET", "/workers"] = hub.routes["GET", "/invites"] = lambda _: []
    hub.routes["GET", "/events"] = lambda _: [Event(2, "2026-01-01T10:00:00+00:00", "run.started", "r", "It began.")]

    found = {name: json.loads(potluck(name, "--json")[1]) for name in ("ps", "workers", "invites", "events")}

    assert found["ps"][0]["fates"]["applied"] == 450
    assert found["events"][0]["kind"] == "run.started"
    assert (found["workers"], found["invites"]) == ([], [])


def test_show_says_how_the_run_stands_and_who_gave_what(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run())

    code, out, _ = potluck("show", "faces")

    assert code == 0
    assert "700 handed out = 450 applied + 50 late + 100 lost + 100 pending" in out
    assert "4 (at first 9.5)" in out
    assert "ada" in out


@pytest.mark.parametrize("ref", ["faces", "dcgan-aaaa", "dcgan-a", "fac", "last"])
def test_a_run_is_named_by_id_name_beginning_or_last(ref: str, hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run("faces"), make_run("digits", "clf-1", created_at="2025-01-01T10:00:00+00:00"))

    code, out, _ = potluck("show", ref, "--json")

    assert (code, json.loads(out)["id"]) == (0, "dcgan-aaaa")


def test_an_unknown_run_names_the_nearest(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run("faces"))

    code, _, err = potluck("show", "faecs")

    assert (code, err) == (3, "not_found: no run `faecs`: did you mean `faces`?\n")


def test_an_ambiguous_beginning_lists_the_runs_it_fits(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run("faces-a", "r-1"), make_run("faces-b", "r-2"))

    code, _, err = potluck("stop", "faces")

    assert code == 2
    assert "faces-a (r-1)" in err
    assert "faces-b (r-2)" in err


def test_set_sends_numbers_as_numbers(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run())
    hub.routes["PATCH", "/runs/dcgan-aaaa/settings"] = lambda body: make_run(settings=body)

    code, out, _ = potluck("set", "last", "unit_s=20", "codec=bf16")

    assert code == 0
    assert hub.asked[-1][2] == {"unit_s": 20, "codec": "bf16"}
    assert "unit_s is now 20" in out


def test_a_slip_in_a_settings_name_is_told_before_anything_is_sent(hub: HubDouble, potluck: Potluck) -> None:
    code, _, err = potluck("set", "last", "unit_sec=20")

    assert (code, hub.asked) == (2, [])
    assert err == "unknown_setting: no setting `unit_sec`: did you mean `unit_s`?\n"


@pytest.mark.parametrize(("verb", "state"), [("pause", "paused"), ("resume", "running"), ("stop", "stopped")])
def test_pause_resume_and_stop_say_the_next_step(verb: str, state: str, hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run())
    hub.routes["POST", f"/runs/dcgan-aaaa/{verb}"] = lambda _: make_run(state=state)

    code, out, _ = potluck(verb, "faces")

    assert code == 0
    assert out.startswith(f"faces is {state}")
    assert "`potluck " in out


def test_why_resolves_a_runs_name_and_prints_the_advice(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run())
    hub.routes["GET", "/why/dcgan-aaaa"] = lambda _: Why("dcgan-aaaa", "It waits for workers.", "potluck invite")

    assert potluck("why", "last")[1] == "It waits for workers.\npotluck invite\n"


def test_why_of_an_id_that_is_no_runs_is_asked_as_it_is(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows()
    hub.routes["GET", "/why/w-7"] = lambda _: Why("w-7", "It left.")

    assert potluck("why", "w-7")[:2] == (0, "It left.\n")


def test_invite_prints_one_line_to_paste_and_the_rest_beside_it(hub: HubDouble, potluck: Potluck) -> None:
    hub.routes["POST", "/invites"] = lambda body: InviteAnswer(
        "i-1", "CODE", body["role"], body["uses"], "2999-01-01T00:00:00+00:00", "https://lab:8470/j/CODE#fp=ab"
    )

    code, out, err = potluck("invite", "--role", "member", "--uses", "2", "--ttl", "1h30m")

    assert (code, out) == (0, 'potluck join "https://lab:8470/j/CODE#fp=ab"\n')
    assert "works 2 times, for" in err
    assert hub.asked[-1][2]["ttl_s"] == 5400


def test_a_watched_run_ends_with_its_own_exit_code(hub: HubDouble, potluck: Potluck) -> None:
    codes = {}
    for state in ("done", "failed"):
        hub.knows(make_run(state=state))
        codes[state] = potluck("show", "last", "--follow")[0]

    assert codes == {"done": 0, "failed": 1}


def test_a_wait_that_is_over_leaves_with_124_and_says_how_to_come_back(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows(make_run())

    code, _, err = potluck("show", "last", "--follow", "--timeout", "0")

    assert code == 124
    assert "potluck show faces --follow" in err


@pytest.mark.parametrize(
    ("answer", "code", "start"),
    [
        ((404, "not_found", "gone"), 3, "not_found: gone"),
        ((403, "not_allowed", "viewers only look"), 4, "not_allowed: viewers"),
        ((401, "not_known", "revoked"), 4, "not_known: revoked"),
        ((409, "conflict", "it ended"), 5, "conflict: it ended"),
        ((426, "version_mismatch", "too old"), 7, "version_mismatch: too old"),
        ((418, "from_the_future", "a new kind"), 1, "internal: a new kind"),
    ],
)
def test_what_the_hub_refuses_becomes_an_exit_code(
    answer: Any, code: int, start: str, hub: HubDouble, potluck: Potluck
) -> None:
    hub.routes["GET", "/workers"] = lambda _: answer

    found, out, err = potluck("workers")

    assert (found, out) == (code, "")
    assert err.startswith(start)


def test_a_hub_out_of_reach_is_69(hub: HubDouble, potluck: Potluck) -> None:
    hub.close()

    code, _, err = potluck("ps")

    assert code == 69
    assert err.startswith("hub_unreachable:")


def test_without_any_hub_the_advice_is_to_host_or_join(potluck: Potluck) -> None:
    code, _, err = potluck("ps")

    assert code == 3
    assert "potluck host" in err


def test_a_mangled_token_is_told_before_the_hub_is_asked(
    hub: HubDouble, potluck: Potluck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTLUCK_TOKEN", "plm_oops")

    code, _, err = potluck("ps")

    assert (code, hub.asked) == (4, [])
    assert "copy it again" in err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian"], "did you mean `train`?"),
        (["ps", "--jsno"], "Did you mean '--json'?"),
        (["invite", "--ttl", "soon"], "like 90s, 10m, 2h or 1d"),
        (["invite", "--role", "king"], "worker"),
        (["show"], "RUN"),
        (["set", "last", "unit_s"], "KEY=VALUE"),
        (["show", "last", "--timeout", "5s"], "--timeout is for --follow"),
        (["train", "dcgan"], "--data mnist5k"),
        (["train", "dcgan", "--data", "x", "--samples", "9", "--epochs", "1"], "take one of them"),
        (["train", "dcgan", "--data", "x", "--share", "50%"], "--share is for --local"),
        (["train", "dcgan", "--data", "x", "--set", "lr"], "KEY=VALUE"),
        (["train", "dcgan", "--data", "x", "--wait", "--detach"], "exclude"),
        (["train", "-f", "nowhere.yaml"], "cannot be read"),
        (["generate", "last", "--out", "grid.jpg"], ".png"),
    ],
)
def test_a_slip_on_the_command_line_is_exit_code_2_with_a_hint(words: list[str], hint: str, potluck: Potluck) -> None:
    code, out, err = potluck(*words)

    assert (code, out) == (2, "")
    assert hint in err


def test_a_bug_shows_one_line_and_keeps_the_story(hub: HubDouble, potluck: Potluck, home: Path) -> None:
    hub.knows(make_run(started_at="not a time"))

    code, out, err = potluck("ps")

    assert (code, out) == (1, "")
    assert err.startswith("internal: Potluck broke: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" in (home / "log" / "bugs.log").read_text()


def test_doctor_speaks_in_sentences_and_finds_the_hub(hub: HubDouble, potluck: Potluck) -> None:
    _, out, _ = potluck("doctor", "--json")

    found = {finding["about"]: finding for finding in json.loads(out)["findings"]}
    assert {"hardware", "gpu", "disk", "versions", "postgresql", "hub", "protocol", "clock"} <= set(found)
    assert "answers in" in found["hub"]["text"]
    assert found["clock"]["ok"] is False  # the double lives in January 2026
    assert "clock is" in found["clock"]["text"]


def test_doctor_leaves_with_1_when_the_hub_is_gone(hub: HubDouble, potluck: Potluck) -> None:
    hub.close()

    code, out, _ = potluck("doctor")

    assert code == 1
    assert "✗ The hub http://127.0.0.1" in out


# --- as a process of its own


def potluck_process(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "potluck.cli", *words], capture_output=True, text=True, timeout=60, check=False, **more
    )


def test_the_process_leaves_with_the_commands_exit_code(hub: HubDouble) -> None:
    hub.knows(make_run())

    assert potluck_process("ps").returncode == 0
    assert potluck_process("show", "nobody").returncode == 3
    assert potluck_process("nonsense").returncode == 2
    assert potluck_process("--version").stdout.startswith("potluck ")


def test_ctrl_c_leaves_a_watched_run_running_with_130(hub: HubDouble) -> None:
    import signal

    hub.knows(make_run())
    words = [sys.executable, "-m", "potluck.cli", "show", "last", "--follow"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the first line about the run: it is watched now

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)

    assert process.returncode == 130
    assert "the run goes on" in err
    assert "Traceback" not in err


def test_a_reader_that_stops_reading_is_no_error(hub: HubDouble) -> None:
    hub.knows(*[make_run(f"run-{i}", f"r-{i}") for i in range(3000)])
    words = f"'{sys.executable}' -m potluck.cli ps | head -n 1"

    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.startswith("RUN")
    assert done.stderr == ""


def test_help_imports_click_and_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from potluck.cli import run\n"
        "run(['--help'])\n"
        "ours = sorted(m for m in sys.modules if m.startswith('potluck'))\n"
        "heavy = {'rich', 'httpx2', 'msgspec', 'torch', 'structlog', 'numpy', 'platformdirs', 'psutil', 'yaml', 'asyncio'}\n"
        "print(ours, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert "Commands:" in done.stdout
    assert done.stderr == "['potluck', 'potluck.cli', 'potluck.errors'] []\n"
