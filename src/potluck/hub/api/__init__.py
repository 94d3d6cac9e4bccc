"""What does the hub answer over HTTP? Parsing, roles, status codes; no rule and no SQL.

    room      people, pool work, bytes, runs
    jobs      jobs: what people ask, what workers say
    gangs     gangs: what people ask; the ways between workers
    keeping   what a job leaves: logs, points, trees; secrets; many blobs at once

Every route names who may call it (`roles`); `tests/security/test_access.py` walks through all of them with every role.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from potluck.errors import BadInput, NotFound, PotluckError, TryLater
from potluck.hub.api import gangs, jobs, keeping, room
from potluck.hub.entrance import problem
from potluck.telemetry import logger

log = logger("hub.api")


def install(app: FastAPI) -> None:
    """Routes and error answers."""
    for router in (jobs.of_workers, room.health, room.router, jobs.router, gangs.router, keeping.router):
        app.include_router(router)

    @app.exception_handler(PotluckError)
    async def ours(request: Request, error: PotluckError) -> JSONResponse:
        if error.status >= 500 and not isinstance(error, TryLater):
            log.error("request.failed", path=request.url.path, reason=str(error))
        return problem(error.status, error.code, str(error))

    @app.exception_handler(RequestValidationError)
    async def misfit(request: Request, error: RequestValidationError) -> JSONResponse:
        places = "; ".join(f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()[:5])
        return problem(422, BadInput.code, f"the request does not fit: {places}")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: NotFound.code, 405: "not_allowed"}.get(error.status_code, "http")
        return problem(error.status_code, code, f"{error.detail}: {request.method} {request.url.path}")

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        log.error("request.bug", path=request.url.path, exc_info=error)
        return problem(500, PotluckError.code, "the hub made a mistake: its log has the details")
