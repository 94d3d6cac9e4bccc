"""How does Python talk to a hub about jobs? Every route of theirs as one typed function."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import TypedDict

from potluck.client.line import path_part
from potluck.client.trees import Trees
from potluck.errors import Conflict, Fenced
from potluck.protocol import (
    CheckpointReport,
    JobProgress,
    JobReport,
    JobRequest,
    JobView,
    LogPiece,
    OrdersAnswer,
    OrdersRequest,
    Outlook,
    Point,
    QueueMove,
    Quota,
    ReportAnswer,
    SecretValue,
    SecretView,
    Tree,
    WorkerView,
)


class _Offset(TypedDict):
    offset: int


class JobRoutes(Trees):
    """Part of `Hub`: jobs, their queue, logs and figures; secrets; and the worker's side of all that."""

    # --- asking

    def submit(self, request: JobRequest, key: str = "") -> JobView:
        """Queue a job. The same `key` again gives the same job, so a lost answer queues nothing twice."""
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self._json("POST", "/jobs", JobView, body=request, headers=headers)

    def outlook(self, request: JobRequest) -> Outlook:
        """Where the job would go if it were submitted now. Nothing is stored."""
        return self._json("POST", "/jobs/outlook", Outlook, body=request)

    def jobs(self, limit: int = 100, state: str = "all") -> list[JobView]:
        """The newest jobs; `state` is "open" or "all"."""
        return self._json("GET", "/jobs", list[JobView], params={"limit": str(limit), "state": state})

    def job(self, ref: str) -> JobView:
        """By its id, the front of its id, its name, or `last`."""
        return self._json("GET", f"/jobs/{path_part(ref)}", JobView)

    def wait_job(self, ref: str, state: str, wait_s: float = 20.0) -> JobView:
        """The job as soon as its state is not `state` any more, or as it is after `wait_s` seconds."""
        params = {"state": state, "wait": f"{wait_s:g}"}
        return self._json("GET", f"/jobs/{path_part(ref)}/wait", JobView, params=params, wait_s=wait_s)

    def stop_job(self, ref: str) -> JobView:
        return self._json("POST", f"/jobs/{path_part(ref)}/stop", JobView)

    def retry_job(self, ref: str) -> JobView:
        return self._json("POST", f"/jobs/{path_part(ref)}/retry", JobView)

    def queue(self) -> list[Outlook]:
        """The jobs that wait, in their order, each with the reason."""
        return self._json("GET", "/queue", list[Outlook])

    def move_in_queue(self, move: QueueMove) -> list[Outlook]:
        return self._json("POST", "/queue/move", list[Outlook], body=move)

    # --- what a job leaves

    def log(self, ref: str, attempt: int = 0, offset: int = 0, wait_s: float = 0.0, limit: int = 65536) -> LogPiece:
        """Output from `offset` on; waits up to `wait_s` if there is none yet. Attempt 0 is the newest.

        Once an attempt is known, name it: offsets are of one attempt's output. The next attempt may be named before it
        began, and is waited for.
        """
        params = {"attempt": str(attempt), "offset": str(offset), "wait": f"{wait_s:g}", "limit": str(limit)}
        return self._json("GET", f"/jobs/{path_part(ref)}/log", LogPiece, params=params, wait_s=wait_s)

    def points(
        self, ref: str, after_seq: int = -1, attempt: int = 0, wait_s: float = 0.0, limit: int = 1000
    ) -> list[Point]:
        """What an attempt logged after its point `after_seq`; attempt 0 is the newest."""
        params = {"after_seq": str(after_seq), "attempt": str(attempt), "wait": f"{wait_s:g}", "limit": str(limit)}
        return self._json("GET", f"/jobs/{path_part(ref)}/points", list[Point], params=params, wait_s=wait_s)

    def tree(self, ref: str, what: str = "outputs", attempt: int = 0) -> Tree:
        """`what` is outputs, project or checkpoint; attempt 0 is the newest that has any."""
        params = {"what": what, "attempt": str(attempt)}
        return self._json("GET", f"/jobs/{path_part(ref)}/tree", Tree, params=params)

    # --- secrets

    def secrets(self) -> list[SecretView]:
        return self._json("GET", "/secrets", list[SecretView])

    def set_secret(self, name: str, value: str) -> SecretView:
        return self._json("PUT", f"/secrets/{path_part(name)}", SecretView, body=SecretValue(value))

    def remove_secret(self, name: str) -> None:
        self._send("DELETE", f"/secrets/{path_part(name)}")

    # --- machines

    def drain(self, worker: str, reason: str = "") -> WorkerView:
        """It takes nothing new; what runs there may end."""
        return self._json("POST", f"/workers/{path_part(worker)}/drain", WorkerView, body={"reason": reason})

    def undrain(self, worker: str) -> WorkerView:
        return self._json("POST", f"/workers/{path_part(worker)}/undrain", WorkerView)

    def label(self, worker: str, labels: Mapping[str, str]) -> WorkerView:
        """These are all the labels that the hub gives to the worker from now on."""
        return self._json("PUT", f"/workers/{path_part(worker)}/labels", WorkerView, body=dict(labels))

    def own(self, worker_token: str) -> WorkerView:
        """Make the caller the owner of the worker whose secret this is."""
        return self._json("POST", "/workers/own", WorkerView, body={"worker_token": worker_token})

    def quotas(self) -> list[Quota]:
        return self._json("GET", "/quotas", list[Quota])

    def set_quota(self, quota: Quota) -> list[Quota]:
        return self._json("PUT", "/quotas", list[Quota], body=quota)

    # --- the worker's side

    def orders(self, request: OrdersRequest, wait_s: float = 20.0) -> OrdersAnswer:
        """Say where this worker stands; what it shall do, as soon as there is something, at the latest after `wait_s`."""
        params = {"wait": f"{wait_s:g}"}
        return self._json("POST", "/orders", OrdersAnswer, params=params, body=request, wait_s=wait_s)

    def progress(self, lease_id: str, progress: JobProgress) -> None:
        self._send("POST", f"/leases/{path_part(lease_id)}/progress", body=progress)

    def checkpoint(self, lease_id: str, report: CheckpointReport) -> None:
        self._send("POST", f"/leases/{path_part(lease_id)}/checkpoint", body=report)

    def end(self, lease_id: str, report: JobReport) -> ReportAnswer:
        """Hand in how the attempt ended. Sent twice, it is answered the same."""
        return self._json("POST", f"/leases/{path_part(lease_id)}/end", ReportAnswer, body=report)

    def send_log(self, lease_id: str, offset: int, piece: bytes, *, skip: bool = False) -> int:
        """Add output that begins at `offset` (at most 1 MiB); the offset to go on from.

        That is less than `offset` if the hub misses what was before it: send that again or, if it is gone here too, send
        with `skip`. Raises `Fenced` when the attempt is no longer this worker's.
        """
        params = {"offset": str(offset), **({"skip": "true"} if skip else {})}
        try:
            answer = self._json("POST", f"/leases/{path_part(lease_id)}/log", _Offset, params=params, content=piece)
        except Fenced:
            raise
        except Conflict as error:
            known = re.search(r"offset (\d+)", str(error))
            if known is None:
                raise
            return int(known[1])
        return answer["offset"]

    def send_points(self, lease_id: str, points: list[Point]) -> None:
        self._send("POST", f"/leases/{path_part(lease_id)}/points", body=points)
