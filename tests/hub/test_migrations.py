"""Does every ledger end up with the same schema, once, whoever comes first?

`schema.txt` is what the migrations make, as PostgreSQL's catalogue tells it. After a new migration:

    python tests/hub/test_migrations.py     writes it again; the difference belongs into the review
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg.rows import dict_row

from ledger_fixture import fresh_database
from potluck.errors import LedgerError
from potluck.hub.store import Ledger
from potluck.hub.store.ledger import migrate, migrations, statements

SNAPSHOT = Path(__file__).with_name("schema.txt")
QUERIES = {
    "columns": """
        SELECT table_name || '.' || column_name || ' ' || data_type
            || CASE WHEN is_nullable = 'NO' THEN ' not null' ELSE '' END
            || COALESCE(' default ' || column_default, '') || CASE WHEN is_identity = 'YES' THEN ' identity' ELSE '' END
        FROM information_schema.columns WHERE table_schema = 'public' ORDER BY table_name, ordinal_position""",
    "constraints": """
        SELECT conrelid::regclass || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
        ORDER BY conrelid::regclass::text, pg_get_constraintdef(oid)""",
    "indexes": "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY tablename, indexname",
    "options": """
        SELECT relname || ' ' || array_to_string(reloptions, ', ') FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND reloptions IS NOT NULL ORDER BY relname""",
    "functions": """
        SELECT pg_get_function_identity_arguments(oid) || ' ' || pg_get_functiondef(oid) FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace ORDER BY proname""",
}


def schema(dsn: str) -> str:
    with psycopg.connect(dsn) as connection:
        parts = []
        for title, query in QUERIES.items():
            rows = connection.execute(query).fetchall()  # type: ignore[arg-type]
            parts.append("\n".join([f"# {title}", *(str(row[0]) for row in rows)]))
    return "\n\n".join(parts) + "\n"


async def _migrate(dsn: str) -> list[str]:
    async with await AsyncConnection.connect(dsn, row_factory=dict_row) as connection:
        return await migrate(connection)


@pytest.fixture
def dsn(both_dsn: str):  # type: ignore[no-untyped-def]
    with fresh_database(both_dsn) as dsn:
        yield dsn


def test_an_empty_database_gets_all_migrations_once(dsn: str) -> None:
    assert asyncio.run(_migrate(dsn)) == [name for _, name, _ in migrations()]
    before = schema(dsn)

    assert asyncio.run(_migrate(dsn)) == []

    assert schema(dsn) == before


def test_migrations_make_the_schema_that_was_reviewed(dsn: str) -> None:
    asyncio.run(_migrate(dsn))

    assert schema(dsn) == SNAPSHOT.read_text(), "run: python tests/hub/test_migrations.py"


def test_two_hubs_that_start_at_once_migrate_once(dsn: str) -> None:
    async def both() -> list[list[str]]:
        return await asyncio.gather(*(_migrate(dsn) for _ in range(4)))

    applied = asyncio.run(both())

    assert sorted(map(len, applied)) == [0, 0, 0, len(migrations())]


def test_a_migration_that_fails_leaves_nothing(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from potluck.hub.store import ledger

    broken = [*migrations(), (9999, "9999_broken.sql", "CREATE TABLE half (id int); SELECT 1 / 0")]
    monkeypatch.setattr(ledger, "migrations", lambda: broken)

    async def open_() -> None:
        hub = Ledger(dsn)
        try:
            await hub.open()
        finally:
            await hub.close()

    with pytest.raises(LedgerError, match="cannot be prepared"):
        asyncio.run(open_())

    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT to_regclass('half'), to_regclass('runs')").fetchone() == (None, None)


def test_a_ledger_from_the_future_is_refused_with_advice(dsn: str) -> None:
    asyncio.run(_migrate(dsn))
    with psycopg.connect(dsn) as connection:
        connection.execute("INSERT INTO migrations (number, name) VALUES (9999, '9999_future.sql')")

    with pytest.raises(LedgerError, match="upgrade the hub"):
        asyncio.run(_migrate(dsn))


def test_migrations_are_numbered_without_gaps() -> None:
    assert [number for number, _, _ in migrations()] == list(range(1, len(migrations()) + 1))


def test_every_statement_is_prepared_by_the_real_schema(dsn: str) -> None:
    """No statement names a column that is not there. (Parameters become NULL: only the names are looked at.)"""
    import re

    asyncio.run(_migrate(dsn))
    wrong = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        for name, text in statements().items():
            query = re.sub(r"%\(\w+\)s", "NULL", text).replace("%%", "%")
            try:
                connection.execute(f"EXPLAIN {query}")  # type: ignore[arg-type]
            except (psycopg.errors.UndefinedColumn, psycopg.errors.UndefinedTable, psycopg.errors.SyntaxError) as error:
                wrong.append(f"{name}: {error}")
            except psycopg.Error:
                continue  # an untyped NULL where a type is needed
    assert wrong == []


if __name__ == "__main__":
    from ledger_fixture import running_server

    with running_server() as server, fresh_database(server) as empty:
        asyncio.run(_migrate(empty))
        SNAPSHOT.write_text(schema(empty))
