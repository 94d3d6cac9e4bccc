"""How many units per second can the ledger lease out and take back?

    python benchmarks/ledger.py [--json] [--seconds N] [--clients N] [--dsn postgresql://…]

A cycle is one `lease_unit` and one `report_unit`, the hub's own statements out of hub/sql, in the hub's own
transactions: the lease without waiting for the disk; the report, then a flush, so that what is acknowledged is durable.
They are sent by pgbench (it is in the wheel of the embedded server), over one Unix socket connection per client, as
prepared statements, so that what is measured is PostgreSQL and not a Python client. Client and server share the cores.

    cycles_per_s              100,000 finished units in the tables, one run
    many_runs_cycles_per_s    the same, spread over eight runs: nobody waits for another worker's row
    partial_cycles_per_s      one run; every report gives a part of its positions back, as most real reports do
    stale_stats_cycles_per_s  100,000 units leased at this moment, statistics from when the tables were empty,
                              generic plans: what once made a partial index cost a factor of 40 (docs/decisions/0003)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from machine import facts
from potluck.hub.postgres import EmbeddedPostgres
from potluck.hub.postgres.machine import find_binaries
from potluck.hub.store.ledger import Ledger, statements

UNITS = 100_000
WANT = 100  # positions a unit
WORKERS = 200
RUNS = 8
TABLES = ("runs", "supplies", "workers", "tasks", "leases", "updates")

LOAD = f"""
INSERT INTO workers (id, name) SELECT 'w-' || n, 'worker ' || n FROM generate_series(0, {WORKERS - 1}) n;
INSERT INTO runs (id, name, state, version, recipe, dataset, settings, layout, started_at)
    SELECT 'bench-' || n, 'bench', 'running', 0, '{{}}', '{{}}', '{{}}', '{{}}', now() FROM generate_series(0, {RUNS - 1}) n;
INSERT INTO supplies (run_id, remaining)
    SELECT 'bench-' || n, int8multirange(int8range({UNITS * WANT}, NULL)) FROM generate_series(0, {RUNS - 1}) n;
INSERT INTO tasks (run_id, kind, state, attempts, positions, ended_at)
    SELECT 'bench-0', 'unit', %(state)s, 1, int8multirange(int8range(n * {WANT}, (n + 1) * {WANT})), %(ended)s
    FROM generate_series(0, {UNITS - 1}) n;
INSERT INTO leases (id, task_id, run_id, worker_id, kind, deadline, ended_at, outcome)
    SELECT gen_random_uuid(), id, run_id, 'w-' || id %% {WORKERS}, 'unit', now() + interval '1 day', %(ended)s, %(outcome)s
    FROM tasks;
INSERT INTO updates (task_id, lease_id, run_id, worker_id, base_version, steps, samples, done, fate)
    SELECT task_id, id, run_id, worker_id, 0, 1, {WANT}, tasks.positions, 'applied'
    FROM (SELECT leases.*, tasks.positions FROM leases JOIN tasks ON tasks.id = task_id) tasks
    WHERE ended_at IS NOT NULL;
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement (default 10)")
    parser.add_argument("--clients", type=int, default=16, help="connections (default 16)")
    parser.add_argument("--dsn", help="an empty database to use instead of an embedded server of its own")
    options = parser.parse_args()
    with server(options.dsn) as dsn:
        found = measure(dsn, seconds=options.seconds, clients=options.clients)
        with psycopg.connect(dsn) as connection:
            versions = connection.execute("SHOW server_version").fetchone()
    about = {**facts(), "postgresql": str(versions[0] if versions else "?"), "clients": str(options.clients)}
    if options.json:
        print(json.dumps({**found, **about}))
    else:
        for key, value in found.items():
            print(f"{key:28}{value:10,.0f}")
        for key, text in about.items():
            print(f"{key:28}{text}")
    return 0


def measure(dsn: str, *, seconds: float, clients: int) -> dict[str, float]:
    def cycles(*scripts: str) -> float:
        return round(pgbench(dsn, scripts, seconds=seconds, clients=clients), 1)

    one_run, partial = cycle("bench-0"), cycle("bench-0", keep=60)
    asyncio.run(migrate(dsn))
    load(dsn, leased=False)
    found = {"cycles_per_s": cycles(one_run)}
    found["many_runs_cycles_per_s"] = cycles(*(cycle(f"bench-{n}") for n in range(RUNS)))
    found["partial_cycles_per_s"] = cycles(partial)
    load(dsn, leased=True)
    found["stale_stats_cycles_per_s"] = cycles(one_run)
    return found


async def migrate(dsn: str) -> None:
    ledger = Ledger(dsn)
    await ledger.open()
    await ledger.close()


def load(dsn: str, *, leased: bool) -> None:
    """100,000 units: all finished and analysed, or all leased with the statistics of empty tables."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"TRUNCATE {', '.join(TABLES)} RESTART IDENTITY CASCADE")
        name = connection.info.dbname
        mode = "force_generic_plan" if leased else "auto"
        connection.execute(f'ALTER DATABASE "{name}" SET plan_cache_mode = {mode}')  # type: ignore[arg-type]
        for table in TABLES:
            option = "false" if leased else "true"
            connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = {option})")  # type: ignore[arg-type]
        if leased:
            connection.execute("VACUUM ANALYZE")
        values = (
            {"state": "leased", "ended": None, "outcome": None}
            if leased
            else {"state": "done", "ended": "now", "outcome": "done"}
        )
        for statement in filter(str.strip, LOAD.split(";")):
            cursor = psycopg.ClientCursor(connection)
            cursor.execute(statement, values)  # type: ignore[arg-type]
        if not leased:
            connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


def cycle(run_id: str, *, keep: int = WANT) -> str:
    """A pgbench script of one cycle. `keep` positions of each unit are done, the rest goes back."""
    run, worker, lease = f"'{run_id}'", "'w-' || :worker::int", "lpad(:lease::text, 32, '0')::uuid"
    done = ":positions::int8multirange"
    if keep < WANT:
        done = f"({done} * int8multirange(int8range(NULL, lower({done}) + {keep})))"
    common = {"run_id": run, "worker_id": f"({worker})", "lease_id": lease, "want": str(WANT), "ttl": "interval '15 s'"}
    report = {
        **common,
        **dict.fromkeys(("steps", "size_bytes", "bytes_up", "bytes_down"), "1000"),
        "done": done,
        "samples": str(keep),
        "base_version": "0",
        "seconds": "10.0",
        "blob_hash": "'" + "0" * 64 + "'",
        "codec": "'int8'",
        "losses": '\'{"d_loss": 0.7, "g_loss": 1.1}\'::jsonb',
        "fate": "'pending'",
        "fate_reason": "''",
    }
    return "\n".join(
        [
            f"\\set worker random(0, {WORKERS - 1})",
            "\\set lease random(1, 9000000000000000000)",
            _filled("lease_unit", common) + " \\gset",
            _filled("report_unit", report) + ";",
            _filled("flush", {}) + ";",
            "",
        ]
    )


def _filled(name: str, values: dict[str, str]) -> str:
    """A statement in one line, with pgbench's variables and literals for its parameters."""
    text = re.sub(r"--.*", "", statements()[name])
    return " ".join(re.sub(r"%\((\w+)\)s", lambda match: values[match[1]], text).split())


def pgbench(dsn: str, scripts: tuple[str, ...], *, seconds: float, clients: int) -> float:
    """Cycles per second."""
    programs = find_binaries(None).folder
    conninfo = conninfo_to_dict(dsn)
    password = str(conninfo.pop("password", "") or "")
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, script in enumerate(scripts):
            path = Path(folder) / f"{number}.sql"
            path.write_text(script)
            files.append(f"--file={path}")
        options = ["--no-vacuum", "--protocol=prepared", f"--client={clients}", "--jobs=1", *files]
        answer = subprocess.run(
            [str(programs / "pgbench"), *options, f"--time={max(1, round(seconds))}", make_conninfo("", **conninfo)],
            capture_output=True,
            text=True,
            env={**os.environ, "PGPASSWORD": password},
        )
    failed = re.search(r"number of failed transactions: ([1-9]\d*)", answer.stdout)
    rate = re.search(r"tps = ([\d.]+) \(without", answer.stdout)
    if answer.returncode or failed or not rate:
        sys.exit(f"pgbench failed:\n{answer.stdout}\n{answer.stderr}")
    return float(rate[1])


@contextlib.contextmanager
def server(dsn: str | None) -> Iterator[str]:
    if dsn:
        yield dsn
        return
    folder = Path(tempfile.mkdtemp(prefix="potluck-bench-"))
    folder.chmod(0o711)  # as root, the server runs as another user
    try:
        with EmbeddedPostgres(folder / "pg", shared_roots=[folder / "shared"]) as own:
            yield own
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=False)


if __name__ == "__main__":
    sys.exit(main())
