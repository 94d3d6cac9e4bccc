"""What the tests of gangs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gang_kit import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Processes that have torch already (gang_nursery.py)."""
    nursery = Nursery()
    yield nursery
    nursery.close()
