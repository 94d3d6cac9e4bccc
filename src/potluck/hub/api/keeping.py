"""What jobs leave, and what they are given, over HTTP: logs, points, trees, secrets, many blobs at once."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from potluck.domain import access
from potluck.errors import BadInput
from potluck.hub.commands import bundles, keeping, secrets
from potluck.hub.entrance import Asking, At, read_body, roles
from potluck.protocol import Blob, LogPiece, Missing, Point, SecretValue, SecretView, Tree

router = APIRouter(prefix="/api/v1")

Wait = Annotated[float, Query(ge=0, le=30)]
Attempt = Annotated[int, Query(ge=0, lt=1_000_000)]
_BYTES = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_MAX_POINTS_BYTES = 4 << 20


def _raw(allowed: frozenset[str], body: dict[str, Any]) -> dict[str, Any]:
    """Like `roles`, for a route that reads its body itself; the OpenAPI document hears of the body this way."""
    given = roles(allowed)
    given["openapi_extra"] = {**given["openapi_extra"], **body}
    return given


# --- logs and points --------------------------------------------------------------------------------------------------


@router.get("/jobs/{job}/log", **roles(access.PEOPLE))
async def read_log(
    desk: At,
    caller: Asking,
    job: str,
    attempt: Attempt = 0,
    offset: Annotated[int, Query(ge=0, le=1 << 60)] = 0,
    wait: Wait = 0,
    limit: Annotated[int, Query(ge=4, le=1 << 20)] = 65536,
) -> LogPiece:
    return await keeping.log(desk, caller, job, attempt=attempt, offset=offset, wait_s=wait, limit=limit)


@router.post("/leases/{lease_id}/log", **_raw(access.WORKERS, _BYTES))
async def add_log(
    desk: At,
    caller: Asking,
    request: Request,
    lease_id: str,
    offset: Annotated[int, Query(ge=0, le=1 << 60)],
    skip: bool = False,
) -> dict[str, int]:
    """`skip`: what is missing before `offset` is gone for good, go on behind it."""
    piece = await read_body(request, keeping.MAX_PIECE_BYTES, "a piece of a log")
    return await keeping.add_log(desk, caller, lease_id, offset, piece, skip=skip)


@router.post("/leases/{lease_id}/points", status_code=204, **_raw(access.WORKERS, _BYTES))
async def add_points(desk: At, caller: Asking, request: Request, lease_id: str) -> None:
    """A JSON list of points. Read by msgspec: it is fast, and knows no NaN."""
    content = await read_body(request, _MAX_POINTS_BYTES, "a list of points")
    try:
        points = msgspec.json.decode(content, type=list[Point])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"this is not a list of points: {error}") from None
    await keeping.add_points(desk, caller, lease_id, points)


@router.get("/jobs/{job}/points", **roles(access.PEOPLE))
async def read_points(
    desk: At,
    caller: Asking,
    job: str,
    after_seq: Annotated[int, Query(ge=-1, le=1 << 60)] = -1,
    attempt: Attempt = 0,
    wait: Wait = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> list[Point]:
    return await keeping.points(desk, caller, job, after_seq=after_seq, attempt=attempt, wait_s=wait, limit=limit)


@router.get("/jobs/{job}/tree", **roles(access.PEOPLE))
async def read_tree(desk: At, caller: Asking, job: str, what: str = "outputs", attempt: Attempt = 0) -> Tree:
    return await keeping.tree(desk, caller, job, what, attempt)


# --- secrets ----------------------------------------------------------------------------------------------------------


@router.get("/secrets", **roles(access.MEMBERS))
async def list_secrets(desk: At, caller: Asking) -> list[SecretView]:
    return await secrets.mine(desk, caller)


@router.put("/secrets/{name}", **roles(access.MEMBERS))
async def put_secret(desk: At, caller: Asking, name: str, body: SecretValue) -> SecretView:
    return await secrets.put(desk, caller, name, body)


@router.delete("/secrets/{name}", status_code=204, **roles(access.MEMBERS))
async def remove_secret(desk: At, caller: Asking, name: str) -> None:
    await secrets.remove(desk, caller, name)


# --- many blobs at once -----------------------------------------------------------------------------------------------


@router.post("/blobs/missing", **roles(access.GIVERS))
async def missing(desk: At, body: list[Blob]) -> Missing:
    return await bundles.missing(desk, body)


@router.post("/blobs/batch", status_code=204, **_raw(access.GIVERS, _BYTES))
async def take_bundle(desk: At, request: Request) -> None:
    """One line of JSON, the list of blobs; then their bytes one after the other."""
    await bundles.take(desk, await read_body(request, bundles.MAX_BUNDLE_BYTES, "a bundle"))


@router.post("/blobs/many", response_class=Response, **roles(access.GIVERS))
async def give_bundle(desk: At, body: list[str]) -> Response:
    """The same form back."""
    return Response(await bundles.give(desk, body), media_type="application/octet-stream")


# --- what a job may say -----------------------------------------------------------------------------------------------


@router.get("/schemas/potluck.yaml.json", response_class=JSONResponse, **roles(access.OPEN))
async def schema() -> JSONResponse:
    """The JSON Schema of potluck.yaml, for editors."""
    from potluck.domain.job import json_schema

    return JSONResponse(json_schema(), headers={"Cache-Control": "public, max-age=3600"})
