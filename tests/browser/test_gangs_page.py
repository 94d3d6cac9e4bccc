"""What does a real browser make of the page of a gang? Chromium, a real hub, no mocks; slow, so not in `make test`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_jobs_page import Desk
from test_page import ARGS, CHROMIUM, HOSTILE

from dashboard_room import Room, open_room
from gang_room import Crew
from potluck.hub.commands import people
from potluck.hub.commands.desk import Caller

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package (pip install playwright)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Chromium: apt-get install chromium"),
]
TIMES = {"load_s": 0.01, "forward_s": 0.02, "backward_s": 0.05, "sum_s": 0.02, "step_s": 0.1, "members": 2}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def room(fresh_dsn: str, tmp_path: Path) -> Iterator[Room]:
    with open_room(fresh_dsn, tmp_path) as room:
        yield room


def training(room: Room, token: str, *names: str) -> tuple[str, Crew, list[Caller]]:
    crew = Crew(room)
    machines = [crew.machine(name) for name in names]
    owner = room.do(people.authenticate(room.desk, token))
    gang = crew.submit(owner, len(names), len(names) + 1, name=HOSTILE[1][:39])
    crew.form()
    for rank, machine in enumerate(machines):
        crew.trains(machine, *range(50), rank=rank, share=64, batch=128, total_per_s=1280, alone_per_s=700, **TIMES)
        crew.says(machine, "".join(f"potluck: {text}\n" for text in HOSTILE))
    return gang.id, crew, machines


@pytest.mark.parametrize(
    "look",
    [{}, {"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 844}, "has_touch": True}],
    ids=["light", "dark", "phone"],
)
def test_a_gang_is_followed_without_a_reload_and_fits_the_screen(
    chromium: Any, room: Room, look: dict[str, Any]
) -> None:
    token = room.token("member", "Ada")
    gang, crew, machines = training(room, token, HOSTILE[0], "lab-" + "2" * 30)
    desk = Desk(chromium, room, token, **look)
    page = desk.open(f"/gangs/{gang}")
    page.evaluate("window.sameDocument = true")

    crew.trains(machines[0], 60, rank=0, share=99, batch=128, total_per_s=1280, alone_per_s=700, **TIMES)
    page.wait_for_selector('#r-gang_lanes:has-text("99 of 128")')

    assert page.evaluate("window.sameDocument")
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.locator("#r-gang_lanes svg.stack").count() == 2
    assert page.locator("#r-gang_lanes svg.stack rect").first.bounding_box()["width"] > 5
    assert HOSTILE[0] in page.inner_text("#r-gang_story")
    page.get_by_role("link", name=HOSTILE[0]).first.click()
    page.get_by_role("link", name="← Its gang").click()
    page.get_by_role("button", name="Stop all members").click()
    page.wait_for_selector('#r-gang_head:has-text("cancelled")')
    desk.assert_quiet(room)
    desk.context.close()
