"""Does `potluck logs` show what a job printed, all of it, cleaned, and to its end?"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hub_double import HubDouble, make_attempt, make_job
from hypothesis import given
from hypothesis import strategies as st

from potluck.cli.watch import Cleaner
from potluck.protocol import LogPiece

Potluck = Callable[..., tuple[int, str, str]]


def test_logs_print_what_there_is_and_no_control_sequence(hub: HubDouble, potluck: Potluck) -> None:
    job = make_job()
    hub.knows_jobs(job)
    hub.prints(job, 1, "step 1\t\x1b[31mloss\x1b[0m 0.5\r\n10%\r20%\rdone \x1b]0;title\x07é\n<b>no newline")

    code, out, err = potluck("logs", "tiny-k3f2")

    assert (code, err) == (0, "")
    assert out == "step 1\tloss 0.5\n10%\n20%\ndone é\n<b>no newline\n"


def test_logs_follow_goes_on_over_a_retry_and_returns_the_exit_code(hub: HubDouble, potluck: Potluck) -> None:
    first = make_attempt(state="running", ended_at=None, reason="")
    running = make_job(state="running", reason="", attempts=[first])
    again = make_job(state="queued", reason="lab-1 fell silent", attempts=[make_attempt(state="lost")], worker="lab-1")
    failed = make_job(
        state="failed",
        exit_code=4,
        reason="exit code 4",
        attempts=[first, make_attempt(2, worker="lab-2", exit_code=4)],
    )
    hub.knows_jobs(running)
    views = [running, again, failed]
    hub.routes["GET", "/jobs/tiny-k3f2"] = lambda _: views.pop(0) if len(views) > 1 else views[0]
    hub.routes["GET", "/jobs/tiny-k3f2/wait"] = lambda _: failed
    pieces = [
        LogPiece(1, 0, 4, "one\n", False),
        LogPiece(1, 4, 4, "", False),
        LogPiece(1, 4, 7, "two", True),
        LogPiece(2, 0, 6, "three\n", True),
    ]
    hub.routes["GET", "/jobs/tiny-k3f2/log"] = lambda _: pieces.pop(0)

    code, out, err = potluck("logs", "-f", "tiny-k3f2")

    assert code == 4
    assert out == "one\ntwo\nthree\n"
    assert "tiny-k3f2: queued: lab-1 fell silent" in err
    assert err.splitlines()[-1] == "tiny-k3f2: failed: exit code 4"
    asked = [q for q, (_, path, _) in zip(hub.queries, hub.asked, strict=True) if path.endswith("/log")]
    assert [(q["attempt"], q["offset"]) for q in asked] == [("1", "0"), ("1", "4"), ("1", "4"), ("2", "0")]


def test_logs_tail_begins_with_the_last_lines(hub: HubDouble, potluck: Potluck) -> None:
    text = "".join(f"line {n} {'x' * (n % 50)}\n" for n in range(20_000)) + "the end"
    job = make_job(attempts=[make_attempt(log_bytes=len(text))])
    hub.knows_jobs(job)
    hub.prints(job, 1, text)

    for count in (0, 1, 3, 2000):
        out = potluck("logs", "last", "--tail", str(count))[1]
        assert out.splitlines() == (text.splitlines()[-count:] if count else [])
    assert sum(int(q.get("offset", 0)) == 0 for q in hub.queries if "limit" in q and "attempt" in q) == 0


def test_logs_of_one_attempt_and_of_all(hub: HubDouble, potluck: Potluck) -> None:
    job = make_job(attempts=[make_attempt(1), make_attempt(2, worker="lab-2")])
    hub.knows_jobs(job)
    hub.prints(job, 1, "old\n")
    hub.prints(job, 2, "new\n")

    assert potluck("logs", "last")[1] == "new\n"
    assert potluck("logs", "last", "--attempt", "1")[1] == "old\n"
    assert potluck("logs", "last", "--offset", "2")[1] == "w\n"
    assert potluck("logs", "last", "--since-start")[1:] == (
        "old\nnew\n",
        "--- attempt 1, lab-1\n--- attempt 2, lab-2\n",
    )
    assert potluck("logs", "last", "--attempt", "3")[::2] == (
        3,
        "not_found: tiny-k3f2 has 2 attempts, and no attempt 3\n",
    )


def test_logs_of_a_job_that_waits_say_so(hub: HubDouble, potluck: Potluck) -> None:
    hub.knows_jobs(make_job(state="queued", attempts=[]))

    code, out, err = potluck("logs", "last")

    assert (code, out) == (0, "")
    assert err == "tiny-k3f2 is queued and has not begun: `potluck why tiny-k3f2` tells what it waits for.\n"


def test_logs_say_what_was_rotated_away(hub: HubDouble, potluck: Potluck) -> None:
    job = make_job()
    hub.knows_jobs(job)
    hub.routes["GET", "/jobs/tiny-k3f2/log"] = lambda _: LogPiece(1, 8_000_000, 8_000_004, "end\n", True)

    assert potluck("logs", "-f", "last")[1:] == (
        "end\n",
        "tiny-k3f2: succeeded: exit code 0\n… 8.0 MB before this are no longer kept\n",
    )


def test_a_hub_that_restarts_does_not_end_the_watching(hub: HubDouble, potluck: Potluck) -> None:
    job = make_job(state="running", attempts=[make_attempt(state="running", ended_at=None)])
    hub.knows_jobs(job)
    answers: list[Any] = [(503, "ledger", "the ledger restarts."), LogPiece(1, 0, 3, "hi\n", True)]
    hub.routes["GET", "/jobs/tiny-k3f2/log"] = lambda _: answers.pop(0)
    hub.routes["GET", "/jobs/tiny-k3f2"] = lambda _: make_job()

    code, out, err = potluck("logs", "-f", "tiny-k3f2")

    assert (code, out) == (0, "hi\n")
    assert "the ledger restarts. Trying again; the job goes on." in err


def test_logs_follow_times_out_and_leaves_the_job(hub: HubDouble, potluck: Potluck) -> None:
    job = make_job(state="running", attempts=[make_attempt(state="running", ended_at=None)])
    hub.knows_jobs(job)
    hub.routes["GET", "/jobs/tiny-k3f2/log"] = lambda _: LogPiece(1, 0, 0, "", False)

    code, _, err = potluck("logs", "-f", "last", "--timeout", "0.2s")

    assert code == 124
    assert "it goes on. Watch it with `potluck logs -f tiny-k3f2`" in err


def test_ctrl_c_leaves_the_job_alone(hub: HubDouble) -> None:
    job = make_job(state="running", attempts=[make_attempt(state="running", ended_at=None)])
    hub.knows_jobs(job)
    pieces = [LogPiece(1, 0, 5, "first", False)]
    hub.routes["GET", "/jobs/tiny-k3f2/log"] = lambda _: pieces.pop() if pieces else LogPiece(1, 5, 5, "", False)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from potluck.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "logs", "-f", "last"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    assert process.stdout.read(5) == "first"

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)

    assert (process.returncode, out) == (130, "\n")
    assert "Left tiny-k3f2, which is running and goes on." in err
    assert "`potluck stop tiny-k3f2`" in err
    assert [path for method, path, _ in hub.asked if method == "POST"] == []


@given(st.text(st.characters(codec="utf-8"), max_size=200), st.lists(st.integers(0, 200), max_size=6))
def test_what_reaches_the_terminal_cannot_steer_it_however_it_is_cut(text: str, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    cleaner = Cleaner()

    shown = "".join(cleaner.feed(text[a:b]) for a, b in pairwise(places))
    shown += cleaner.feed("", last=True)

    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]", shown)


@given(st.lists(st.sampled_from(["\x1b[31m", "\x1b[0m", "\r\n", "\n", "loss 0.5", "\x1b]0;title\x07"])), st.data())
def test_where_the_output_is_cut_does_not_change_what_is_shown(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cut = data.draw(st.integers(0, len(text)))
    whole, halves = Cleaner(), Cleaner()

    assert halves.feed(text[:cut]) + halves.feed(text[cut:], last=True) == whole.feed(text, last=True)
