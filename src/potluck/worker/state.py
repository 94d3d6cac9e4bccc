"""What does a lane of a worker do next?

A lane is a child process and the leases that feed it. It knows no clock, network or disk: every event comes in with the
time, every wish goes out as an instruction.

    Leased → FETCHING ─Fetched→ FETCHED ─Tell→ TOLD ─Started→ WORKING ─Finished→ SENDING ─Reported→ (gone)
                 └───────────── returned, failed, dropped: from anywhere ────────────┘

While a unit is at work, from about 70 % of its time box on, the next one is leased, fetched and told, so that the child
goes on without a pause. Its update travels meanwhile; a version that appears in time is given to the child (`Rebase`).

What always holds: a lease that came in is sent (done, failed or returned) or dropped, once; at most one task is at work
and one told; the chains that the child is told follow one another without a gap.
"""

from __future__ import annotations

from collections import OrderedDict

from potluck.protocol import (
    Drop,
    Failed,
    Finished,
    FromChild,
    HandIn,
    Lease,
    Progress,
    Ready,
    Rebase,
    Rebased,
    Report,
    Started,
    Stepping,
)
from potluck.worker import orders
from potluck.worker.held import Held
from potluck.worker.orders import Parts
from potluck.worker.pulse import Pulse
from potluck.worker.tasks import LanePolicy, Stage, Tally, Task
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
    Instruction,
    LaneEvent,
    Leased,
    NewVersion,
    NotFetched,
    NoWork,
    Over,
    Reported,
    Say,
    Send,
    StartChild,
    Stop,
    Tell,
    Tick,
    WatchRun,
)

STRIKES = 5  # failures in a row after which a run is left to other machines
HAND_IN_S = 8.0  # what a leaving worker's child gets to hand in
LEAVE_S = 10.0  # after so long a leaving worker goes; what is not sent stays in the spool
IDLE_CHILD_S = 600.0  # a child without work holds memory that its owner may want


class Lane:
    """One lane's memory. `handle` is the only way in."""

    def __init__(self, policy: LanePolicy, now: float = 0.0) -> None:
        self.policy = policy
        self.tasks: OrderedDict[str, Task] = OrderedDict()
        self.child = "absent"  # absent | starting | ready | ending
        self.held = Held()
        self.answered_at = 0.0  # when the last update's report was answered
        self.watching: WatchRun = WatchRun(None)
        self.asking = False
        self.ask_at = 0.0
        self.asked_at = 0.0
        self.restart_at = 0.0
        self.deaths = 0  # in a row, before the child was ready
        self.strikes: dict[str, int] = {}
        self.tired: set[str] = set()
        self.rates: dict[str, float] = {}
        self.pulse = Pulse(now)
        self.busy_at = now
        self.stopping_since: float | None = None
        self.held_since: float | None = None
        self.over = False
        self.tally = Tally()

    # --- what others may look at

    def working(self) -> Task | None:
        return next((task for task in self.tasks.values() if task.stage is Stage.WORKING), None)

    def progress(self) -> list[Progress]:
        """Every lease that is still ours to renew."""
        return [task.progress for task in self.tasks.values()]

    def is_quiet(self) -> bool:
        """Has it let go of the machine: nothing to compute, and no child that holds memory?"""
        return self.over or (self.child == "absent" and not self._at_hand())

    def next_tick_s(self) -> float:
        """How long this lane can do without a `Tick`."""
        hurry = self.stopping_since or self.held_since or any(task.window_until for task in self.tasks.values())
        return 0.1 if hurry else 0.5

    # --- events

    def handle(self, event: LaneEvent, now: float) -> list[Instruction]:
        if self.over:
            return []
        return [*self._take(event, now), *self._go_on(now)]

    def _take(self, event: LaneEvent, now: float) -> list[Instruction]:
        match event:
            case Leased(lease):
                return self._leased(lease, now)
            case NoWork():
                self.asking = False
                self.ask_at = max(self.ask_at, self.asked_at + 1.0)
                return []
            case Fetched(lease_id, parts):
                if (task := self.tasks.get(lease_id)) and task.stage is Stage.FETCHING:
                    task.parts, task.stage = parts, Stage.FETCHED
                return []
            case NotFetched(lease_id, reason, ours):
                return self._not_fetched(lease_id, reason, ours, now)
            case ChildSaid(said):
                self.busy_at = now
                self.pulse.heard(now)
                return self._child_said(said, now)
            case ChildDied(reason):
                return self._child_died(reason, now)
            case Reported(lease_id, accepted, reason):
                return self._reported(lease_id, accepted, reason, now)
            case NewVersion(run_id, chain):
                self.watching = WatchRun(None)  # it has fired
                self.held.hear(run_id, chain, now)
                return []
            case Beat(drop, hand_in):
                return [
                    *(wish for lease_id in list(self.tasks) if lease_id in drop for wish in self._drop(lease_id)),
                    *(wish for lease_id in list(self.tasks) if lease_id in hand_in for wish in self._hand_in(lease_id)),
                ]
            case Stop():
                return self._stop(now)
            case Hold():
                return self._hold(now)
            case GoOn():
                self.held_since = None
                return []
            case Tick():
                return self._tick(now)

    def _leased(self, lease: Lease, now: float) -> list[Instruction]:
        self.asking = False
        self.busy_at = now
        task = Task(lease, now, progress=Progress(lease.id))
        self.tasks[lease.id] = task
        if self.stopping_since is not None:
            return self._give_back(task, "the worker is leaving")
        if self.held_since is not None:
            return self._give_back(task, "its worker has got a job to do")
        if lease.run_id in self.tired:
            self.ask_at = now + 30.0
            return self._give_back(task, f"tasks of {lease.run_id} fail on this machine")
        if reason := orders.why_not(lease):
            self.ask_at = now + 30.0
            return self._give_back(task, reason)
        return [Fetch(lease, self.held.version(lease.run_id))]

    def _not_fetched(self, lease_id: str, reason: str, ours: bool, now: float) -> list[Instruction]:
        task = self.tasks.get(lease_id)
        if task is None or task.stage is not Stage.FETCHING:
            return []
        if ours:
            self.ask_at = now + 30.0
            return [Say(reason, bad=True), *self._give_back(task, reason)]
        return self._fail(task, reason, "fetch", now)

    def _reported(self, lease_id: str, accepted: bool, reason: str, now: float) -> list[Instruction]:
        task = self.tasks.pop(lease_id, None)
        if task is None:
            return []
        self.answered_at = now
        if accepted:
            return []
        self.tally.refused += 1
        return [Say(f"{task.name} was not taken: {reason}", bad=True)]

    # --- the child

    def _child_said(self, said: FromChild, now: float) -> list[Instruction]:
        if isinstance(said, Ready):
            self.child, self.deaths = "ready", 0
            return []
        task = self.tasks.get(said.lease_id)
        if task is None or task.stage is Stage.SENDING:
            return []  # we have let go of it already
        match said:
            case Started(box_s=box_s, overlap=overlap):
                task.stage, task.started_at, task.box_s = Stage.WORKING, now, box_s
                self.pulse.began()
                if overlap and task.lease.unit:
                    task.window_until = now + task.lease.unit.overlap_s
            case Stepping():
                task.stage = Stage.WORKING
                self.pulse.stepped(now)
                task.fraction = said.fraction
                task.progress = Progress(said.lease_id, said.steps, said.samples, said.samples_per_s, said.loss)
                if said.samples_per_s > 0:
                    self.rates[task.lease.run_id] = said.samples_per_s
            case Rebased():
                task.window_until = 0.0
            case Failed(reason=reason, code="weights") if task.fetches == 1:
                self.held.forget(task.lease.run_id)
                return [Say(f"{task.name}: {reason}"), *self._fetch_again(task)]
            case Failed(reason=reason, code=code):
                return self._fail(task, reason, code, now)
            case Finished(report=report, files=files):
                return self._finished(task, report, files, now)
        return []

    def _finished(self, task: Task, report: Report, files: dict[str, str], now: float) -> list[Instruction]:
        if report.outcome != "done":
            self.ask_at = max(self.ask_at, now + 1.0)
            return self._send(task, report, files)
        self.strikes.pop(task.lease.run_id, None)
        if report.samples and report.seconds > 0:
            self.rates[task.lease.run_id] = report.samples / report.seconds
        self.tally.done += 1
        self.tally.samples += report.samples
        task.progress = Progress(task.lease.id, report.steps, report.samples, self.rates.get(task.lease.run_id, 0.0))
        return [*self._send(task, report, files), *(self._stop(now) if self.policy.once else [])]

    def _child_died(self, reason: str, now: float) -> list[Instruction]:
        meant, was_starting = self.child == "ending", self.child == "starting"
        self.child = "absent"
        self.pulse.gone()
        self.held.clear()
        if meant:
            at_hand = [t for t in self.tasks.values() if t.stage in (Stage.TOLD, Stage.WORKING)]
            return [wish for task in at_hand for wish in self._give_back(task, "its child was ended")]
        self.deaths += was_starting
        wishes: list[Instruction] = [Say(f"the training process ended: {reason}", bad=True)]
        blamed = self.working() or next((t for t in self.tasks.values() if t.stage is Stage.TOLD), None)
        if blamed is None and self.deaths >= 3:  # it cannot even start: do not sit on other people's work
            blamed = next(iter(self._at_hand()), None)
        if blamed is not None:
            wishes += self._fail(blamed, reason, "died", now)
        for task in [t for t in self.tasks.values() if t.stage is Stage.TOLD]:
            wishes += self._give_back(task, "the training process ended before this unit began")
        worst = max([*self.strikes.values(), self.deaths, 1])
        self.restart_at = now + min(30.0, 0.5 * 2.0 ** min(worst, 10))
        return wishes

    # --- letting go of a task

    def _send(self, task: Task, report: Report, files: dict[str, str] | None = None) -> list[Instruction]:
        task.stage, task.window_until = Stage.SENDING, 0.0
        return [Send(task.lease, report, files or {})]

    def _give_back(self, task: Task, reason: str) -> list[Instruction]:
        wishes: list[Instruction] = []
        if task.stage in (Stage.TOLD, Stage.WORKING) and self.child == "ready":
            wishes.append(Tell(Drop(lease_id=task.lease.id)))
        elif task.stage is Stage.FETCHING:
            wishes.append(Abandon(task.lease.id))
        return [*wishes, *self._send(task, Report("returned", reason=reason))]

    def _fail(self, task: Task, reason: str, code: str, now: float) -> list[Instruction]:
        run = task.lease.run_id
        self.strikes[run] = strikes = self.strikes.get(run, 0) + 1
        if code not in ("nan", "died"):
            self.held.forget(run)
        if code != "nan":
            self.ask_at = max(self.ask_at, now + min(30.0, 0.25 * 2.0**strikes))
        wishes: list[Instruction] = [Say(f"{task.name} failed: {reason}", bad=True)]
        wishes += self._send(task, Report("failed", reason=reason, code=code))
        if strikes >= STRIKES and run not in self.tired:
            self.tired.add(run)
            text = f"{strikes} tasks of {run} in a row failed here: this machine leaves that run to others from now on"
            wishes.append(Say(text, bad=True))
            for other in [t for t in self._at_hand() if t.lease.run_id == run]:
                wishes += self._give_back(other, f"tasks of {run} fail on this machine")
        return [*wishes, *(self._stop(now) if self.policy.once else [])]

    def _drop(self, lease_id: str) -> list[Instruction]:
        """The hub says that the lease is no longer ours."""
        task = self.tasks[lease_id]
        if task.stage is Stage.SENDING:
            return [Abandon(lease_id)]  # the answer, if the report is out already, tells how it ended
        del self.tasks[lease_id]
        say = Say(f"{task.name} is not ours any more: the hub has moved on")
        if task.stage in (Stage.TOLD, Stage.WORKING) and self.child == "ready":
            return [say, Tell(Drop(lease_id=lease_id)), Abandon(lease_id)]
        return [say, Abandon(lease_id)]

    def _hand_in(self, lease_id: str) -> list[Instruction]:
        """Finish this lease now, with what is done."""
        task = self.tasks[lease_id]
        if task.stage is Stage.SENDING:
            return []
        if task.stage is not Stage.WORKING:
            return self._give_back(task, "it had not begun when it was to be handed in")
        if task.asked_in or task.lease.kind != "unit":
            return []
        task.asked_in = True
        return [Tell(HandIn(lease_id=lease_id))]

    def _stop(self, now: float) -> list[Instruction]:
        if self.stopping_since is not None:
            return []
        self.stopping_since = now
        return self._hand_in_all()

    def _hold(self, now: float) -> list[Instruction]:
        if self.held_since is not None or self.stopping_since is not None:
            return []
        self.held_since = now
        return self._hand_in_all()

    def _hand_in_all(self) -> list[Instruction]:
        queued_first = reversed(self._at_hand())  # so that the queued one does not begin
        return [wish for task in queued_first for wish in self._hand_in(task.lease.id)]

    def _at_hand(self) -> list[Task]:
        return [task for task in self.tasks.values() if task.stage is not Stage.SENDING]

    # --- time

    def _tick(self, now: float) -> list[Instruction]:
        self.pulse.ticked(now)
        wishes: list[Instruction] = []
        if self.stopping_since is not None and now > self.stopping_since + HAND_IN_S:
            for task in self._at_hand():
                wishes += self._give_back(task, "the worker left before this was ready")
        elif self.held_since is not None and now > self.held_since + HAND_IN_S:
            for task in self._at_hand():
                wishes += self._give_back(task, "its worker had to begin a job before this was ready")
        at_hand = [t for t in self.tasks.values() if t.stage in (Stage.TOLD, Stage.WORKING)]
        if not at_hand and self.child != "starting":
            self.pulse.heard(now)
        elif (limit := self._silent_too_long_s(now)) is not None:
            reason = f"the training process has been silent for {limit:.0f} s, so it was ended"
            for task in at_hand[:1]:
                wishes += self._fail(task, reason, "silent", now)
            wishes += self._end_child(gently=False)
        if self.tasks:
            self.busy_at = now
        elif self.child == "ready" and now - self.busy_at > IDLE_CHILD_S:
            wishes += self._end_child(gently=True)
        return wishes

    def _silent_too_long_s(self, now: float) -> float | None:
        task = self.working()
        return self.pulse.silent_too_long_s(now, kind=task.lease.kind if task else "unit", at_work=task is not None)

    def _end_child(self, *, gently: bool) -> list[Instruction]:
        if self.child in ("absent", "ending"):
            return []
        self.child = "ending"
        return [EndChild(gently)]

    # --- what follows from how things stand

    def _go_on(self, now: float) -> list[Instruction]:
        wishes: list[Instruction] = []
        rules = [self._leave, self._make_room, self._start_child, self._tell_next, self._rebase, self._watch, self._ask]
        for rule in rules:
            if not self.over:
                wishes += rule(now)
        return wishes

    def _leave(self, now: float) -> list[Instruction]:
        if self.stopping_since is None:
            return []
        unsent = bool(self.tasks) and now < self.stopping_since + LEAVE_S
        if unsent or self._at_hand():
            return []
        self.over = True
        return [*self._end_child(gently=True), WatchRun(None), Over()]

    def _make_room(self, now: float) -> list[Instruction]:
        """Held, the child ends as soon as it has handed in: what it has in memory, a job may need."""
        if self.held_since is None or self._at_hand():
            return []
        return self._end_child(gently=True)

    def _start_child(self, now: float) -> list[Instruction]:
        waiting = any(task.stage in (Stage.FETCHING, Stage.FETCHED) for task in self.tasks.values())
        if self.child != "absent" or not waiting or now < self.restart_at:
            return []
        self.child = "starting"
        self.pulse.heard(now)
        return [StartChild()]

    def _tell_next(self, now: float) -> list[Instruction]:
        """Give the child the next task: one to work on, and for units one more behind it."""
        if self.child != "ready" or any(task.stage is Stage.TOLD for task in self.tasks.values()):
            return []
        if self.working() and not self.policy.ahead:
            return []
        task = next((t for t in self.tasks.values() if t.stage is Stage.FETCHED), None)
        if task is None:
            return []
        run, parts = task.lease.run_id, task.parts
        have = self.held.version(run)
        if task.lease.kind != "init":
            chain = orders.usable(parts.weights, have)
            if chain is None:
                return self._fetch_again(task)
            if task.lease.kind == "unit":
                chain = self.held.onto(run, chain)
            if chain:
                have = chain[-1].version
            assert have is not None
            self.held.hold(run, have)
            parts = Parts(parts.recipe_path, parts.shard_paths, chain, parts.state_path, parts.update_paths, parts.out)
        unit = task.lease.unit
        tick_s = orders.tick_s(unit.next_tick_s, unit.box_s, now - task.leased_at) if unit else 0.0
        task.stage = Stage.TOLD if task.lease.kind == "unit" else Stage.WORKING
        task.parts = parts
        if not self.working():
            self.pulse.heard(now)
        if task.lease.kind != "unit":
            task.started_at = now
            self.pulse.heard(now)
        return [
            Tell(orders.order(task.lease, parts, tick_s=tick_s, device=self.policy.device, share=self.policy.share))
        ]

    def _fetch_again(self, task: Task) -> list[Instruction]:
        task.stage = Stage.FETCHING
        task.fetches += 1
        return [Fetch(task.lease, self.held.version(task.lease.run_id))]

    def _rebase(self, now: float) -> list[Instruction]:
        """Give the unit at work the newer version that has come, while it can still change over.

        The version that counts is the one that our own last update is in, so an earlier one waits for it until the
        window is nearly over.
        """
        task = self.working()
        if task is None or not task.window_until or self.child != "ready":
            return []
        if now >= task.window_until:
            task.window_until = 0.0
            return []
        run = task.lease.run_id
        if (news_at := self.held.news_at(run)) is None:
            return []
        sending = any(t.stage is Stage.SENDING and t.lease.run_id == run for t in self.tasks.values())
        window_s = task.lease.unit.overlap_s if task.lease.unit else 0.0
        if (sending or news_at < self.answered_at) and now < task.window_until - 0.2 * window_s:
            return []
        task.window_until = 0.0
        return [Tell(Rebase(lease_id=task.lease.id, weights=self.held.take_news(run)))]

    def _watch(self, now: float) -> list[Instruction]:
        """While a unit is at work, have every newer version brought here."""
        task = self.working()
        wanted = WatchRun(None)
        if task is not None and task.lease.kind == "unit":
            run = task.lease.run_id
            if self.held.version(run) is not None:
                wanted = WatchRun(run, self.held.newest(run))
        if wanted == self.watching:
            return []
        self.watching = wanted
        return [wanted]

    def _ask(self, now: float) -> list[Instruction]:
        if self.asking or self.stopping_since is not None or self.held_since is not None:
            return []
        if now < self.ask_at or len(self.tasks) >= 2:
            return []
        if self.child == "absent" and now < self.restart_at:
            return []
        at_hand = self._at_hand()
        if at_hand and not (self.policy.ahead and not self.policy.once and at_hand[0].is_ripe(now)):
            return []
        self.asking, self.asked_at = True, now
        return [AskLease(self.policy.kinds, dict(self.rates), tuple(sorted(self.tired)))]
