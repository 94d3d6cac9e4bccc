"""Does the terminal show of a gang what its members say, and is none of it more than text?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hub_double import HubDouble, make_attempt, make_job
from hypothesis import given
from hypothesis import strategies as st

from potluck.cli import gangview, output
from potluck.client import Hub
from potluck.protocol import GangView, LogPiece, MemberView, Outlook, Point

EVIL = "lab\x1b[31m-2\u202e\x07"
TIMES = {"load_s": 0.01, "forward_s": 0.02, "backward_s": 0.05, "sum_s": 0.02}


def figures(**values: float) -> dict[str, float]:
    return {f"gang/{name}": value for name, value in values.items()}


def make_gang(**changes: Any) -> GangView:
    members = [
        MemberView("faces-1", 1, "running", "", "lab-1", "10.0.0.1"),
        MemberView("faces-2", 2, "running", "", EVIL, "10.0.0.2"),
        MemberView("faces-3", 3, "queued", "", "", ""),
    ]
    values: dict[str, Any] = {
        "id": "faces-k3f2",
        "name": "faces",
        "owner": "ada",
        "state": "running",
        "reason": "",
        "mine": True,
        "least": 2,
        "most": 3,
        "engine": "plain",
        "created_at": "2026-01-01T10:00:00+00:00",
        "exit_code": None,
        "started_at": "2026-01-01T10:00:05+00:00",
        "ended_at": None,
        "host": "lab-1",
        "members": members,
    }
    return GangView(**(values | changes))


@pytest.fixture
def gang(hub: HubDouble) -> GangView:
    """A gang of which two members have trained for 2,000 points, and one waits."""
    found = make_gang()
    for number in (1, 2):
        job = make_job(f"faces·{number}", f"faces-{number}", state="running", attempts=[make_attempt(number)])
        hub.knows_jobs(job)
        own = {"rank": number - 1, "members": 2, "share": 96 * number, "batch": 288, "alone_per_s": 1000.0 * number}
        own |= {"total_per_s": 2850, "samples_per_s": 950 * number, "step_s": 0.1, **TIMES}
        points = [Point(seq, float(seq), figures(**own), seq=seq, attempt=number) for seq in range(2_000)]

        def read_points(_: Any, points: list[Point] = points) -> list[Point]:
            query = hub.queries[-1]
            return points[int(query["after_seq"]) + 1 :][: int(query["limit"])]

        text = "noise\n" * 30_000 + f"potluck: step 1999 is taken again: {EVIL} is gone\n"

        def read_log(_: Any, number: int = number, content: bytes = text.encode()) -> LogPiece:
            query = hub.queries[-1]
            start = min(int(query["offset"]), len(content))
            part = content[start : start + int(query["limit"])]
            return LogPiece(number, start, start + len(part), part.decode(), False)

        hub.routes["GET", f"/jobs/{job.id}/points"] = read_points
        hub.routes["GET", f"/jobs/{job.id}/log"] = read_log
    hub.routes["GET", "/queue"] = lambda _: [Outlook("faces-3", 1, "", "no machine with 4 cores is free")]
    for ref in ("faces", found.id):
        hub.routes["GET", f"/gangs/{ref}"] = lambda _: found
    return found


def connect(hub: HubDouble) -> Hub:
    return Hub(hub.address, "token")


def test_without_a_terminal_a_gang_is_a_table_and_its_sentences(
    hub: HubDouble, gang: GangView, capsys: pytest.CaptureFixture[str]
) -> None:
    gangview.show(connect(hub), "faces")

    out = capsys.readouterr().out
    for expected in (
        "faces (faces-k3f2) of ada: running, 2 of 2..3 machines at work, engine plain, they meet at lab-1",
        "A member waits, number 1 in the queue: no machine with 4 cores is free",
        "2,850 samples/s, 95% of what they do alone (3,000)",
        "backward 50%, forward 20%, sum 20%, load 10%",
        "192 (67%)",
        "sets the pace: 50 % of its step is the backward pass.",
        "step 1,999: lab-1, lab-2: step 1999 is taken again: lab-2 is gone",
    ):
        assert expected in out, out
    assert not set(out) & {"\x1b", "\u202e", "\x07"}


def test_a_long_training_is_not_read_from_its_beginning(hub: HubDouble, gang: GangView) -> None:
    eye = gangview.Eye(connect(hub), "faces")

    eye.look()
    asked = len(hub.asked)
    eye.look()

    assert len(eye.watch.lanes[1].looks) < 1_000
    assert eye.watch.step == 1_999
    assert len(hub.asked) - asked < 12, "the second look asks for what is new only"


def test_the_live_picture_has_a_bar_for_each_member_and_no_strange_characters(hub: HubDouble, gang: GangView) -> None:
    from rich.console import Console

    eye = gangview.Eye(connect(hub), "faces")
    eye.look()

    with (console := Console(width=160, color_system=None)).capture() as shown:
        console.print(gangview.picture(eye, "Ctrl-C leaves."))

    assert "lll" + "f" * 7 + "b" * 16 + "s" * 6 in shown.get()
    assert "faces-3" not in shown.get()
    assert not set(shown.get()) & {"\x1b", "\u202e", "\x07"}


def test_what_is_somebody_elses_is_not_asked_for(
    hub: HubDouble, gang: GangView, capsys: pytest.CaptureFixture[str]
) -> None:
    others = replace(gang, mine=False, state="succeeded")
    hub.routes["GET", "/gangs/faces"] = hub.routes["GET", f"/gangs/{gang.id}"] = lambda _: others

    gangview.show(connect(hub), "faces")

    assert "succeeded" in capsys.readouterr().out
    assert {path for _, path, _ in hub.asked} == {"/gangs/faces", f"/gangs/{gang.id}"}


def test_on_a_terminal_it_is_watched_until_it_has_ended(
    hub: HubDouble, gang: GangView, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([gang, gang, gang])
    hub.routes["GET", f"/gangs/{gang.id}"] = lambda _: next(looks, replace(gang, state="failed", reason="exit code 3"))
    monkeypatch.setattr(output, "is_terminal", lambda: True)
    monkeypatch.setattr(gangview, "EVERY_S", 0.0)

    gangview.show(connect(hub), "faces")

    assert "exit code 3" in capsys.readouterr().out


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=7).filter(lambda parts: sum(parts) > 0))
def test_a_bar_is_as_long_as_a_bar(parts: list[float]) -> None:
    cut = gangview.lengths([part / sum(parts) for part in parts])

    assert sum(cut) == gangview.BAR
    assert min(cut) >= 0
