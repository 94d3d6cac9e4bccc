"""Whatever happens in whatever order: does every position have exactly one place, and every update one fate?

A hypothesis machine over the real ledger. Its rules are what machines and people do to a hub; after each step the
invariants are read from the tables themselves. Each example is a run of its own in one database.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hub_kit import Hub, check_accounts, check_positions, open_hub, size
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger_fixture import fresh_database

from potluck.errors import BadInput
from potluck.hub.commands import people, runs, work
from potluck.hub.commands.desk import Caller
from potluck.protocol import HeartbeatRequest, Lease, Positions, Progress, Report, ReportAnswer

TARGET = 600
FATES = st.lists(st.sampled_from(["applied", "late", "superseded", "rejected"]), max_size=6)


@dataclass
class Handed:
    """A lease that a worker holds, or believes to hold."""

    worker: Caller
    lease: Lease
    answers: list[tuple[Report, ReportAnswer]] = field(default_factory=list)


class LedgerMachine(RuleBasedStateMachine):
    hub: Hub  # set by the test, one for all examples

    def __init__(self) -> None:
        super().__init__()
        self.workers: list[Caller] = []
        self.gone: list[Caller] = []  # left or revoked; they may still try to report
        self.units: list[Handed] = []  # every unit ever leased
        self.merges: list[Handed] = []
        self.seed = 0

    @initialize()
    def begin(self) -> None:
        self.house = self.hub.join("house", trusted=True)
        self.run_id = self.hub.start_run(self.house, samples=TARGET)

    def teardown(self) -> None:
        """Drive the run to its end, whatever state it is in: then every position is applied, exactly once."""
        if not hasattr(self, "run_id"):
            return
        state = self.hub.view(self.run_id).state
        if state == "paused":
            self.resume()
        if state not in ("stopped", "failed"):
            self._finish()
        self.hub.stop(self.run_id)
        self.places()
        for worker in (*self.workers, self.house):
            self.hub.run(work.leave(self.hub.desk, worker))

    def _open(self) -> bool:
        return self.hub.view(self.run_id).state in ("queued", "running", "paused", "finishing")

    def _finish(self) -> None:
        fresh = self.hub.join("fresh")  # the others may be struck out by now
        self.workers.append(fresh)
        self.hub.let_lapse()
        self.hub.run(work.expire(self.hub.desk))
        for _ in range(30):
            self.hub.age_updates(60)
            self.hub.settle(self.run_id)
            task = self.hub.lease(self.house, "merge", "taste")
            if task is not None:
                done = Report("done") if task.kind == "taste" else self.hub.merge_report(task)
                assert self.hub.report(self.house, task, done).accepted
            unit = self.hub.lease(fresh, "unit", speed={self.run_id: 1000.0})
            if unit is not None:
                report = self.hub.unit_report(unit, base=self.hub.view(self.run_id).version)
                assert self.hub.report(fresh, unit, report).accepted
            view = self.hub.view(self.run_id)
            if view.state == "failed" and "again and again" in view.reason:
                return  # a merge was lost or failed four times: that is a fate of its own
            if view.state == "stopped":
                assert view.fates.pending == 0
                return
            if view.state == "done":
                assert view.fates.applied + view.fates.late == TARGET
                assert view.fates.pending == 0
                return
        raise AssertionError(f"the run does not end: {self.hub.view(self.run_id)}")

    # --- what machines do

    @rule(name=st.sampled_from(["ann", "bob"]))
    def join(self, name: str) -> None:
        if len(self.workers) < 4:
            self.workers.append(self.hub.join(name))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), revoked=st.booleans())
    def go(self, data: st.DataObject, revoked: bool) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        self.workers.remove(worker)
        self.gone.append(worker)
        if revoked:
            self.hub.run(people.revoke_worker(self.hub.desk, worker.subject, actor="the test"))
        else:
            self.hub.run(work.leave(self.hub.desk, worker))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), samples_per_s=st.sampled_from([0.0, 0.1, 5.0, 7.3, 12.0, 40.0]))
    def lease_unit(self, data: st.DataObject, samples_per_s: float) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        lease = self.hub.lease(worker, "unit", "merge", speed={self.run_id: samples_per_s})
        if lease is not None:
            assert lease.run_id == self.run_id
            assert lease.kind == "unit", "only the trusted merge"
            self.units.append(Handed(worker, lease))

    @precondition(lambda self: self.units)
    @rule(data=st.data(), how=st.sampled_from(["all", "all", "front", "holes", "nothing", "too much"]))
    def report_done(self, data: st.DataObject, how: str) -> None:
        unit = data.draw(st.sampled_from(self.units))
        assert unit.lease.unit is not None
        done = _part(unit.lease.unit.positions, how, data)
        self.seed += 1
        base = data.draw(st.integers(0, self.hub.view(self.run_id).version))
        self._report(unit, self.hub.unit_report(unit.lease, done, base=base, seed=self.seed))

    @precondition(lambda self: self.units)
    @rule(data=st.data(), outcome=st.sampled_from(["returned", "failed", "nan"]), samples=st.integers(0, 10**6))
    def report_nothing(self, data: st.DataObject, outcome: str, samples: int) -> None:
        unit = data.draw(st.sampled_from(self.units))
        if outcome == "nan":
            self._report(unit, Report("failed", code="nan", reason="the loss is NaN", samples=samples))
        else:
            self._report(unit, Report(outcome, reason="so it is"))

    @precondition(lambda self: any(unit.answers for unit in self.units))
    @rule(data=st.data())
    def report_again(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from([unit for unit in self.units if unit.answers]))
        report, before = data.draw(st.sampled_from(unit.answers))
        answer = self.hub.report(unit.worker, unit.lease, report)
        assert answer.accepted == before.accepted or report.outcome != "done"

    def _report(self, unit: Handed, report: Report) -> None:
        first = not unit.answers
        live = self.hub.one("SELECT ended_at IS NULL FROM leases WHERE id = %(id)s", id=unit.lease.id)
        try:
            answer = self.hub.report(unit.worker, unit.lease, report)
        except BadInput as error:
            assert "does not hold" in str(error)
            return
        assert live or not answer.accepted or not first, "an ended lease took a report"
        unit.answers.append((report, answer))

    @precondition(lambda self: self.units)
    @rule(data=st.data(), samples=st.integers(0, 10**9))
    def beat(self, data: st.DataObject, samples: int) -> None:
        unit = data.draw(st.sampled_from(self.units))
        request = HeartbeatRequest([Progress(unit.lease.id, 1, samples, 3.0)], "working")
        answer = self.hub.run(work.heartbeat(self.hub.desk, unit.worker, request))
        live = self.hub.one("SELECT ended_at IS NULL FROM leases WHERE id = %(id)s", id=unit.lease.id)
        assert (unit.lease.id in answer.drop) == (not live)

    @precondition(lambda self: self.units or self.merges)
    @rule(data=st.data())
    def fall_silent(self, data: st.DataObject) -> None:
        """One worker freezes past its lease. It may thaw and report later."""
        self.hub.let_lapse(data.draw(st.sampled_from([*self.units, *self.merges])).lease.id)
        self.hub.run(work.expire(self.hub.desk))

    # --- what the trusted do

    @rule(patience_s=st.sampled_from([0.0, 0.2, 60.0]))
    def settle(self, patience_s: float) -> None:
        self.hub.age_updates(patience_s)
        self.hub.settle(self.run_id)

    @rule()
    def lease_merge(self) -> None:
        self.hub.settle(self.run_id)
        lease = self.hub.lease(self.house, "merge")
        if lease is not None:
            self.merges.append(Handed(self.house, lease))

    @precondition(lambda self: self.merges)
    @rule(data=st.data(), fates=FATES)
    def report_merge(self, data: st.DataObject, fates: list[str]) -> None:
        """Also again, late, or after another lease of the same merge was answered."""
        merge = data.draw(st.sampled_from(self.merges))
        before = self.hub.view(self.run_id).version
        live = self.hub.one("SELECT ended_at IS NULL FROM leases WHERE id = %(id)s", id=merge.lease.id)
        answer = self.hub.report(self.house, merge.lease, self.hub.merge_report(merge.lease, fates))
        assert self.hub.view(self.run_id).version == before + (live and answer.accepted)

    @precondition(lambda self: self.merges)
    @rule(data=st.data())
    def fail_merge(self, data: st.DataObject) -> None:
        merge = data.draw(st.sampled_from(self.merges))
        self.hub.report(self.house, merge.lease, Report("failed", reason="out of memory"))

    # --- what people and the hub do

    @rule()
    def restart(self) -> None:
        self.hub.restart()

    @precondition(lambda self: self.hub.view(self.run_id).state == "running")
    @rule()
    def pause(self) -> None:
        self.hub.run(runs.move(self.hub.desk, self.run_id, "pause", actor="the test"))

    @precondition(lambda self: self.hub.view(self.run_id).state == "paused")
    @rule()
    def resume(self) -> None:
        self.hub.run(runs.move(self.hub.desk, self.run_id, "resume", actor="the test"))

    @precondition(lambda self: len(self.units) > 6 and self._open())
    @rule(at_once=st.booleans())
    def stop(self, at_once: bool) -> None:
        self.hub.run(runs.move(self.hub.desk, self.run_id, "stop", actor="the test"))
        if at_once:
            self.hub.stop(self.run_id)
            assert self.hub.view(self.run_id).fates.pending == 0

    # --- what must hold

    @invariant()
    def places(self) -> None:
        if hasattr(self, "run_id"):
            check_positions(self.hub, self.run_id, TARGET)
            check_accounts(self.hub, self.run_id)


def _part(positions: Positions, how: str, data: st.DataObject) -> Positions:
    """Some of a unit's positions: what was done."""
    lo, hi = positions[0]
    match how:
        case "front":
            return [(lo, lo + data.draw(st.integers(1, hi - lo)))]
        case "holes":
            cuts = sorted(data.draw(st.sets(st.integers(lo, hi), min_size=2, max_size=6)))
            return [*zip(cuts[::2], cuts[1::2], strict=False)][::-1]
        case "nothing":
            return []
        case "too much":
            return [*positions, (positions[-1][1], positions[-1][1] + 5)]
        case _:
            assert size(positions)
            return positions


@pytest.fixture
def machine_hub(request: pytest.FixtureRequest, embedded_dsn: str) -> Iterator[Hub]:
    with ExitStack() as stack:
        dsn = stack.enter_context(fresh_database(embedded_dsn))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        yield stack.enter_context(open_hub(dsn, Path(folder)))


def _run(hub: Hub, examples: int, steps: int) -> None:
    machine = type("Machine", (LedgerMachine,), {"hub": hub})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    )


def test_every_position_has_one_place_and_every_update_one_fate(machine_hub: Hub) -> None:
    _run(machine_hub, examples=8, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_for_long(machine_hub: Hub) -> None:
    _run(machine_hub, examples=150, steps=60)
