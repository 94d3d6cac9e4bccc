"""Jobs over HTTP: what people ask of them, and what workers say about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request

from potluck.domain import access
from potluck.hub.commands import attempts, jobs, machines, orders, placing
from potluck.hub.entrance import Asking, At, roles
from potluck.protocol import (
    CheckpointReport,
    JobProgress,
    JobReport,
    JobRequest,
    JobView,
    OrdersAnswer,
    OrdersRequest,
    Outlook,
    QueueMove,
    Quota,
    ReportAnswer,
    WorkerView,
)

router = APIRouter(prefix="/api/v1")
of_workers = APIRouter(prefix="/api/v1")
"""Installed before all others: routes are looked through in their order, and a thousand workers ask for these."""

Wait = Annotated[float, Query(ge=0, le=30)]


@dataclass(frozen=True)
class DrainRequest:
    reason: str = ""


@dataclass(frozen=True)
class OwnRequest:
    worker_token: str = field(repr=False)


# --- people ---------------------------------------------------------------------------------------------------------


@router.post("/jobs", status_code=201, **roles(access.MEMBERS))
async def submit(
    desk: At,
    caller: Asking,
    body: JobRequest,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> JobView:
    return await jobs.submit(desk, caller, body, key=idempotency_key)


@router.post("/jobs/outlook", **roles(access.MEMBERS))
async def outlook(desk: At, caller: Asking, body: JobRequest) -> Outlook:
    return await jobs.outlook(desk, caller, body)


@router.get("/jobs", **roles(access.ANYBODY))
async def list_jobs(
    desk: At, caller: Asking, limit: Annotated[int, Query(ge=1, le=1000)] = 100, state: str = "all"
) -> list[JobView]:
    return await jobs.list_jobs(desk, caller, limit=limit, state=state)


@router.get("/jobs/{job}", **roles(access.ANYBODY))
async def show_job(desk: At, caller: Asking, job: str) -> JobView:
    return await jobs.show(desk, caller, job)


@router.get("/jobs/{job}/wait", **roles(access.ANYBODY))
async def wait_job(desk: At, caller: Asking, job: str, state: str = "", wait: Wait = 0) -> JobView:
    return await jobs.wait(desk, caller, job, state, wait)


@router.post("/jobs/{job}/stop", **roles(access.MEMBERS))
async def stop_job(desk: At, caller: Asking, job: str) -> JobView:
    return await jobs.stop(desk, caller, job)


@router.post("/jobs/{job}/retry", **roles(access.MEMBERS))
async def retry_job(desk: At, caller: Asking, job: str) -> JobView:
    return await jobs.retry(desk, caller, job)


@router.get("/queue", **roles(access.ANYBODY))
async def queue(desk: At) -> list[Outlook]:
    return await placing.queue(desk)


@router.post("/queue/move", **roles(access.ADMINS))
async def move_in_queue(desk: At, caller: Asking, body: QueueMove) -> list[Outlook]:
    return await jobs.move(desk, caller, body)


# --- machines -------------------------------------------------------------------------------------------------------


@router.post("/workers/own", **roles(access.MEMBERS))
async def own_worker(desk: At, caller: Asking, body: OwnRequest) -> WorkerView:
    return await machines.own(desk, caller, body.worker_token)


@router.post("/workers/{worker}/drain", **roles(access.ADMINS))
async def drain(desk: At, caller: Asking, worker: str, body: DrainRequest | None = None) -> WorkerView:
    return await machines.drain(desk, caller, worker, draining=True, reason=body.reason if body else "")


@router.post("/workers/{worker}/undrain", **roles(access.ADMINS))
async def undrain(desk: At, caller: Asking, worker: str) -> WorkerView:
    return await machines.drain(desk, caller, worker, draining=False)


@router.put("/workers/{worker}/labels", **roles(access.ADMINS))
async def label_worker(desk: At, caller: Asking, worker: str, body: dict[str, str]) -> WorkerView:
    return await machines.label(desk, caller, worker, body)


@router.get("/quotas", **roles(access.ADMINS))
async def quotas(desk: At) -> list[Quota]:
    return await machines.quotas(desk)


@router.put("/quotas", **roles(access.ADMINS))
async def set_quota(desk: At, caller: Asking, body: Quota) -> list[Quota]:
    return await machines.set_quota(desk, caller, body)


# --- workers --------------------------------------------------------------------------------------------------------


@of_workers.post("/orders", **roles(access.WORKERS))
async def take_orders(desk: At, caller: Asking, request: Request, body: OrdersRequest, wait: Wait = 0) -> OrdersAnswer:
    async def gone() -> None:
        # The body has been read: the next message can only be the end of the connection.
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return await orders.orders(desk, caller, body, wait, gone=gone)


@of_workers.post("/leases/{lease_id}/progress", status_code=204, **roles(access.WORKERS))
async def progress(desk: At, caller: Asking, lease_id: str, body: JobProgress) -> None:
    await attempts.progress(desk, caller, lease_id, body)


@of_workers.post("/leases/{lease_id}/end", **roles(access.WORKERS))
async def end(desk: At, caller: Asking, lease_id: str, body: JobReport) -> ReportAnswer:
    return await attempts.end(desk, caller, lease_id, body)


@of_workers.post("/leases/{lease_id}/checkpoint", status_code=204, **roles(access.WORKERS))
async def checkpoint(desk: At, caller: Asking, lease_id: str, body: CheckpointReport) -> None:
    await attempts.checkpoint(desk, caller, lease_id, body)
