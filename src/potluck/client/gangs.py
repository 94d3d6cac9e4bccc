"""How does Python talk to a hub about gangs? Every route of theirs as one typed function."""

from __future__ import annotations

import uuid

from potluck.client.jobs import JobRoutes
from potluck.client.line import path_part
from potluck.protocol import GangRequest, GangView, Link


class GangRoutes(JobRoutes):
    """Part of `Hub`: gangs. What a member printed and left is its job's: `GangView.members` names the jobs."""

    def submit_gang(self, request: GangRequest, key: str = "") -> GangView:
        """Queue a gang. The same `key` again gives the same gang, so a lost answer queues nothing twice."""
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self._json("POST", "/gangs", GangView, body=request, headers=headers)

    def gangs(self, limit: int = 100, state: str = "all") -> list[GangView]:
        """The newest gangs; `state` is "open" or "all"."""
        return self._json("GET", "/gangs", list[GangView], params={"limit": str(limit), "state": state})

    def gang(self, ref: str) -> GangView:
        """By its id, the front of its id, its name, or `last`."""
        return self._json("GET", f"/gangs/{path_part(ref)}", GangView)

    def wait_gang(self, ref: str, state: str, wait_s: float = 20.0) -> GangView:
        """The gang as soon as its state is not `state` any more, or as it is after `wait_s` seconds."""
        params = {"state": state, "wait": f"{wait_s:g}"}
        return self._json("GET", f"/gangs/{path_part(ref)}/wait", GangView, params=params, wait_s=wait_s)

    def stop_gang(self, ref: str) -> GangView:
        """All its members are stopped."""
        return self._json("POST", f"/gangs/{path_part(ref)}/stop", GangView)

    def links(self) -> list[Link]:
        """What the workers found when they tried to reach one another."""
        return self._json("GET", "/links", list[Link])
