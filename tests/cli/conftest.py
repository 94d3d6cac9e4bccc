"""A home of its own for every test, and a hub to talk to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_double import HubDouble

from potluck import settings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("POTLUCK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    double = HubDouble()
    monkeypatch.setenv("POTLUCK_HUB", double.address)
    monkeypatch.setenv("POTLUCK_TOKEN", settings.make_token("member"))
    yield double
    double.close()


@pytest.fixture
def potluck(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the whole command line in this process: exit code, stdout, stderr."""
    from potluck.cli import run

    def call(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([str(arg) for arg in args])
        return code, *capfd.readouterr()

    return call
