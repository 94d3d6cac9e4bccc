"""Does the first page tell the truth, let in only whom it should, and stay cheap however many look at it?"""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard_room import Room, open_room, picture
from potluck.errors import PotluckError
from potluck.hub.commands import people, runs
from potluck.hub.commands.board import Point
from potluck.hub.dashboard import answers, charts, live, routers, session, words
from potluck.hub.dashboard.regions import ASSETS, asset, progress
from potluck.hub.entrance import SESSION_COOKIE
from potluck.protocol import Fates

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'-alert(1)-'",
    "</title><script>alert(1)</script>",
    "{{ 7*7 }}{% raw %}",
    "javascript:alert(1)",
    "&lt;b&gt;&#x3c;i&#x3e;",
    "]]><!--",
    "\u202egnp.exe\u2066\u0007",
]


@pytest.fixture
def room(fresh_dsn: str, tmp_path: Path) -> Iterator[Room]:
    with open_room(fresh_dsn, tmp_path) as room:
        yield room


@pytest.fixture
def lively(room: Room) -> Room:
    """A run with one merge by two machines, one taste, and a unit at work."""
    run = room.run("faces", samples=50_000)
    ada, bob = room.worker("Ada's laptop", share=0.5), room.worker("bob", device="cuda:0")
    for worker, samples in ((ada, 1_000), (bob, 2_000)):
        room.hand_in(worker, room.lease(worker, "unit"), samples, d_loss=1.25, g_loss=0.75)
    room.beat(ada, room.lease(ada, "unit"), 512, 310.0)
    room.settle()
    room.taste(picture(), distance=182.4, contrast=0.1)
    room.settle()
    room.merge()
    assert room.do(runs.show(room.desk, run.id)).version == 1
    return room


# --- words and drawings


def test_numbers_are_written_for_people() -> None:
    assert [words.short(n) for n in (0, 847, 1_234, 12_345, 1_234_567, 61.25, 0.0321)] == [
        *("0", "847", "1,234", "12.3 k", "1.23 M", "61.2", "0.032")
    ]
    assert [words.span(s) for s in (0, 8, 200, 7_500, 273_600)] == ["0 s", "8 s", "3 min 20 s", "2 h 5 min", "3 d 4 h"]
    assert [words.percent(f) for f in (0, 0.0001, 0.64, 0.9999, 1)] == ["0 %", "< 1 %", "64 %", "> 99 %", "100 %"]
    assert words.figure("accuracy", 0.9731) == "97.3 %"
    assert words.size(79_278) == "79.3 kB"
    assert words.change(182.4, 69.3) == "−62 %"


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9), st.integers(2, 5))
def test_ticks_hold_the_values_and_are_evenly_spaced(a: float, b: float, about: int) -> None:
    low, high = min(a, b), max(a, b)

    ticks = charts.nice_ticks(low, high, about)

    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 2 * about + 3
    steps = [y - x for x, y in pairwise(ticks)]
    assert max(steps) - min(steps) <= slack


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(-100, 100)), min_size=1, max_size=600), st.integers(3, 100))
def test_a_thinned_line_keeps_its_ends_and_its_bounds(points: list[tuple[float, float]], most: int) -> None:
    thinned = charts.thin(points, most)

    assert len(thinned) == min(len(points), most)
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert min(y for _, y in points) - 1e-6 <= min(y for _, y in thinned)
    assert max(y for _, y in thinned) <= max(y for _, y in points) + 1e-6


@given(st.lists(st.integers(0, 10**12), min_size=6, max_size=6))
def test_every_fate_that_happened_is_seen_in_the_bar(counts: list[int]) -> None:
    cut = charts.slices(Fates(sum(counts), *counts))

    assert sum(slice_.samples for slice_ in cut) == sum(counts)
    if sum(counts):
        assert math.isclose(sum(slice_.width for slice_ in cut), charts.WIDTH, abs_tol=1)
    assert all((slice_.width > 0) == (slice_.samples > 0) for slice_ in cut)


def test_losses_share_a_chart_but_an_accuracy_gets_its_own() -> None:
    curve = [Point(v, v * 100, {"loss": 2.0 / v, "accuracy": 0.4 + v / 10}) for v in (1, 2, 3)]

    first, second = charts.losses(curve)

    assert [line.name for line in first.lines] == ["loss"]
    assert "loss went from 2 to 0.667 over 300 samples" in first.text
    assert "accuracy went from 50.0 % to 70.0 %" in second.text


def test_values_that_are_not_finite_are_left_out_of_a_drawing() -> None:
    drawn = charts.chart("x", {"x": [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)], "y": [(1, math.nan)]})

    assert drawn is not None
    assert [line.name for line in drawn.lines] == ["x"]
    assert not re.search("nan|inf", drawn.lines[0].path)
    assert charts.chart("x", {"x": []}) is None


# --- what is there to see


def test_the_overview_shows_run_machines_losses_and_newest_samples(lively: Room) -> None:
    html = lively.viewer().get("/").text

    run = lively.do(runs.list_runs(lively.desk))[0]
    newest = lively.do(runs.tastes(lively.desk, run.id))[0]
    assert newest.image is not None
    text = text_of(html)
    for expected in ("Kitchen lab", "faces", "running", "Ada's laptop", "310 samples/s", "d_loss 1.25", "Distance 182"):
        assert expected in text
    assert "d_loss is 1.25" in html  # the drawing's text for those who cannot see it
    assert f'src="/api/v1/blobs/{newest.image.hash}"' in html
    assert "3,000 of 50,000 samples" in text
    assert "applied 3,000" in text
    assert re.search(r"bob cuda:0.*67 % 2,000", text)


def test_the_page_of_a_run_shows_every_tasted_version(room: Room) -> None:
    run = room.run("faces", settings={"taste_every_s": 0.001})
    ada = room.worker("ada")
    room.settle()
    room.taste(picture(0), distance=182.4)
    for version in (1, 2):
        room.hand_in(ada, room.lease(ada, "unit"), 1_000, d_loss=1.0)
        room.settle()
        assert room.merge() == version
        room.settle()
        room.taste(picture(version), distance=182.4 / (version + 1))
    viewer = room.viewer()

    html = viewer.get(f"/runs/{run.id}").text

    assert re.findall(r'alt="Samples of version (\d+)"', html) == ["0", "1", "2"]
    assert "from 182 at version 0 −67 %" in text_of(html)
    assert "unit_s 10.0" in text_of(html)
    assert viewer.get("/runs/last").headers["location"] == f"/runs/{run.id}"
    assert viewer.get("/runs/nonsense").status_code == 404


def test_an_empty_hub_says_how_to_begin(room: Room) -> None:
    text = text_of(room.viewer().get("/").text)

    assert "Nothing runs yet" in text
    assert "potluck train" in text
    assert "potluck invite" in text


def test_a_run_without_an_end_has_no_bar_and_one_with_both_shows_the_nearer(room: Room) -> None:
    endless = room.run("endless", samples=None)
    both = room.run("both", samples=1_000, duration_s=86_400)

    assert progress(endless) is None
    going = progress(both)
    assert going is not None
    assert going.fraction < 0.1


def test_a_ledger_that_is_away_is_a_friendly_page(lively: Room) -> None:
    viewer = lively.viewer()
    lively.do(lively.desk.ledger.close())

    answer = viewer.get("/")

    assert answer.status_code == 503
    assert "One moment" in answer.text
    assert answer.headers["content-type"].startswith("text/html")


# --- who gets in


def test_without_a_link_the_page_says_how_to_get_one(room: Room) -> None:
    for path in ("/", "/runs/last", "/live"):
        answer = httpx.get(room.url + path)
        assert answer.status_code == 401
        assert "potluck invite --role viewer" in answer.text
        assert answer.headers["content-security-policy"] == answers.POLICY


def test_a_viewer_link_lets_a_browser_look_but_not_act(room: Room) -> None:
    code = room.invite("viewer", uses=1)
    browser = httpx.Client(base_url=room.url)

    assert "Open the page" in browser.get(f"/j/{code}").text
    entered = browser.post(f"/j/{code}/enter")

    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    cookie = entered.headers["set-cookie"].lower()
    assert all(word in cookie for word in ("httponly", "samesite=strict", "max-age=604800", "path=/"))
    assert "secure" not in cookie  # this room speaks plain http; a browser would drop such a cookie
    assert browser.get("/").status_code == 200
    assert browser.get("/api/v1/runs").status_code == 200
    assert browser.post("/api/v1/invites", json={}).status_code == 401
    assert browser.post(f"/j/{code}/enter").headers["location"] == "/"  # a second click uses nothing up
    assert httpx.get(f"{room.url}/j/{code}").status_code == 410


def test_looking_at_a_link_uses_nothing_up(room: Room) -> None:
    code = room.invite("worker", uses=1)

    for _ in range(3):
        assert httpx.get(f"{room.url}/j/{code}").status_code == 200

    assert room.do(people.invites(room.desk))[0]["used"] == 0


@pytest.mark.parametrize("role", ["worker", "member"])
def test_a_machine_link_shows_the_command_and_gives_a_cookie_to_members_only(room: Room, role: str) -> None:
    code = room.invite(role)

    shown = httpx.get(f"{room.url}/j/{code}")
    entered = httpx.post(f"{room.url}/j/{code}/enter")

    assert f"potluck join '{room.url}/j/{code}'" in text_of(shown.text)
    assert session.INSTALL in text_of(shown.text)
    assert "valid for 2 h 59 min" in text_of(shown.text) or "valid for 3 h" in text_of(shown.text)
    if role == "worker":
        assert entered.headers["location"] == f"/j/{code}"
        assert "set-cookie" not in entered.headers
    else:  # a member may also come in with the browser, and then the link gives a credential of its own
        assert entered.headers["location"] == "/"
        assert "potluck_session=plm_" in entered.headers["set-cookie"]


def test_the_command_carries_the_fingerprint_of_a_hub_with_its_own_certificate(room: Room) -> None:
    object.__setattr__(room.desk, "fingerprint", "ab" * 32)
    code = room.invite("worker")

    assert f"/j/{code}#fp={'ab' * 32}'" in text_of(httpx.get(f"{room.url}/j/{code}").text)


def test_a_wrong_or_withdrawn_link_is_explained(room: Room) -> None:
    code = room.invite("viewer")
    id_ = room.do(people.invites(room.desk))[0]["id"]
    room.do(people.revoke_invite(room.desk, id_, actor="Ada"))

    withdrawn, unknown = httpx.get(f"{room.url}/j/{code}"), httpx.get(f"{room.url}/j/no-such-code")

    assert (withdrawn.status_code, unknown.status_code) == (410, 404)
    assert "fresh one" in withdrawn.text
    assert "fresh one" in unknown.text
    assert httpx.post(f"{room.url}/j/{code}/enter").headers["location"] == f"/j/{code}"


def test_a_revoked_viewer_is_told_so(room: Room) -> None:
    viewer = room.viewer()
    id_ = room.do(people.invites(room.desk))[0]["id"]
    room.do(people.revoke_invite(room.desk, id_, actor="Ada"))

    answer = viewer.get("/")

    assert answer.status_code == 401
    assert "revoked" in answer.text


def test_every_page_names_its_roles_and_stays_out_of_the_api_document() -> None:
    for route in [route for router in routers() for route in router.routes]:
        assert route.openapi_extra["x-roles"], route.path  # type: ignore[attr-defined]
        assert route.include_in_schema is False, route.path  # type: ignore[attr-defined]


# --- strangers' words


class Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def text_of(html: str) -> str:
    return " ".join(" ".join(Tags(html).text).split())


def assert_harmless(html: str) -> None:
    for tag, attributes in Tags(html).tags:
        assert tag not in ("iframe", "object", "embed", "base", "style", "foreignobject"), tag
        if tag == "script":
            assert (attributes.get("src") or "").startswith("/assets/"), html
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", "the policy forbids inline styles"
            if name in ("href", "src", "action"):
                assert (value or "").startswith(("/", "#")), value


@pytest.fixture
def hostile(room: Room) -> Room:
    """Everything that a stranger can name has a hostile name."""
    for index, text in enumerate(HOSTILE):
        room.worker(text, device=text[:20])
        run = room.run(text or "x", recipe=text, samples=10_000)
        worker = room.worker(f"w{index}{text}")
        room.hand_in(worker, room.lease(worker, "unit"), 100, **{text: 1.0, f"{text} accuracy": 0.5})
        room.settle()
        room.taste(picture(), **{text: 2.0})
        room.settle()
        room.merge()
        room.do(runs.move(room.desk, run.id, "pause", actor=text))
    return room


def test_what_strangers_typed_is_text_and_nothing_else(hostile: Room) -> None:
    viewer = hostile.viewer()

    found = [viewer.get("/").text]
    found += [viewer.get(f"/runs/{run.id}").text for run in hostile.do(runs.list_runs(hostile.desk))]
    found += [viewer.get(f"/runs/{text}").text for text in ("<script>alert(1)", "{{7*7}}")]
    found += [viewer.get(f"/j/{text}").text for text in ("<script>alert(1)", "'-alert(1)-'")]

    for html in found:
        assert_harmless(html)
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u0007]", html), "nobody turns our sentences around"
    for run in hostile.do(runs.list_runs(hostile.desk)):
        assert re.fullmatch("[a-z0-9-]+", run.id), "an id is part of an address"
    assert "<script>alert(1)</script>" in text_of(found[0])  # shown as they typed it


def test_pages_ask_nobody_else_for_anything(lively: Room) -> None:
    viewer = lively.viewer()
    found = [viewer.get(path).text for path in ("/", "/runs/last", f"/j/{lively.invite('worker')}")]
    found += [asset(name)[0].decode() for name in ASSETS]

    for text in found:
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'<)]*", text)
        assert all(lively.url in a or "www.w3.org" in a or "127.0.0.1" in a for a in addresses), addresses


def test_a_page_is_small(lively: Room) -> None:
    html = lively.viewer().get("/").text

    assert len(html) + sum(len(asset(name)[0]) for name in re.findall(r'"/assets/([^?"]+)', html)) < 60_000


def test_assets_are_kept_by_browsers_until_they_change(room: Room) -> None:
    version = asset("page.css")[1]

    kept = httpx.get(f"{room.url}/assets/page.css?v={version}")

    assert "immutable" in kept.headers["cache-control"]
    assert kept.headers["content-type"].startswith("text/css")
    assert httpx.get(f"{room.url}/assets/page.css?v=old").headers["cache-control"] == "no-cache"
    assert httpx.get(f"{room.url}/assets/..%2Fpages.py").status_code == 404


# --- live


async def first_event(channel: live.Channel, have: str = "") -> dict[str, Any]:
    """What a viewer who has the frame `have` is sent next."""

    async def welcome() -> bool:
        return True

    events = live.stream(channel, have, welcome)
    async for message in events:
        if message.startswith(b"event: page"):
            await events.aclose()
            return parse(message)
    raise AssertionError("the stream ended")


def parse(message: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(message.partition(b"data: ")[2])
    return found


def test_a_change_sends_only_what_changed(lively: Room) -> None:
    html = lively.viewer().get("/").text
    have = re.search(r'data-frame="([^"]+)"', html)
    assert have is not None

    async def meanwhile() -> dict[str, Any]:
        channel = live.Board(lively.desk).channel("")
        frame = await channel.now()
        coming = asyncio.ensure_future(first_event(channel, frame.id))
        await people.invite(lively.desk, people.InviteRequest("viewer"), actor="Ada")
        lively.desk.news.tell("change")
        return await coming

    regions = lively.do(meanwhile())
    assert regions.keys() <= {"r-events", "r-head"}  # the head has a clock in it
    assert "Ada made a viewer link" in text_of(regions["r-events"])


def test_a_browser_that_comes_back_after_a_restart_gets_everything(lively: Room) -> None:
    regions = lively.do(first_event(live.Board(lively.desk).channel(""), "0123abcd-7"))

    assert {"r-head", "r-samples", "r-losses", "r-workers"} <= regions.keys()


def test_two_hundred_viewers_and_a_burst_of_news_are_one_rendering(lively: Room) -> None:
    channel = live.Board(lively.desk).channel("")

    async def crowd() -> list[dict[str, Any]]:
        frame = await channel.now()
        viewers = [asyncio.ensure_future(first_event(channel, frame.id)) for _ in range(200)]
        await asyncio.sleep(0)  # let all of them begin to wait
        await people.invite(lively.desk, people.InviteRequest("viewer"), actor="Ada")
        for _ in range(50):
            lively.desk.news.tell("change")
        return await asyncio.gather(*viewers)

    seen = lively.do(crowd())

    assert len(seen) == 200
    assert all(each == seen[0] for each in seen)
    assert channel.renders <= 3


def test_a_revoked_viewer_is_sent_away_from_the_stream(lively: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "RECHECK_S", 0.0)
    viewer = lively.viewer()
    id_ = lively.do(people.invites(lively.desk))[0]["id"]

    with viewer.stream("GET", "/live") as stream:
        lines = stream.iter_lines()
        assert next(line for line in lines if line.startswith("event:")) == "event: page"
        lively.do(people.revoke_invite(lively.desk, id_, actor="Ada"))
        assert lively.loop is not None
        lively.loop.call_soon_threadsafe(lively.desk.news.tell, "change")
        assert "event: bye" in list(lines)  # and then the stream ends


def test_a_ledger_that_is_away_does_not_end_the_stream(lively: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    board = live.Board(lively.desk)

    async def failing_once() -> dict[str, Any]:
        channel = board.channel("")
        frame = await channel.now()
        coming = asyncio.ensure_future(first_event(channel, frame.id))
        await lively.desk.ledger.close()
        lively.desk.news.tell("change")
        with pytest.raises(PotluckError):
            await channel.frame(10**9)
        assert not coming.done()
        coming.cancel()
        return {}

    lively.do(failing_once())


def test_streams_end_cleanly_when_the_hub_stops(fresh_dsn: str, tmp_path: Path) -> None:
    ended: list[str] = []
    started = threading.Event()

    def watch(viewer: httpx.Client) -> None:
        try:
            with viewer.stream("GET", "/live") as stream:
                for line in stream.iter_lines():
                    if line.startswith("event: page"):
                        started.set()
            ended.append("cleanly")
        except httpx.HTTPError as error:
            ended.append(repr(error))

    with open_room(fresh_dsn, tmp_path) as room:
        room.run("faces")
        watcher = threading.Thread(target=watch, args=(room.viewer(),), daemon=True)
        watcher.start()
        assert started.wait(20)
    watcher.join(20)

    assert ended == ["cleanly"]


def test_a_stream_needs_a_credential_and_an_existing_run(lively: Room) -> None:
    viewer = lively.viewer()

    assert viewer.get("/live", params={"run": "nonsense"}).status_code == 404
    assert httpx.get(lively.url + "/live", headers={"Cookie": f"{SESSION_COOKIE}=plv_forged"}).status_code == 401
