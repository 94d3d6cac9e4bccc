"""A hub without HTTP for the tests: a real ledger, a real blob store, and short names for what tests do all the time.

    hub.run(work.lease(hub.desk, worker, request, 0))    any use case
    hub.sql("SELECT ...")                                what the ledger really holds
    run_id = hub.start_run(samples=1000)                 with version 0 built
    job = hub.submit_job(ann, cpu="2")                   a job in the line
    hub.place()                                          one placement pass
    hub.orders(worker).leases                            what the worker is told, at once

Workers are real `Caller`s who joined by a real link. Weights have four values, so that every file is tiny.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import struct
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psycopg
from psycopg.rows import dict_row

from potluck.blobs import BlobStore, hash_bytes
from potluck.domain.job import JobSpec, Resources
from potluck.hub import upkeep
from potluck.hub.commands import attempts, files, jobs, orders, people, placing, reports, rounds, runs, work
from potluck.hub.commands.desk import Caller, Desk
from potluck.hub.store import Ledger
from potluck.protocol import (
    Blob,
    Dataset,
    GpuNow,
    InviteRequest,
    JobReport,
    JobRequest,
    JobView,
    JoinRequest,
    Layout,
    Lease,
    LeaseRequest,
    MachineNow,
    OrdersAnswer,
    OrdersRequest,
    Positions,
    RecipeRef,
    Report,
    ReportAnswer,
    Rules,
    RunRequest,
    RunView,
    Shard,
    Tree,
    TreeFile,
    Verdict,
)

T = TypeVar("T")
LAYOUT = Layout([("net.weight", [4])])
SETTINGS = {"codec": "fp32", "unit_s": "10", "taste_every_s": "0"}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_file(**tensors: tuple[str, list[int], bytes]) -> bytes:
    """A safetensors file: name=(dtype, shape, bytes)."""
    header: dict[str, Any] = {}
    place = 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(content)]}
        place += len(content)
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(content for _, _, content in tensors.values())


def update_file(seed: int = 1) -> bytes:
    """A well-formed fp32 update (or delta) of `LAYOUT`; another seed makes other bytes."""
    values = struct.pack("<4f", *[float(seed)] * 4)
    return tensor_file(values=("F32", [4], values), buffers=("F32", [0], b""), counters=("I64", [0], b""))


def snapshot_file() -> bytes:
    return tensor_file(params=("F32", [4], bytes(16)), buffers=("F32", [0], b""), counters=("I64", [0], b""))


def size(positions: Positions) -> int:
    return sum(hi - lo for lo, hi in positions)


def machine(*, cpu: int = 4, memory_gb: float = 16, gpus_gb: tuple[float, ...] = ()) -> MachineNow:
    """An idle Linux machine."""
    memory = int(memory_gb * 10**9)
    cards = [GpuNow(n, "NVIDIA RTX 4090", int(gb * 10**9), int(gb * 10**9)) for n, gb in enumerate(gpus_gb)]
    return MachineNow(cpu, memory, memory, 10**12, 0.0, cards, "linux", "x86_64")


class Hub:
    """One hub process, driven without HTTP."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.runner = asyncio.Runner()
        self.blobs = BlobStore(folder)
        self.desk = self._open()
        self.side = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)
        self._tokens = 0

    def _open(self) -> Desk:
        desk = Desk(Ledger(self.dsn, pool_size=4), self.blobs)

        async def open_() -> None:
            await desk.ledger.open()
            await upkeep.welcome_back(desk)

        self.runner.run(open_())
        return desk

    def restart(self) -> None:
        """Another process on the same ledger and blobs."""
        self.run(self.desk.ledger.close())
        self.desk = self._open()

    def close(self) -> None:
        self.run(self.desk.ledger.close())
        self.side.close()
        self.runner.close()

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(what)

    def together(self, *what: Coroutine[Any, Any, T]) -> list[T]:
        """All at once, each on its own connection."""

        async def gather() -> list[T]:
            return list(await asyncio.gather(*what))

        return self.runner.run(gather())

    def sql(self, query: str, **values: Any) -> list[dict[str, Any]]:
        cursor = self.side.execute(query, values)
        return cursor.fetchall() if cursor.description else []

    def one(self, query: str, **values: Any) -> Any:
        """The first column of the only row."""
        (row,) = self.sql(query, **values)
        return next(iter(row.values()))

    # --- people

    def join(self, name: str = "ann", *, trusted: bool = False, role: str = "worker") -> Caller:
        return self.join_with_token(name, trusted=trusted, role=role)[0]

    def join_with_token(self, name: str = "ann", *, trusted: bool = False, role: str = "worker") -> tuple[Caller, str]:
        self._tokens += 1
        token = f"{name}-{self._tokens}"
        link = self.run(people.invite(self.desk, InviteRequest(role, uses=1, trusted=trusted), actor="the test"))
        self.run(people.join(self.desk, JoinRequest(link.code, name, sha256(token))))
        return self.run(people.authenticate(self.desk, token)), token

    # --- bytes

    def put(self, content: bytes) -> Blob:
        blob = hash_bytes(content)
        answer = self.run(files.begin(self.desk, blob))
        if not answer.done:
            answer = self.run(files.append(self.desk, answer.upload_id, 0, content))
        assert answer.done
        return blob

    # --- runs

    def request(self, *, samples: int | None = 1000, **changes: Any) -> RunRequest:
        shard = Shard(self.put(b"x" * 1000), 1000)
        dataset = Dataset("toy", 1000, [shard], [1])
        settings = {**SETTINGS, **changes.pop("settings", {})}
        return RunRequest(RecipeRef("dcgan"), dataset, samples=samples, settings=settings, **changes)

    def create_run(self, *, samples: int | None = 1000, **changes: Any) -> str:
        return self.run(runs.create(self.desk, self.request(samples=samples, **changes), actor="the test")).id

    def start_run(self, house: Caller, *, samples: int | None = 1000, **changes: Any) -> str:
        """A run with version 0, so that units can be leased."""
        run_id = self.create_run(samples=samples, **changes)
        lease = self.lease(house, "init")
        assert lease is not None
        assert self.report(house, lease, self.init_report()).accepted
        return run_id

    def init_report(self) -> Report:
        snapshot = self.put(snapshot_file())
        return Report("done", version=0, weights_sha256="0", snapshot=snapshot, state=snapshot, layout=LAYOUT)

    def stop(self, run_id: str) -> None:
        """At once: the first stop still merges what is there, the second waits for nothing."""
        while self.view(run_id).state not in ("stopped", "done", "failed"):
            self.run(runs.move(self.desk, run_id, "stop", actor="the test"))

    def view(self, run_id: str) -> RunView:
        return self.run(runs.show(self.desk, run_id))

    def settle(self, run_id: str) -> str:
        return self.run(rounds.settle(self.desk, run_id)).text

    # --- work

    def lease(self, caller: Caller, *kinds: str, speed: dict[str, float] | None = None) -> Lease | None:
        request = LeaseRequest(list(kinds), samples_per_s=speed or {})
        return self.run(work.lease(self.desk, caller, request, 0))

    def unit(self, caller: Caller, run_id: str, samples: int = 170) -> Lease:
        """A unit of that many positions: what a worker of the right speed is offered."""
        lease = self.lease(caller, "unit", speed={run_id: samples / 17})
        assert lease is not None
        return lease

    def report(self, caller: Caller, lease: Lease | str, report: Report) -> ReportAnswer:
        id_ = lease if isinstance(lease, str) else lease.id
        return self.run(reports.report(self.desk, caller, id_, report))

    def unit_report(
        self, lease: Lease, done: Positions | None = None, *, base: int = 0, seed: int = 1, **changes: Any
    ) -> Report:
        assert lease.unit is not None
        done = lease.unit.positions if done is None else done
        facts = {"metrics": {"loss": 1.0}, "steps": 1, "seconds": 1.0, "samples": size(done), **changes}
        update = self.put(update_file(seed))
        return Report("done", update=update, codec="fp32", base_version=base, done=done, **facts)

    def merge_report(self, lease: Lease, fates: list[str] | None = None) -> Report:
        """Publish the next version; `fates` go to the updates one after another ("applied" when they run out)."""
        assert lease.merge is not None
        given = iter(fates or [])
        verdicts = [Verdict(i.task_id, next(given, "applied"), "because", 0.5, 1.0, 1.0) for i in lease.merge.inputs]
        delta = self.put(update_file(7))
        return Report(
            "done",
            version=lease.merge.base.number + 1,
            weights_sha256=f"{lease.merge.base.number + 1}",
            codec="fp32",
            delta=delta,
            state=self.put(snapshot_file()),
            verdicts=verdicts,
        )

    # --- jobs

    def member(self, name: str = "mia") -> Caller:
        return self.join(name, role="member")

    def project(self, **files_: bytes) -> Blob:
        """A folder as the hub knows it: a blob that lists the files."""
        content = files_ or {"train": b"print('hello')\n"}
        tree = Tree([TreeFile(f"{name}.py", self.put(each)) for name, each in sorted(content.items())])
        return self.put(json.dumps(msgspec.to_builtins(tree)).encode())

    def job_request(self, *, cpu: str = "1", memory: str = "", gpu: str = "0", **changes: Any) -> JobRequest:
        resources = changes.pop("resources", Resources(gpu=gpu, cpu=cpu, memory=memory))
        spec = JobSpec(changes.pop("command", ["python", "train.py"]), resources=resources, **changes)
        return JobRequest(spec, self.project())

    def submit_job(self, who: Caller, *, key: str | None = None, **changes: Any) -> str:
        """A job in the line; its id."""
        return self.run(jobs.submit(self.desk, who, self.job_request(**changes), key=key)).id

    def place(self) -> int:
        """One placement pass; how many jobs got a place."""
        return self.run(placing.run_pass(self.desk)).placed

    def orders(
        self, worker: Caller, *holding: str, agent: str = "agent-1", wait_s: float = 0.0, **changes: Any
    ) -> OrdersAnswer:
        """What the worker is told. By default it is a machine with four idle cores that takes anybody's plain process."""
        return self.run(self.ask_orders(worker, *holding, agent=agent, wait_s=wait_s, **changes))

    async def ask_orders(
        self, worker: Caller, *holding: str, agent: str = "agent-1", wait_s: float = 0.0, **changes: Any
    ) -> OrdersAnswer:
        gone = changes.pop("gone", None)
        facts = {"now": machine(), "rules": Rules(runtime="any", max_tasks=8), "executors": ["process"], **changes}
        request = OrdersRequest(agent, list(holding), **facts)
        return await orders.orders(self.desk, worker, request, wait_s, gone=gone)

    def end_job(self, worker: Caller, lease_id: str, code: int = 0, **changes: Any) -> ReportAnswer:
        report = JobReport(**{"outcome": "exited", "exit_code": code, **changes})
        return self.run(attempts.end(self.desk, worker, lease_id, report))

    def job(self, who: Caller, ref: str) -> JobView:
        return self.run(jobs.show(self.desk, who, ref))

    def hang_up(self, worker: Caller, seconds: float = 11) -> None:
        """The worker's connection ended that long ago, and it did not come back."""
        self.sql(
            "UPDATE workers SET hung_up_at = now() - make_interval(secs => %(s)s) WHERE id = %(w)s",
            s=seconds,
            w=worker.subject,
        )

    def let_lapse(self, lease_id: str | None = None) -> None:
        """Put deadlines (all, or one lease's) into the past: the workers are silent."""
        self.sql(
            "UPDATE leases SET deadline = now() - interval '1 second'"
            " WHERE ended_at IS NULL AND (%(id)s::uuid IS NULL OR id = %(id)s::uuid)",
            id=lease_id,
        )

    def age_updates(self, seconds: float) -> None:
        """Make what waits for its merge wait that much longer."""
        self.sql(
            "UPDATE updates SET reported_at = reported_at - make_interval(secs => %(s)s) WHERE fate = 'pending'",
            s=seconds,
        )


@contextlib.contextmanager
def open_hub(dsn: str, folder: Path) -> Iterator[Hub]:
    hub = Hub(dsn, folder)
    try:
        yield hub
    finally:
        hub.close()


LAW = """
WITH used AS (
    SELECT 'update ' || task_id AS what, done AS positions FROM updates
    WHERE run_id = %(run_id)s AND fate IN ('applied', 'late', 'pending')
    UNION ALL
    SELECT 'lease ' || leases.id, tasks.positions FROM leases JOIN tasks ON tasks.id = leases.task_id
    WHERE leases.run_id = %(run_id)s AND leases.kind = 'unit' AND leases.ended_at IS NULL
    UNION ALL
    SELECT 'supply', remaining FROM supplies WHERE run_id = %(run_id)s
)
SELECT COALESCE(SUM(span(positions)), 0)::bigint AS total,
    COALESCE((SELECT range_agg(r) FROM used, unnest(positions) AS r), '{}')::text AS whole
FROM used
"""


def check_positions(hub: Hub, run_id: str, target: int) -> None:
    """Every position is in exactly one place: applied, late, pending, at work, or still to do. Only for finite runs."""
    (row,) = hub.sql(LAW, run_id=run_id)
    assert row["whole"] == f"{{[0,{target})}}", f"positions are missing or foreign: {row['whole']}"
    assert row["total"] == target, "some position is in two places"


def check_accounts(hub: Hub, run_id: str) -> None:
    """Fates add up, contributions add up to them, versions have no gap, and each ended lease has one outcome."""
    fates = hub.view(run_id).fates
    kinds = ("applied", "late", "superseded", "rejected", "lost", "pending")
    assert fates.handed_out == sum(getattr(fates, kind) for kind in kinds)
    shares = [c.fates for c in hub.run(runs.contributions(hub.desk, run_id))]
    for kind in kinds[:5]:
        assert sum(getattr(share, kind) for share in shares) == getattr(fates, kind), kind
    numbers = [
        row["number"] for row in hub.sql("SELECT number FROM versions WHERE run_id = %(r)s ORDER BY 1", r=run_id)
    ]
    assert numbers == list(range(len(numbers)))
    assert hub.one("SELECT version FROM runs WHERE id = %(r)s", r=run_id) == len(numbers) - 1
    assert not hub.sql("SELECT id FROM leases WHERE (ended_at IS NULL) <> (outcome IS NULL)")
    # a task has at most one live lease, and is 'leased' exactly while it has one
    assert not hub.sql(
        "SELECT tasks.id FROM tasks LEFT JOIN leases ON leases.task_id = tasks.id AND leases.ended_at IS NULL"
        " GROUP BY tasks.id HAVING count(leases.id) > 1 OR (count(leases.id) = 1) <> (tasks.state = 'leased')"
    )
    # an applied update is in exactly the version of its merge, and credited for exactly the positions it did
    assert not hub.sql(
        "SELECT updates.task_id FROM updates LEFT JOIN versions"
        " ON versions.run_id = updates.run_id AND versions.number = updates.fate_version"
        " WHERE updates.fate IN ('applied', 'late')"
        " AND (versions.task_id IS DISTINCT FROM updates.merge_task OR updates.samples <> span(updates.done))"
    )
    assert not hub.sql(
        "SELECT versions.number, versions.applied_samples FROM versions WHERE run_id = %(r)s AND applied_samples <> ("
        " SELECT COALESCE(SUM(samples), 0) FROM updates WHERE updates.run_id = versions.run_id"
        " AND fate IN ('applied', 'late') AND fate_version <= versions.number)",
        r=run_id,
    )


def check_jobs(hub: Hub) -> None:
    """What must hold of all jobs, whatever happened: one place at most, and none that is nowhere."""
    # a lease that is live and an attempt that has not ended are the same thing; a job has at most one of them
    assert not hub.sql(
        "SELECT attempts.run_id FROM attempts JOIN leases ON leases.id = attempts.lease_id"
        " WHERE (attempts.ended_at IS NULL) <> (leases.ended_at IS NULL)"
    )
    assert not hub.sql("SELECT run_id FROM attempts WHERE ended_at IS NULL GROUP BY run_id HAVING count(*) > 1")
    assert not hub.sql(
        "SELECT run_id FROM attempts WHERE (ended_at IS NULL) <> (state IN ('placed', 'preparing', 'running'))"
    )
    # a job has a live attempt exactly while it is placed, preparing or running, or was stopped and is being ended
    assert not hub.sql(
        "SELECT runs.id, runs.state, jobs.finished FROM runs JOIN jobs ON jobs.run_id = runs.id"
        " LEFT JOIN attempts ON attempts.run_id = runs.id AND attempts.ended_at IS NULL"
        " WHERE (attempts.run_id IS NOT NULL) <> (runs.state IN ('placed', 'preparing', 'running')"
        "     OR (runs.state = 'cancelled' AND NOT jobs.finished))"
        "   OR (runs.state = 'queued' AND jobs.finished)"
        "   OR (runs.state IN ('succeeded', 'failed', 'lost') AND NOT jobs.finished)"
        "   OR (jobs.cancelled_by IS NOT NULL) <> (runs.state = 'cancelled')"
        "   OR (runs.ended_at IS NULL) <> (runs.state IN ('queued', 'placed', 'preparing', 'running'))"
    )
    # its task says the same
    assert not hub.sql(
        "SELECT runs.id, runs.state, tasks.state FROM runs JOIN jobs ON jobs.run_id = runs.id"
        " JOIN tasks ON tasks.id = jobs.task_id"
        " LEFT JOIN attempts ON attempts.run_id = runs.id AND attempts.ended_at IS NULL"
        " WHERE (tasks.state = 'queued') <> (runs.state = 'queued')"
        "   OR (tasks.state = 'leased') <> (attempts.run_id IS NOT NULL)"
    )
    # attempts are numbered without gaps, and only the last may be live
    assert not hub.sql(
        "SELECT jobs.run_id FROM jobs LEFT JOIN attempts ON attempts.run_id = jobs.run_id GROUP BY jobs.run_id"
        " HAVING count(attempts.number) <> jobs.attempts OR max(attempts.number) <> jobs.attempts"
    )
    # nobody promised more of a machine than it has
    assert not hub.sql(
        "SELECT worker_id FROM attempts JOIN workers ON workers.id = worker_id WHERE ended_at IS NULL"
        " GROUP BY worker_id, machine, rules HAVING sum((granted ->> 'cpu')::float8) > (machine ->> 'cpu_cores')::float8"
        "   OR count(*) > (rules ->> 'max_tasks')::integer"
    )
