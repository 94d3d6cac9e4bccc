"""The life of a lane, whatever happens in whatever order."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from potluck.protocol import (
    Dataset,
    DoUnit,
    Drop,
    Failed,
    Finished,
    HandIn,
    Layout,
    Lease,
    Ready,
    Rebase,
    Rebased,
    RecipeRef,
    Report,
    Started,
    Stepping,
    UnitSpec,
    WeightFile,
)
from potluck.worker.orders import Parts
from potluck.worker.state import Lane
from potluck.worker.tasks import LanePolicy, Stage
from potluck.worker.words import (
    Abandon,
    AskLease,
    Beat,
    ChildDied,
    ChildSaid,
    EndChild,
    Fetch,
    Fetched,
    GoOn,
    Hold,
    Leased,
    NewVersion,
    NotFetched,
    NoWork,
    Over,
    Reported,
    Send,
    StartChild,
    Stop,
    Tell,
    Tick,
    WatchRun,
)

RUNS = ("a", "b")


def lease(number: int, run: str) -> Lease:
    spec = UnitSpec([(number * 10, number * 10 + 10)], 10.0, 4.0, 2.0, "int8")
    return Lease(
        f"L{number}", number, "unit", run, 15.0, RecipeRef("r"), Dataset("d", 10, [], [1]), Layout([]), 0, spec
    )


def chain(have: int | None, newest: int) -> list[WeightFile]:
    """From `have` to the newest; a snapshot for whom has nothing."""
    first = [] if have is not None else [WeightFile("snapshot", newest - newest % 3, "int8", "s", "")]
    at = have if have is not None else first[0].version
    return [*first, *(WeightFile("delta", v, "int8", "d", "") for v in range(at + 1, newest + 1))]


class LaneLife(RuleBasedStateMachine):
    """Plays hub, network and child; the child is a model of the real one's queue."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.lane = Lane(LanePolicy("units", ("unit",), True), self.now)
        self.number = 0
        self.newest = dict.fromkeys(RUNS, 2)
        self.fates: dict[str, list[str]] = {}  # lease → sent outcomes and drops
        self.asked = 0
        self.fetching: list[tuple[Lease, int | None]] = []
        self.unanswered: list[str] = []
        self.watched = WatchRun(None)
        self.child = "none"  # none | loading | ready | dying
        self.queue: list[DoUnit] = []
        self.unit: DoUnit | None = None
        self.window = False
        self.handed_in = False
        self.held: dict[str, int] = {}
        self.over = False
        self.paused = False
        self.feed(Tick())

    def feed(self, event: Any) -> None:
        for wish in self.lane.handle(event, self.now):
            assert not self.over, f"{wish} after the end"
            self.obey(wish)

    def obey(self, wish: Any) -> None:
        match wish:
            case AskLease():
                assert not self.paused, "asked while held"
                self.asked += 1
                assert self.asked == 1, "asked while asking"
            case Fetch(wanted, have):
                self.fetching.append((wanted, have))
            case Send(sent, report):
                self.fates[sent.id].append(report.outcome)
                self.unanswered.append(sent.id)
            case Abandon(lease_id):
                if lease_id not in self.unanswered and lease_id not in self.lane.tasks:
                    self.fates[lease_id].append("dropped")
            case StartChild():
                assert self.child == "none"
                self.child, self.held, self.queue, self.unit = "loading", {}, [], None
            case EndChild():
                assert self.child in ("loading", "ready")
                self.child = "dying"
            case Tell(message):
                assert self.child == "ready", f"{message} to a child that is {self.child}"
                self.hear(message)
            case WatchRun():
                self.watched = wish
            case Over():
                self.over = True

    def hear(self, message: Any) -> None:
        match message:
            case DoUnit():
                self.follow(message.run_id, message.weights)
                self.queue.append(message)
                assert len(self.queue) <= 1, "two units queued"
            case Rebase():
                assert self.unit is not None
                assert message.weights, "a rebase to nowhere"
                assert message.lease_id == self.unit.lease_id or message.lease_id in self.fates
                self.follow(self.unit.run_id, message.weights)
            case Drop(lease_id=lease_id):
                self.queue = [job for job in self.queue if job.lease_id != lease_id]
                if self.unit and self.unit.lease_id == lease_id:
                    self.unit = None
            case HandIn():
                self.handed_in = True

    def follow(self, run: str, files: list[WeightFile]) -> None:
        for file in files:
            if file.kind == "delta" and file.version > self.held.get(run, -1):
                assert file.version == self.held.get(run, -1) + 1, f"a gap: {self.held.get(run)} → {file.version}"
            self.held[run] = max(file.version, self.held.get(run, -1))
        assert run in self.held, "a unit without weights"

    @rule(steps=st.integers(3, 12), run=st.sampled_from(RUNS), overlap=st.booleans())
    def all_goes_well(self, steps: int, run: str, overlap: bool) -> None:
        """Some steps of the ordinary way, which chance alone would rarely take."""
        for _ in range(steps):
            if self.asked:
                self.grant(run)
            elif self.fetching:
                self.fetched()
            elif self.child == "loading":
                self.ready()
            elif self.child == "ready" and self.unit is None and self.queue:
                self.begin(overlap)
            elif self.child == "ready" and self.unit and not self.queue and len(self.lane.tasks) < 2:
                self.step(0.8)
            elif self.unanswered:
                self.answer(True)
            elif self.child == "ready" and self.unit:
                self.end_unit(True, "")
            else:
                self.wait(2.0)

    # --- hub

    @precondition(lambda self: self.asked)
    @rule(run=st.sampled_from(RUNS))
    def grant(self, run: str) -> None:
        self.asked = 0
        self.number += 1
        granted = lease(self.number, run)
        if not self.over:
            self.fates[granted.id] = []
        self.feed(Leased(granted))

    @precondition(lambda self: self.asked)
    @rule()
    def no_work(self) -> None:
        self.asked = 0
        self.feed(NoWork())

    @precondition(lambda self: self.unanswered)
    @rule(accepted=st.booleans())
    def answer(self, accepted: bool) -> None:
        self.feed(Reported(self.unanswered.pop(0), accepted, "because"))

    @precondition(lambda self: self.lane.tasks)
    @rule(which=st.integers(0, 1), drop=st.booleans())
    def beat(self, which: int, drop: bool) -> None:
        ids = sorted(self.lane.tasks)
        named = frozenset(ids[which : which + 1])
        self.feed(Beat(drop=named) if drop else Beat(hand_in=named))

    @rule(run=st.sampled_from(RUNS))
    def merge(self, run: str) -> None:
        self.newest[run] += 1
        if self.watched.run_id == run and self.watched.after < self.newest[run]:
            files = chain(self.watched.after, self.newest[run])
            self.watched = WatchRun(None)
            self.feed(NewVersion(run, files))

    # --- network

    @precondition(lambda self: self.fetching)
    @rule()
    def fetched(self) -> None:
        wanted, have = self.fetching.pop(0)
        self.feed(Fetched(wanted.id, Parts(weights=chain(have, self.newest[wanted.run_id]), out="o")))

    @precondition(lambda self: self.fetching)
    @rule(ours=st.booleans())
    def not_fetched(self, ours: bool) -> None:
        wanted, _ = self.fetching.pop(0)
        self.feed(NotFetched(wanted.id, "no such blob", ours))

    # --- child

    @precondition(lambda self: self.child == "loading")
    @rule()
    def ready(self) -> None:
        self.child = "ready"
        self.feed(ChildSaid(Ready(torch="", device="cpu")))

    @precondition(lambda self: self.child == "ready" and self.unit is None and self.queue)
    @rule(overlap=st.booleans())
    def begin(self, overlap: bool) -> None:
        self.unit, self.window, self.handed_in = self.queue.pop(0), overlap, False
        self.feed(ChildSaid(Started(lease_id=self.unit.lease_id, box_s=10.0, overlap=overlap)))

    @precondition(lambda self: self.child == "ready" and self.unit)
    @rule(fraction=st.floats(0, 1))
    def step(self, fraction: float) -> None:
        assert self.unit
        said = Stepping(lease_id=self.unit.lease_id, steps=1, samples=1, samples_per_s=1.0, fraction=fraction, loss={})
        self.feed(ChildSaid(said))

    @precondition(lambda self: self.child == "ready" and self.unit and self.window)
    @rule()
    def window_ends(self) -> None:
        assert self.unit
        self.window = False
        self.feed(ChildSaid(Rebased(lease_id=self.unit.lease_id, version=self.held[self.unit.run_id])))

    @precondition(lambda self: self.child == "ready" and self.unit)
    @rule(good=st.booleans(), code=st.sampled_from(["nan", "failed", "weights"]))
    def end_unit(self, good: bool, code: str) -> None:
        assert self.unit
        done, self.unit = self.unit, None
        if good:
            report = Report("done", samples=5, seconds=1.0, done=done.spec.positions)
            self.feed(ChildSaid(Finished(lease_id=done.lease_id, report=report, files={"update": "u"})))
        else:
            self.feed(ChildSaid(Failed(lease_id=done.lease_id, reason="why", code=code)))

    @precondition(lambda self: self.child != "none")
    @rule()
    def die(self) -> None:
        self.child, self.unit, self.queue = "none", None, []
        self.feed(ChildDied("killed"))

    # --- time and people

    @rule(seconds=st.sampled_from([0.1, 0.5, 2.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick())

    @rule()
    def hold(self) -> None:
        self.paused = True
        self.feed(Hold())

    @precondition(lambda self: self.paused)
    @rule()
    def go_on(self) -> None:
        self.paused = False
        self.feed(GoOn())

    @precondition(lambda self: self.paused and not self.over)
    @rule()
    def held_for_long(self) -> None:
        """Whatever the child does or leaves undone, a lane that is held lets go of the machine."""
        self.now += 9.0
        self.feed(Tick())
        assert self.child in ("none", "dying")
        assert all(task.stage is Stage.SENDING for task in self.lane.tasks.values())
        assert self.lane.is_quiet() == (self.child == "none")

    @rule(really=st.integers(0, 19))
    def stop(self, really: int) -> None:
        if really == 7:
            self.feed(Stop())

    # --- what always holds

    @invariant()
    def one_at_work_and_one_queued(self) -> None:
        stages = [task.stage for task in self.lane.tasks.values()]
        assert stages.count(Stage.WORKING) <= 1
        assert stages.count(Stage.TOLD) <= 1
        assert len(self.lane.tasks) <= 2

    @invariant()
    def lane_and_child_agree(self) -> None:
        if self.over:
            return
        told = {id_ for id_, task in self.lane.tasks.items() if task.stage is Stage.TOLD}
        working = {id_ for id_, task in self.lane.tasks.items() if task.stage is Stage.WORKING}
        if self.child == "ready":
            assert told == {job.lease_id for job in self.queue}
            assert working == ({self.unit.lease_id} if self.unit else set())
        elif self.child == "none":
            assert not told
            assert not working

    @invariant()
    def every_lease_has_one_fate_or_is_at_hand(self) -> None:
        for lease_id, fates in self.fates.items():
            at_hand = (task := self.lane.tasks.get(lease_id)) is not None and task.stage is not Stage.SENDING
            assert len(fates) + at_hand == 1, f"{lease_id}: {fates}, at hand: {at_hand}"

    def teardown(self) -> None:
        """However it stands, a lane that is told to stop comes to its end, and no lease is left over."""
        self.feed(Stop())
        for _ in range(8):
            self.now += 3.0
            self.feed(Tick())
        assert self.over
        assert all(len(fates) == 1 for fates in self.fates.values()), self.fates


LaneLife.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestLaneLife = LaneLife.TestCase
