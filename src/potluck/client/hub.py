"""How does Python talk to a hub? Every route as one typed function; every failure as one of our errors."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from potluck.client.gangs import GangRoutes
from potluck.client.line import decode, path_part
from potluck.protocol import (
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
    Version,
    Why,
    WorkerView,
)


class Hub(GangRoutes):
    """One hub, seen by one credential."""

    # --- people and machines

    def join(self, request: JoinRequest) -> JoinAnswer:
        return self._json("POST", "/join", JoinAnswer, body=request)

    def info(self) -> HubInfo:
        return self._json("GET", "/hub", HubInfo)

    def invite(self, request: InviteRequest) -> InviteAnswer:
        return self._json("POST", "/invites", InviteAnswer, body=request)

    def invites(self) -> list[dict[str, Json]]:
        return self._json("GET", "/invites", list[dict[str, Json]])

    def revoke_invite(self, id_: str) -> None:
        self._send("DELETE", f"/invites/{path_part(id_)}")

    def workers(self) -> list[WorkerView]:
        return self._json("GET", "/workers", list[WorkerView])

    def revoke_worker(self, id_: str) -> None:
        self._send("DELETE", f"/workers/{path_part(id_)}")

    # --- work

    def heartbeat(self, request: HeartbeatRequest) -> HeartbeatAnswer:
        return self._json("POST", "/heartbeat", HeartbeatAnswer, body=request)

    def lease(self, request: LeaseRequest, wait_s: float = 0.0) -> Lease | None:
        """The next task, or None if there was none for `wait_s` seconds."""
        answer = self._send("POST", "/leases", params={"wait": f"{wait_s:g}"}, body=request, wait_s=wait_s)
        return None if answer.status_code == 204 else decode(answer, Lease, self.address)

    def report(self, lease_id: str, report: Report) -> ReportAnswer:
        """Hand in an outcome. Sent twice, it is answered the same; `accepted` False says why not."""
        return self._json("POST", f"/leases/{path_part(lease_id)}/report", ReportAnswer, body=report)

    def leave(self) -> None:
        self._send("POST", "/leave")

    def versions(self, run_id: str, after: int = -1, wait_s: float = 0.0) -> list[Version]:
        """The way from version `after` to the newest; waits up to `wait_s` if there is no newer one yet."""
        params = {"after": str(after), "wait": f"{wait_s:g}"}
        return self._json("GET", f"/runs/{path_part(run_id)}/versions", list[Version], params=params, wait_s=wait_s)

    # --- runs

    def create_run(self, request: RunRequest, key: str = "") -> RunView:
        """Start a run. The same `key` again gives the same run, so a lost answer starts nothing twice."""
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self._json("POST", "/runs", RunView, body=request, headers=headers)

    def runs(self) -> list[RunView]:
        return self._json("GET", "/runs", list[RunView])

    def run(self, id_: str) -> RunView:
        return self._json("GET", f"/runs/{path_part(id_)}", RunView)

    def set(self, id_: str, settings: Mapping[str, Json]) -> RunView:
        return self._json("PATCH", f"/runs/{path_part(id_)}/settings", RunView, body=dict(settings))

    def pause(self, id_: str) -> RunView:
        return self._json("POST", f"/runs/{path_part(id_)}/pause", RunView)

    def resume(self, id_: str) -> RunView:
        return self._json("POST", f"/runs/{path_part(id_)}/resume", RunView)

    def stop(self, id_: str) -> RunView:
        return self._json("POST", f"/runs/{path_part(id_)}/stop", RunView)

    def contributions(self, id_: str) -> list[Contribution]:
        return self._json("GET", f"/runs/{path_part(id_)}/contributions", list[Contribution])

    def tastes(self, id_: str) -> list[Taste]:
        return self._json("GET", f"/runs/{path_part(id_)}/tastes", list[Taste])

    def curve(self, id_: str) -> list[Curve]:
        return self._json("GET", f"/runs/{path_part(id_)}/curve", list[Curve])

    def events(self, after: int = 0, run_id: str = "") -> list[Event]:
        path = f"/runs/{path_part(run_id)}/events" if run_id else "/events"
        return self._json("GET", path, list[Event], params={"after": str(after)})

    def why(self, id_: str) -> Why:
        return self._json("GET", f"/why/{path_part(id_)}", Why)
