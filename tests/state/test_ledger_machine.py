"""Whatever happens in whatever order: does every position have exactly one place, and every update one fate?

A hypothesis machine over the real ledger. Its rules are what machines and people do to a hub; after each step the
invariants are read from the tables themselves. Each example is a run of its own in one database.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from hub_kit import Hub, check_accounts, check_positions, open_hub, size
from ledger_fixture import fresh_database
from potluck.errors import BadInput
from potluck.hub.commands import people, runs, work
from potluck.hub.commands.desk import Caller
from potluck.protocol import HeartbeatRequest, Lease, Positions, Progress, Report, ReportAnswer

TARGET = 600
Draw = Callable[[st.SearchStrategy[Any]], Any]
STEPS = [
    *["lease_units"] * 3,
    *["report_units"] * 4,
    *["merge"] * 4,
    *["beat", "fall_silent", "come_and_go", "steer"],
]
PICK = st.integers(0, 9)
PICKS = st.lists(PICK, min_size=1, max_size=3)
WAYS = ["all", "all", "front", "holes", "nothing", "too much", "returned", "failed", "nan"]
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
        self.units: list[Handed] = []  # every unit ever leased, also by workers who are gone
        self.merges: list[Handed] = []
        self.seed = 0

    @initialize()
    def begin(self) -> None:
        self.house = self.hub.join("house", trusted=True)
        self.run_id = self.hub.start_run(self.house, samples=TARGET)
        self.workers = [self.hub.join("ann"), self.hub.join("bob")]

    def teardown(self) -> None:
        """Drive the run to its end, whatever state it is in: then every position is applied, exactly once."""
        if not hasattr(self, "run_id"):
            return
        state = self.hub.view(self.run_id).state
        if state == "paused":
            self._move("resume")
        if state not in ("stopped", "failed"):
            self._finish()
        self.hub.stop(self.run_id)
        self.places()
        for worker in (*self.workers, self.house):
            self.hub.run(work.leave(self.hub.desk, worker))

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

    @rule(data=st.data(), what=st.sampled_from(STEPS))
    def step(self, data: st.DataObject, what: str) -> None:
        """One rule for all: hypothesis would leave out some rules in each example, and here they need one another."""
        getattr(self, what)(data.draw)

    # --- what machines do

    def lease_units(self, draw: Draw) -> None:
        picks, samples_per_s = draw(PICKS), draw(st.sampled_from([0.0, 0.1, 5.0, 7.3, 12.0, 40.0]))
        for pick in picks:
            self._lease(self.workers[pick % len(self.workers)], samples_per_s)

    def _lease(self, worker: Caller, samples_per_s: float) -> None:
        lease = self.hub.lease(worker, "unit", "merge", speed={self.run_id: samples_per_s})
        if lease is not None:
            assert lease.run_id == self.run_id
            assert lease.kind == "unit", "only the trusted merge"
            self.units.append(Handed(worker, lease))

    def _choose(self, pick: int) -> Handed | None:
        """Mostly a unit at work (leased now, if there is none), sometimes one that ended long ago."""
        live = {str(row["id"]) for row in self.hub.sql("SELECT id FROM leases WHERE ended_at IS NULL")}
        working = [unit for unit in self.units if unit.lease.id in live]
        if not working and pick < 9:
            self._lease(self.workers[pick % len(self.workers)], 5.0)
            working = self.units[-1:]
        chosen = working if pick < 9 else self.units
        return chosen[-1 - pick % len(chosen)] if chosen else None

    def report_units(self, draw: Draw) -> None:
        picks, how, again = draw(PICKS), draw(st.sampled_from(WAYS)), draw(st.booleans())
        for pick in picks:
            unit = self._choose(pick)
            if unit is None:
                continue
            assert unit.lease.unit is not None
            match how:
                case "returned" | "failed":
                    report = Report(how, reason="so it is")
                case "nan":
                    samples = draw(st.integers(0, 10**6))
                    report = Report("failed", code="nan", reason="the loss is NaN", samples=samples)
                case _:
                    self.seed += 1
                    done = _part(unit.lease.unit.positions, how, draw)
                    base = draw(st.integers(0, self.hub.view(self.run_id).version))
                    report = self.hub.unit_report(unit.lease, done, base=base, seed=self.seed)
            self._report(unit, report)
            if again:
                self._report_again(unit)

    def _report(self, unit: Handed, report: Report) -> None:
        live = self._is_live(unit)
        try:
            answer = self.hub.report(unit.worker, unit.lease, report)
        except BadInput as error:
            assert "does not hold" in str(error)
            return
        assert live or not answer.accepted, "an ended lease took a new report"
        unit.answers.append((report, answer))

    def _report_again(self, unit: Handed) -> None:
        """After a lost answer: the very same report. It is answered the same, and changes nothing."""
        if unit.answers and unit.answers[-1][0].outcome == "done":
            report, before = unit.answers[-1]
            assert self.hub.report(unit.worker, unit.lease, report).accepted == before.accepted

    def _is_live(self, handed: Handed) -> bool:
        return bool(self.hub.one("SELECT ended_at IS NULL FROM leases WHERE id = %(id)s", id=handed.lease.id))

    def beat(self, draw: Draw) -> None:
        unit, samples = self._choose(draw(PICK)), draw(st.integers(0, 10**9))
        if unit is None:
            return
        request = HeartbeatRequest([Progress(unit.lease.id, 1, samples, 3.0)], "working")
        answer = self.hub.run(work.heartbeat(self.hub.desk, unit.worker, request))
        assert (unit.lease.id in answer.drop) == (not self._is_live(unit))

    def fall_silent(self, draw: Draw) -> None:
        """One worker freezes past its lease. It may thaw and report later."""
        if unit := self._choose(draw(PICK)):
            self.hub.let_lapse(unit.lease.id)
            self.hub.run(work.expire(self.hub.desk))

    # --- what the trusted do

    def merge(self, draw: Draw) -> None:
        """Also lost, late, failed, published twice, or left open while the others go on."""
        patience_s, fates = draw(st.sampled_from([0.2, 60.0, 60.0])), draw(FATES)
        fault = draw(st.sampled_from(["", "", "", "lost", "late", "failed", "twice", "open"]))
        self.hub.age_updates(patience_s)
        self.hub.settle(self.run_id)
        lease = self.hub.lease(self.house, "merge")
        if lease is not None:
            self.merges.append(Handed(self.house, lease))
        if not self.merges or fault == "open":
            return
        merge = self.merges[-1]
        if fault in ("lost", "late"):
            self.hub.let_lapse(merge.lease.id)
            self.hub.run(work.expire(self.hub.desk))
        if fault == "failed":
            self.hub.report(self.house, merge.lease, Report("failed", reason="out of memory"))
        elif fault != "lost":
            for _ in range(2 if fault == "twice" else 1):
                self._publish(merge, fates)

    def _publish(self, merge: Handed, fates: list[str]) -> None:
        before, live = self.hub.view(self.run_id).version, self._is_live(merge)
        answer = self.hub.report(self.house, merge.lease, self.hub.merge_report(merge.lease, fates))
        assert answer.accepted or not live
        assert self.hub.view(self.run_id).version == before + live

    # --- what people and the hub do

    def come_and_go(self, draw: Draw) -> None:
        what, pick = draw(st.sampled_from(["join", "leave", "revoke"])), draw(PICK)
        if what == "join" and len(self.workers) < 4:
            self.workers.append(self.hub.join("ann"))
        elif what != "join" and len(self.workers) > 1:
            worker = self.workers.pop(pick % len(self.workers))
            if what == "leave":
                self.hub.run(work.leave(self.hub.desk, worker))
            else:
                self.hub.run(people.revoke_worker(self.hub.desk, worker.subject, actor="the test"))

    def steer(self, draw: Draw) -> None:
        what = draw(st.sampled_from(["restart", "pause", "pause", "stop", "stop at once"]))
        state = self.hub.view(self.run_id).state
        if what == "restart":
            self.hub.restart()
        elif what == "pause" and state in ("running", "paused"):
            self._move("pause" if state == "running" else "resume")
        elif what.startswith("stop") and len(self.units) > 10 and state in ("running", "paused", "finishing"):
            self._move("stop")
            if what == "stop at once":
                self.hub.stop(self.run_id)
                assert self.hub.view(self.run_id).fates.pending == 0

    def _move(self, verb: str) -> None:
        self.hub.run(runs.move(self.hub.desk, self.run_id, verb, actor="the test"))

    # --- what must hold

    @invariant()
    def places(self) -> None:
        if hasattr(self, "run_id"):
            check_positions(self.hub, self.run_id, TARGET)
            check_accounts(self.hub, self.run_id)


def _part(positions: Positions, how: str, draw: Draw) -> Positions:
    """Some of a unit's positions: what was done."""
    lo, hi = positions[0]
    match how:
        case "front":
            return [(lo, lo + draw(st.integers(1, hi - lo)))]
        case "holes":
            cuts = sorted(draw(st.sets(st.integers(lo, hi), min_size=2, max_size=6)))
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


@pytest.mark.timeout(1200)  # a failure is shrunk first, for up to five minutes
def test_every_position_has_one_place_and_every_update_one_fate(machine_hub: Hub) -> None:
    _run(machine_hub, examples=20, steps=35)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_for_long(machine_hub: Hub) -> None:
    _run(machine_hub, examples=150, steps=60)
