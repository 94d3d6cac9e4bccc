"""How are a lane's wishes carried out, without ever keeping the lane waiting?

Each wish that takes time has a thread of its own and comes back as an event: asking for a lease, fetching a task's
files, watching for a newer version, sending an outcome (one after the other, through the spool).
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import shutil
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from potluck.blobs import BlobStore
from potluck.client import Hub
from potluck.errors import DiskFull, PotluckError
from potluck.protocol import Blob, Lease, LeaseRequest, Report, ReportAnswer, Version, WeightFile
from potluck.worker import orders
from potluck.worker.line import LOCAL, GivenUp, Line
from potluck.worker.orders import Parts
from potluck.worker.runners import COMMAND, ProcessRunner
from potluck.worker.spool import Entry, Spool
from potluck.worker.spool import read as read_entry
from potluck.worker.words import (
    Abandon,
    AskLease,
    ChildDied,
    ChildSaid,
    EndChild,
    Fetch,
    Fetched,
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
    Tell,
    WatchRun,
)

LEASE_WAIT_S = 25.0
VERSION_WAIT_S = 20.0
_PATIENCE_S = 5.0  # of one upload or download; the line's patience is the lease's


@dataclass
class Cost:
    """What the exchange of one task took."""

    seconds: float = 0.0
    up: int = 0
    down: int = 0


@dataclass(frozen=True)
class Bench:
    """What all lanes of an agent share."""

    line: Line
    store: BlobStore
    spool: Spool
    home: Path
    worker_id: str
    device: str
    share: float
    say: Callable[[str, bool], None]
    command: Sequence[str] = COMMAND


class Errands:
    """Carries out one lane's wishes; everything comes back through `post`."""

    def __init__(self, name: str, bench: Bench, post: Callable[[LaneEvent], None], *, threads: int) -> None:
        self.name = name
        self.bench = bench
        self._post = post
        self._threads = threads
        self._child: ProcessRunner | None = None
        self._unwanted: set[str] = set()  # leases whose files nobody needs any more
        self._gone: set[str] = set()  # leases whose outcome nobody wants any more
        self._pins: dict[str, set[str]] = defaultdict(set)  # lease → blobs that must not be evicted
        self._news: deque[str] = deque(maxlen=100)  # blobs of newer versions, likewise
        self._costs: dict[str, Cost] = defaultdict(Cost)
        self._news_cost = Cost()
        self._watched: WatchRun = WatchRun(None)
        self._watchers: dict[WatchRun, threading.Thread] = {}
        self._stopped = threading.Event()
        self._outbox: queue.SimpleQueue[Send | Path] = queue.SimpleQueue()
        self._sending: set[str] = set()
        _thread(f"{name}-send", self._send_all)

    # --- for the agent

    @property
    def pinned(self) -> set[str]:
        return {hash_ for pins in [*self._pins.values(), self._news] for hash_ in list(pins)}

    @property
    def spooled(self) -> set[str]:
        """Leases whose outcome is on its way, also those from before a restart."""
        return set(self._sending)

    def hand_in(self, folder: Path, entry: Entry) -> None:
        """Send what an earlier agent left in the spool."""
        self._sending.add(entry.lease_id)
        self._outbox.put(folder)

    @property
    def child_pid(self) -> int | None:
        """Of the child, while it lives."""
        child = self._child
        return None if child is None or child.wait(0) else child.pid

    def stop_asking(self) -> None:
        self._stopped.set()

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    def wait_child(self, timeout_s: float) -> None:
        if self._child is not None and not self._child.wait(timeout_s):
            self._child.kill()
            self._child.wait(2.0)

    def carry_out(self, wish: Instruction) -> None:
        match wish:
            case AskLease():
                _thread(f"{self.name}-ask", self._ask, wish)
            case Fetch():
                _thread(f"{self.name}-fetch", self._fetch, wish)
            case Send():
                self._sending.add(wish.lease.id)
                self._gone.discard(wish.lease.id)
                self._outbox.put(wish)
            case Abandon(lease_id):
                self._unwanted.add(lease_id)
                self._gone.add(lease_id)
                self._pins.pop(lease_id, None)
            case Tell(message):
                if self._child is not None:
                    self._child.tell(message)
            case StartChild():
                self._start_child()
            case EndChild(gently):
                if self._child is not None:
                    self._child.end(gently=gently)
            case WatchRun():
                self._watch(wish)
            case Say(text, bad):
                self.bench.say(text, bad)
            case Over():
                self._stopped.set()

    # --- the child

    def _start_child(self) -> None:
        cache = self.bench.home / "judges"
        try:
            self._child = ProcessRunner(
                command=self.bench.command,
                on_event=lambda event: self._post(ChildSaid(event)),
                on_exit=lambda reason: self._post(ChildDied(reason)),
                log=self.bench.home / f"{self.name}.log",
                threads=self._threads,
                extra_env={"POTLUCK_CHILD_CACHE": str(cache)},
            )
        except OSError as error:
            self._post(ChildDied(f"it could not be started: {error}"))

    # --- leases

    def _ask(self, wish: AskLease) -> None:
        request = LeaseRequest(
            kinds=list(wish.kinds),
            share=self.bench.share,
            device=self.bench.device,
            samples_per_s=wish.samples_per_s,
            except_runs=list(wish.except_runs),
        )
        try:
            lease = self.bench.line.call(lambda hub: hub.lease(request, LEASE_WAIT_S), give_up=self._stopped.is_set)
        except GivenUp:
            self._post(NoWork())
            return
        except PotluckError as error:
            self.bench.say(f"the hub refuses to lease: {error}", True)
            lease = None
        if lease is not None and self._stopped.is_set():
            # Nobody listens any more: give it back, so that it need not lapse.
            with contextlib.suppress(PotluckError):
                self.bench.line.hub.report(lease.id, Report("returned", reason="the worker was leaving"))
            return
        self._post(NoWork() if lease is None else Leased(lease))

    # --- fetching

    def _fetch(self, wish: Fetch) -> None:
        lease = wish.lease
        begun = time.monotonic()
        try:
            parts = self._gather(lease, wish.have)
        except GivenUp:
            return
        except DiskFull as error:
            self._post(NotFetched(lease.id, str(error), ours=True))
        except OSError as error:
            self._post(NotFetched(lease.id, f"this machine's disk: {error}", ours=True))
        except PotluckError as error:
            self._post(NotFetched(lease.id, f"its files could not be fetched: {error}"))
        except Exception as error:  # noqa: BLE001  (a lease without an end would be renewed for ever)
            self._post(NotFetched(lease.id, f"fetching its files failed: {type(error).__name__}: {error}"))
        else:
            self._costs[lease.id].seconds += time.monotonic() - begun
            self._post(Fetched(lease.id, parts))

    def _gather(self, lease: Lease, have: int | None) -> Parts:
        """All files of the task. The child's folder for what it writes is named by us, not by the lease."""
        out = self.bench.home / "work" / hashlib.sha256(lease.id.encode()).hexdigest()[:24]
        wanted = set(orders.shards_wanted(lease))
        shards = lease.dataset.shards
        state = lease.merge.state if lease.merge else lease.taste.state if lease.taste else None
        inputs = lease.merge.inputs if lease.merge and lease.kind == "merge" else []
        return Parts(
            recipe_path=self._get(lease, lease.recipe.source) if lease.recipe.source else "",
            shard_paths=[self._get(lease, shard.blob) if index in wanted else "" for index, shard in enumerate(shards)],
            weights=self._weights(lease, have) if lease.kind != "init" else [],
            state_path=self._get(lease, state) if state is not None else "",
            update_paths=[self._get(lease, given.blob) for given in inputs],
            out=str(out),
        )

    def _get(self, lease: Lease, blob: Blob) -> str:
        self._pins[lease.id].add(blob.hash)
        return self._get_blob(blob, self._costs[lease.id], lambda: lease.id in self._unwanted)

    def _get_blob(self, blob: Blob, cost: Cost, give_up: Callable[[], bool]) -> str:
        if not self.bench.store.has(blob.hash):
            cost.down += blob.size_bytes

        def fetch(hub: Hub) -> Path:
            return hub.fetch(
                blob,
                self.bench.store,
                patience_s=_PATIENCE_S,
                give_up=lambda: give_up() or self.bench.line.closed.is_set(),
            )

        return str(self.bench.line.call(fetch, give_up=give_up))

    def _weights(self, lease: Lease, have: int | None) -> list[WeightFile]:
        target = lease.merge.base if lease.merge else lease.taste.version if lease.taste else None
        steps = self._way(lease, have, target)
        return [
            WeightFile(
                step[0], step[1].number, step[1].codec, self._get(lease, orders.blob_of(step)), step[1].weights_sha256
            )
            for step in steps
        ]

    def _way(self, lease: Lease, have: int | None, target: Version | None) -> list[tuple[str, Version]]:
        to = target.number if target else None
        if target is not None and have == to:
            return []
        if target is not None and have is None and target.snapshot is not None:
            return [("snapshot", target)]
        for start, after in ((have, -1 if have is None else have), (None, -1), (None, 0)):
            versions = self.bench.line.call(
                lambda hub, after=after: hub.versions(lease.run_id, after),  # type: ignore[misc]
                give_up=lambda: lease.id in self._unwanted,
            )
            steps = orders.way(versions, start, to=to)
            if steps is not None:
                return steps
        if target is not None and target.snapshot is not None:
            return [("snapshot", target)]
        wanted = "its weights" if to is None else f"version {to}"
        raise PotluckError(f"the hub offers no way to {wanted} of {lease.run_id}")

    # --- newer versions

    def _watch(self, wish: WatchRun) -> None:
        self._watched = wish
        if wish.run_id is None or ((alive := self._watchers.get(wish)) is not None and alive.is_alive()):
            return
        self._watchers = {key: t for key, t in self._watchers.items() if t.is_alive()}
        self._watchers[wish] = _thread(f"{self.name}-watch", self._watch_one, wish)

    def _watch_one(self, wish: WatchRun) -> None:
        run_id, after = wish.run_id or "", wish.after

        def is_done() -> bool:
            return self._stopped.is_set()

        while self._watched == wish and not is_done():
            try:
                versions = self.bench.line.call(
                    lambda hub: hub.versions(run_id, after, VERSION_WAIT_S), give_up=is_done
                )
                steps = orders.way(versions, after)
                if not steps or self._watched != wish:
                    if versions and not steps:
                        return  # no way from here: the next task's fetch will find one
                    continue
                cost, begun = Cost(), time.monotonic()
                chain = []
                for kind, version in steps:
                    blob = orders.blob_of((kind, version))
                    self._news.append(blob.hash)
                    path = self._get_blob(blob, cost, is_done)
                    chain.append(WeightFile(kind, version.number, version.codec, path, version.weights_sha256))
                self._news_cost.down += cost.down
                self._news_cost.seconds += time.monotonic() - begun
                self._post(NewVersion(run_id, chain))
                return
            except (GivenUp, PotluckError, OSError):
                return  # the next task's fetch meets the same trouble and tells of it

    # --- outcomes

    def _send_all(self) -> None:
        while not self.bench.line.closed.is_set():
            try:
                item = self._outbox.get(timeout=1.0)
            except queue.Empty:
                continue
            lease_id = ""
            try:
                if isinstance(item, Path):
                    entry = read_entry(item)
                    lease_id = entry.lease_id
                    answer = self._deliver(entry, {f: str(item / n) for f, n in entry.files.items()})
                    self.bench.spool.remove(item)
                    fate = "was taken" if answer.accepted else f"was not taken: {answer.reason}"
                    self.bench.say(f"an earlier {entry.kind} of {entry.run_id} {fate}", not answer.accepted)
                else:
                    lease_id = item.lease.id
                    answer = self._send(item)
                    self._post(Reported(lease_id, answer.accepted, answer.reason))
            except GivenUp:
                continue
            except Exception as error:  # noqa: BLE001  (the outbox must go on, whatever one outcome holds)
                self._post(Reported(lease_id, False, f"it could not be sent: {error}"))
            finally:
                self._forget(lease_id)

    def _send(self, wish: Send) -> ReportAnswer:
        lease, files, folder = wish.lease, wish.files, None
        entry = Entry(lease.id, self.bench.worker_id, lease.kind, lease.run_id, wish.report)
        if wish.report.outcome == "done":
            for path in files.values() if lease.kind in ("init", "merge") else ():
                with contextlib.suppress(PotluckError, OSError):
                    self.bench.store.add_file(Path(path))  # the next merge starts from it
            try:
                folder = self.bench.spool.put(entry, files)
                files = {name: str(folder / n) for name, n in read_entry(folder).files.items()}
            except DiskFull as error:
                self.bench.say(f"{error}. Handing in without keeping a copy", True)
        answer = self._deliver(entry, files)
        if folder is not None:
            self.bench.spool.remove(folder)
        return answer

    def _deliver(self, entry: Entry, files: dict[str, str]) -> ReportAnswer:
        """Upload, then report. Tries again for as long as it may help."""
        cost = self._costs[entry.lease_id]
        news, self._news_cost = self._news_cost, Cost()
        begun = time.monotonic()

        def is_gone() -> bool:
            return entry.lease_id in self._gone

        def upload(path: str) -> Callable[[Hub], Blob]:
            return lambda hub: hub.upload(
                Path(path), patience_s=_PATIENCE_S, give_up=lambda: is_gone() or self.bench.line.closed.is_set()
            )

        try:
            blobs = {}
            for name, path in files.items():
                blobs[name] = self.bench.line.call(upload(path), give_up=is_gone, also=LOCAL)
                cost.up += blobs[name].size_bytes
            report = replace(
                entry.report,
                exchange_s=cost.seconds + news.seconds + time.monotonic() - begun,
                bytes_up=cost.up,
                bytes_down=cost.down + news.down,
                **blobs,  # type: ignore[arg-type]
            )
            return self.bench.line.call(lambda hub: hub.report(entry.lease_id, report), give_up=is_gone, also=LOCAL)
        except GivenUp:
            if not is_gone():
                raise
            return ReportAnswer(False, "the lease lapsed before the hub had it")
        except PotluckError as error:
            return ReportAnswer(False, str(error))

    def _forget(self, lease_id: str) -> None:
        self._pins.pop(lease_id, None)
        self._costs.pop(lease_id, None)
        self._sending.discard(lease_id)
        self._gone.discard(lease_id)
        self._unwanted.discard(lease_id)
        shutil.rmtree(self.bench.home / "work" / hashlib.sha256(lease_id.encode()).hexdigest()[:24], ignore_errors=True)


def _thread(name: str, target: Callable[..., None], *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread
