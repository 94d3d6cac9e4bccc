"""The page of a gang, and what can be pressed there."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from potluck.domain import access
from potluck.hub.commands import gang_requests
from potluck.hub.dashboard import views
from potluck.hub.dashboard.answers import Page, page, see
from potluck.hub.dashboard.pages import board_of
from potluck.hub.entrance import Asking, At, roles

router = APIRouter(route_class=Page, include_in_schema=False)


@router.get("/gangs/{gang}", response_class=HTMLResponse, **roles(access.ANYBODY))
async def one_gang(request: Request, desk: At, caller: Asking, gang: str) -> Response:
    view = await gang_requests.show(desk, caller, gang)
    if view.id != gang:
        return RedirectResponse(f"/gangs/{quote(view.id)}", 307)
    frame = await board_of(request).channel(await views.find(desk, caller, gang=view.id)).now()
    return page(
        "gang.html",
        request=request,
        caller=caller,
        hub=desk.name,
        frame=frame,
        live=urlencode({"gang": view.id}),
        name=view.name,
        owner=view.owner,
        mine=view.mine,
    )


@router.post("/gangs/{gang}/stop", **roles(access.MEMBERS))
async def stop(request: Request, desk: At, caller: Asking, gang: str) -> Response:
    view = await gang_requests.stop(desk, caller, gang)
    board_of(request).spoil()
    return see(f"/gangs/{quote(view.id)}")
