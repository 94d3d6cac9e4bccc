"""Which pages are there, who may see them, and how does a browser get in?

The same `roles` as the API's guard every route; what differs is that a refusal is a page that says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from fastapi.routing import APIRoute

import potluck
from potluck import settings
from potluck.domain import access
from potluck.errors import NotFound, PotluckError
from potluck.hub.commands import people, runs
from potluck.hub.dashboard import live
from potluck.hub.dashboard.regions import ASSETS, asset, templates
from potluck.hub.entrance import SESSION_COOKIE, At, caller_of, desk_of, roles
from potluck.protocol import JoinRequest

SESSION_S = 7 * 86400
INSTALL = "pip install '.[train]'"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def page(template: str, status: int = 200, /, **context: Any) -> HTMLResponse:
    html = templates().get_template(template).render(version=potluck.__version__, **context)
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
    return HTMLResponse(html, status, headers)


class Page(APIRoute):
    """A route whose refusals are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except PotluckError as error:
                return refusal(request, error)

        return answer


def refusal(request: Request, error: PotluckError) -> Response:
    hub = desk_of(request).name
    if error.status == 401:
        had_one = SESSION_COOKIE in request.cookies
        return page("sign_in.html", 401, hub=hub, reason=str(error) if had_one else "")
    title = {403: "Not for you", 404: "Not here", 503: "One moment"}.get(error.status, HTTPStatus(error.status).phrase)
    answer = page("message.html", error.status, hub=hub, title=title, text=str(error), again=error.status == 503)
    if error.status == 503:
        answer.headers["Retry-After"] = "2"
    return answer


router = APIRouter(route_class=Page, include_in_schema=False)


def board_of(request: Request) -> live.Board:
    board: live.Board = request.app.state.board
    return board


@router.get("/", response_class=HTMLResponse, **roles(access.ANYBODY))
async def overview(request: Request, desk: At) -> Response:
    frame = await board_of(request).channel("").now()
    return page("overview.html", hub=desk.name, frame=frame, run_id="")


@router.get("/runs/{run}", response_class=HTMLResponse, **roles(access.ANYBODY))
async def one_run(request: Request, desk: At, run: str) -> Response:
    found = await runs.show(desk, run)
    if found.id != run:
        return RedirectResponse(f"/runs/{found.id}", 307)
    frame = await board_of(request).channel(found.id).now()
    return page("run.html", hub=desk.name, frame=frame, run_id=found.id, name=found.name)


@router.get("/live", response_class=StreamingResponse, **roles(access.ANYBODY))
async def events(request: Request, desk: At, run: str = "", after: str = "") -> Response:
    """Server-sent events: the regions of a page that changed since frame `after` (or the browser's Last-Event-ID)."""
    run_id = (await runs.show(desk, run)).id if run else ""
    have = request.headers.get("last-event-id") or after

    async def welcome() -> bool:
        try:
            return (await caller_of(request)).role in access.ANYBODY
        except PotluckError as error:
            return error.status not in (401, 403)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    body = live.stream(board_of(request).channel(run_id), have, welcome)
    return StreamingResponse(body, media_type="text/event-stream", headers=headers)


@router.get("/assets/{name}", **roles(access.OPEN))
async def file(request: Request, name: str, v: str = "") -> Response:
    if name not in ASSETS:
        raise NotFound(f"there is no file {name}")
    content, version = asset(name)
    lasting = "public, max-age=31536000, immutable" if v == version else "no-cache"
    return Response(content, media_type=ASSETS[name], headers={"Cache-Control": lasting})


# --- getting in -----------------------------------------------------------------------------------------------------


@router.get("/j/{code}", response_class=HTMLResponse, **roles(access.OPEN))
async def link(desk: At, code: str) -> Response:
    """What a link is for. Looking at it uses nothing up."""
    invite = await people.peek_invite(desk, code)
    if invite is None:
        text = "This hub never gave this link. Copy it again, whole, or ask for a fresh one."
        return page("message.html", 404, hub=desk.name, title="An unknown link", text=text, again=False)
    if not invite["usable"]:
        late = invite["expires_at"] <= datetime.now(UTC)
        text = "Its time is over. " if late else "All its uses are taken, or it was withdrawn. "
        text += "Ask for a fresh one (on the hub's machine: potluck invite)."
        return page("message.html", 410, hub=desk.name, title="This link no longer works", text=text, again=False)
    url = f"{desk.public_url}/j/{code}" + (f"#fp={desk.fingerprint}" if desk.fingerprint else "")
    return page(
        "link.html",
        hub=desk.name,
        role=invite["role"],
        expires_at=invite["expires_at"].isoformat(),
        seconds_left=(invite["expires_at"] - datetime.now(UTC)).total_seconds(),
        code=code,
        url=url,
        install=INSTALL,
        verb="work" if invite["role"] == "worker" else "member",
    )


@router.post("/j/{code}/enter", **roles(access.OPEN))
async def enter(request: Request, desk: At, code: str) -> Response:
    """Take a viewer's credential out of a viewer link and leave it in the browser, where no script can read it."""
    answer = RedirectResponse("/", 303, {"Cache-Control": "no-store"})
    if await _is_known(request):
        return answer  # a second click does not use the link up
    invite = await people.peek_invite(desk, code)
    if invite is None or not invite["usable"] or invite["role"] != "viewer":
        return RedirectResponse(f"/j/{code}", 303)  # that page says what is wrong with it
    token = settings.make_token("viewer")
    await people.join(desk, JoinRequest(code, "", settings.hash_token(token)))
    answer.set_cookie(
        SESSION_COOKIE,
        token,
        max_age=SESSION_S,
        path="/",
        httponly=True,
        samesite="strict",
        secure=urlsplit(str(request.url)).scheme == "https",
    )
    return answer


async def _is_known(request: Request) -> bool:
    token = request.cookies.get(SESSION_COOKIE, "")
    try:
        return bool(token and await people.authenticate(desk_of(request), token))
    except PotluckError:
        return False
