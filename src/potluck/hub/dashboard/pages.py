"""Which pages are there about runs, and how do they stay up to date?

The same `roles` as the API's guard every route; what differs is that a refusal is a page that says what to do.
"""

from __future__ import annotations

from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse

from potluck.domain import access
from potluck.errors import NotFound, PotluckError
from potluck.hub.commands import runs
from potluck.hub.dashboard import live, views
from potluck.hub.dashboard.answers import Page, page
from potluck.hub.dashboard.regions import ASSETS, asset
from potluck.hub.entrance import Asking, At, caller_of, roles

router = APIRouter(route_class=Page, include_in_schema=False)


def board_of(request: Request) -> live.Board:
    board: live.Board = request.app.state.board
    return board


@router.get("/", response_class=HTMLResponse, **roles(access.ANYBODY))
async def overview(request: Request, desk: At, caller: Asking) -> Response:
    frame = await board_of(request).channel("").now()
    return page("overview.html", request=request, caller=caller, hub=desk.name, frame=frame, live="")


@router.get("/runs/{run}", response_class=HTMLResponse, **roles(access.ANYBODY))
async def one_run(request: Request, desk: At, caller: Asking, run: str) -> Response:
    found = await runs.show(desk, run)
    if found.id != run:
        return RedirectResponse(f"/runs/{found.id}", 307)
    frame = await board_of(request).channel(found.id).now()
    asks = urlencode({"run": found.id})
    return page("run.html", request=request, caller=caller, hub=desk.name, frame=frame, live=asks, name=found.name)


@router.get("/live", response_class=StreamingResponse, **roles(access.ANYBODY))
async def events(
    request: Request,
    desk: At,
    caller: Asking,
    run: str = "",
    job: str = "",
    gang: str = "",
    show: str = "",
    after: str = "",
) -> Response:
    """Server-sent events: the regions of a page that changed since frame `after` (or the browser's Last-Event-ID)."""
    asked = {"run": run, "job": job, "gang": gang, "show": show}
    key = await views.find(desk, caller, **asked)
    have = request.headers.get("last-event-id") or after

    async def welcome() -> bool:
        try:
            now = await caller_of(request)
            return now.role in access.ANYBODY and await views.find(desk, now, **asked) == key
        except PotluckError as error:
            return error.status not in (401, 403)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    body = live.stream(board_of(request).channel(key), have, welcome)
    return StreamingResponse(body, media_type="text/event-stream", headers=headers)


@router.get("/assets/{name}", **roles(access.OPEN))
async def file(request: Request, name: str, v: str = "") -> Response:
    if name not in ASSETS:
        raise NotFound(f"there is no file {name}")
    content, version = asset(name)
    lasting = "public, max-age=31536000, immutable" if v == version else "no-cache"
    return Response(content, media_type=ASSETS[name], headers={"Cache-Control": lasting})
