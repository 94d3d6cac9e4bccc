"""A hub for the tests of client and agent: real HTTP on a real socket, everything in memory, faults on request."""

from __future__ import annotations

import ssl
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
from fake_http import Refusal, Requests, Server

from potluck.blobs import BlobStore
from potluck.domain.job import JobSpec
from potluck.protocol import (
    Blob,
    CheckpointReport,
    Dataset,
    End,
    HeartbeatAnswer,
    HeartbeatRequest,
    HubInfo,
    JobLease,
    JobProgress,
    JobReport,
    JoinAnswer,
    JoinRequest,
    Knock,
    Layout,
    Lease,
    LeaseRequest,
    Meeting,
    MeetOrder,
    Missing,
    OrdersAnswer,
    OrdersRequest,
    Point,
    Reached,
    RecipeRef,
    Report,
    ReportAnswer,
    Shard,
    Tree,
    TreeFile,
    UnitSpec,
    UploadAnswer,
    UploadRequest,
    Version,
)
from potluck.settings import hash_token


class FakeHub:
    """`hub.reports`, `hub.leased` … tell what came; `hub.fail`, `hub.stop`, `hub.start` … make trouble."""

    def __init__(self, root: Path, *, tls: tuple[Path, Path] | None = None) -> None:
        self.blobs = BlobStore(root / "hub-blobs")
        self.tls = tls
        self.changed = threading.Condition()
        self.tokens: dict[str, str] = {}  # hash → worker id
        self.codes = {"GOODCODE": 3}
        self.waiting: list[Lease] = []  # leases to give
        self.live: dict[str, Lease] = {}
        self.leased: list[Lease] = []
        self.reports: list[tuple[str, Report]] = []
        self.answers: dict[str, ReportAnswer] = {}
        self.beats: list[HeartbeatRequest] = []
        self.requests: list[LeaseRequest] = []
        self.versions: dict[str, list[Version]] = {}
        self.drop: set[str] = set()
        self.hand_in: set[str] = set()
        self.left: list[str] = []
        self.joined: list[JoinRequest] = []
        self.calls: list[tuple[str, str]] = []
        self.fail: dict[str, list[int]] = {}  # path prefix → statuses to answer with, one a request
        self.cut: dict[str, int] = {}  # path prefix → how many requests to cut in the middle of the body
        self.ttl_s = 0.9
        self.merge_on_report = False
        self.endless: dict[str, Any] | None = None  # arguments of `unit` for as many as are asked for
        self.bare = False  # answer as something that is no hub
        self.jobs: dict[str, JobLease] = {}  # live leases of jobs
        self.job_agents: dict[str, str] = {}  # lease → agent that it was delivered to
        self.orders: list[OrdersRequest] = []
        self.job_ends: list[End] = []
        self.job_drops: set[str] = set()
        self.knocks: list[Knock] = []  # to be asked until the worker has said what came of them
        self.reached: list[Reached] = []
        self.meet: dict[str, MeetOrder] = {}  # by lease: said until it is echoed
        self.job_progress: list[tuple[str, JobProgress]] = []
        self.job_reports: list[tuple[str, JobReport]] = []
        self.job_answers: dict[str, ReportAnswer] = {}
        self.logs: dict[str, bytearray] = {}
        self.points: dict[str, list[Point]] = {}
        self.checkpoints: list[tuple[str, CheckpointReport]] = []
        self._next = 0
        self.port = 0
        self.server: ThreadingHTTPServer | None = None

    # --- life

    def start(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = Server(("127.0.0.1", self.port), handler)
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.tls)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server.cut_all()
            self.server = None
            with self.changed:
                self.changed.notify_all()

    @property
    def address(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def worker(self, token: str = "plw_test") -> str:
        self.tokens[hash_token(token)] = "w1"
        return token

    # --- what there is to do

    def publish(self, run: str, *, snapshot: bool = False) -> Version:
        chain = self.versions.setdefault(run, [])
        number = len(chain)
        delta = self.blobs.add_bytes(f"delta {run} {number}".encode() * 20) if number else None
        whole = self.blobs.add_bytes(f"snapshot {run} {number}".encode() * 50) if snapshot or not number else None
        version = Version(number, f"{number:064d}", "int8", delta, whole)
        with self.changed:
            chain.append(version)
            self.changed.notify_all()
        return version

    def dataset(self) -> Dataset:
        shards = [Shard(self.blobs.add_bytes(f"shard {i}".encode() * 1000), 500) for i in range(3)]
        return Dataset("pictures", 1500, shards, [3, 8, 8], held_out=100)

    def unit(
        self, run: str = "run1", *, overlap_s: float = 0.0, box_s: float = 1.0, size: int = 80, **behaviour: Any
    ) -> Lease:
        if run not in self.versions:
            self.publish(run)
        self._next += 1
        number = self._next
        spec = UnitSpec([(number * size, (number + 1) * size)], box_s, box_s, overlap_s, "int8")
        return Lease(
            id=f"00000000-0000-4000-8000-{number:012d}",
            task_id=number,
            kind="unit",
            run_id=run,
            ttl_s=self.ttl_s,
            recipe=RecipeRef("fake", behaviour),
            dataset=self.dataset(),
            layout=Layout([("net.w", [4])]),
            seed=7,
            unit=spec,
        )

    def give(self, *leases: Lease) -> None:
        with self.changed:
            self.waiting += leases
            self.changed.notify_all()

    def tree(self, files: dict[str, str | bytes]) -> Blob:
        """A folder with these files, as a blob of its tree."""
        kept = []
        for path, content in sorted(files.items()):
            data = content.encode() if isinstance(content, str) else content
            kept.append(TreeFile(path, self.blobs.add_bytes(data), data.startswith(b"#!")))
        return self.blobs.add_bytes(msgspec.json.encode(Tree(kept)))

    def read_tree(self, blob: Blob) -> dict[str, bytes]:
        tree = msgspec.json.decode(self.blobs.read(blob.hash), type=Tree)
        return {file.path: self.blobs.read(file.blob.hash) for file in tree.files}

    def job(
        self,
        *command: str,
        files: dict[str, str | bytes] | None = None,
        ttl_s: float = 60.0,
        mine: bool = True,
        spec: dict[str, Any] | None = None,
        **more: Any,
    ) -> JobLease:
        """A lease of a job with this command, not placed yet."""
        self._next += 1
        return JobLease(
            id=f"00000000-0000-4000-9000-{self._next:012d}",
            task_id=self._next,
            run_id=f"job{self._next}",
            name=f"job-{self._next}",
            attempt=1,
            owner="m-ann",
            owner_name="ann",
            owns_worker=mine,
            ttl_s=ttl_s,
            spec=JobSpec(list(command), **{"grace_s": 5.0, **(spec or {})}),
            project=self.tree(files or {}),
            **more,
        )

    def place(self, *leases: JobLease) -> None:
        with self.changed:
            self.jobs.update({lease.id: lease for lease in leases})
            self.changed.notify_all()

    def end_job(self, lease: JobLease, reason: str = "stopped by ann", grace_s: float = 5.0) -> None:
        with self.changed:
            self.job_ends.append(End(lease.id, reason, grace_s))
            self.changed.notify_all()

    def take_away(self, lease: JobLease) -> None:
        """The lease has lapsed."""
        with self.changed:
            self.jobs.pop(lease.id, None)
            self.job_drops.add(lease.id)
            self.changed.notify_all()

    def meets(self, *orders: MeetOrder) -> None:
        """Where gangs meet, for some of their members."""
        with self.changed:
            self.meet.update({order.lease_id: order for order in orders})
            self.changed.notify_all()

    def ask_to_knock(self, *knocks: Knock) -> None:
        with self.changed:
            self.knocks += knocks
            self.changed.notify_all()

    def meeting_of(self, lease: JobLease) -> Meeting | None:
        """What the worker said last of where this member's gang meets."""
        told = [meeting for request in self.orders[-1:] for meeting in request.meetings]
        return next((meeting for meeting in told if meeting.lease_id == lease.id), None)

    def job_report(self, lease: JobLease) -> JobReport | None:
        return next((report for lease_id, report in self.job_reports if lease_id == lease.id), None)

    def log(self, lease: JobLease) -> bytes:
        return bytes(self.logs.get(lease.id, b""))

    def outcome(self, lease: Lease | str) -> Report | None:
        id_ = lease if isinstance(lease, str) else lease.id
        return next((report for lease_id, report in self.reports if lease_id == id_), None)


class _Handler(Requests):
    hub: FakeHub

    def route(self, path: str, body: bytes) -> None:
        hub, parts = self.hub, path.strip("/").split("/")
        if path == "/join":
            request = msgspec.json.decode(body, type=JoinRequest)
            if not hub.codes.get(request.code):
                raise Refusal(403, "this link was used up or never existed: ask for a new one")
            hub.codes[request.code] -= 1
            hub.joined.append(request)
            hub.tokens[request.token_sha256] = f"w{len(hub.joined)}"
            self.say(JoinAnswer(f"w{len(hub.joined)}", request.name, "worker", "testhub"))
            return
        worker = hub.tokens.get(hash_token(self.headers.get("Authorization", "").removeprefix("Bearer ")))
        if worker is None:
            raise Refusal(401, "this credential was revoked")
        match self.command, parts:
            case "GET", ["hub"]:
                self.say(HubInfo("testhub", "0", 1, 1, "now"))
            case "GET", ["events"]:
                self.say([])
            case "POST", ["heartbeat"]:
                beat = msgspec.json.decode(body, type=HeartbeatRequest)
                hub.beats.append(beat)
                ids = {progress.lease_id for progress in beat.leases}
                known = {lease_id for lease_id in ids if lease_id in hub.live}
                self.say(HeartbeatAnswer(sorted((ids - known) | (ids & hub.drop)), sorted(ids & hub.hand_in), [], 5))
            case "POST", ["leases"]:
                self.lease(msgspec.json.decode(body, type=LeaseRequest))
            case "POST", ["leases", lease_id, "report"]:
                self.say(self.report(lease_id, msgspec.json.decode(body, type=Report)))
            case "POST", ["leave"]:
                hub.left.append(worker)
                hub.live.clear()
                self.answer(204, b"")
            case "GET", ["runs", run, "versions"]:
                self.say(self.chain(run, int(self.query["after"]), float(self.query.get("wait", 0))))
            case "POST", ["uploads"]:
                blob = msgspec.json.decode(body, type=UploadRequest).blob
                done = hub.blobs.has(blob.hash)
                offset = blob.size_bytes if done else hub.blobs.part_size(blob.hash)
                self.say(UploadAnswer(f"{blob.hash}-{blob.size_bytes}", offset, done))
            case "PATCH", ["uploads", upload_id]:
                hash_, _, size = upload_id.partition("-")
                offset = int(self.query["offset"])
                have = hub.blobs.append(hash_, offset, body)
                if have != offset + len(body):
                    raise Refusal(409, f"go on at offset {have}")
                if have == int(size):
                    hub.blobs.commit(hash_)
                self.say(UploadAnswer(upload_id, have, have == int(size)))
            case "GET", ["blobs", hash_]:
                self.blob(hash_)
            case "POST", ["blobs", "missing"]:
                blobs = msgspec.json.decode(body, type=list[Blob])
                self.say(Missing([blob.hash for blob in blobs if not hub.blobs.has(blob.hash)]))
            case "POST", ["blobs", "batch"]:
                head, _, rest = body.partition(b"\n")
                for blob in msgspec.json.decode(head, type=list[Blob]):
                    assert hub.blobs.add_bytes(rest[: blob.size_bytes]) == blob
                    rest = rest[blob.size_bytes :]
                self.answer(204, b"")
            case "POST", ["blobs", "many"]:
                found = [hub.blobs.blob(hash_) for hash_ in msgspec.json.decode(body, type=list[str])]
                pieces = [hub.blobs.read(blob.hash) for blob in found]
                self.answer(200, b"".join([msgspec.json.encode(found), b"\n", *pieces]))
            case "POST", ["orders"]:
                self.say(self.orders(msgspec.json.decode(body, type=OrdersRequest)))
            case "POST", ["leases", lease_id, what] if what in ("progress", "log", "points", "checkpoint", "end"):
                self.of_job(lease_id, what, body)
            case _:
                raise Refusal(404, f"no route {self.command} {path}")

    def blob(self, hash_: str) -> None:
        content = self.hub.blobs.read(hash_)
        wanted = self.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self.answer(206, content[start:], headers)
        else:
            self.answer(200, content, {"Content-Type": "application/octet-stream"})

    def wait_for(self, look: Any, wait_s: float) -> Any:
        until = time.monotonic() + min(wait_s, 3.0)
        server = self.hub.server
        with self.hub.changed:
            while not (found := look()) and (left := until - time.monotonic()) > 0 and self.hub.server is server:
                self.hub.changed.wait(min(left, 0.25))
        return found

    def lease(self, request: LeaseRequest) -> None:
        hub = self.hub
        hub.requests.append(request)

        def look() -> Lease | None:
            if hub.endless is not None and "unit" in request.kinds and len(hub.live) < 2:
                hub.waiting.append(hub.unit(**hub.endless))
            for lease in hub.waiting:
                if lease.kind in request.kinds and lease.run_id not in request.except_runs:
                    hub.waiting.remove(lease)
                    hub.live[lease.id] = lease
                    hub.leased.append(lease)
                    return lease
            return None

        lease = self.wait_for(look, float(self.query.get("wait", 0)))
        self.say(lease) if lease else self.answer(204, b"")

    def report(self, lease_id: str, report: Report) -> ReportAnswer:
        hub = self.hub
        if lease_id in hub.answers:
            return hub.answers[lease_id]
        lease = hub.live.pop(lease_id, None)
        if lease is None:
            return ReportAnswer(False, "too late: the lease lapsed")
        for blob in (report.update, report.delta, report.snapshot, report.state, report.image):
            if blob is not None and not hub.blobs.has(blob.hash):
                raise Refusal(422, "its bytes never arrived")
        hub.reports.append((lease_id, report))
        hub.answers[lease_id] = ReportAnswer(True, "accepted")
        if hub.merge_on_report and lease.kind == "unit" and report.outcome == "done":
            hub.publish(lease.run_id)
        return hub.answers[lease_id]

    def orders(self, request: OrdersRequest) -> OrdersAnswer:
        hub = self.hub
        with hub.changed:
            hub.orders.append(request)
            hub.reached += request.reached
            done = {one.worker for one in request.reached}
            hub.knocks = [knock for knock in hub.knocks if knock.worker not in done]
        echoed = {(one.lease_id, one.turn, one.host): one.address for one in request.meetings}
        ended = {lease_id for lease_id, _ in hub.job_reports}

        def look() -> OrdersAnswer | None:
            new = [
                lease
                for lease_id, lease in hub.jobs.items()
                if lease_id not in request.holding and hub.job_agents.get(lease_id, request.agent) == request.agent
            ]
            ends = [end for end in hub.job_ends if end.lease_id in request.holding and end.lease_id not in ended]
            drops = [lease_id for lease_id in request.holding if lease_id not in hub.jobs and lease_id not in ended]
            meet = []
            for order in hub.meet.values():
                known = echoed.get((order.lease_id, order.turn, order.host))
                if order.lease_id in request.holding and (known is None or (known != order.address and not order.host)):
                    meet.append(order)
            if not (new or ends or drops or meet or hub.knocks):
                return None
            return OrdersAnswer(new, ends, drops, knock=list(hub.knocks), meet=meet)

        answer = self.wait_for(look, float(self.query.get("wait", 0)))
        for lease in answer.leases if answer else ():
            hub.job_agents[lease.id] = request.agent
        return answer or OrdersAnswer()

    def of_job(self, lease_id: str, what: str, body: bytes) -> None:
        hub = self.hub
        if what == "end":
            if lease_id not in hub.job_answers:
                live = hub.jobs.pop(lease_id, None) is not None
                hub.job_answers[lease_id] = ReportAnswer(live, "" if live else "the hub has moved on")
                if live:
                    hub.job_reports.append((lease_id, msgspec.json.decode(body, type=JobReport)))
            self.say(hub.job_answers[lease_id])
            return
        if lease_id not in hub.jobs:
            raise Refusal(409, "the hub has moved on")
        match what:
            case "log":
                log, offset = hub.logs.setdefault(lease_id, bytearray()), int(self.query["offset"])
                if offset > len(log) and "skip" not in self.query:
                    raise Refusal(409, f"go on at offset {len(log)}")
                log[offset:] = body
                self.say({"offset": len(log)})
                return
            case "points":
                hub.points.setdefault(lease_id, []).extend(msgspec.json.decode(body, type=list[Point]))
            case "checkpoint":
                hub.checkpoints.append((lease_id, msgspec.json.decode(body, type=CheckpointReport)))
            case "progress":
                hub.job_progress.append((lease_id, msgspec.json.decode(body, type=JobProgress)))
        self.answer(204, b"")

    def chain(self, run: str, after: int, wait_s: float) -> list[Version]:
        chain = self.hub.versions.get(run, [])
        if after < 0:
            newest = max((v.number for v in chain if v.snapshot), default=0)
            return [v for v in chain if v.number >= newest]
        return self.wait_for(lambda: [v for v in chain if v.number > after], wait_s)
