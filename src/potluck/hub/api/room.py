"""People, pool work, bytes and runs over HTTP."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import FileResponse

import potluck
from potluck.domain import access
from potluck.errors import NotFound
from potluck.hub.commands import files, people, reports, runs, work
from potluck.hub.entrance import Asking, At, read_body, roles
from potluck.protocol import (
    OLDEST_PROTOCOL,
    PROTOCOL,
    Contribution,
    Curve,
    Event,
    HeartbeatAnswer,
    HeartbeatRequest,
    HubInfo,
    InviteAnswer,
    InviteRequest,
    JoinAnswer,
    JoinRequest,
    Json,
    Lease,
    LeaseRequest,
    Report,
    ReportAnswer,
    RunRequest,
    RunView,
    Taste,
    UploadAnswer,
    UploadRequest,
    Version,
    Why,
    WorkerView,
)

router = APIRouter(prefix="/api/v1")
health = APIRouter()


@health.get("/livez", **roles(access.OPEN))
async def livez() -> dict[str, str]:
    return {"status": "ok", "service": "potluck"}


@health.get("/readyz", **roles(access.OPEN))
async def readyz(desk: At) -> dict[str, str]:
    async with desk.ledger.transaction() as tx:
        await tx.row("trusted_worker_live")
    return {"status": "ok", "service": "potluck"}


# --- people ---------------------------------------------------------------------------------------------------------


@router.post("/join", **roles(access.OPEN))
async def join(desk: At, body: JoinRequest) -> JoinAnswer:
    return await people.join(desk, body)


@router.get("/hub", **roles(access.ANYBODY))
async def hub(desk: At) -> HubInfo:
    from datetime import UTC, datetime

    return HubInfo(desk.name, potluck.__version__, PROTOCOL, OLDEST_PROTOCOL, datetime.now(UTC).isoformat())


@router.post("/invites", status_code=201, **roles(access.ADMINS))
async def invite(desk: At, caller: Asking, body: InviteRequest) -> InviteAnswer:
    return await people.invite(desk, body, actor=caller.name)


@router.get("/invites", **roles(access.ADMINS))
async def invites(desk: At) -> list[dict[str, Any]]:
    return await people.invites(desk)


@router.delete("/invites/{invite_id}", status_code=204, **roles(access.ADMINS))
async def revoke_invite(desk: At, caller: Asking, invite_id: str) -> None:
    await people.revoke_invite(desk, invite_id, actor=caller.name)


@router.get("/workers", **roles(access.ANYBODY))
async def workers(desk: At) -> list[WorkerView]:
    return await people.workers(desk)


@router.delete("/workers/{worker_id}", **roles(access.ADMINS))
async def revoke_worker(desk: At, caller: Asking, worker_id: str) -> dict[str, str]:
    return {"revoked": await people.revoke_worker(desk, worker_id, actor=caller.name)}


# --- work -----------------------------------------------------------------------------------------------------------

Wait = Annotated[float, Query(ge=0, le=30)]


@router.post("/heartbeat", **roles(access.WORKERS))
async def heartbeat(desk: At, caller: Asking, body: HeartbeatRequest) -> HeartbeatAnswer:
    return await work.heartbeat(desk, caller, body)


@router.post("/leases", response_model=None, responses={200: {"model": Lease}, 204: {}}, **roles(access.WORKERS))
async def lease(desk: At, caller: Asking, request: Request, body: LeaseRequest, wait: Wait = 0) -> Response:
    granted = await work.lease(desk, caller, body, wait, gone=request.is_disconnected)
    if granted is None:
        return Response(status_code=204)
    return Response(msgspec.json.encode(granted), media_type="application/json")


@router.post("/leases/{lease_id}/report", **roles(access.WORKERS))
async def report(desk: At, caller: Asking, lease_id: str, body: Report) -> ReportAnswer:
    return await reports.report(desk, caller, lease_id, body)


@router.post("/leave", status_code=204, **roles(access.WORKERS))
async def leave(desk: At, caller: Asking) -> None:
    await work.leave(desk, caller)


# --- bytes ----------------------------------------------------------------------------------------------------------


@router.post("/uploads", **roles(access.GIVERS))
async def begin_upload(desk: At, body: UploadRequest) -> UploadAnswer:
    return await files.begin(desk, body.blob)


@router.get("/uploads/{upload_id}", **roles(access.GIVERS))
async def upload_status(desk: At, upload_id: str) -> UploadAnswer:
    return await files.status(desk, upload_id)


@router.patch("/uploads/{upload_id}", **roles(access.GIVERS))
async def append(desk: At, request: Request, upload_id: str, offset: Annotated[int, Query(ge=0)]) -> UploadAnswer:
    piece = await read_body(request, files.MAX_PIECE_BYTES, "a piece of a blob")
    return await files.append(desk, upload_id, offset, piece)


@router.head("/blobs/{hash_}", include_in_schema=False, response_class=FileResponse, **roles(access.ANYBODY))
@router.get("/blobs/{hash_}", response_class=FileResponse, **roles(access.ANYBODY))
async def blob(desk: At, hash_: str) -> FileResponse:
    """The bytes; ranges are honoured. Always as a download, never as something a browser would run."""
    path = desk.blobs.path(hash_)
    if not path.exists():
        raise NotFound(f"there is no blob {hash_[:12]}…")
    kind = "image/png" if await asyncio.to_thread(_is_png, path) else "application/octet-stream"
    headers = {
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": "inline" if kind == "image/png" else "attachment",
        "Content-Security-Policy": "sandbox",
    }
    return FileResponse(path, media_type=kind, headers=headers)


def _is_png(path: Any) -> bool:
    with path.open("rb") as file:
        return bool(file.read(8) == b"\x89PNG\r\n\x1a\n")


# --- runs -----------------------------------------------------------------------------------------------------------


@router.post("/runs", status_code=201, **roles(access.MEMBERS))
async def create_run(
    desk: At,
    caller: Asking,
    body: RunRequest,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> RunView:
    return await runs.create(desk, body, actor=caller.name, key=idempotency_key)


@router.get("/runs", **roles(access.ANYBODY))
async def list_runs(desk: At, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[RunView]:
    return await runs.list_runs(desk, limit)


@router.get("/runs/{run}", **roles(access.ANYBODY))
async def show_run(desk: At, run: str) -> RunView:
    return await runs.show(desk, run)


@router.patch("/runs/{run}/settings", **roles(access.MEMBERS))
async def set_run(desk: At, caller: Asking, run: str, body: dict[str, Json]) -> RunView:
    return await runs.change(desk, run, body, actor=caller.name)


@router.post("/runs/{run}/pause", **roles(access.MEMBERS))
async def pause(desk: At, caller: Asking, run: str) -> RunView:
    return await runs.move(desk, run, "pause", actor=caller.name)


@router.post("/runs/{run}/resume", **roles(access.MEMBERS))
async def resume(desk: At, caller: Asking, run: str) -> RunView:
    return await runs.move(desk, run, "resume", actor=caller.name)


@router.post("/runs/{run}/stop", **roles(access.MEMBERS))
async def stop(desk: At, caller: Asking, run: str) -> RunView:
    return await runs.move(desk, run, "stop", actor=caller.name)


@router.get("/runs/{run}/versions", **roles(access.ANYBODY))
async def versions(desk: At, run: str, after: Annotated[int, Query(ge=-1)] = -1, wait: Wait = 0) -> list[Version]:
    return await runs.versions(desk, run, after, wait)


@router.get("/runs/{run}/contributions", **roles(access.ANYBODY))
async def contributions(desk: At, run: str) -> list[Contribution]:
    return await runs.contributions(desk, run)


@router.get("/runs/{run}/tastes", **roles(access.ANYBODY))
async def tastes(desk: At, run: str) -> list[Taste]:
    return await runs.tastes(desk, run)


@router.get("/runs/{run}/curve", **roles(access.ANYBODY))
async def curve(desk: At, run: str) -> list[Curve]:
    return await runs.curve(desk, run)


@router.get("/runs/{run}/events", **roles(access.ANYBODY))
async def run_events(desk: At, caller: Asking, run: str, after: int = 0) -> list[Event]:
    return await runs.events(desk, after=after, ref=run, caller=caller)


@router.get("/events", **roles(access.ANYBODY))
async def events(desk: At, caller: Asking, after: int = 0) -> list[Event]:
    return await runs.events(desk, after=after, caller=caller)


@router.get("/why/{subject}", **roles(access.ANYBODY))
async def why(desk: At, caller: Asking, subject: str) -> Why:
    return await runs.why(desk, subject, caller=caller)
