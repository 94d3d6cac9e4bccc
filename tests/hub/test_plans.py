"""Does the hot path stay on primary keys, even when the planner's statistics are wrong?

A partial index that the planner believes to be empty once drew a completion by primary key to itself: 98,000 rows read
for each unit, 21 units a second (docs/decisions/0003). So here are 100,000 leased units, statistics from another time,
and plans that are made without looking at values. What counts is rows and pages read, never time.
"""

from __future__ import annotations

import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from psycopg import ClientCursor

from hub_kit import Hub, open_hub
from ledger_fixture import fresh_database
from potluck.hub.store.ledger import statements

UNITS = 100_000
BIG = ("tasks", "leases", "updates")
TYPES = {
    "lease_id": "uuid",
    "ids": "uuid[]",
    "task_id": "bigint",
    "ttl": "interval",
    "grace": "interval",
    "want": "bigint",
    "done": "int8multirange",
    "only_if_late": "boolean",
    "max_attempts": "integer",
    "kinds": "text[]",
    "steps": "bigint",
    "samples": "bigint",
    "rates": "real[]",
    "base_version": "integer",
    "losses": "jsonb",
    "seconds": "float8",
    **dict.fromkeys(("size_bytes", "bytes_up", "bytes_down"), "bigint"),
}

LOAD = """
INSERT INTO tasks (run_id, kind, state, attempts, positions, ended_at)
    SELECT %(run)s, 'unit', %(state)s, 1, int8multirange(int8range(n * 100, n * 100 + 100)), %(ended)s
    FROM generate_series(1, %(units)s) n
"""
LEASES = """
INSERT INTO leases (id, task_id, run_id, worker_id, kind, deadline, ended_at, outcome)
    SELECT gen_random_uuid(), id, run_id, %(worker)s, 'unit', now() + interval '1 day', %(ended)s, %(outcome)s
    FROM tasks WHERE kind = 'unit' AND state = %(state)s
"""

UPDATES = """
WITH old AS (
    INSERT INTO tasks (run_id, kind, state, positions) SELECT %(run)s, 'unit', 'done', '{}' FROM generate_series(1, 20000)
    RETURNING id
)
INSERT INTO updates (task_id, lease_id, run_id, worker_id, base_version, steps, samples, done)
    SELECT id, gen_random_uuid(), %(run)s, %(worker)s, 0, 1, 1, '{}' FROM old
"""


@dataclass
class Scene:
    hub: Hub
    run: str
    worker: str
    leases: Iterator[uuid.UUID]  # live ones, each for one use


@pytest.fixture(scope="module", params=["analysed when empty", "analysed when all were done"])
def scene(request: pytest.FixtureRequest, embedded_dsn: str) -> Iterator[Scene]:
    with ExitStack() as stack:
        dsn = stack.enter_context(fresh_database(embedded_dsn))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        hub = stack.enter_context(open_hub(dsn, Path(folder)))
        house, worker = hub.join("house", trusted=True), hub.join("ann")
        run = hub.start_run(house, samples=None)
        for table in BIG:
            hub.sql(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
        common = {"run": run, "worker": worker.subject, "units": UNITS}
        if "done" in request.param:
            done = {**common, "state": "done", "ended": "now", "outcome": "done"}
            hub.sql(LOAD, **done)
            hub.sql(LEASES, **done)
        hub.sql("ANALYZE")
        live = {**common, "state": "leased", "ended": None, "outcome": None}
        hub.sql(LOAD, **live)
        hub.sql(LEASES, **live)
        hub.sql(UPDATES, **common)
        for _ in range(3):
            hub.sql("INSERT INTO tasks (run_id, kind) VALUES (%(run)s, 'merge')", run=run)
        hub.sql("SET plan_cache_mode = force_generic_plan")
        ids = hub.sql("SELECT id FROM leases WHERE ended_at IS NULL ORDER BY id LIMIT 1000")
        yield Scene(hub, run, worker.subject, iter([row["id"] for row in ids]))


@dataclass
class Access:
    node: str
    table: str
    index: str
    rows: float  # read, those that a filter then removed included


def explain(scene: Scene, name: str, **values: Any) -> tuple[list[Access], int]:
    """How the generic plan of a statement reached the tables, and the pages it touched. It is executed, and undone."""
    text = statements()[name]
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
    for number, key in enumerate(names, 1):
        text = text.replace(f"%({key})s", f"${number}")
    types = [
        TYPES.get(key, "text") + ("[]" if name == "renew" and key in ("steps", "samples") else "") for key in names
    ]
    side = scene.hub.side
    plan_name = f"p_{name}"
    head = f"PREPARE {plan_name}" + (f" ({', '.join(types)})" if types else "")
    side.execute(f"{head} AS {text}".replace("%", "%%"))  # type: ignore[arg-type]
    try:
        with side.transaction(force_rollback=True):
            places = ", ".join(f"%({key})s::{kind}" for key, kind in zip(names, types, strict=True))
            cursor = ClientCursor(side)
            cursor.execute(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE {plan_name}" + (f" ({places})" if names else ""),
                values,  # type: ignore[arg-type]
            )
            row = cursor.fetchone()
    finally:
        side.execute(f"DEALLOCATE {plan_name}")  # type: ignore[arg-type]
    assert row is not None
    answer = next(iter(row.values())) if isinstance(row, dict) else row[0]
    plan = answer[0]["Plan"]
    return list(_accesses(plan)), plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


def _accesses(node: dict[str, Any]) -> Iterator[Access]:
    loops = node.get("Actual Loops", 1)
    index = node.get("Index Name")
    if "Scan" in node["Node Type"] and (node.get("Relation Name") in BIG or index):
        removed = sum(v for k, v in node.items() if k.startswith("Rows Removed by"))
        table = node.get("Relation Name") or str(index).split("_")[0]
        yield Access(node["Node Type"], table, index or "", loops * (node["Actual Rows"] + removed))
    for child in node.get("Plans", ()):
        yield from _accesses(child)


def check(accesses: list[Access], pages: int, *, allowed: set[str], rows: int = 4) -> None:
    for access in accesses:
        if access.table in BIG:
            assert access.node != "Seq Scan", access
            # a bitmap's heap scan has no index of its own; its child has
            assert access.node == "Bitmap Heap Scan" or access.index in allowed, access
            assert access.rows <= rows, access
    assert pages < 150, f"{pages} pages"


REPORT = {
    "steps": 5,
    "samples": 60,
    "blob_hash": "0" * 64,
    "size_bytes": 10,
    "codec": "int8",
    "base_version": 0,
    "losses": "{}",
    "seconds": 1.0,
    "bytes_up": 1,
    "bytes_down": 1,
    "fate_reason": "",
}
KEYS = {"tasks_pkey", "leases_pkey", "updates_pkey"}


@pytest.mark.parametrize("fate", ["pending", "rejected"])
def test_a_report_goes_by_primary_key(scene: Scene, fate: str) -> None:
    lease = next(scene.leases)
    (row,) = scene.hub.sql(
        "SELECT positions::text AS p FROM tasks JOIN leases ON task_id = tasks.id WHERE leases.id = %(l)s", l=lease
    )

    found = explain(scene, "report_unit", lease_id=lease, worker_id=scene.worker, done=row["p"], fate=fate, **REPORT)

    check(*found, allowed=KEYS)
    assert {access.index for access in found[0]} >= {"tasks_pkey", "leases_pkey"}


def test_what_a_report_looks_up_goes_by_primary_key(scene: Scene) -> None:
    check(*explain(scene, "lease_facts", lease_id=next(scene.leases)), allowed=KEYS)
    check(*explain(scene, "earlier_report", task_id=1), allowed=KEYS)
    check(*explain(scene, "lock_lease", lease_id=next(scene.leases)), allowed=KEYS)
    check(*explain(scene, "end_lease", lease_id=next(scene.leases), outcome="done", reason=""), allowed=KEYS)
    check(*explain(scene, "close_task", task_id=1, state="done", reason=""), allowed=KEYS)


@pytest.mark.parametrize("outcome", ["returned", "lost"])
def test_giving_back_goes_by_primary_key(scene: Scene, outcome: str) -> None:
    found = explain(
        scene,
        "give_back",
        lease_id=next(scene.leases),
        worker_id=scene.worker,
        only_if_late=False,
        outcome=outcome,
        reason="",
        max_attempts=4,
    )

    check(*found, allowed=KEYS)


def test_a_heartbeat_goes_by_primary_key(scene: Scene) -> None:
    ids = [next(scene.leases) for _ in range(3)]
    beat = {"steps": [1] * 3, "samples": [1] * 3, "rates": [1.0] * 3, "ttl": "15 s"}

    check(*explain(scene, "renew", ids=ids, worker_id=scene.worker, **beat), allowed=KEYS, rows=8)
    check(*explain(scene, "fate_of_leases", ids=ids, worker_id=scene.worker), allowed=KEYS, rows=8)


def test_a_unit_is_leased_without_reading_tasks_or_leases(scene: Scene) -> None:
    accesses, pages = explain(
        scene, "lease_unit", run_id=scene.run, want=100, lease_id=uuid.uuid4(), worker_id=scene.worker, ttl="15 s"
    )

    assert [access for access in accesses if access.table in BIG] == []
    assert pages < 150


def test_a_waiting_task_is_found_among_a_hundred_thousand_leased_ones(scene: Scene) -> None:
    found = explain(
        scene,
        "lease_task",
        kinds=["init", "merge", "taste"],
        lease_id=uuid.uuid4(),
        worker_id=scene.worker,
        ttl="15 s",
    )

    check(*found, allowed={"tasks_queued", "tasks_upkeep", "tasks_pkey"})


def test_upkeep_finds_its_tasks_and_updates_without_reading_the_units(scene: Scene) -> None:
    for name in ("open_tasks", "failed_tasks"):
        check(*explain(scene, name, run_id=scene.run), allowed={"tasks_upkeep", "tasks_failed", "tasks_queued"})
