"""Whatever machines, people and hubs do in whatever order: is every job in one place, and does each come to an end?

A hypothesis machine over the real ledger. Workers are modelled as what they are: an agent with jobs that it believes to
run. Time is SQL: deadlines and hang-ups are moved into the past. After each step the laws are read from the tables
(hub_kit.check_jobs); at the end everything settles, and nothing may be left over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hub_kit import Hub, check_jobs, machine, open_hub
from ledger_fixture import fresh_database
from potluck.errors import Conflict, Fenced, NotKnown
from potluck.hub.commands import attempts, jobs, machines, people, placing, work
from potluck.hub.commands.desk import Caller
from potluck.protocol import CheckpointReport, JobProgress, JobReport, OrdersAnswer

ADMIN = Caller("admin", "admin-1", "admin")
STEPS = [
    *["submit"] * 3,
    *["place"] * 3,
    *["ask"] * 5,
    *["go_on"] * 3,
    *["finish"] * 4,
    *["stop_or_retry"] * 2,
    *["fall_silent", "hang_up", "restart_agent", "come_and_go", "drain", "restart_hub", "expire"],
]
ENDS = ["exited", "exited", "exited", "failed", "cancelled", "returned"]


@dataclass
class Agent:
    """A machine as it sees itself."""

    worker: Caller
    name: str
    holds: set[str] = field(default_factory=set)  # leases that it believes to have
    unsaid: list[tuple[str, JobReport]] = field(default_factory=list)  # ends that it has not reported yet


class JobMachine(RuleBasedStateMachine):
    hub: Hub  # set by the test, one for all examples
    tree: Any

    def __init__(self) -> None:
        super().__init__()
        self.agents: list[Agent] = []
        self.said: list[tuple[Caller, str, JobReport, bool]] = []  # every end that was reported, and its answer
        self.jobs: list[str] = []
        self.stopped: set[str] = set()
        self.serial = 0

    @initialize()
    def begin(self) -> None:
        self.owners = [self.hub.member("mia"), self.hub.member("noa")]
        for name in ("ann", "bob"):
            self._join(name)

    def _join(self, name: str) -> None:
        self.serial += 1
        self.agents.append(Agent(self.hub.join(name), f"agent-{self.serial}"))

    @rule(seed=st.integers(0, 1 << 32), what=st.sampled_from(STEPS))
    def step(self, seed: int, what: str) -> None:
        """One rule for all: hypothesis would leave out some rules in each example, and here they need one another.

        It draws the same two things each time, whatever happened: ids are random, so what a step finds is never quite the
        same, and hypothesis gives up when an example that it plays again draws something else.
        """
        getattr(self, what)(Random(seed))

    # --- people

    def submit(self, luck: Random) -> None:
        owner = self.owners[luck.randint(0, 1)]
        changes = {
            "cpu": luck.choice(["1", "2", "3.5", "4"]),
            "retries": luck.randint(0, 2),
            "retry_on": luck.choice(["lost", "any"]),
            "priority": luck.choice([0, 0, 5]),
        }
        self.jobs.append(self.hub.submit_job(owner, **changes))

    def stop_or_retry(self, luck: Random) -> None:
        if not self.jobs:
            return
        job, verb = (
            self.jobs[-1 - luck.randrange(10) % len(self.jobs)],
            luck.choice([jobs.stop, jobs.stop, jobs.retry]),
        )
        try:
            view = self.hub.run(verb(self.hub.desk, ADMIN, job))
        except Conflict:
            return
        if verb is jobs.stop:
            assert view.state == "cancelled"
            self.stopped.add(job)
        else:
            assert view.state == "queued"
            self.stopped.discard(job)

    def drain(self, luck: Random) -> None:
        agent = self._agent(luck)
        draining = luck.choice([False, True])
        self.hub.run(machines.drain(self.hub.desk, ADMIN, agent.worker.subject, draining=draining))

    # --- workers

    def _agent(self, luck: Random) -> Agent:
        return self.agents[luck.randrange(10) % len(self.agents)]

    def ask(self, luck: Random) -> None:
        """The answer may get lost; then the worker does not know of it."""
        agent, lost = self._agent(luck), luck.choice([False, False, False, True])
        holding = [*agent.holds, *(lease for lease, _ in agent.unsaid)]
        try:
            answer = self.hub.orders(agent.worker, *holding, agent=agent.name, now=machine(cpu=4))
        except Conflict:  # a twin is there, or was half a minute ago
            self.hub.sql(
                "UPDATE workers SET ordered_at = ordered_at - interval '31 seconds' WHERE id = %(w)s",
                w=agent.worker.subject,
            )
            return
        if lost:
            return
        self._obey(agent, answer)

    def _obey(self, agent: Agent, answer: OrdersAnswer) -> None:
        for lease in answer.leases:
            assert lease.id not in agent.holds, "given twice to one that has it"
            assert lease.run_id not in self.stopped, "a stopped job was given"
            agent.holds.add(lease.id)
        for end in answer.end:
            if end.lease_id in agent.holds:
                agent.holds.discard(end.lease_id)
                agent.unsaid.append((end.lease_id, JobReport("cancelled", signal="SIGTERM")))
        for lease_id in answer.drop:
            agent.holds.discard(lease_id)
            agent.unsaid = [(id_, report) for id_, report in agent.unsaid if id_ != lease_id]

    def go_on(self, luck: Random) -> None:
        agent = self._agent(luck)
        for lease_id in sorted(agent.holds):
            live, state = self._is_live(lease_id), luck.choice(["preparing", "running", "running"])
            try:
                self.hub.run(attempts.progress(self.hub.desk, agent.worker, lease_id, JobProgress(state)))
                if luck.choice([False, True]):
                    report = CheckpointReport(self.tree, 1, 1)
                    self.hub.run(attempts.checkpoint(self.hub.desk, agent.worker, lease_id, report))
                assert live
            except Fenced:
                assert not live

    def finish(self, luck: Random) -> None:
        """A command ends; the report arrives once, twice, or waits in the spool. Old ones may come again, too."""
        agent = self._agent(luck)
        how, code = luck.choice(ENDS), luck.choice([0, 0, 1])
        report = JobReport(how, exit_code=code if how == "exited" else None, reason="so it is")
        if agent.holds:
            lease_id = sorted(agent.holds)[luck.randrange(10) % len(agent.holds)]
            agent.holds.discard(lease_id)
            agent.unsaid.append((lease_id, report))
        if luck.choice([False, True]):
            self._say_all(agent)
        if self.said and luck.choice([False, True]):
            worker, lease_id, before, accepted = self.said[luck.randrange(10) % len(self.said)]
            if worker in [each.worker for each in self.agents]:
                assert self.hub.run(attempts.end(self.hub.desk, worker, lease_id, before)).accepted == accepted

    def _say_all(self, agent: Agent) -> None:
        for lease_id, report in agent.unsaid:
            live = self._is_live(lease_id)
            answer = self.hub.run(attempts.end(self.hub.desk, agent.worker, lease_id, report))
            assert answer.accepted == live, answer
            self.said.append((agent.worker, lease_id, report, answer.accepted))
        agent.unsaid = []

    def restart_agent(self, luck: Random) -> None:
        """kill -9: the jobs die with it. What had ended before is in its spool."""
        agent = self._agent(luck)
        self.serial += 1
        agent.name = f"agent-{self.serial}"
        agent.holds = set()
        self.hub.hang_up(agent.worker, 0)

    def come_and_go(self, luck: Random) -> None:
        what = luck.choice(["join", "twin", "leave", "revoke"])
        agent = self._agent(luck)
        if what == "join" and len(self.agents) < 4:
            self._join("ann")
        elif what == "twin" and len(self.agents) < 4:
            self.serial += 1  # a second agent with the same credential
            self.agents.append(Agent(agent.worker, f"agent-{self.serial}"))
        elif what in ("leave", "revoke") and len({each.worker.subject for each in self.agents}) > 1:
            self.agents = [each for each in self.agents if each.worker.subject != agent.worker.subject]
            if what == "leave":
                self.hub.run(work.leave(self.hub.desk, agent.worker))
            else:
                self.hub.run(people.revoke_worker(self.hub.desk, agent.worker.subject, actor="the test"))

    # --- time, and the hub

    def place(self, luck: Random) -> None:
        self.hub.place()

    def expire(self, luck: Random) -> None:
        self.hub.run(attempts.expire(self.hub.desk))

    def fall_silent(self, luck: Random) -> None:
        """Longer than the patience of one of its jobs, or of all; also of those that were never delivered."""
        live = [str(row["id"]) for row in self.hub.sql("SELECT id FROM leases WHERE ended_at IS NULL ORDER BY id")]
        if live:
            self.hub.let_lapse(luck.choice(live))
        if luck.choice([False, True]):
            self.hub.run(attempts.expire(self.hub.desk))

    def hang_up(self, luck: Random) -> None:
        self.hub.hang_up(self._agent(luck).worker, luck.choice([1, 11]))
        if luck.choice([False, True]):
            self.hub.run(attempts.expire(self.hub.desk))

    def restart_hub(self, luck: Random) -> None:
        self.hub.restart()

    def _is_live(self, lease_id: str) -> bool:
        return bool(self.hub.one("SELECT ended_at IS NULL FROM leases WHERE id = %(id)s", id=lease_id))

    # --- what must hold

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "owners"):
            return
        check_jobs(self.hub)
        assert self.hub.one("SELECT count(*) FROM jobs WHERE run_id = ANY(%(ids)s)", ids=self.jobs) == len(self.jobs)
        states = self.hub.sql("SELECT id, state FROM runs WHERE id = ANY(%(ids)s)", ids=sorted(self.stopped))
        assert all(row["state"] == "cancelled" for row in states), "a stopped job is not stopped"

    def teardown(self) -> None:
        """Let everything settle: all workers gone, a fresh machine that does all that waits, and nothing is left."""
        if not hasattr(self, "owners"):
            return
        try:
            self._settle()
        finally:
            for job in self.jobs:  # the next example begins with an empty line
                if self.hub.job(ADMIN, job).state not in ("succeeded", "failed", "cancelled", "lost"):
                    self.hub.run(jobs.stop(self.hub.desk, ADMIN, job))

    def _settle(self) -> None:
        for worker in {agent.worker.subject: agent.worker for agent in self.agents}.values():
            self.hub.run(work.leave(self.hub.desk, worker))
            self.hub.run(people.revoke_worker(self.hub.desk, worker.subject, actor="the test"))
            with pytest.raises(NotKnown):
                self.hub.orders(worker)
        assert self.hub.one("SELECT count(*) FROM attempts WHERE ended_at IS NULL") == 0, "a place was not freed"
        self.laws()
        fresh = self.hub.join("fresh")
        self.hub.orders(fresh, now=machine(cpu=4))
        for _ in range(3 * len(self.jobs) + 3):
            waiting = self.hub.run(placing.queue(self.hub.desk))
            assert all(each.reason for each in waiting), "one waits without a reason"
            if not waiting:
                break
            assert self.hub.place() > 0, f"nothing goes on: {waiting}"
            for lease in self.hub.orders(fresh, now=machine(cpu=4)).leases:
                assert self.hub.end_job(fresh, lease.id).accepted
        for job in self.jobs:
            view = self.hub.job(ADMIN, job)
            assert view.state in ("succeeded", "failed", "cancelled", "lost"), f"{job} is stuck: {view.state}"
            assert (view.state == "cancelled") == (job in self.stopped)
        self.laws()
        self.hub.run(work.leave(self.hub.desk, fresh))


@pytest.fixture
def machine_hub(embedded_dsn: str) -> Iterator[Hub]:
    with ExitStack() as stack:
        dsn = stack.enter_context(fresh_database(embedded_dsn))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        yield stack.enter_context(open_hub(dsn, Path(folder) / "blobs"))


def _run(hub: Hub, examples: int, steps: int) -> None:
    members = {"hub": hub, "tree": hub.project(state=b"1")}
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        type("Machine", (JobMachine,), members),
        settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None),
    )


@pytest.mark.timeout(1200)  # a failure is shrunk first, for up to five minutes
def test_no_job_is_lost_stuck_or_in_two_places(machine_hub: Hub) -> None:
    _run(machine_hub, examples=20, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_for_jobs_for_long(machine_hub: Hub) -> None:
    _run(machine_hub, examples=150, steps=60)
