"""How does a worker come to its jobs, keep the right to them, and bring their ends home?

    orders        one long-poll after the other; the answer brings leases, and jobs to end or to drop
    job-<lease>   a thread for each lease: attempt (attempt.py), then its end, durable (reports.py), then to the hub
    fence         an attempt whose last answered request is older than the job's patience ends itself (Attempt.off)
    gangs         the hub asks whom we can reach (door.py) and says where a gang meets, or that it shall meet here
                  (gangs.py); what came of it goes with the next request, which waits a moment for it

A lease is begun once: `_seen` remembers each. It is in `holding` until the hub has answered for its end, also across a
restart of the agent. While a job is here the pool's lane holds; `quiet` says when it has let go of the machine.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from potluck.blobs import BlobStore
from potluck.client import Hub
from potluck.errors import DiskFull, NotFound, NotKnown, PotluckError
from potluck.protocol import End, JobLease, JobReport, MachineNow, OrdersAnswer, OrdersRequest
from potluck.telemetry import clean
from potluck.worker.door import Porter
from potluck.worker.jobs import environments, executors, reports
from potluck.worker.jobs.attempt import Attempt, Folders, Shop, key_of
from potluck.worker.jobs.box import clock
from potluck.worker.jobs.gangs import Member
from potluck.worker.jobs.house import LEAVING, House, refuse
from potluck.worker.jobs.hubside import HubSide
from potluck.worker.jobs.output import Output
from potluck.worker.jobs.walking import remove_tree, size_of
from potluck.worker.line import GivenUp, Line

ORDERS_WAIT_S = 20.0
EARLY_S = 1.0
"""An answer without news that comes this early, again and again, is a hub that does not wait: then we do."""
NEWS_S = 1.0
"""A request waits so long for what the hub asked to know: else that would go with the next one, up to 20 s later."""
ARRIVES_S = 1.0
"""Whatever was sent so long ago has arrived, or never will."""
TRIM_EVERY_S = 60.0


@dataclass
class _Here:
    """A job on this machine."""

    lease: JobLease
    attempt: Attempt
    side: HubSide
    output: Output
    until: float  # the lease lapses then, by box.clock()
    member: Member | None = None  # of a gang
    is_over: bool = False  # its command has ended; its end is on the way
    is_dropped: bool = False


class Keeper:
    """All jobs of one agent. `leave` and `kill` may be called from any thread."""

    def __init__(
        self,
        *,
        line: Line,
        store: BlobStore,
        home: Path,
        worker_id: str,
        house: House,
        machine: Callable[[], MachineNow],
        say: Callable[[str, bool], None],
        on_busy: Callable[[bool], None] = lambda busy: None,
        on_end: Callable[[], None] = lambda: None,
        quiet: Callable[[float], bool] = lambda seconds: True,
        cache_bytes: int = 5 * 10**9,
    ) -> None:
        self.agent = secrets.token_hex(8)
        self._line = line
        self._store = store
        self._home = home
        self._worker_id = worker_id
        self._house = house
        self._machine = machine
        self._say = say
        self._on_busy = on_busy
        self._on_end = on_end
        self._quiet = quiet
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._here: dict[str, _Here] = {}
        self._kept: dict[str, threading.Event] = {}  # ends on their way, by lease: set when it was dropped
        self._seen: deque[str] = deque(maxlen=10_000)
        self._leaving = threading.Event()
        self._asked_at = 0.0
        self._asking: threading.Thread | None = None
        self._porter: Porter | None = None
        self._news = threading.Condition()
        self._shop = Shop([], house.rules.runtime, house.executor, home / "shared", say)
        self._trimming = threading.Lock()
        self._trim_at = 0.0
        self._dead: list[Path] = []
        self._was_busy = False
        self._busy_lock = threading.Lock()

    # --- for the agent

    def start(self) -> None:
        """Clear away what an earlier agent left, hand in what it could not, and ask for orders."""
        with self._lock:
            for folder, kept in self._left_behind():
                self._kept[kept.lease_id] = gone = threading.Event()
                self._seen.append(kept.lease_id)
                _thread(f"job-{folder.name[:8]}", self._hand_in_again, folder, kept, gone)
        if self._house.rules.accept != "pool":
            try:
                self._porter = Porter(self._on_news)
            except OSError as error:
                self._say(f"this worker takes part in no gang: it can have no port ({error})", True)
        self._asking = _thread("orders", self._work)

    def leave(self) -> None:
        """Begin nothing new; let what runs write its checkpoint and end; the hub gives it to somebody else."""
        with self._lock:
            self._leaving.set()
            running = [here for here in self._here.values() if not here.is_over]
        for here in running:
            here.attempt.end(LEAVING, here.lease.spec.grace_s, outcome="returned")

    def kill(self) -> None:
        """Now. Nothing is reported: the hub sees that we are gone."""
        self._leaving.set()
        with self._lock:
            running = [here for here in self._here.values() if not here.is_over]
        for here in running:
            here.attempt.kill("its worker left at once")
        if self._porter is not None:
            self._porter.close()

    def be_quiet(self) -> None:
        """After this no request of ours arrives at the hub any more: one that came after our goodbye would undo it.

        To be called when the line is closed, or when we are leaving and idle: then no other begins.
        """
        with self._lock:
            asked_at = self._asked_at
        if self._asking is not None:
            self._asking.join(max(0.0, asked_at + ARRIVES_S - clock()))

    def is_idle(self) -> bool:
        """Nothing runs and everything is answered for."""
        with self._lock:
            return not self._here and not self._kept

    def grace_s(self) -> float:
        """How long the jobs at work may still take when they are told to end."""
        with self._lock:
            return max((h.lease.spec.grace_s for h in self._here.values() if not h.is_over), default=0.0)

    def works(self) -> list[str]:
        """For the screen: a line for each job."""
        with self._lock:
            return [
                f"job {clean(h.lease.name)} of {clean(h.lease.owner_name)}: "
                + ("handing in" if h.is_over else h.attempt.state)
                for h in self._here.values()
            ]

    @property
    def kept(self) -> int:
        with self._lock:
            return len(self._kept) + sum(here.is_over for here in self._here.values())

    # --- orders

    def _left_behind(self) -> list[tuple[Path, reports.Kept]]:
        ended, self._dead = reports.left_behind(self._home / "jobs")
        mine = []
        for folder, kept in ended:
            if kept.worker_id == self._worker_id:
                mine.append((folder, kept))
            else:
                self._say(f"the end of {clean(kept.name)}, a job of another membership, is thrown away", True)
                reports.remove(folder)
        if mine:
            self._say(f"handing in the end of {len(mine)} job{'s'[: len(mine) != 1]} from before", False)
        return mine

    def _work(self) -> None:
        try:
            self._prepare()
            self._ask_for_ever()
        except GivenUp:
            return
        except Exception as error:
            self._say(f"no more jobs until the next start, Potluck broke: {type(error).__name__}: {error}", True)
            raise

    def _prepare(self) -> None:
        """Clear away the jobs that died with an earlier agent. Then: what runs jobs here? It tries every program."""
        executors.sweep({folder.name: folder for folder in self._dead})
        for folder in self._dead:
            reports.remove(folder)
        if self._house.rules.accept != "pool":
            found = executors.found()
            self._shop = replace(self._shop, found=found)
            with contextlib.suppress(
                PotluckError, OSError
            ):  # looked at once, so that the first job need not wait for it
                environments.prepare(
                    self._home, requirements="", python="", cache=self._shop.cache, say=lambda text: None
                ).release()
            self._trim()

    def _ask_for_ever(self) -> None:
        idle, refused = 0, ""
        while not self._line.closed.is_set():
            self._wait_for_news()
            begun, wait_s = clock(), self._wait_s()
            try:
                sent_at, held, answer = self._ask(wait_s)
            except NotFound as error:
                self._say(f"this hub knows no jobs: {error}", True)
                if self._line.closed.wait(300):
                    return
                continue
            except PotluckError as error:
                if refused != str(error):  # once, not every five seconds for a night
                    self._say(f"the hub refuses to give orders: {error}", True)
                refused = str(error)
                if self._line.closed.wait(5):
                    return
                continue
            refused = ""
            news = self._take(answer, sent_at, held)
            early = not news and clock() - begun < min(EARLY_S, wait_s / 2)
            idle = idle + 1 if early else 0
            if idle > 2 and self._line.closed.wait(min(1.0, 0.05 * 2.0 ** min(idle, 5))):
                return

    def _wait_s(self) -> float:
        """Never so long that a short patience could end within it, or that what the hub asked to know would wait."""
        longest = NEWS_S if self._has_news_to_come() else ORDERS_WAIT_S
        with self._lock:
            return min([longest, *(max(0.2, here.lease.ttl_s / 3) for here in self._here.values())])

    def _wait_for_news(self) -> None:
        with self._news:
            self._news.wait_for(lambda: self._line.closed.is_set() or not self._has_news_to_come(), NEWS_S)

    def _on_news(self) -> None:
        with self._news:
            self._news.notify_all()

    def _has_news_to_come(self) -> bool:
        if self._porter is not None and self._porter.is_out:
            return True
        with self._lock:
            members = [here.member for here in self._here.values() if here.member is not None]
        return any(member.is_opening for member in members)

    def _ask(self, wait_s: float) -> tuple[float, list[str], OrdersAnswer]:
        """The answer, with when it was asked for and what we held then. GivenUp if we are leaving and hold nothing."""
        sent_at, held = 0.0, list[str]()

        def ask(hub: Hub) -> OrdersAnswer:
            nonlocal sent_at, held
            request = self._request()
            with self._lock:
                if self._line.closed.is_set() or (self._leaving.is_set() and not request.holding):
                    raise GivenUp
                self._asked_at = sent_at = clock()
            held = request.holding
            answer = hub.orders(request, wait_s)
            if self._porter is not None:
                self._porter.told(request.reached)
            return answer

        # A hub that was away must be found again well within the patience of the jobs that are here.
        answer = self._line.call(ask, refusal=NotKnown, longest_wait_s=max(0.2, wait_s / 2))
        return sent_at, held, answer

    def _request(self) -> OrdersRequest:
        rules = self._house.rules
        if self._leaving.is_set():
            rules = replace(rules, accept="pool")
        with self._lock:
            holding = [*self._here, *self._kept]
            members = [here.member for here in self._here.values() if here.member is not None and not here.is_over]
        porter = self._porter if rules.accept != "pool" else None
        works = [found.name for found in self._shop.found if found.works]
        if self._house.executor:
            works = [name for name in works if name == self._house.executor]
        return OrdersRequest(
            self.agent,
            holding,
            self._machine(),
            rules,
            works,
            dict(self._house.labels),
            door=porter.door if porter is not None else None,
            reached=porter.found() if porter is not None else [],
            meetings=[member.meeting() for member in members],
        )

    def _take(self, answer: OrdersAnswer, sent_at: float, held: list[str]) -> bool:
        """Do what the hub says. Was there anything new in it?"""
        news = False
        with self._lock:
            for lease_id in held:
                if lease_id not in answer.drop and (here := self._here.get(lease_id)) is not None:
                    here.until = here.attempt.until = max(here.until, sent_at + here.lease.ttl_s)
        for lease_id in answer.drop:
            news |= self._drop(lease_id)
        for end in answer.end:
            news |= self._end(end)
        for lease in answer.leases:
            news |= self._begin(lease)
        for order in answer.meet:
            with self._lock:
                here = self._here.get(order.lease_id)
            if here is not None and here.member is not None and not here.is_over:
                news |= here.member.order(order)
        if self._porter is not None and not self._leaving.is_set():
            news |= self._porter.knock(answer.knock)
        return news

    def _drop(self, lease_id: str) -> bool:
        with self._lock:
            gone, here = self._kept.get(lease_id), self._here.get(lease_id)
            news = (gone is not None and not gone.is_set()) or (here is not None and not here.is_dropped)
            if gone is not None:
                gone.set()
            if here is not None:
                here.is_dropped = True
        if here is not None and news and not here.is_over:
            self._say(f"{clean(here.lease.name)} is not ours any more: the hub has moved on", False)
            here.attempt.kill("the hub has moved on")
        return news

    def _end(self, end: End) -> bool:
        with self._lock:
            here = self._here.get(end.lease_id)
        if here is None or here.is_over or here.attempt.is_ending:
            return False
        self._say(f"{clean(here.lease.name)} is ended: {clean(end.reason)}", False)
        here.attempt.end(end.reason, end.grace_s, outcome="cancelled")
        return True

    # --- a job

    def _begin(self, lease: JobLease) -> bool:
        with self._lock:
            if lease.id in self._seen:
                return False
            self._seen.append(lease.id)
            at_work = sum(not (here.is_over or here.is_dropped) for here in self._here.values())
            leaving = self._leaving.is_set()
            here = self._here[lease.id] = self._new(lease)
        refusal = refuse(lease, self._house, at_work=at_work, leaving=leaving)
        if refusal:
            report = JobReport("returned", reason=refusal, code="rules")
            _thread(f"job-{key_of(lease.id)[:8]}", self._live, here, lambda: report)
        else:
            self._say(f"job {clean(lease.name)} of {clean(lease.owner_name)} is here", False)
            self._busy()
            _thread(f"job-{key_of(lease.id)[:8]}", self._live, here, here.attempt.run)
        return True

    def _new(self, lease: JobLease) -> _Here:
        folders = Folders.below(self._home / "jobs" / key_of(lease.id))
        side = HubSide(
            lease.id,
            self._line,
            self._store,
            lease=lease,
            quiet=self._quiet,
            gone=lambda: here.is_dropped,
            say=lambda text: output.say(text),
        )
        output = Output(folders.root / "output.log", side.send_log, secrets=lease.secrets.values())
        member = None
        if lease.gang is not None:
            member = Member(
                lease,
                root=folders.root,
                scratch=folders.scratch,
                until=lambda: attempt.until,
                on_news=self._on_news,
            )
        attempt = Attempt(lease, folders=folders, shop=self._shop, side=side, output=output, member=member)
        attempt.until = clock() + lease.ttl_s
        here = _Here(lease, attempt, side, output, attempt.until, member)
        return here

    def _live(self, here: _Here, run: Callable[[], JobReport]) -> None:
        """From the lease to the hub's answer for its end."""
        lease, folders, output = here.lease, here.attempt.folders, here.output
        try:
            report = run()
            if here.member is not None:
                here.member.close()
            if report.reason and (report.outcome != "exited" or report.signal):
                output.say(report.reason)
            output.close()
            with self._lock:
                here.is_over = True
            self._busy()
            if report.code != "rules":
                self._say(f"job {clean(lease.name)} has ended: {in_words(report)}", report.outcome == "failed")
            sent, rest = output.unsent()
            kept = reports.Kept(lease.id, self._worker_id, lease.run_id, lease.name, report, sent)
            if not here.is_dropped:
                self._keep(folders.root, kept, rest)
                answer = here.side.bring_home(kept, folders, output)
                if not answer.accepted:
                    self._say(f"the end of {clean(lease.name)} was not taken: {clean(answer.reason)}", True)
            reports.remove(folders.root)
        except GivenUp:
            if here.is_dropped:
                reports.remove(folders.root)
            return  # the agent is closed: the next one hands it in
        except Exception as error:  # noqa: BLE001  (the thread's last word; the folder stays for the next agent)
            self._say(f"the end of {clean(lease.name)} could not be handed in: {type(error).__name__}: {error}", True)
        finally:
            here.side.close()
            with self._lock:
                here.is_over = True
                del self._here[lease.id]
            self._busy()
            self._trim()
            self._on_end()

    def _keep(self, folder: Path, kept: reports.Kept, rest: bytes) -> None:
        """On the disk before it is sent. The rest of the output may arrive meanwhile: what is sent twice counts once."""
        try:
            reports.keep(folder, kept, rest)
        except (DiskFull, OSError) as error:
            self._say(f"{error}. Handing in without keeping a copy", True)

    def _hand_in_again(self, folder: Path, kept: reports.Kept, gone: threading.Event) -> None:
        side = HubSide(kept.lease_id, self._line, self._store, gone=gone.is_set)
        try:
            answer = side.bring_home(kept, Folders.below(folder), None)
            fate = "was taken" if answer.accepted else f"was not taken: {clean(answer.reason)}"
            self._say(f"the end of {clean(kept.name)} {fate}", not answer.accepted)
            reports.remove(folder)
        except GivenUp:
            if gone.is_set():
                reports.remove(folder)
        except Exception as error:  # noqa: BLE001  (the folder stays: the next agent tries once more)
            self._say(f"the end of {clean(kept.name)} could not be handed in: {type(error).__name__}: {error}", True)
        finally:
            side.close()
            with self._lock:
                del self._kept[kept.lease_id]
            self._on_end()

    def _busy(self) -> None:
        with self._busy_lock:
            with self._lock:
                busy = any(not here.is_over for here in self._here.values())
            if busy != self._was_busy:
                self._was_busy = busy
                self._on_busy(busy)

    def _trim(self) -> None:
        """Keep what jobs share (environments, models) within the owner's limit. What is in use stays."""
        with self._trimming:
            now = clock()
            if now < self._trim_at:
                return
            self._trim_at = now + TRIM_EVERY_S
            caches = sorted(self._shop.cache.glob("*"), key=lambda person: person.stat().st_mtime)
            for person in caches:
                environments.evict(person, self._cache_bytes)
            sizes = {person: size_of(person / "shared") for person in caches}
            for person in caches:  # whoever was here longest ago loses the downloaded models first
                with self._lock:
                    in_use = {here.attempt.cache.name for here in self._here.values()}
                if sum(sizes.values()) > self._cache_bytes and person.name not in in_use:
                    remove_tree(person / "shared")
                    sizes[person] = 0


def in_words(report: JobReport) -> str:
    """For the person at this machine."""
    if report.reason:
        return clean(report.reason)
    return f"exit code {report.exit_code}" if report.exit_code is not None else report.signal or report.outcome


def _thread(name: str, target: Callable[..., object], *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread
