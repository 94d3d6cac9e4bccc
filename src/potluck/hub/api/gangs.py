"""Gangs over HTTP: what people ask of them, and what is known of the ways between workers."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query

from potluck.domain import access
from potluck.hub.commands import gang_requests, reaches
from potluck.hub.entrance import Asking, At, roles
from potluck.protocol import GangRequest, GangView, Link

router = APIRouter(prefix="/api/v1")

Wait = Annotated[float, Query(ge=0, le=30)]


@router.post("/gangs", status_code=201, **roles(access.MEMBERS))
async def submit_gang(
    desk: At,
    caller: Asking,
    body: GangRequest,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> GangView:
    return await gang_requests.submit(desk, caller, body, key=idempotency_key)


@router.get("/gangs", **roles(access.ANYBODY))
async def list_gangs(
    desk: At, caller: Asking, limit: Annotated[int, Query(ge=1, le=1000)] = 100, state: str = "all"
) -> list[GangView]:
    return await gang_requests.list_gangs(desk, caller, limit=limit, state=state)


@router.get("/gangs/{gang}", **roles(access.ANYBODY))
async def show_gang(desk: At, caller: Asking, gang: str) -> GangView:
    return await gang_requests.show(desk, caller, gang)


@router.get("/gangs/{gang}/wait", **roles(access.ANYBODY))
async def wait_gang(desk: At, caller: Asking, gang: str, state: str = "", wait: Wait = 0) -> GangView:
    return await gang_requests.wait(desk, caller, gang, state, wait)


@router.post("/gangs/{gang}/stop", **roles(access.MEMBERS))
async def stop_gang(desk: At, caller: Asking, gang: str) -> GangView:
    return await gang_requests.stop(desk, caller, gang)


@router.get("/links", **roles(access.MEMBERS))
async def links(desk: At) -> list[Link]:
    return await reaches.links(desk)
