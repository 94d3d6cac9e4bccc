"""How are statements found, connections pooled, the schema migrated and news passed on?"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

import msgspec
import psycopg
import psycopg.errors
from psycopg import AsyncConnection
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from potluck.errors import BadInput, LedgerError, TryLater
from potluck.hub.store.shared import Rows, Shared
from potluck.telemetry import logger

log = logger("hub.ledger")
CHANNEL = "potluck"
_MIGRATION_LOCK = 0x706F746C  # "potl"
_BEGIN_RELAXED = "BEGIN; SET LOCAL synchronous_commit TO off"  # one round trip

set_json_dumps(lambda value: msgspec.json.encode(value).decode())
set_json_loads(msgspec.json.decode)


@cache
def statements() -> Mapping[str, str]:
    """Every named statement of hub/sql/queries: `-- name: lease_unit` starts one."""
    found: dict[str, str] = {}
    folder = resources.files("potluck.hub") / "sql" / "queries"
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        parts = re.split(r"^-- name: (\w+)\n", file.read_text("utf-8"), flags=re.MULTILINE)
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            if name in found:
                raise LedgerError(f"two statements are called {name}: rename one in {file.name}")
            found[name] = text.strip().rstrip(";")
    return found


def migrations() -> list[tuple[int, str, str]]:
    """(number, name, text) of every migration, in order."""
    folder = resources.files("potluck.hub") / "sql" / "migrations"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return [(int(f.name.split("_")[0]), f.name, f.read_text("utf-8")) for f in files]


class Transaction:
    """One open transaction; statements by name."""

    def __init__(self, connection: AsyncConnection[DictRow]) -> None:
        self._connection = connection

    async def rows(self, statement: str, /, **values: Any) -> Rows:
        cursor = await self._connection.execute(statements()[statement], values)
        return await cursor.fetchall() if cursor.description else []

    async def row(self, statement: str, /, **values: Any) -> dict[str, Any] | None:
        rows = await self.rows(statement, **values)
        return rows[0] if rows else None

    async def run(self, statement: str, /, **values: Any) -> int:
        """How many rows the statement touched."""
        return (await self._connection.execute(statements()[statement], values)).rowcount

    async def notify(self, news: str) -> None:
        """Tell every hub copy, when this transaction commits. Never on the hot path: NOTIFY serialises commits."""
        await self._connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, news))


class Ledger:
    """The hub's PostgreSQL. `open` migrates it; `transaction` is the way in."""

    def __init__(self, dsn: str, *, pool_size: int = 12) -> None:
        self.dsn = dsn
        self._pool: AsyncConnectionPool[AsyncConnection[DictRow]] = AsyncConnectionPool(
            dsn,
            min_size=2,
            max_size=pool_size,
            open=False,
            timeout=8,
            kwargs={"row_factory": dict_row, "application_name": "potluck-hub", "autocommit": True},
            check=_check,
        )
        self._shared: dict[str, Shared] = {}

    async def open(self) -> None:
        """Connect and bring the schema up to date. Only one hub copy migrates at a time."""
        await self._pool.open()
        try:
            async with self._pool.connection() as connection:
                await migrate(connection)
        except (psycopg.Error, PoolTimeout) as error:
            raise LedgerError(f"the ledger cannot be prepared: {str(error).strip()}") from error

    async def close(self) -> None:
        await self._pool.close()

    @contextlib.asynccontextmanager
    async def transaction(self, *, relaxed: bool = False) -> AsyncIterator[Transaction]:
        """One transaction; a lost connection or a full pool is `TryLater`, since the hub itself is well.

        `relaxed`: it does not wait for the disk. For what a crash may forget without harm, and before a `flush`.
        """
        async with self._connection() as connection:
            await connection.execute(_BEGIN_RELAXED if relaxed else "BEGIN")
            yield Transaction(connection)  # committed, or rolled back, with the connection's own context

    async def once(self, statement: str, /, **values: Any) -> dict[str, Any] | None:
        """The first row of a statement that is a transaction of its own: it is committed before we hear of it.

        For the statements that lock what many want. In a `transaction`, their locks would be held until this process,
        which may have a hundred other things to do, gets round to sending the COMMIT.
        """
        async with self._connection() as connection:
            return await Transaction(connection).row(statement, **values)

    async def shared(self, statement: str, /, *, apart: object = None, **values: Any) -> Rows:
        """The rows of a statement that answers many requests at once, and is a transaction of its own.

        Its parameters are arrays with an element for each request; each row says in `n`, from 1, whose it is. Requests
        that come while one statement is on its way share the next: so a hub with a thousand workers asks its ledger a
        few hundred times a second, not thousands of times. Those with an equal `apart` never share one.
        """
        queue = self._shared.get(statement)
        if queue is None:
            queue = self._shared[statement] = Shared(lambda asked: self._ask(statement, asked))
        return await queue.ask(apart, values)

    async def _ask(self, statement: str, asked: list[dict[str, Any]]) -> list[Rows]:
        arrays = {name: [values[name] for values in asked] for name in asked[0]}
        async with self._connection() as connection:
            rows = await Transaction(connection).rows(statement, **arrays)
        answers: list[Rows] = [[] for _ in asked]
        for row in rows:
            answers[row["n"] - 1].append(row)
        return answers

    async def flush(self) -> None:
        """Return when everything that was committed before is on the disk.

        A durable transaction holds its row locks until the disk has answered. Where many want the same row, commit
        `relaxed`, flush, and only then tell the caller: the same promise, nobody else waits for the disk, and those who
        wait for it wait together.
        """
        await self.shared("flush", one=1)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection[DictRow]]:
        with _explained():
            async with self._pool.connection() as connection:
                yield connection
                connection.__dict__["used_at"] = time.monotonic()

    async def listen(self, heard: Callable[[str], None]) -> None:
        """Call `heard` with every piece of news, for ever; reconnects, and then says "" (something may be missed)."""
        while True:
            try:
                async with await AsyncConnection.connect(self.dsn, autocommit=True) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    heard("")
                    async for notification in connection.notifies():
                        heard(notification.payload)
            except psycopg.Error as error:
                log.warning("ledger.listen_lost", reason=str(error).strip())
            await asyncio.sleep(1)


TRUSTED_S = 1.0
"""A connection that worked so lately is not asked whether it lives: that costs a round trip for each transaction."""


async def _check(connection: AsyncConnection[DictRow]) -> None:
    if time.monotonic() - connection.__dict__.get("used_at", 0.0) > TRUSTED_S:
        await AsyncConnectionPool.check_connection(connection)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What PostgreSQL says, as errors that say what to do."""
    try:
        yield
    except psycopg.DataError as error:
        # A number out of range, a text with a NUL: whoever sent it can mend it, and nothing was written.
        raise BadInput(f"a value does not fit into the ledger: {str(error).strip()}") from error
    except psycopg.errors.UniqueViolation as error:
        raise TryLater("somebody else did the same at the same moment: try again") from error
    except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout) as error:
        raise TryLater(f"the ledger does not answer, try again in a moment: {str(error).strip()}") from error


async def migrate(connection: AsyncConnection[DictRow]) -> list[str]:
    """Apply what is missing, all of it in one transaction. Returns the names applied."""
    applied: list[str] = []
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS migrations"
            " (number integer PRIMARY KEY, name text NOT NULL, at timestamptz NOT NULL DEFAULT now())"
        )
        cursor = await connection.execute("SELECT max(number) AS newest FROM migrations")
        newest = ((await cursor.fetchone()) or {}).get("newest") or 0
        known = migrations()
        if newest > known[-1][0]:
            raise LedgerError(
                f"this ledger was migrated to {newest} by a newer Potluck; this one knows {known[-1][0]}: upgrade the hub"
            )
        for number, name, text in known:
            if number > newest:
                await connection.execute(text)
                await connection.execute("INSERT INTO migrations (number, name) VALUES (%s, %s)", (number, name))
                applied.append(name)
    return applied
