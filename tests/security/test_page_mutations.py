"""Can another site, or a link, make a browser that is signed in here do anything?

A browser sends its cookie by itself. Every way that a foreign page could use that is tried on every route that changes
something; each is refused, and nothing happens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from test_access import routes

from dashboard_room import Room, open_room
from ledger_fixture import fresh_database
from potluck.hub.commands import jobs, people
from potluck.hub.dashboard import routers
from potluck.hub.entrance import FORM_TOKEN, MAX_FORM_BYTES, PAGE_HEADER, form_token
from potluck.protocol import JobView

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture(scope="module")
def room(embedded_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    folder: Path = tmp_path_factory.mktemp("room")
    with fresh_database(embedded_dsn) as dsn, open_room(dsn, folder) as room:
        yield room


@pytest.fixture(scope="module")
def admin(room: Room) -> httpx.Client:
    return room.browser("admin")


@pytest.fixture
def job(room: Room, admin: httpx.Client) -> JobView:
    return room.job(room.who(admin))


def state(room: Room, admin: httpx.Client, job: JobView) -> str:
    return room.do(jobs.show(room.desk, room.who(admin), job.id)).state


def ask(
    room: Room, admin: httpx.Client, method: str, path: str, headers: dict[str, str], **more: Any
) -> httpx.Response:
    """A request of this browser, with exactly these headers beside its cookie."""
    cookie = {"Cookie": f"potluck_session={admin.cookies['potluck_session']}"}
    return httpx.request(method, room.url + path, headers={**cookie, **headers}, **more)


def word(admin: httpx.Client) -> dict[str, str]:
    return {FORM_TOKEN: form_token(admin.cookies["potluck_session"])}


FOREIGN = [
    "http://evil.example",
    "null",
    "http://127.0.0.1:1",
    "https://",
    "",
    "http://[",
    "file://",
    "http://127.0.0.1.evil.example",
]


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_foreign_page_presses_nothing_even_if_it_knew_the_word(
    room: Room, admin: httpx.Client, job: JobView, origin: str
) -> None:
    for said in ({"Origin": origin}, {"Referer": origin + "/page"}, {"Origin": origin, "Referer": room.url + "/queue"}):
        if said.get("Origin") == "":
            continue  # no browser says an empty origin; the next test is about none at all
        for headers, more in (
            ({**said, PAGE_HEADER: "1"}, {"json": {}}),
            ({**said}, {"data": word(admin)}),
        ):
            for path in (f"/jobs/{job.id}/stop", f"/api/v1/jobs/{job.id}/stop"):
                assert ask(room, admin, "POST", path, headers, **more).status_code == 401, (said, path)

    assert state(room, admin, job) == "queued"


def test_a_request_that_does_not_say_where_it_comes_from_does_nothing(
    room: Room, admin: httpx.Client, job: JobView
) -> None:
    for headers in ({}, {PAGE_HEADER: "1"}):
        assert ask(room, admin, "POST", f"/jobs/{job.id}/stop", headers, data=word(admin)).status_code == 401
        assert ask(room, admin, "POST", f"/api/v1/jobs/{job.id}/stop", headers).status_code == 401

    assert state(room, admin, job) == "queued"


def test_the_right_origin_alone_is_not_enough(room: Room, admin: httpx.Client, job: JobView) -> None:
    """A file that a job left could be such a page, if a browser ever showed it."""
    here = {"Origin": room.url}
    for fields in (
        {},
        {FORM_TOKEN: ""},
        {FORM_TOKEN: "0" * 64},
        {FORM_TOKEN: form_token("another session")},
        {FORM_TOKEN: "é"},
    ):
        assert ask(room, admin, "POST", f"/jobs/{job.id}/stop", here, data=fields).status_code == 401, fields
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/json"):
        body = f"{FORM_TOKEN}={word(admin)[FORM_TOKEN]}".encode()
        headers = {**here, "Content-Type": kind}
        assert ask(room, admin, "POST", f"/jobs/{job.id}/stop", headers, content=body).status_code == 401, kind
    for value in ("", "0", "yes", "11"):
        headers = {**here, PAGE_HEADER: value}
        assert ask(room, admin, "POST", f"/api/v1/jobs/{job.id}/stop", headers).status_code == 401, value

    assert state(room, admin, job) == "queued"


def test_a_form_of_ours_leads_to_no_route_for_programs(room: Room, admin: httpx.Client, job: JobView) -> None:
    answer = ask(room, admin, "POST", f"/api/v1/jobs/{job.id}/stop", {"Origin": room.url}, data=word(admin))

    assert answer.status_code == 401
    assert state(room, admin, job) == "queued"


def test_what_our_own_pages_do_works(room: Room, admin: httpx.Client) -> None:
    here = {"Origin": room.url}
    ways = [
        ("/jobs/{}/stop", here, {"data": word(admin)}),
        ("/jobs/{}/stop", {"Referer": f"{room.url}/jobs/x"}, {"data": word(admin)}),
        ("/api/v1/jobs/{}/stop", {**here, PAGE_HEADER: "1"}, {}),
        ("/api/v1/jobs/{}/stop", {"Origin": room.url.upper().replace("HTTP", "http"), PAGE_HEADER: "1"}, {}),
    ]
    for path, headers, more in ways:
        job = room.job(room.who(admin))
        assert ask(room, admin, "POST", path.format(job.id), headers, **more).status_code in (200, 303), path
        assert state(room, admin, job) == "cancelled"


def test_a_bearer_needs_no_origin_and_a_wrong_one_is_not_helped_by_a_cookie(
    room: Room, admin: httpx.Client, job: JobView
) -> None:
    bearer = {"Authorization": f"Bearer {admin.headers['x-test-token']}"}
    wrong = {"Authorization": "Bearer nobody", "Origin": room.url, PAGE_HEADER: "1"}

    assert ask(room, admin, "POST", f"/api/v1/jobs/{job.id}/stop", wrong).status_code == 401
    assert httpx.post(f"{room.url}/api/v1/jobs/{job.id}/stop", headers=bearer).status_code == 200


def test_looking_changes_nothing_anywhere(room: Room, admin: httpx.Client, job: JobView) -> None:
    """GET and HEAD, with the cookie and all the headers in the world, on every path that something can be pressed at."""
    headers = {"Origin": room.url, PAGE_HEADER: "1"}
    before = room.do(people.workers(room.desk)), state(room, admin, job)
    paths = {route.path for router in routers() for route in router.routes if "POST" in route.methods}  # type: ignore[attr-defined]
    assert len(paths) > 12
    gets = {route.path for router in routers() for route in router.routes if "GET" in route.methods}  # type: ignore[attr-defined]

    for path in paths - gets:
        filled = re.sub(r"\{\w+\}", job.id, path)
        for method in ("GET", "HEAD"):
            assert ask(room, admin, method, filled, headers).status_code in (404, 405), path

    assert (room.do(people.workers(room.desk)), state(room, admin, job)) == before


def test_every_route_that_changes_something_asks_for_the_proof(room: Room, admin: httpx.Client) -> None:
    """With an admin's cookie and a foreign origin: the whole API and all pages, by their list."""
    from potluck.hub.app import make_app

    tried = 0
    for method, path, allowed in routes(make_app(room.desk)):
        if method in ("GET", "HEAD") or allowed is None or "nobody" in allowed:
            continue
        filled = re.sub(r"\{\w+(:\w+)?\}", "nothing", path)
        headers = {"Origin": "http://evil.example", PAGE_HEADER: "1"}
        assert ask(room, admin, method, filled, headers, json={}).status_code == 401, (method, path)
        tried += 1
    assert tried > 30


def test_nobody_is_signed_in_behind_their_back(room: Room) -> None:
    """Else a stranger's account could collect what somebody submits in good faith."""
    token, code = room.token("member"), room.invite("viewer")
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Referer": "http://evil.example/x"}):
        signed = httpx.post(room.url + "/sign-in", data={"credential": token}, headers=headers)
        entered = httpx.post(f"{room.url}/j/{code}/enter", headers=headers)
        for answer in (signed, entered):
            assert answer.status_code == 403
            assert "set-cookie" not in answer.headers


def test_a_form_that_never_ends_is_refused(room: Room, admin: httpx.Client, job: JobView) -> None:
    here = {"Origin": room.url, **FORM}
    body = f"{FORM_TOKEN}={word(admin)[FORM_TOKEN]}&x=".encode()

    answer = ask(room, admin, "POST", "/submit", here, content=body + b"y" * MAX_FORM_BYTES)
    many = ask(room, admin, "POST", "/submit", here, content=body + b"&a=1" * 5000)
    unsaid = ask(room, admin, "POST", "/submit", here, content=iter([body]))

    assert (answer.status_code, many.status_code, unsaid.status_code) == (422, 422, 422)


def test_no_page_gives_a_secret_of_the_session_away(room: Room, admin: httpx.Client, job: JobView) -> None:
    session = admin.cookies["potluck_session"]
    for path in ("/", "/queue", "/workers", "/submit", f"/jobs/{job.id}"):
        html = admin.get(path).text
        assert session not in html
        assert form_token(session) in html
    with admin.stream("GET", "/live", params={"job": job.id}) as stream:
        event = next(line for line in stream.iter_lines() if line.startswith("data: {"))
    assert form_token(session) not in event, "what is drawn once for all holds nobody's word"


def test_pages_let_no_other_site_frame_or_script_them(room: Room, admin: httpx.Client, job: JobView) -> None:
    for path in ("/", "/queue", "/workers", "/submit", f"/jobs/{job.id}", "/sign-in"):
        headers = admin.get(path).headers
        policy = headers["content-security-policy"]
        for rule in (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "frame-ancestors 'none'",
            "form-action 'self'",
        ):
            assert rule in policy, path
        assert "unsafe" not in policy
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
