"""Which of the machine's Pythons does a version mean?"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from potluck.worker.jobs import interpreters
from potluck.worker.jobs.interpreters import EnvironmentFailed

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX shells")


@pytest.fixture(autouse=True)
def _few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all Pythons of the machine that runs the tests: it may have dozens."""
    monkeypatch.setattr(interpreters, "_PLACES", ())


def test_a_python_that_is_not_there_is_an_error_that_says_which_are() -> None:
    have = interpreters.own().version

    with pytest.raises(EnvironmentFailed, match=rf"no Python 3\.99: it has .*{re.escape(have)}"):
        interpreters.find("3.99")
    with pytest.raises(EnvironmentFailed, match="no version of Python"):
        interpreters.find("three; rm -rf")


def test_another_python_of_the_machine_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python3.87"
    fake.write_text('#!/bin/sh\necho "[[3, 87, 1], \\"/opt/python3.87\\"]"\n')
    fake.chmod(0o755)
    broken = tmp_path / "bin" / "python3.88"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    found = interpreters.find("3.87")

    assert (found.path, found.version, found.minor) == (fake.resolve(), "3.87.1", "3.87")
    with pytest.raises(EnvironmentFailed):
        interpreters.find("3.88")
    assert interpreters.find("3").version == interpreters.own().version
