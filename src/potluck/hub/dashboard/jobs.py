"""The pages of jobs and machines, and what can be pressed there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, StreamingResponse

from potluck import telemetry
from potluck.domain import access
from potluck.errors import NotFound
from potluck.hub.commands import jobs, keeping, machines
from potluck.hub.commands.desk import Caller, Desk
from potluck.hub.dashboard import views
from potluck.hub.dashboard.answers import Page, page, see
from potluck.hub.dashboard.pages import board_of
from potluck.hub.entrance import Asking, At, roles
from potluck.protocol import JobView, QueueMove

TAIL_BYTES = 65536
"""So much of a log is in the page itself, for those without a script, and where the script begins."""
LONGEST_TAIL = 20_000
"""Characters of it that are shown without a script."""

router = APIRouter(route_class=Page, include_in_schema=False)
Attempt = Annotated[int, Query(ge=0, le=1_000_000)]


@router.get("/queue", response_class=HTMLResponse, **roles(access.ANYBODY))
async def queue(request: Request, desk: At, caller: Asking) -> Response:
    return await _live(request, desk, caller, "queue.html", show="queue")


@router.get("/workers", response_class=HTMLResponse, **roles(access.ANYBODY))
async def workers(request: Request, desk: At, caller: Asking) -> Response:
    return await _live(request, desk, caller, "workers.html", show="workers")


async def _live(request: Request, desk: Desk, caller: Caller, template: str, **what: str) -> Response:
    frame = await board_of(request).channel(await views.find(desk, caller, **what)).now()
    return page(template, request=request, caller=caller, hub=desk.name, frame=frame, live=urlencode(what))


@router.get("/jobs/{job}", response_class=HTMLResponse, **roles(access.ANYBODY))
async def one_job(request: Request, desk: At, caller: Asking, job: str, attempt: Attempt = 0) -> Response:
    view = await jobs.show(desk, caller, job)
    if view.id != job:
        return RedirectResponse(f"/jobs/{view.id}", 307)
    frame = await board_of(request).channel(await views.find(desk, caller, job=view.id)).now()
    return page(
        "job.html",
        request=request,
        caller=caller,
        hub=desk.name,
        frame=frame,
        live=urlencode({"job": view.id}),
        job_id=view.id,
        name=view.name,
        owner=view.owner,
        gang=view.gang,
        attempts=len(view.attempts),
        log=await _tail(desk, caller, view, attempt) if view.mine else None,
    )


async def _tail(desk: Desk, caller: Caller, view: JobView, attempt: int) -> dict[str, Any]:
    """The end of an attempt's output as plain text, and where it begins."""
    number = attempt or len(view.attempts) or 1
    if number > len(view.attempts):
        waits = "It waits; its output will be here." if not attempt else "There is no such attempt."
        return {"attempt": number, "offset": 0, "text": "", "empty": waits}
    end = await asyncio.to_thread(desk.logs.end, view.id, number)
    start = max(0, end - TAIL_BYTES)
    piece = await keeping.log(desk, caller, view.id, attempt=number, offset=start, limit=TAIL_BYTES)
    text = piece.text if not start else piece.text.partition("\n")[2] or piece.text
    # a progress bar writes its line again and again: the last counts
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    plain = telemetry.clean("\n".join(lines), keep="\n\t", limit=TAIL_BYTES)
    empty = "It printed nothing." if piece.over else "Nothing yet."
    return {"attempt": number, "offset": piece.offset, "text": plain[-LONGEST_TAIL:], "empty": empty}


@router.post("/jobs/{job}/stop", **roles(access.MEMBERS))
async def stop(request: Request, desk: At, caller: Asking, job: str) -> Response:
    view = await jobs.stop(desk, caller, job)
    return _pressed(request, f"/jobs/{view.id}")


@router.post("/jobs/{job}/retry", **roles(access.MEMBERS))
async def retry(request: Request, desk: At, caller: Asking, job: str) -> Response:
    view = await jobs.retry(desk, caller, job)
    return _pressed(request, f"/jobs/{view.id}")


@router.post("/jobs/{job}/front", **roles(access.ADMINS))
async def to_front(request: Request, desk: At, caller: Asking, job: str) -> Response:
    await jobs.move(desk, caller, QueueMove(job))
    return _pressed(request, "/queue")


def _pressed(request: Request, path: str) -> Response:
    """What it led to, as it is now."""
    board_of(request).spoil()
    return see(path)


# --- what a job left ------------------------------------------------------------------------------------------------


@router.get("/jobs/{job}/log.txt", response_class=StreamingResponse, **roles(access.PEOPLE))
async def whole_log(desk: At, caller: Asking, job: str, attempt: Attempt = 0) -> Response:
    """All that is kept of an attempt's output, as it came, for an editor."""
    first = await keeping.log(desk, caller, job, attempt=attempt, limit=1 << 20)
    view = await jobs.show(desk, caller, job)

    async def pieces() -> AsyncIterator[bytes]:
        piece = first
        while piece.text:
            yield piece.text.encode()
            offset = piece.next_offset
            piece = await keeping.log(desk, caller, view.id, attempt=first.attempt, offset=offset, limit=1 << 20)

    headers = _as_download(f"{view.name}-{first.attempt}.log")
    return StreamingResponse(pieces(), media_type="text/plain; charset=utf-8", headers=headers)


@router.get("/jobs/{job}/files/{path:path}", response_class=FileResponse, **roles(access.PEOPLE))
async def artefact(desk: At, caller: Asking, job: str, path: str, attempt: Attempt = 0) -> Response:
    """A file that the job left. Whatever it is, the browser keeps it and never shows or runs it."""
    tree = await keeping.tree(desk, caller, job, "outputs", attempt)
    file = next((file for file in tree.files if file.path == path), None)
    if file is None or not desk.blobs.has(file.blob.hash):
        raise NotFound(f"{job} left no file {path[:200]}")
    headers = {**_as_download(path.rpartition("/")[2]), "Cache-Control": "private, no-cache"}
    return FileResponse(desk.blobs.path(file.blob.hash), media_type="application/octet-stream", headers=headers)


def _as_download(name: str) -> dict[str, str]:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)[:120] or "file"
    disposition = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name[:200], safe='')}"
    return {"Content-Disposition": disposition, "Content-Security-Policy": "sandbox", "Cache-Control": "no-store"}


# --- machines -------------------------------------------------------------------------------------------------------


@router.post("/workers/{worker}/drain", **roles(access.ADMINS))
async def drain(request: Request, desk: At, caller: Asking, worker: str) -> Response:
    await machines.drain(desk, caller, worker, draining=True)
    return _pressed(request, "/workers")


@router.post("/workers/{worker}/undrain", **roles(access.ADMINS))
async def undrain(request: Request, desk: At, caller: Asking, worker: str) -> Response:
    await machines.drain(desk, caller, worker, draining=False)
    return _pressed(request, "/workers")
