"""Who is asking, may they, and how is a no said? What the API and the pages share.

A program shows its credential in a header, and may do with it what its role may. A browser carries it in a cookie, which
it sends by itself, also when somebody else's page makes it ask. So a cookie alone only looks (GET). It acts when the
request proves that a page of this very hub made it:

    the Origin (or the Referer) is the address that the request came to
    and   the header `Potluck-Page: 1`            a script's request: no other site may set it without our consent
    or    the field `form_token` of a plain form  a word that only those pages have, made of the cookie's secret
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

import msgspec
from fastapi import Depends, Request
from fastapi.responses import JSONResponse

from potluck.errors import BadInput, NotAllowed, NotKnown
from potluck.hub.commands import people
from potluck.hub.commands.desk import Caller, Desk
from potluck.protocol import PROTOCOL_HEADER, Problem

SESSION_COOKIE = "potluck_session"
PAGE_HEADER = "Potluck-Page"
FORM_TOKEN = "form_token"
FORM = "application/x-www-form-urlencoded"
MAX_FORM_BYTES = 256 << 10
"""A form of ours has some fields, never files."""


def desk_of(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


async def _desk(request: Request) -> Desk:
    """As a dependency it has to be async: FastAPI would call the other in a thread, for each request."""
    return desk_of(request)


async def caller_of(request: Request) -> Caller:
    """Who asks: a bearer token, or the session cookie of a browser, if it may speak for its owner here."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = request.cookies.get(SESSION_COOKIE, "")
        if token and request.method not in ("GET", "HEAD") and not await _is_meant(request, token):
            raise NotKnown(
                "this did not come from a page of this hub that is open here: reload that page and press again"
            )
    theirs = request.headers.get(PROTOCOL_HEADER, "")
    if theirs.isdecimal():
        people.check_protocol(int(theirs[:9]))
    return await people.authenticate(desk_of(request), token.strip())


async def _is_meant(request: Request, token: str) -> bool:
    """Did the cookie's owner press something on a page of ours, or does another site make the browser ask?"""
    if not comes_from_here(request):
        return False
    if request.headers.get(PAGE_HEADER) == "1":
        return True
    if request.url.path.startswith("/api/"):
        return False  # programs' routes: no form of ours leads there
    given = (await form_of(request)).get(FORM_TOKEN, "")
    return hmac.compare_digest(given.encode(), form_token(token).encode())


def comes_from_here(request: Request) -> bool:
    """Whether a browser says that a page of the very address it asks made it ask. Ports count: cookies ignore them."""
    said = request.headers.get("origin") or request.headers.get("referer", "")
    try:
        source = urlsplit(said).netloc
    except ValueError:
        return False
    here = {request.headers.get("host", "").lower(), urlsplit(desk_of(request).public_url).netloc.lower()}
    return bool(source) and source.lower() in here  # the second is for proxies that ask us by another name


def came_encrypted(request: Request) -> bool:
    """Whether the browser's end of the line is https. Behind a tunnel or a proxy ours is not."""
    public = urlsplit(desk_of(request).public_url)
    by_public_name = request.headers.get("host", "").lower() == public.netloc.lower()
    return request.url.scheme == "https" or (public.scheme == "https" and by_public_name)


def form_token(session: str) -> str:
    """What a form shows to prove that it was made for the owner of this session. It does not give the session away."""
    return hmac.new(session.encode(), b"a form of the potluck page", hashlib.sha256).hexdigest() if session else ""


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a plain form; of a field that is there twice the last. Empty for any other kind of body."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        return {}
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length[:12]) > MAX_FORM_BYTES:
        raise BadInput(f"this form is too long: its fields may have {MAX_FORM_BYTES >> 10} kB together")
    body = await request.body()
    try:
        fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=1000, errors="replace")
    except ValueError as error:
        raise BadInput(f"this is not a form's content: {error}") from None
    return {name: values[-1] for name, values in fields.items()}


async def read_body(request: Request, most: int, what: str) -> bytes:
    """The whole body, given up as soon as it is longer than `most` bytes."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise BadInput(f"{what} may have at most {most:,} bytes: send it in several")
    return bytes(content)


def require(roles: frozenset[str]) -> Callable[[Request], Awaitable[Caller]]:
    async def check(request: Request) -> Caller:
        if "nobody" in roles:
            return Caller("nobody", "", "")
        caller = await caller_of(request)
        if caller.role not in roles:
            allowed = ", ".join(sorted(roles))
            raise NotAllowed(f"a {caller.role} may not do this: it takes the role {allowed}")
        request.state.caller = caller  # for `_asking`: the ledger need not be asked twice
        return caller

    return check


def roles(allowed: frozenset[str]) -> dict[str, Any]:
    """Arguments of a route: who may call it, enforced and written into the OpenAPI document."""
    return {
        "dependencies": [Depends(require(allowed))],
        "openapi_extra": {"x-roles": sorted(allowed)},
    }


async def _asking(request: Request) -> Caller:
    """Whom `require` let in; it comes first."""
    known: Caller | None = getattr(request.state, "caller", None)
    return known or await caller_of(request)


Asking = Annotated[Caller, Depends(_asking)]
At = Annotated[Desk, Depends(_desk)]


def problem(status: int, code: str, detail: str) -> JSONResponse:
    body = Problem(f"urn:potluck:{code}", HTTPStatus(status).phrase, status, detail, code)
    headers = {"Retry-After": "2"} if status == 503 else {}
    return JSONResponse(msgspec.to_builtins(body), status, headers, media_type="application/problem+json")
