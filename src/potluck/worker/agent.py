"""How does a machine work for a hub, from its first heartbeat to its leave?

    main thread     takes events from one queue, asks the lanes' state machines, has their errands run
    heartbeat       tells the hub every third of a lease's life that we are here, and what every lease is at
    errands         one short-lived thread for each wait on the network (errands.py)
    child           the training process of each lane (runners.py)
    keeper          jobs: asks for orders, a thread for each job that is here (jobs/keeper.py)

While a job is here the lane of units holds: it hands in, frees the memory and waits.

The first Ctrl-C (or SIGTERM) hands in what is done and leaves; the second leaves at once. Jobs get their grace to write
a checkpoint and go on elsewhere. What the hub has not
answered for stays in the spool, and the next agent in this folder hands it in.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from potluck.blobs import BlobStore
from potluck.client import Hub
from potluck.errors import PotluckError, VersionMismatch
from potluck.protocol import HeartbeatRequest, Progress
from potluck.worker.errands import Bench, Errands
from potluck.worker.hardware import Machine, usable_cores
from potluck.worker.jobs.house import House
from potluck.worker.jobs.keeper import Keeper
from potluck.worker.line import LONGEST_WAIT_S, GivenUp, Line
from potluck.worker.membership import Credential, only_agent
from potluck.worker.runners import COMMAND
from potluck.worker.screen import Facts, View, Work, view
from potluck.worker.spool import Spool
from potluck.worker.state import HAND_IN_S, LEAVE_S, Lane
from potluck.worker.tasks import LanePolicy, Stage
from potluck.worker.words import Beat, GoOn, Hold, LaneEvent, Over, Stop, Tick

TTL_S = 15.0  # of a lease, until the first one says it
EVICT_EVERY_S = 60.0
REVOKED, TOO_OLD, INTERRUPTED = 1, 7, 130


@dataclass(frozen=True)
class AgentSettings:
    """Everything that an agent has to be told."""

    hub: str  # the address
    token: str
    home: Path
    fingerprint: str = ""
    worker_id: str = ""
    name: str = "worker"
    hub_name: str = ""
    device: str = "cpu"  # chosen already: cpu, cuda:0, mps
    share: float = 1.0  # of the time
    threads: int = 0  # of the training child; 0: every core that we may use
    trusted: bool = False  # also merges and tastes
    once: bool = False
    for_s: float | None = None
    cache_bytes: int = 5 * 10**9
    screen: bool = True
    house: House = field(default_factory=House)  # what its owner allows

    @classmethod
    def of(cls, credential: Credential, home: Path, **more: object) -> AgentSettings:
        return cls(
            hub=credential.hub,
            token=credential.token,
            home=home,
            fingerprint=credential.fingerprint,
            worker_id=credential.worker_id,
            name=credential.name,
            hub_name=credential.hub_name,
            **more,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class _Refused:
    """The hub will have nothing of us."""

    error: PotluckError


@dataclass(frozen=True)
class _Asked:
    """Somebody wants us to stop."""

    at_once: bool


@dataclass(frozen=True)
class _Jobs:
    """Jobs are here now, or the last one has gone."""

    busy: bool


_Event = tuple[str, LaneEvent | _Refused | _Asked | _Jobs]


class Agent:
    """One worker. `run` works until it leaves, and returns the exit code; `stop` may be called from anywhere."""

    def __init__(
        self,
        settings: AgentSettings,
        *,
        command: Sequence[str] = COMMAND,
        screen: View | None = None,
        clock: Callable[[], float] = time.monotonic,
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        self.settings = settings
        self._command = command
        self._clock = clock
        self._longest_wait_s = longest_wait_s
        self._inbox: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._beat_now = threading.Event()
        self._given_view = screen
        self._ttl_s = TTL_S
        self._beats: list[Progress] = []
        self._applied = 0
        self._messages: set[str] = set()
        self._quiet = threading.Event()  # the pool has let go of the machine
        self._held = False
        self._left_at: float | None = None
        self._last_at = 0.0  # a leaving agent goes then, whatever is left
        self._interrupts = 0
        self._exit: int | None = None

    def stop(self, *, at_once: bool = False) -> None:
        """As Ctrl-C does: hand in and leave, or leave at once."""
        self._inbox.put(("", _Asked(at_once)))

    def run(self) -> int:
        """0: left on purpose. 1: the hub refused this worker. 7: too old or too new. 130: left at once."""
        settings = self.settings
        with only_agent(settings.home):
            hub = Hub(settings.hub, settings.token, settings.fingerprint)
            self._view = self._given_view or view(settings.screen)
            with self._signals():
                try:
                    return self._work(hub)
                finally:
                    self._closed.set()
                    self._beat_now.set()
                    self._view.close()
                    hub.close()

    # --- the life of an agent

    def _work(self, hub: Hub) -> int:
        settings = self.settings
        shutil.rmtree(settings.home / "work", ignore_errors=True)  # of an agent that was killed
        self._store = BlobStore(settings.home / "cache")
        spool = Spool(settings.home / "spool")
        self._line = Line(
            hub,
            closed=self._closed,
            say=self._view.say,
            refused=lambda error: self._inbox.put(("", _Refused(error))),
            longest_wait_s=self._longest_wait_s,
        )
        bench = Bench(
            line=self._line,
            store=self._store,
            spool=spool,
            home=settings.home,
            worker_id=settings.worker_id,
            device=settings.device,
            share=settings.share,
            say=self._view.say,
            command=self._command,
        )
        now = self._clock()
        self._lanes = {policy.name: Lane(policy, now) for policy in policies(settings)}
        self._errands = {
            name: Errands(name, bench, self._poster(name), threads=threads_of(name, settings)) for name in self._lanes
        }
        self._machine = Machine(settings.home, pool=self._pool_processes)
        self._keeper = Keeper(
            line=self._line,
            store=self._store,
            home=settings.home,
            worker_id=settings.worker_id,
            house=house_of(settings),
            machine=self._machine.now,
            say=self._view.say,
            on_busy=self._jobs_are_here,
            on_end=self._job_ended,
            quiet=self._quiet.wait,
            cache_bytes=settings.cache_bytes,
        )
        self._hand_in_spool(spool)
        self._keeper.start()
        threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True).start()
        self._view.say(f"{settings.name} works for {settings.hub_name or settings.hub} on {settings.device}")
        try:
            self._loop(now)
        finally:
            self._end_children()
        return self._leave(hub)

    def _loop(self, started: float) -> None:
        """Until every lane is over and no job is left, or there is a reason to go at once."""
        ticked = evicted = started
        for name in self._lanes:
            self._feed(name, Tick())
        while self._exit is None and not self._is_over():
            try:
                name, event = self._inbox.get(
                    timeout=min([0.5, *(lane.next_tick_s() for lane in self._lanes.values())])
                )
            except queue.Empty:
                pass
            else:
                self._take(name, event)
            now = self._clock()
            if now - ticked >= 0.1:
                ticked = now
                for lane in self._lanes:
                    self._feed(lane, Tick())
                self._view.show(self._facts())
            if self.settings.for_s is not None and now - started >= self.settings.for_s:
                self._start_leaving()
            if now - evicted >= EVICT_EVERY_S:
                evicted = now
                pinned = {h for errands in self._errands.values() for h in errands.pinned}
                self._store.evict(self.settings.cache_bytes, keep=pinned)

    def _is_over(self) -> bool:
        if self._left_at is None or not all(lane.over for lane in self._lanes.values()):
            return False
        return self._keeper.is_idle() or self._clock() >= self._last_at

    def _take(self, name: str, event: LaneEvent | _Refused | _Asked | _Jobs) -> None:
        match event:
            case _Refused(error):
                self._exit = TOO_OLD if isinstance(error, VersionMismatch) else REVOKED
                self._view.say(f"the hub will not have this worker: {error}", True)
            case _Asked(at_once):
                self._interrupts += 1
                if at_once or self._interrupts > 1:
                    self._exit = INTERRUPTED
                elif not self._is_leaving():
                    self._view.say("leaving: handing in what is done. Once more to leave at once")
                    self._start_leaving()
            case _Jobs(busy):
                self._held = busy
                for lane, state in self._lanes.items():
                    if "unit" in state.policy.kinds:  # merges and tastes go on: the whole pool waits for them
                        self._feed(lane, Hold() if busy else GoOn())
                self._look_for_quiet()
            case Beat() if not name:
                for lane in self._lanes:
                    self._feed(lane, event)
            case _:
                self._feed(name, event)

    def _feed(self, name: str, event: LaneEvent) -> None:
        lane, errands = self._lanes[name], self._errands[name]
        leases = len(lane.tasks)
        for wish in lane.handle(event, self._clock()):
            errands.carry_out(wish)
            if isinstance(wish, Over):
                self._start_leaving()
        for task in lane.tasks.values():
            self._ttl_s = task.lease.ttl_s
        self._beats = [beat for each in self._lanes.values() for beat in each.progress()]
        if len(lane.tasks) > leases:
            self._beat_now.set()  # the hub may keep shorter leases than we thought
        self._look_for_quiet()

    def _jobs_are_here(self, busy: bool) -> None:
        """From the keeper's threads, before a first job begins and after the last one has ended."""
        self._quiet.clear()
        self._inbox.put(("", _Jobs(busy)))

    def _look_for_quiet(self) -> None:
        if self._held and all(lane.is_quiet() for lane in self._lanes.values() if "unit" in lane.policy.kinds):
            self._quiet.set()

    def _start_leaving(self) -> None:
        """Lanes hand in; jobs get their grace, and after it the time that handing in takes."""
        if self._left_at is None:
            self._left_at = self._clock()
            self._last_at = self._left_at + max(HAND_IN_S, self._keeper.grace_s()) + LEAVE_S
            self._keeper.leave()
        for name, lane in self._lanes.items():
            if lane.stopping_since is None and not lane.over:
                self._feed(name, Stop())

    def _is_leaving(self) -> bool:
        return self._left_at is not None

    def _job_ended(self) -> None:
        if self.settings.once and self.settings.house.rules.accept == "jobs" and self._keeper.is_idle():
            self.stop()

    def _pool_processes(self) -> list[int]:
        return [pid for errands in self._errands.values() if (pid := errands.child_pid) is not None]

    def _leave(self, hub: Hub) -> int:
        """Say goodbye, if there is time for manners."""
        if self._exit is not None:
            return self._exit
        self._closed.set()
        if not self._line.is_away:
            self._keeper.be_quiet()
            hub.timeout_s = min(hub.timeout_s, 3.0)
            with contextlib.suppress(PotluckError):
                hub.leave()
        units = sum(lane.tally.done for lane in self._lanes.values())
        samples = sum(lane.tally.samples for lane in self._lanes.values())
        kept = sum(len(errands.spooled) for errands in self._errands.values()) + self._keeper.kept
        more = f"; {kept} not yet handed in, kept for the next time" if kept else ""
        self._view.say(f"left after {units} tasks and {samples:,} samples{more}")
        return 0

    def _end_children(self) -> None:
        self._keeper.kill()  # after a goodbye there is nothing left to kill
        for errands in self._errands.values():
            errands.stop_asking()
            if self._exit is not None:
                errands.kill()
        for errands in self._errands.values():
            errands.wait_child(5.0)

    def _hand_in_spool(self, spool: Spool) -> None:
        first = next(iter(self._errands.values()), None)
        entries = spool.entries() if first is not None else []
        for folder, entry in entries:
            if entry.worker_id != self.settings.worker_id:
                self._view.say(f"a finished {entry.kind} of another membership is thrown away", True)
                spool.remove(folder)
            elif first is not None:
                first.hand_in(folder, entry)
        if first is not None and first.spooled:
            self._view.say(f"handing in {len(first.spooled)} finished before")

    # --- heartbeat

    def _heartbeat(self) -> None:
        while not self._closed.is_set():
            try:
                answer = self._line.call(lambda hub: hub.heartbeat(self._beat()))
            except GivenUp:
                return
            except PotluckError as error:
                self._view.say(f"the hub refuses a heartbeat: {error}", True)
            else:
                self._applied = answer.samples_applied
                for message in answer.messages:
                    if message not in self._messages:
                        self._messages.add(message)
                        self._view.say(f"hub: {message}")
                if answer.drop or answer.hand_in:
                    self._inbox.put(("", Beat(frozenset(answer.drop), frozenset(answer.hand_in))))
            self._beat_now.wait(self._ttl_s / 3)
            self._beat_now.clear()

    def _beat(self) -> HeartbeatRequest:
        beats = {beat.lease_id: beat for beat in self._beats}
        for errands in self._errands.values():
            for lease_id in errands.spooled:
                beats.setdefault(lease_id, Progress(lease_id))
        at_work = beats or self._keeper.works()
        state = "leaving" if self._is_leaving() else "working" if at_work else "idle"
        return HeartbeatRequest(list(beats.values()), state)

    # --- small things

    def _poster(self, name: str) -> Callable[[LaneEvent], None]:
        return lambda event: self._inbox.put((name, event))

    def _facts(self) -> Facts:
        works = []
        for lane in self._lanes.values():
            task = lane.working()
            if task is not None and task.stage is Stage.WORKING:
                works.append(Work(task.name, task.fraction, task.progress.samples_per_s, task.progress.loss))
        return Facts(
            name=self.settings.name,
            hub=self.settings.hub_name or self.settings.hub,
            device=self.settings.device,
            share=self.settings.share,
            is_away=self._line.is_away,
            is_leaving=self._is_leaving(),
            works=tuple(works),
            jobs=tuple(self._keeper.works()),
            units=sum(lane.tally.done for lane in self._lanes.values()),
            samples=sum(lane.tally.samples for lane in self._lanes.values()),
            applied=self._applied,
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM are requests to leave, while we run in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def policies(settings: AgentSettings) -> list[LanePolicy]:
    """The lanes of this worker: units for everybody, merges and tastes for the trusted; none where only jobs may run."""
    device, share = settings.device, settings.share
    if settings.house.rules.accept == "jobs":
        return []
    lanes = [LanePolicy("units", ("unit",), True, device, share, settings.once)]
    if settings.trusted:
        lanes.append(LanePolicy("merges", ("init", "merge"), False))
        lanes.append(LanePolicy("tastes", ("taste",), False, device))
    return lanes


def house_of(settings: AgentSettings) -> House:
    """Who came for one unit (`--once`) takes no jobs beside it."""
    house = settings.house
    if settings.once and house.rules.accept == "all":
        return replace(house, rules=replace(house.rules, accept="pool"))
    return house


def threads_of(lane: str, settings: AgentSettings) -> int:
    """Threads of a lane's child. Merges take one, so that sums come out the same on every machine."""
    if lane == "merges":
        return 1
    cores = settings.threads or usable_cores()
    return cores if lane == "units" else max(1, cores // 2)
