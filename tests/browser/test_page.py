"""What does a real browser make of the page? Chromium, a real hub, no mocks; slow, so not in `make test`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dashboard_room import Room, open_room, picture
from potluck.hub.commands import runs

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package (pip install playwright)")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
HOSTILE = [
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    '"><svg onload=window.pwned=1>',
    "</title><script>window.pwned=1</script>",
    "'-(window.pwned=1)-'",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Chromium: apt-get install chromium"),
]


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


class Tab:
    """A page and everything that it complained about."""

    def __init__(self, chromium: Any, **options: Any) -> None:
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.add_init_script(
            "window.violations = []; addEventListener('securitypolicyviolation', e => violations.push(e.violatedDirective))"
        )

    def enter(self, room: Room) -> Any:
        self.page.goto(f"{room.url}/j/{room.invite('viewer')}")
        self.page.get_by_role("button", name="Open the page").click()
        self.page.wait_for_selector("#state.live")
        return self.page

    def assert_quiet(self, room: Room) -> None:
        assert self.complaints == []
        assert self.page.evaluate("window.violations") == []
        assert [url for url in self.requests if not url.startswith((room.url, "data:"))] == []


@pytest.fixture
def tab(chromium: Any) -> Iterator[Tab]:
    tab = Tab(chromium)
    yield tab
    tab.context.close()


def test_a_change_is_seen_without_a_reload(room: Room, tab: Tab) -> None:
    room.run("faces", samples=50_000, settings={"taste_every_s": 0.001})
    ada = room.worker("Ada's laptop")
    page = tab.enter(room)
    page.evaluate("window.sameDocument = true")
    assert "Ada's laptop" in page.inner_text("#r-workers")

    room.settle()
    room.taste(picture(0), distance=182.4)
    room.hand_in(ada, room.lease(ada, "unit"), 1_000, d_loss=1.25, g_loss=0.75)
    room.settle()
    room.merge()
    room.settle()
    room.taste(picture(1), distance=61.0)

    page.wait_for_selector('#r-samples:has-text("version 1")')
    page.wait_for_selector('#r-losses:has-text("1.25")')
    assert page.evaluate("document.querySelector('#r-samples img').naturalWidth") == 16  # loaded before it was shown
    assert "from 182" in page.inner_text("#r-score")
    assert page.evaluate("window.sameDocument")
    tab.assert_quiet(room)


def test_a_swap_keeps_the_reader_where_they_are(room: Room, tab: Tab) -> None:
    run = room.run("faces", samples=50_000)
    room.worker("ada")
    page = tab.enter(room)
    link = page.locator("#r-head a")
    link.focus()
    page.evaluate("scrollTo(0, 60)")
    place = page.evaluate("scrollY")

    room.do(runs.move(room.desk, run.id, "pause", actor="Ada"))

    page.wait_for_selector('#r-head:has-text("paused")')
    assert page.evaluate("document.activeElement.getAttribute('href')") == f"/runs/{run.id}"
    assert page.evaluate("scrollY") == place
    tab.assert_quiet(room)


def test_a_lost_hub_is_said_and_found_again(fresh_dsn: str, tmp_path: Path, tab: Tab) -> None:
    with open_room(fresh_dsn, tmp_path) as room:
        run = room.run("faces")
        page = tab.enter(room)
        port = int(room.url.rpartition(":")[2])
    page.wait_for_selector("#state.lost")

    with open_room(fresh_dsn, tmp_path, port=port) as room:
        page.wait_for_selector("#state.live", timeout=30_000)
        room.do(runs.move(room.desk, run.id, "pause", actor="Ada"))
        page.wait_for_selector('#r-head:has-text("paused")')


def test_hostile_names_stay_words(room: Room, tab: Tab) -> None:
    page = tab.enter(room)
    for index, text in enumerate(HOSTILE):
        room.run(text, recipe=text, samples=10_000)
        room.worker(text)
        worker = room.worker(f"{index}{text}"[:40])
        room.hand_in(worker, room.lease(worker, "unit"), 100, **{text: 1.0})
        room.settle()
        room.taste(picture(), **{text: 2.0})
        room.merge()

    page.wait_for_selector('#r-workers:has-text("<script>window.pwned=1")')
    for run in room.do(runs.list_runs(room.desk)):
        page.goto(f"{room.url}/runs/{run.id}")
        page.wait_for_selector("#state.live")
        assert page.evaluate("window.pwned") is None
        tab.assert_quiet(room)


def test_the_command_has_the_fingerprint_of_the_address_bar_and_nothing_else(room: Room, tab: Tab) -> None:
    page, link = tab.page, f"{room.url}/j/{room.invite('worker')}"

    page.goto(f"{link}#fp={'ab' * 32}")
    assert page.inner_text("#join") == f"potluck join '{link}#fp={'ab' * 32}'"

    page.goto("about:blank")
    page.goto(f"{link}#fp=';rm -rf ~;'")
    assert page.inner_text("#join") == f"potluck join '{link}'"

    page.click("button[data-copy=join]")
    page.wait_for_selector("#copied:not(:empty)")
    tab.assert_quiet(room)


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900), (1920, 1080)])
def test_nothing_sticks_out_and_everything_has_a_name(room: Room, chromium: Any, width: int, height: int) -> None:
    room.run("a-run-with-a-rather-long-name-" + "x" * 30, samples=50_000, settings={"taste_every_s": 0.001})
    worker = room.worker("W" * 40)
    room.hand_in(worker, room.lease(worker, "unit"), 1_000, a_loss_with_a_long_name_indeed=1.25, g_loss=0.75)
    room.settle()
    room.taste(picture(), distance=182.4)
    room.merge()
    tab = Tab(chromium, viewport={"width": width, "height": height})
    page = tab.enter(room)

    for path in ("/", "/runs/last"):
        page.goto(room.url + path)
        page.wait_for_selector("#state.live")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(image => image.hasAttribute('alt'))")
        nameless = "svg[role=img]:not([aria-labelledby]), button:empty, a:empty, [tabindex]:not([aria-label])"
        assert page.locator(nameless).count() == 0
        assert page.locator("h1").count() == 1
    if (width, height) == (1920, 1080):
        bottom = page.evaluate("document.querySelector('#r-samples').getBoundingClientRect().bottom")
        assert bottom <= height, "the newest samples are seen whole on a projector"
    tab.assert_quiet(room)
    tab.context.close()


def test_the_page_is_whole_without_a_script(room: Room, chromium: Any) -> None:
    room.run("faces", samples=50_000)
    room.worker("ada")
    tab = Tab(chromium, java_script_enabled=False)
    tab.page.goto(f"{room.url}/j/{room.invite('viewer')}")
    tab.page.get_by_role("button", name="Open the page").click()

    assert "faces" in tab.page.inner_text("#r-head")
    assert re.search("ada", tab.page.inner_text("#r-workers"))
    tab.context.close()
