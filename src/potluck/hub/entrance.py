"""Who is asking, may they, and how is a no said? What the API and the pages share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from fastapi import Depends, Request
from fastapi.responses import JSONResponse

from potluck.errors import NotAllowed
from potluck.hub.commands import people
from potluck.hub.commands.desk import Caller, Desk
from potluck.protocol import PROTOCOL_HEADER, Problem

SESSION_COOKIE = "potluck_session"


def desk_of(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


async def caller_of(request: Request) -> Caller:
    """Who asks: a bearer token, or for looking only (GET) the page's session cookie."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = request.cookies.get(SESSION_COOKIE, "") if request.method in ("GET", "HEAD") else ""
    theirs = request.headers.get(PROTOCOL_HEADER, "")
    if theirs.isdecimal():
        people.check_protocol(int(theirs[:9]))
    return await people.authenticate(desk_of(request), token.strip())


def require(roles: frozenset[str]) -> Callable[[Request], Awaitable[Caller]]:
    async def check(request: Request) -> Caller:
        if "nobody" in roles:
            return Caller("nobody", "", "")
        caller = await caller_of(request)
        if caller.role not in roles:
            allowed = ", ".join(sorted(roles))
            raise NotAllowed(f"a {caller.role} may not do this: it takes the role {allowed}")
        return caller

    return check


def roles(allowed: frozenset[str]) -> dict[str, Any]:
    """Arguments of a route: who may call it, enforced and written into the OpenAPI document."""
    return {
        "dependencies": [Depends(require(allowed))],
        "openapi_extra": {"x-roles": sorted(allowed)},
    }


Asking = Annotated[Caller, Depends(caller_of)]
At = Annotated[Desk, Depends(desk_of)]


def problem(status: int, code: str, detail: str) -> JSONResponse:
    body = Problem(f"urn:potluck:{code}", HTTPStatus(status).phrase, status, detail, code)
    headers = {"Retry-After": "2"} if status == 503 else {}
    return JSONResponse(msgspec.to_builtins(body), status, headers, media_type="application/problem+json")
