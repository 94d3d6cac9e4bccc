"""A room for the page's tests: a real hub on a real ledger, whose machines are played by calling the real commands.

Nothing is trained; updates and pictures are small files of the right form. `Room.do` runs a coroutine on the hub's loop.
"""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import zlib
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

import httpx2 as httpx
import msgspec
import numpy as np
import uvicorn
from safetensors.numpy import save

from potluck import settings
from potluck.blobs import BlobStore, hash_bytes
from potluck.domain.job import JobSpec, Resources
from potluck.hub import upkeep
from potluck.hub.app import Server, make_app
from potluck.hub.commands import attempts, files, jobs, keeping, orders, people, placing, reports, runs, work
from potluck.hub.commands.desk import Caller, Desk
from potluck.hub.store import Ledger
from potluck.protocol import (
    Blob,
    Dataset,
    GpuNow,
    HeartbeatRequest,
    InviteRequest,
    JobLease,
    JobProgress,
    JobReport,
    JobRequest,
    JobView,
    JoinRequest,
    Layout,
    Lease,
    LeaseRequest,
    MachineNow,
    OrdersRequest,
    Point,
    Progress,
    RecipeRef,
    Report,
    Rules,
    RunRequest,
    RunView,
    Shard,
    Tree,
    TreeFile,
    Verdict,
)

T = TypeVar("T")
LAYOUT = Layout([("net.weight", [4, 2])], [("net.mean", [4])], [("net.batches", [])])


@dataclass
class Room:
    """A hub that answers at `url`."""

    desk: Desk
    url: str = ""
    loop: asyncio.AbstractEventLoop | None = None
    callers: dict[str, Caller] = field(default_factory=dict)
    machines: dict[str, tuple[float, str]] = field(default_factory=dict)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    # people and machines

    def invite(self, role: str = "worker", **more: Any) -> str:
        """A link's code."""
        return self.do(people.invite(self.desk, InviteRequest(role, **more), actor="the test")).code

    def token(self, role: str, name: str = "", **more: Any) -> str:
        token = settings.make_token(role)
        request = JoinRequest(self.invite(role, **more), name or role, settings.hash_token(token))
        self.do(people.join(self.desk, request))
        return token

    def worker(self, name: str, *, trusted: bool = False, device: str = "cpu", share: float = 1.0) -> Caller:
        token = settings.make_token("worker")
        code = self.invite("worker", trusted=trusted)
        request = JoinRequest(code, name, settings.hash_token(token), device=device, share=share)
        self.do(people.join(self.desk, request))
        caller = self.do(people.authenticate(self.desk, token))
        self.callers[name] = caller
        self.machines[name] = (share, device)
        return caller

    def viewer(self) -> httpx.Client:
        """A browser that came in by a link."""
        client = httpx.Client(base_url=self.url, timeout=20)
        answer = client.post(f"/j/{self.invite('viewer')}/enter")
        assert answer.status_code == 303, answer.text
        return client

    def browser(self, role: str = "member", name: str = "Ada") -> httpx.Client:
        """A browser that a person of this role signed in with; every request of it says where it comes from."""
        client = httpx.Client(base_url=self.url, timeout=20, headers={"Origin": self.url})
        token = self.admin() if role == "admin" else self.token(role, name)
        answer = client.post("/sign-in", data={"credential": token})
        assert answer.status_code == 303, answer.text
        client.headers["x-test-token"] = token  # for the tests that want to know it
        return client

    def admin(self) -> str:
        """The credential of an admin."""
        token = settings.make_token("admin")
        self.do(people.put_admin(self.desk, token))
        return token

    # jobs

    def who(self, browser: httpx.Client) -> Caller:
        return self.do(people.authenticate(self.desk, browser.headers["x-test-token"]))

    def ready(
        self,
        caller: Caller,
        *,
        now: MachineNow | None = None,
        rules: Rules | None = None,
        labels: dict[str, str] | None = None,
        holding: tuple[str, ...] = (),
    ) -> list[JobLease]:
        """The machine asks what to do about jobs; what it is given."""
        request = OrdersRequest(
            agent=f"agent of {caller.name}",
            holding=list(holding),
            now=now or MachineNow(8, 16_000_000_000, 12_000_000_000, 200_000_000_000, os="linux", arch="x86_64"),
            rules=rules or Rules(),
            executors=["podman", "bubblewrap", "process"],
            labels=labels or {},
        )
        return self.do(orders.orders(self.desk, caller, request, 0)).leases

    def job(
        self,
        caller: Caller,
        command: str = "python train.py",
        *,
        project: dict[str, bytes] | None = None,
        **spec: Any,
    ) -> JobView:
        resources = Resources(**spec.pop("resources", {}))
        request = JobRequest(
            JobSpec(["/bin/sh", "-c", command], resources=resources, **spec),
            self.tree(project or {"train.py": b"print('hello')"}),
        )
        return self.do(jobs.submit(self.desk, caller, request))

    def tree(self, content: dict[str, bytes]) -> Blob:
        listed = [TreeFile(path, self.upload(body)) for path, body in sorted(content.items())]
        return self.upload(msgspec.json.encode(Tree(listed)))

    def place(self) -> None:
        self.do(placing.run_pass(self.desk))

    def start(self, caller: Caller, **machine: Any) -> JobLease:
        """Place what waits; this machine takes one job and runs it."""
        self.place()
        lease = next(iter(self.ready(caller, **machine)))
        environment = {"python": "3.12.4", "packages": ["numpy==2.1.0", "torch==2.6.0"]}
        for state in ("preparing", "running"):
            said = JobProgress(state, executor="bubblewrap", environment=environment)
            self.do(attempts.progress(self.desk, caller, lease.id, said))
        return lease

    def prints(self, caller: Caller, lease: JobLease, text: str | bytes, offset: int = 0) -> int:
        piece = text.encode() if isinstance(text, str) else text
        return self.do(keeping.add_log(self.desk, caller, lease.id, offset, piece))["offset"]

    def logs(self, caller: Caller, lease: JobLease, *points: Point) -> None:
        self.do(keeping.add_points(self.desk, caller, lease.id, list(points)))

    def finish(self, caller: Caller, lease: JobLease, exit_code: int = 0, **report: Any) -> None:
        said = JobReport("exited", exit_code=exit_code, **report)
        answer = self.do(attempts.end(self.desk, caller, lease.id, said))
        assert answer.accepted, answer.reason

    # bytes and runs

    def upload(self, content: bytes) -> Blob:
        blob = hash_bytes(content)
        begun = self.do(files.begin(self.desk, blob))
        if not begun.done:
            self.do(files.append(self.desk, begun.upload_id, 0, content))
        return blob

    def run(self, name: str = "faces", *, recipe: str = "dcgan", samples: int | None = 100_000, **more: Any) -> RunView:
        """A run at version 0, built by the trusted worker `house`."""
        shard = self.upload(b"a shard of " + name.encode())
        dataset = Dataset("emoji people", 2_400, [Shard(shard, 2_400)], [3, 32, 32], held_out=0, licence="CC-BY 4.0")
        request = RunRequest(RecipeRef(recipe, {"lr": 0.0002}), dataset, name=name, samples=samples, **more)
        view = self.do(runs.create(self.desk, request, actor="Ada"))
        lease = self.lease(self.house(), "init")
        params = {"params": np.zeros(8, "f4"), "buffers": np.zeros(4, "f4"), "counters": np.zeros(1, "i8")}
        snapshot, state = self.upload(save(params)), self.upload(save({"residual": np.zeros(8, "f4")}))
        report = Report("done", version=0, weights_sha256="0" * 64, layout=LAYOUT, snapshot=snapshot, state=state)
        self.report(self.house(), lease, report)
        return self.do(runs.show(self.desk, view.id))

    def house(self) -> Caller:
        return self.callers.get("house") or self.worker("house", trusted=True)

    def lease(self, caller: Caller, *kinds: str) -> Lease:
        granted = self.do(
            work.lease(self.desk, caller, LeaseRequest(list(kinds), *self.machines.get(caller.name, ())), 0)
        )
        assert granted is not None, f"nothing to do of {kinds}"
        return granted

    def report(self, caller: Caller, lease: Lease, report: Report) -> None:
        answer = self.do(reports.report(self.desk, caller, lease.id, report))
        assert answer.accepted, answer.reason

    def beat(self, caller: Caller, lease: Lease, samples: int, rate: float, **loss: float) -> None:
        progress = Progress(lease.id, steps=samples // 32, samples=samples, samples_per_s=rate, loss=loss)
        self.do(work.heartbeat(self.desk, caller, HeartbeatRequest([progress], "working")))

    def hand_in(self, caller: Caller, lease: Lease, samples: int, *, seconds: float = 10.0, **losses: float) -> None:
        """`samples` of the lease's positions are done; the others go back."""
        assert lease.unit is not None
        done, left = [], samples
        for low, high in lease.unit.positions:
            if left > 0:
                done.append((low, min(high, low + left)))
                left -= high - low
        rng = np.random.default_rng(lease.task_id)
        update = save(
            {
                "values": rng.integers(-127, 127, 8, "i1"),
                "scales": np.ones(1, "f4"),
                "buffers": np.zeros(4, "f4"),
                "counters": np.ones(1, "i8"),
            }
        )
        blob = self.upload(update)
        report = Report(
            "done",
            update=blob,
            codec="int8",
            base_version=self.do(runs.show(self.desk, lease.run_id)).version,
            steps=max(1, samples // 32),
            samples=samples,
            done=done,
            seconds=seconds,
            exchange_s=0.4,
            bytes_up=blob.size_bytes,
            bytes_down=3 * blob.size_bytes,
            metrics=losses,
        )
        self.report(caller, lease, report)

    def settle(self) -> None:
        """Upkeep does one thing for a run at a time: a merge and a taste are two."""
        for _ in range(3):
            self.do(upkeep.run_once(self.desk))

    def merge(self, fates: Callable[[int], str] = lambda i: "applied") -> int:
        """Do the merge that upkeep minted. Returns the new version."""
        lease = self.lease(self.house(), "merge")
        assert lease.merge is not None
        version = lease.merge.base.number + 1
        delta = self.upload(save({"values": np.full(8, version % 127, "i1"), "scales": np.ones(1, "f4")}))
        verdicts = [Verdict(each.task_id, fates(i), "", 1.0, 1.0, 0.9) for i, each in enumerate(lease.merge.inputs)]
        report = Report(
            "done",
            version=version,
            weights_sha256=f"{version:064x}",
            codec="int8",
            delta=delta,
            state=delta,
            verdicts=verdicts,
        )
        self.report(self.house(), lease, report)
        return version

    def taste(self, picture: bytes, **metrics: float) -> None:
        lease = self.lease(self.house(), "taste")
        self.report(self.house(), lease, Report("done", image=self.upload(picture), metrics=metrics))

    def until(self, true: Callable[[], T], within_s: float = 15.0) -> T:
        """Wait for a condition of the outside world; the only place that sleeps, in small steps and not for ever."""
        end = monotonic() + within_s
        while not (found := true()):
            assert monotonic() < end, "it did not happen"
            sleep(0.02)
        return found


def gpu(index: int = 0, name: str = "NVIDIA GeForce RTX 3090", gigabytes: float = 24, free: float = 24) -> GpuNow:
    return GpuNow(index, name, int(gigabytes * 1e9), int(free * 1e9))


def picture(seed: int = 0, pixels: np.ndarray | None = None) -> bytes:
    """A small PNG, without Pillow: the tests of the hub need no part of the training stack."""
    if pixels is None:
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), "u1")
    height, width, _ = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    out = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    out.seek(0, io.SEEK_END)
    out.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))
    out.write(chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    return out.getvalue()


@contextmanager
def open_room(dsn: str, folder: Path, *, port: int = 0, name: str = "Kitchen lab") -> Iterator[Room]:
    """A hub on a thread of its own, until the block ends; then it must stop by itself."""
    ready: Future[tuple[asyncio.AbstractEventLoop, int]] = Future()

    async def main() -> None:
        desk = room.desk = Desk(Ledger(dsn), BlobStore(folder / "blobs"), name=name)
        config = uvicorn.Config(
            make_app(desk), port=port, log_level="warning", lifespan="on", timeout_graceful_shutdown=5
        )
        server = room_server.append(Server(config, desk)) or room_server[-1]
        serving = asyncio.ensure_future(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if serving.done():
            serving.result()
        ready.set_result((asyncio.get_running_loop(), server.servers[0].sockets[0].getsockname()[1]))
        await serving

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    room = Room(None)  # type: ignore[arg-type]
    room_server: list[Server] = []
    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    room.loop, bound = ready.result(30)
    room.url = f"http://127.0.0.1:{bound}"
    object.__setattr__(room.desk, "public_url", room.url)
    try:
        yield room
    finally:
        room_server[0].should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the hub did not stop"
