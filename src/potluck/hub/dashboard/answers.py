"""How does a page get answered: which headers, which frame around it, and how does a refusal look?"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute

import potluck
from potluck.errors import BadInput, PotluckError
from potluck.hub.commands.desk import Caller
from potluck.hub.dashboard.regions import templates
from potluck.hub.entrance import SESSION_COOKIE, desk_of, form_token

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
TITLES = {403: "Not for you", 404: "Not here", 503: "One moment", 409: "Not now", 422: "That does not fit"}


def page(
    template: str,
    status: int = 200,
    /,
    *,
    request: Request | None = None,
    caller: Caller | None = None,
    **context: Any,
) -> HTMLResponse:
    """`caller` is who looks; only with one are there ways to the other pages, and forms that work."""
    token = form_token(request.cookies.get(SESSION_COOKIE, "")) if request and caller else ""
    path = request.url.path if request else ""
    html = (
        templates()
        .get_template(template)
        .render(version=potluck.__version__, caller=caller, token=token, path=path, **context)
    )
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
    return HTMLResponse(html, status, headers)


def see(path: str) -> RedirectResponse:
    """After a form: look at `path`, by GET, so that a reload does nothing twice."""
    return RedirectResponse(path, 303, {"Cache-Control": "no-store"})


class Page(APIRoute):
    """A route whose refusals are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except PotluckError as error:
                return refusal(request, error)
            except RequestValidationError as error:
                place = ".".join(map(str, error.errors()[0]["loc"][1:]))
                return refusal(request, BadInput(f"{place or 'the request'}: {error.errors()[0]['msg']}"))

        return answer


def refusal(request: Request, error: PotluckError) -> Response:
    hub = desk_of(request).name
    if error.status == 401:
        had_one = SESSION_COOKIE in request.cookies
        return page("sign_in.html", 401, hub=hub, reason=str(error) if had_one else "", to="")
    title = TITLES.get(error.status, HTTPStatus(error.status).phrase)
    answer = page("message.html", error.status, hub=hub, title=title, text=str(error), again=error.status == 503)
    if error.status == 503:
        answer.headers["Retry-After"] = "2"
    return answer
