"""Workers of gangs for the hub's tests: they knock, hold their leases, open meeting places and say so, as agents do.

    crew = Crew(hub, "lab-1", "lab-2")           two workers with doors, that reach each other
    crew.cut.add(("lab-1", "lab-2"))             not in this direction any more
    gang = crew.submit(mia, least=2, most=2)
    crew.rounds()                                everybody asks, the hub places and tends, until nothing changes
    crew.of("lab-1").leases                      what it has

Nothing waits and nothing runs: a round is what a second would bring. A module's tests share one hub that is emptied
before each of them (`hub_of_module`, `emptied`): making a ledger takes longer than most of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_kit import Hub, machine, open_hub
from ledger_fixture import fresh_database
from potluck.domain.job import GangSpec, JobSpec, Resources
from potluck.hub.commands import attempts, gang_requests, gang_upkeep
from potluck.hub.commands.desk import Caller
from potluck.protocol import (
    Door,
    GangRequest,
    GangView,
    JobLease,
    JobProgress,
    JobReport,
    MachineNow,
    Meeting,
    OrdersAnswer,
    Reached,
)

MOST_ROUNDS = 12


@dataclass
class Hand:
    """One worker, as its agent remembers itself."""

    caller: Caller
    door: Door | None
    engines: list[str]
    agent: str = "agent-1"
    leases: dict[str, JobLease] = field(default_factory=dict)
    meetings: dict[str, Meeting] = field(default_factory=dict)
    reached: list[Reached] = field(default_factory=list)
    heard: list[OrdersAnswer] = field(default_factory=list)
    opens: bool = True  # a meeting place, when it is asked to

    @property
    def address(self) -> str:
        assert self.door is not None
        return self.door.addresses[0]

    @property
    def lease(self) -> JobLease:
        """The only one it has."""
        (lease,) = self.leases.values()
        return lease

    @property
    def meeting(self) -> Meeting:
        return self.meetings[self.lease.id]


class Crew:
    def __init__(
        self,
        hub: Hub,
        *names: str,
        engines: tuple[str, ...] = ("plain", "torchft"),
        known: bool = False,
        cut: Iterable[tuple[str, str]] = (),
    ) -> None:
        """`known`: they have found out already that each reaches each. `cut`: they knock as soon as they join."""
        self.hub = hub
        self.hands: dict[str, Hand] = {}
        self.cut = set(cut)  # (from, to): does not get through
        self.silent: set[str] = set()  # these ask no more
        self.knocked: list[tuple[str, str]] = []
        for name in names:
            self.join(name, engines=engines)
        if known:
            hub.sql(
                "INSERT INTO reaches (source, target, door, address, rtt_s, bytes_per_s, at)"
                " SELECT a.id, b.id, door_mark(b.door), b.door -> 'addresses' ->> 0, 0.001, 1e8, now()"
                " FROM workers a JOIN workers b ON a.id <> b.id"
                " ON CONFLICT (source, target) DO UPDATE SET address = excluded.address, at = now(), wanted_at = NULL"
            )

    def join(self, name: str, *, engines: tuple[str, ...] = ("plain", "torchft"), door: bool = True) -> Hand:
        number = len(self.hands) + 1
        at = Door(7000 + number, f"the-key-of-{name}", [f"10.0.0.{number}", "127.0.0.1"]) if door else None
        self.hands[name] = Hand(self.hub.join(name), at, list(engines))
        self.ask(name)
        return self.hands[name]

    def of(self, name: str) -> Hand:
        return self.hands[name]

    # --- what agents do

    def ask(self, name: str) -> OrdersAnswer:
        hand = self.hands[name]
        has = machine()
        answer = self.hub.orders(
            hand.caller,
            *hand.leases,
            agent=hand.agent,
            now=MachineNow(
                has.cpu_cores, has.memory_bytes, has.memory_bytes, has.disk_free_bytes, os="linux", engines=hand.engines
            ),
            door=hand.door,
            reached=hand.reached,
            meetings=list(hand.meetings.values()),
        )
        hand.reached = [self._knock(name, knock.worker, knock.door) for knock in answer.knock]
        for lease in answer.leases:
            hand.leases[lease.id] = lease
        for id_ in answer.drop:
            self._forget(hand, id_)
        for order in answer.meet:
            if order.host and hand.opens:
                lease = hand.leases[order.lease_id]
                assert lease.gang is not None
                scheme = "http://" if lease.gang.engine == "torchft" else ""
                place = f"{scheme}{lease.gang.address}:{9000 + order.turn}"
                hand.meetings[order.lease_id] = Meeting(order.lease_id, order.turn, place, host=True)
            elif not order.host:
                hand.meetings[order.lease_id] = Meeting(order.lease_id, order.turn, order.address)
        hand.heard.append(answer)
        for each in answer.end:
            self.end(name, each.lease_id, outcome="cancelled", exit_code=None)
        return answer

    def _knock(self, source: str, target_id: str, door: Door) -> Reached:
        target = next(name for name, hand in self.hands.items() if hand.caller.subject == target_id)
        self.knocked.append((source, target))
        if (source, target) in self.cut or self.hands[target].door != door:
            return Reached(target_id, reason="no answer within a second")
        return Reached(target_id, door.addresses[0], 0.001, 1e8)

    @staticmethod
    def _forget(hand: Hand, lease_id: str) -> None:
        hand.leases.pop(lease_id, None)
        hand.meetings.pop(lease_id, None)

    def run(self, name: str, lease_id: str = "") -> None:
        """Its command runs."""
        hand = self.hands[name]
        lease_id = lease_id or hand.lease.id
        self.hub.run(attempts.progress(self.hub.desk, hand.caller, lease_id, JobProgress("running")))

    def end(self, name: str, lease_id: str = "", *, exit_code: int | None = 0, **changes: Any) -> None:
        """Its command ended, and it says so."""
        hand = self.hands[name]
        lease_id = lease_id or hand.lease.id
        report = JobReport(**{"outcome": "exited", "exit_code": exit_code, **changes})
        assert self.hub.run(attempts.end(self.hub.desk, hand.caller, lease_id, report)).accepted
        self._forget(hand, lease_id)

    def die(self, name: str) -> None:
        """The agent is killed: its connection closes, and it asks no more."""
        self.silent.add(name)
        hand = self.hands[name]
        hand.leases.clear()
        hand.meetings.clear()
        self.hub.hang_up(hand.caller, 11)
        self.hub.run(attempts.expire(self.hub.desk))

    def back(self, name: str) -> None:
        """Another agent on the same machine; its door is another one."""
        hand = self.hands[name]
        self.silent.discard(name)
        hand.agent += "+"
        assert hand.door is not None
        hand.door = Door(hand.door.port + 100, hand.door.key + "+", hand.door.addresses)

    # --- time passes

    def tend(self) -> None:
        self.hub.run(gang_upkeep.tend(self.hub.desk))

    def round(self) -> None:
        self.hub.place()
        for name in self.hands:
            if name not in self.silent:
                self.ask(name)
        self.tend()

    def rounds(self) -> None:
        """Until nothing changes."""
        before = None
        for _ in range(MOST_ROUNDS):
            self.round()
            now = self._state()
            if now == before:
                return
            before = now
        raise AssertionError(f"it does not come to rest: {now}")

    def _state(self) -> tuple[Any, ...]:
        rows = self.hub.sql(
            "SELECT runs.id, runs.state, gangs.host, gangs.turn, gangs.address, gangs.due FROM runs"
            " LEFT JOIN gangs ON gangs.run_id = runs.id ORDER BY runs.id"
        )
        ways = self.hub.sql(
            "SELECT source, target, address, wanted_at IS NOT NULL AS wanted FROM reaches ORDER BY 1, 2"
        )
        mine = [(sorted(hand.leases), sorted(map(repr, hand.meetings.values()))) for hand in self.hands.values()]
        return repr(rows), repr(ways), repr(mine)

    # --- people

    def submit(self, who: Caller, *, key: str | None = None, **changes: Any) -> str:
        return self.hub.run(gang_requests.submit(self.hub.desk, who, self.request(**changes), key=key)).id

    def request(self, **changes: Any) -> GangRequest:
        names = ("least", "most", "batch", "policy", "engine", "compat")
        gang = GangSpec(**{name: changes.pop(name) for name in names if name in changes})
        resources = changes.pop("resources", Resources(cpu=changes.pop("cpu", "4")))
        command = changes.pop("command", ["python", "train.py"])
        return GangRequest(JobSpec(command, resources=resources, gang=gang, **changes), self.hub.project())

    def view(self, who: Caller, ref: str) -> GangView:
        return self.hub.run(gang_requests.show(self.hub.desk, who, ref))

    def states(self, who: Caller, ref: str) -> list[str]:
        return [member.state for member in self.view(who, ref).members]

    def at_work(self) -> list[str]:
        """Workers that have a lease."""
        return sorted(name for name, hand in self.hands.items() if hand.leases)


@contextmanager
def hub_of_module(dsn: str, folder: Path) -> Iterator[Hub]:
    with fresh_database(dsn) as fresh, open_hub(fresh, folder) as hub:
        yield hub


def emptied(hub: Hub) -> Hub:
    """The same hub, as if nothing had ever happened there; the bytes of projects may stay."""
    tables = hub.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    names = [row["tablename"] for row in tables if row["tablename"] not in ("migrations", "blobs")]
    # one statement after the other, whatever refers to what
    hub.sql("SET session_replication_role = replica; " + "; ".join(f'DELETE FROM "{name}"' for name in names))
    hub.sql("SET session_replication_role = DEFAULT")
    hub.desk.memory.forecast = None
    hub.desk.memory.told.clear()
    return hub


LAW = """
SELECT gangs.run_id, runs.state, gangs.finished, gangs.formed_at IS NOT NULL AS formed, gangs.least,
    gangs.host IS NOT NULL AND NOT EXISTS (
        SELECT FROM attempts JOIN jobs ON jobs.run_id = attempts.run_id
        WHERE jobs.gang = gangs.run_id AND attempts.lease_id = gangs.host AND attempts.ended_at IS NULL) AS ghost,
    count(attempts.run_id) AS live, count(DISTINCT attempts.worker_id) AS machines,
    count(*) FILTER (WHERE NOT jobs.finished) AS open, count(*) AS members, gangs.most
FROM gangs JOIN runs ON runs.id = gangs.run_id JOIN jobs ON jobs.gang = gangs.run_id
LEFT JOIN attempts ON attempts.run_id = jobs.run_id AND attempts.ended_at IS NULL
GROUP BY gangs.run_id, runs.state
"""


def check_gangs(hub: Hub) -> None:
    """What holds of every gang that has been tended, whatever happened."""
    for row in hub.sql(LAW):
        assert row["members"] == row["most"], row
        assert row["live"] == row["machines"], f"two members on one machine: {row}"
        assert not row["ghost"], f"a lease that is over keeps the meeting place: {row}"
        assert row["formed"] or row["live"] == 0 or row["finished"], (
            f"members at work in a gang that is not formed: {row}"
        )
        assert row["finished"] == (
            row["state"] in ("succeeded", "failed") or (row["state"] == "cancelled" and not row["open"])
        ), row
        if row["finished"]:
            assert row["open"] == 0, f"a gang that is over has members that are not: {row}"
