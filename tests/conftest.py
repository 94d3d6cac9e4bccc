"""What every test may ask for: PostgreSQL servers, and a hub on either kind of server."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from hub_kit import Hub, open_hub
from ledger_fixture import both_dsn, debian_dsn, embedded_dsn, fresh_database, fresh_dsn
from potluck.hub.commands.desk import Caller

__all__ = ["both_dsn", "debian_dsn", "embedded_dsn", "fresh_dsn"]

# A shell that starts us in the background makes everybody below us deaf to Ctrl-C; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "potluck",
    deadline=None,  # two cores shared with real servers: time says nothing
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("potluck")


@pytest.fixture
def hub(both_dsn: str, tmp_path: Path) -> Iterator[Hub]:
    """A hub on an empty ledger; each test runs on the embedded server and on Debian's."""
    with fresh_database(both_dsn) as dsn, open_hub(dsn, tmp_path / "blobs") as hub:
        yield hub


@pytest.fixture
def embedded_hub(fresh_dsn: str, tmp_path: Path) -> Iterator[Hub]:
    """A hub on the embedded server only: where PostgreSQL's version cannot matter."""
    with open_hub(fresh_dsn, tmp_path / "blobs") as hub:
        yield hub


@pytest.fixture
def house(hub: Hub) -> Caller:
    """A trusted worker, who builds version 0 and merges."""
    return hub.join("house", trusted=True)


@pytest.fixture
def ann(hub: Hub) -> Caller:
    return hub.join("ann")


@pytest.fixture
def bob(hub: Hub) -> Caller:
    return hub.join("bob")
