"""Does the page of a gang show what its members say, to those who may know it, and keep what they say as text?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from test_dashboard import HOSTILE, assert_harmless, text_of

from dashboard_room import Room, open_room
from gang_room import Crew
from potluck.domain.gangwatch import KEPT
from potluck.hub.commands import gang_requests, gang_upkeep
from potluck.hub.commands.desk import Caller
from potluck.hub.dashboard import charts, gangviews, words
from potluck.hub.dashboard.figures import Figures
from potluck.hub.entrance import form_token
from potluck.protocol import GangView, Point

WORK = {"load_s": 0.01, "forward_s": 0.02, "backward_s": 0.05, "sum_s": 0.02}
EVIL = [*HOSTILE, "\x1b]0;title\x07\x1b[31mred", "\u202eevil\u2066", "x" * 10_000]


@pytest.fixture
def room(fresh_dsn: str, tmp_path: Path) -> Iterator[Room]:
    with open_room(fresh_dsn, tmp_path) as room:
        yield room


@pytest.fixture
def ada(room: Room) -> httpx.Client:
    return room.browser("member", "Ada")


@pytest.fixture
def crew(room: Room) -> Crew:
    return Crew(room)


def press(browser: httpx.Client, path: str) -> httpx.Response:
    return browser.post(path, data={"form_token": form_token(browser.cookies["potluck_session"])})


def trains(crew: Crew, caller: Caller, rank: int, *steps: int, **values: float) -> None:
    own = {"rank": rank, "members": 2, "share": 64 * (rank + 1), "batch": 192, "step_s": 0.1, **WORK}
    own |= {"samples_per_s": 640.0 * (rank + 1), "total_per_s": 1920, "alone_per_s": 800.0 if rank == 0 else 1200.0}
    crew.trains(caller, *steps, **(own | values))


def training(crew: Crew, owner: Caller, name: str = "faces") -> tuple[GangView, list[Caller]]:
    """Two machines that train together."""
    machines = [crew.machine("lab-1"), crew.machine("lab-2")]
    gang = crew.submit(owner, 2, 3, name=name, command="python secret-idea.py")
    crew.form()
    for rank, machine in enumerate(machines):
        trains(crew, machine, rank, *range(0, 100, 10))
    return gang, machines


def test_a_gangs_page_has_its_members_as_lanes_its_steps_and_its_reasons(
    room: Room, ada: httpx.Client, crew: Crew
) -> None:
    gang, (one, two) = training(crew, room.who(ada))
    trains(crew, two, 1, 100, 110, share=32, load_s=0.2)
    trains(crew, one, 0, 100, 110, share=160)
    crew.logs(one, 110, loss=0.25)
    crew.says(
        one,
        "epoch 1\npotluck: lab-2 is 3.0× slower than before: 300 → 120 ms a step; shares of 192: lab-1 160, lab-2 32\n",
    )
    for machine in (one, two):
        crew.says(machine, "potluck: step 105 is taken again: lab-2 does not answer\n")

    room.do(gang_upkeep.tend(room.desk))

    html = ada.get(f"/gangs/{gang.id}").text
    text = text_of(html)

    assert re.search(r"they meet at lab-[12] ", text)
    assert re.search(r"step 105 lab-[12], lab-[12] : step 105 is taken again", text)
    for expected in (
        "faces running Ada · gang of 2 to 3 machines",
        "python secret-idea.py",
        "engine plain",
        "Members 2 of 3 at work",
        "160 of 192 samples a step, 83 %",
        "640 samples/s; alone 800",
        "lab-2 sets the pace:",
        "samples a second 1,920",
        "of what its machines do alone, together 96 %",
        "What a step takes the whole step 100 ms lab-2",
        "the gang 1,920 its machines alone, together 2,000",
        ": step 105 is taken again: lab-2 does not answer step 100 lab-2 is 3.0× slower than before",
        "loss is 0.25",
        "Stop all members",
    ):
        assert expected in text, (expected, text)
    assert "Of a step on lab-2: the loader 3" in html
    assert 'class="mark"' in html, "what was decided is marked where it happened"
    for member in room.do(gang_requests.show(room.desk, room.who(ada), gang.id)).members:
        assert f'href="/jobs/{member.job}"' in html
        assert f'href="/gangs/{gang.id}"' in ada.get(f"/jobs/{member.job}").text


def test_others_see_who_takes_part_and_not_what_is_in_it(room: Room, ada: httpx.Client, crew: Crew) -> None:
    gang, (one, _) = training(crew, room.who(ada))
    crew.says(one, "potluck: a secret sentence\n")
    crew.logs(one, 5, secret_loss=1.0)

    for browser in (room.browser("member", "Bob"), room.viewer()):
        html = browser.get(f"/gangs/{gang.id}").text
        assert "lab-2" in html
        for hidden in ("secret", "Stop all members", "r-gang_steps", "has room"):
            assert hidden not in html
        with browser.stream("GET", "/live", params={"gang": gang.id}) as stream:
            event = next(line for line in stream.iter_lines() if line.startswith("data: {"))
        assert "r-gang_lanes" in event
        assert "r-gang_story" not in event
        assert "secret" not in event
    assert "secret" in room.browser("admin").get(f"/gangs/{gang.id}").text


def test_a_gang_is_one_line_of_the_queue_and_one_tile_of_the_first_page(
    room: Room, ada: httpx.Client, crew: Crew
) -> None:
    gang, _ = training(crew, room.who(ada))
    later = crew.submit(room.who(ada), 4, 4, name="later")

    html = ada.get("/queue").text
    text = text_of(html)

    assert "5 jobs wait, 2 at work" in text
    assert re.search(r"faces Ada · gang, 1 member, each .* later Ada · gang, 4 members, each ", text), text
    assert re.search(r"faces gang of 2 running lab-1, lab-2 Ada", text), text
    assert html.count(f'href="/gangs/{gang.id}"') == 2, "once where a member waits, once where the others are at work"
    assert html.count(f'href="/gangs/{later.id}"') == 1
    assert 'href="/jobs/m' not in html
    assert ada.get("/").text.count(f'href="/gangs/{gang.id}"') == 1

    press(ada, f"/gangs/{later.id}/stop")

    assert re.search(r"Ended lately .* later gang of 4 cancelled", text_of(ada.get("/queue").text))


def test_a_gang_is_stopped_by_a_press_of_its_owner(room: Room, ada: httpx.Client, crew: Crew) -> None:
    gang, _ = training(crew, room.who(ada))

    assert press(room.browser("member", "Bob"), f"/gangs/{gang.id}/stop").status_code == 403
    assert ada.post(f"/gangs/{gang.id}/stop").status_code == 401, "without the word of this browser"
    assert press(ada, f"/gangs/{gang.id}/stop").headers["location"] == f"/gangs/{gang.id}"

    text = text_of(ada.get(f"/gangs/{gang.id}").text)
    assert "faces cancelled" in text
    assert "Stopped by Ada" in text
    assert "Stop all members" not in text


def test_what_members_say_is_sent_as_it_comes(room: Room, ada: httpx.Client, crew: Crew) -> None:
    gang, (one, two) = training(crew, room.who(ada))
    frame = re.search(r'data-frame="([^"]+)"', ada.get(f"/gangs/{gang.id}").text)
    assert frame is not None

    with ada.stream("GET", "/live", params={"gang": gang.id, "after": frame[1]}) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
        trains(crew, one, 0, 200, share=191)
        event = next(line for line in lines if "<b>191</b>" in line)
        crew.ends(two, 3, reason="boom")
        next(line for line in lines if "exit code 3" in line or "boom" in line)

    assert "r-gang_lanes" in event
    assert "r-events" not in event, "only what has changed"


def test_whatever_a_gang_is_called_prints_and_logs_stays_text(room: Room, ada: httpx.Client, crew: Crew) -> None:
    machines = [crew.machine(EVIL[0]), crew.machine(EVIL[2])]
    gang = crew.submit(room.who(ada), 2, 3, name=EVIL[1][:39], command=f"echo '{EVIL[0]}'")
    crew.form()
    for rank, machine in enumerate(machines):
        trains(crew, machine, rank, *range(5))
        crew.says(machine, "".join(f"potluck: {text}\n" for text in EVIL))
        crew.says(machine, f"potluck: {EVIL[4]} left; shares of 8: {EVIL[0]} 64, {EVIL[2]} 128\n")
    for number, text in enumerate(EVIL):
        name = re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u2069]", "", text)[:90]
        crew.logs(machines[0], number, **{name: 1.0, f"gang/{name}": 2.0})
    pages = [browser.get(f"/gangs/{gang.id}").text for browser in (ada, room.viewer(), room.browser("admin"))]
    crew.ends(machines[0], 1, reason=EVIL[0])
    crew.ends(machines[1], 1, reason=EVIL[3])
    pages += [
        ada.get(path).text
        for path in (f"/gangs/{gang.id}", "/queue", "/", "/gangs/<script>alert(1)", "/gangs/%E2%80%AE")
    ]

    for html in pages:
        assert_harmless(html)
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u0007\x1b]", html)
    assert "<script>alert(1)</script>" in text_of(pages[0])
    assert len(pages[0]) < 200_000


def test_a_long_gang_is_read_in_pieces(room: Room, ada: httpx.Client, crew: Crew) -> None:
    gang, (one, _) = training(crew, room.who(ada))
    for start in range(0, 3_000, 1_000):
        trains(crew, one, 0, *range(start + 100, start + 1_100))
    crew.says(one, "potluck: too old to be told\n" + "noise\n" * 100_000)
    crew.says(one, "potluck: young enough\n")
    page = gangviews.GangPage(gang.id, inside=True)

    first = room.do(page.facts(room.desk))
    trains(crew, one, 0, 9_999)
    crew.says(one, "potluck: still younger\n")
    second = room.do(page.facts(room.desk))

    assert len(first.watch.lanes[first.watch.current[0]].looks) <= KEPT
    assert second.watch.step == 9_999
    assert [said.text for said in second.said] == ["young enough", "still younger"]
    assert any(topic.startswith("points:m1-") for topic in page.topics)


def test_the_curve_goes_on_with_the_member_that_logs_after_the_first_is_gone(
    room: Room, ada: httpx.Client, crew: Crew
) -> None:
    gang, (one, two) = training(crew, room.who(ada))
    for step in range(5):
        crew.logs(one, step, loss=5.0 - step)
    for step in range(5, 9):
        crew.logs(two, step, loss=0.5)

    facts = room.do(gangviews.GangPage(gang.id, inside=True).facts(room.desk))

    assert [x for x, _ in facts.figures.series["loss"]] == list(range(9))
    assert facts.curves[0].lines[0].latest == "0.5"


def test_a_front_of_its_id_leads_to_a_gang_and_what_is_not_there_is_a_friendly_page(
    room: Room, ada: httpx.Client, crew: Crew
) -> None:
    gang = crew.submit(room.who(ada), 2, 2, name="faces")

    answer = ada.get(f"/gangs/{gang.id[:-2]}")

    assert (answer.status_code, answer.headers["location"]) == (307, f"/gangs/{gang.id}")
    assert "Nothing yet" in ada.get(f"/gangs/{gang.id}").text
    missing = ada.get("/gangs/nothing")
    assert missing.status_code == 404
    assert "Not here" in missing.text


# --- drawings


def test_what_a_gang_writes_about_itself_is_the_last_on_the_page_of_a_member() -> None:
    figures = Figures()

    figures.add([Point(0, 0.0, {"zebra": 1.0, "gang/rank": 0.0, "val loss": 2.0}, seq=0, attempt=1)])

    assert [chart.title for chart in figures.curves] == ["val loss", "zebra", "gang/rank"]


def test_a_chart_may_begin_at_nought_and_has_marks_only_where_there_is_something() -> None:
    drawn = charts.chart("x", {"a": [(10.0, 5.0), (20.0, 6.0)]}, lowest=0.0, marks=[5.0, 15.0])

    assert drawn is not None
    assert drawn.y_ticks[-1] == "0"
    assert drawn.marks == "M500.0 0V400"


def test_short_times_are_written_for_people() -> None:
    assert [words.brief(s) for s in (0, 0.0004, 0.084, 1.25, 75)] == ["0", "0.4 ms", "84 ms", "1.25 s", "1 min 15 s"]
