"""A gang for the page's tests: machines with doors that reach one another, and members that train as fast as one says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dashboard_room import Room
from potluck.domain.job import GangSpec, JobSpec, Resources
from potluck.hub.commands import attempts, gang_requests, orders
from potluck.hub.commands.desk import Caller
from potluck.protocol import (
    Door,
    GangRequest,
    GangView,
    JobLease,
    JobProgress,
    MachineNow,
    OrdersRequest,
    Point,
    Reached,
    Rules,
)

PHASES = ("load", "forward", "backward", "sum", "optimizer", "outside")


@dataclass
class Member:
    """One machine, and the place in a gang that it got."""

    caller: Caller
    door: Door
    lease: JobLease | None = None
    printed: int = 0
    seq: int = 0


@dataclass
class Crew:
    """Machines that may train together, played by calling the real commands."""

    room: Room
    members: dict[str, Member] = field(default_factory=dict)

    def machine(self, name: str) -> Caller:
        caller = self.room.worker(name)
        number = len(self.members) + 1
        self.members[caller.subject] = Member(caller, Door(7000 + number, f"the-key-of-{number}", [f"10.0.0.{number}"]))
        self.ask(caller)
        return caller

    def ask(self, caller: Caller, reached: Sequence[Reached] = ()) -> list[JobLease]:
        """The machine asks for orders, and knocks where it shall; it is told of new leases."""
        one = self.members[caller.subject]
        request = OrdersRequest(
            agent=f"agent of {caller.name}"[:40],
            holding=[one.lease.id] if one.lease else [],
            now=MachineNow(8, 1 << 34, 1 << 33, 1 << 37, os="linux", arch="x86_64", engines=["plain"]),
            rules=Rules(),
            executors=["process", "bubblewrap", "podman"],
            door=one.door,
            reached=list(reached),
        )
        answer = self.room.do(orders.orders(self.room.desk, caller, request, 0))
        found = [Reached(each.worker, each.door.addresses[0], 0.001, 1e8) for each in answer.knock]
        return answer.leases + (self.ask(caller, found) if found else [])

    def submit(self, owner: Caller, least: int, most: int, **spec: Any) -> GangView:
        command = spec.pop("command", "python train.py")
        asked = JobSpec(
            ["/bin/sh", "-c", command],
            resources=Resources(**spec.pop("resources", {})),
            gang=GangSpec(least, most, **spec.pop("gang", {})),
            **spec,
        )
        project = self.room.tree({"train.py": b"print('hello')"})
        return self.room.do(gang_requests.submit(self.room.desk, owner, GangRequest(asked, project)))

    def form(self) -> None:
        """All knock at all doors; whoever is placed begins to train."""
        for _ in range(3):
            self.room.place()
            for one in self.members.values():
                for lease in self.ask(one.caller):
                    one.lease, one.printed, one.seq = lease, 0, 0
                    for state in ("preparing", "running"):
                        said = JobProgress(state, executor="process", environment={"python": "3.12.4"})
                        self.room.do(attempts.progress(self.room.desk, one.caller, lease.id, said))

    def of(self, caller: Caller) -> Member:
        one = self.members[caller.subject]
        assert one.lease is not None, f"{caller.name} has no place in a gang"
        return one

    def trains(self, caller: Caller, *steps: int, at: float = 1e9, **values: float) -> None:
        """A point for each of these steps, as the library writes them; values without the "gang/" in front."""
        one = self.of(caller)
        own = {f"gang/{name}": value for name, value in values.items()}
        points = [Point(step, at + step, own, seq=one.seq + i) for i, step in enumerate(steps)]
        one.seq += len(points)
        self.room.logs(caller, self.lease(caller), *points)

    def logs(self, caller: Caller, step: int, **values: float) -> None:
        one = self.of(caller)
        self.room.logs(caller, self.lease(caller), Point(step, 1e9 + step, dict(values), seq=one.seq))
        one.seq += 1

    def says(self, caller: Caller, text: str) -> None:
        one = self.of(caller)
        one.printed = self.room.prints(caller, self.lease(caller), text, one.printed)

    def ends(self, caller: Caller, exit_code: int = 0, **report: Any) -> None:
        self.room.finish(caller, self.lease(caller), exit_code, **report)
        self.members[caller.subject].lease = None

    def lease(self, caller: Caller) -> JobLease:
        found = self.of(caller).lease
        assert found is not None
        return found
