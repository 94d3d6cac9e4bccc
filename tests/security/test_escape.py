"""Does each executor stop what it says it stops, and no more, and does docs/executors.md say the same?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the attempts are made in Linux's words", allow_module_level=True)

import escape_kit as kit
from escape_kit import ATTEMPTS, NEEDS_ROOT

from potluck.worker.jobs import executors

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "executors.md"
MEASURED = ("process", "bubblewrap", "podman")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, bool], dict[str, str]]]:
    """Executor → what it stopped, and the sentences of those that were ended. Each that works here, once."""
    results: dict[str, tuple[dict[str, bool], dict[str, str]]] = {}

    def attempt_all() -> None:
        for found in executors.found():
            if found.works and found.name in MEASURED:
                home = tmp_path_factory.mktemp(found.name) / "home"
                results[found.name] = kit.measure(executors.ALL[found.name], home)

    kit.in_own_network(attempt_all)
    return results


def results_of(measured: dict[str, tuple[dict[str, bool], dict[str, str]]], name: str) -> dict[str, bool]:
    if name not in measured:
        reason = next(found.reason for found in executors.found() if found.name == name)
        pytest.skip(f"{name} does not work here: {reason}")
    return measured[name][0]


@pytest.mark.parametrize("name", MEASURED)
def test_an_executor_stops_exactly_what_it_says(
    measured: dict[str, tuple[dict[str, bool], dict[str, str]]], name: str
) -> None:
    results = results_of(measured, name)
    declared = executors.ALL[name].STOPS

    assert sorted(attempt for attempt in declared & set(results) if not results[attempt]) == []  # it got through
    assert sorted(attempt for attempt in set(results) - declared if results[attempt]) == []  # better than it says


@pytest.mark.parametrize("name", MEASURED)
def test_every_attempt_is_made(measured: dict[str, tuple[dict[str, bool], dict[str, str]]], name: str) -> None:
    results = results_of(measured, name)

    assert set(results) <= set(ATTEMPTS)
    if kit.is_root():
        assert set(results) == set(ATTEMPTS)
    else:
        # An ordinary user can neither have an own LAN nor try what only root can.
        own = {f"{place}_{how}_network" for place in ("lan", "metadata") for how in ("with", "without")}
        assert set(ATTEMPTS) - set(results) <= NEEDS_ROOT | own


@pytest.mark.parametrize("name", MEASURED)
def test_a_limit_says_that_it_was_the_limit(
    measured: dict[str, tuple[dict[str, bool], dict[str, str]]], name: str
) -> None:
    results_of(measured, name)
    sentences = measured[name][1]

    assert sentences["memory"].startswith("killed by the memory limit: asked 64 MB")
    assert sentences["disk"].startswith("stopped by the disk limit: asked 8 MB, wrote ")
    assert sentences["overtime"] == "stopped after its time limit of 0.5 s"


@pytest.mark.parametrize("name", MEASURED)
def test_the_page_says_what_was_measured(
    measured: dict[str, tuple[dict[str, bool], dict[str, str]]], name: str
) -> None:
    results = results_of(measured, name)
    said = kit.read_table(PAGE.read_text(encoding="utf-8"))

    assert {attempt: said[attempt][name] for attempt in results} == results


def test_the_page_has_every_attempt_and_what_every_executor_says() -> None:
    said = kit.read_table(PAGE.read_text(encoding="utf-8"))

    assert list(said) == list(ATTEMPTS)
    for name in MEASURED:
        assert {attempt for attempt in said if said[attempt][name]} == executors.ALL[name].STOPS


def test_what_counts_as_a_container_stops_all_that_touches_the_owner() -> None:
    touches = {
        "home",
        "credential",
        "other_job",
        "write_outside",
        "trace_agent",
        "kill_agent",
        "survive",
        "become_root",
    }

    for executor in executors.ALL.values():
        assert not executor.contains or touches <= executor.STOPS
