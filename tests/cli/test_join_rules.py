"""Does a machine's owner decide what it works for, and is every dangerous choice one that they made?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_double import HubDouble

from potluck import settings
from potluck.protocol import Fates, Hardware, JoinAnswer, Rules, WorkerView
from potluck.worker.agent import Agent, AgentSettings

Potluck = Callable[..., tuple[int, str, str]]


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> list[AgentSettings]:
    """What the agents that would have started were told."""
    told: list[AgentSettings] = []

    def run(self: Agent) -> int:
        told.append(self.settings)
        return 0

    monkeypatch.setattr(Agent, "run", run)
    return told


@pytest.fixture
def stranger(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> HubDouble:
    """A hub that gives worker links, and that this machine knows nothing of."""
    monkeypatch.delenv("POTLUCK_HUB")
    monkeypatch.delenv("POTLUCK_TOKEN")
    hub.routes["POST", "/join"] = lambda _: JoinAnswer("w-1", "box", "worker", "Lab")
    hub.routes["GET", "/workers"] = lambda _: []
    return hub


def worker(owner: str) -> WorkerView:
    return WorkerView(
        "w-1", "box", "idle", "cpu", 1.0, False, Hardware(), "now", "now", "", 0.0, Fates(), 0, owner=owner
    )


def link(hub: HubDouble) -> str:
    return f"{hub.address}/j/w-abcd-efgh"


def test_without_a_word_everybodys_jobs_run_in_containers(
    stranger: HubDouble, potluck: Potluck, agents: list[AgentSettings]
) -> None:
    assert potluck("join", link(stranger), "--name", "box")[0] == 0

    assert agents[0].house.rules == Rules("all", "hub", "container", 1)


def test_rules_are_told_and_remembered(stranger: HubDouble, potluck: Potluck, agents: list[AgentSettings]) -> None:
    rules: Any = ["--accept", "jobs", "--max-tasks", "3", "--label", "room=lab-2", "--label", "fast=yes"]
    code, _, err = potluck("join", link(stranger), "--name", "box", *rules, "--executor", "bubblewrap")
    assert code == 0, err

    assert potluck("join", "--name", "box")[0] == 0

    assert agents[0].house == agents[1].house
    assert agents[1].house.rules == Rules("jobs", "hub", "container", 3)
    assert agents[1].house.labels == {"room": "lab-2", "fast": "yes"}
    assert agents[1].house.executor == "bubblewrap"


def test_plain_processes_for_everybody_take_an_explicit_yes(
    stranger: HubDouble, potluck: Potluck, agents: list[AgentSettings], home: Path
) -> None:
    code, _, err = potluck("join", link(stranger), "--name", "box", "--runtime", "any")

    assert code == 4
    assert "--yes" in err
    assert "your files" in err
    assert not agents
    assert not list(home.rglob("credential.json")), "it must not even have joined"

    assert potluck("join", link(stranger), "--name", "box", "--runtime", "any", "--yes")[0] == 0
    assert potluck("join", "--name", "box")[0] == 0, "who said yes once is not asked again"
    assert agents[1].house.rules.runtime == "any"


def test_my_jobs_only_needs_to_know_who_i_am(
    stranger: HubDouble, potluck: Potluck, agents: list[AgentSettings]
) -> None:
    code, _, err = potluck("join", link(stranger), "--name", "box", "--from", "me")

    assert code == 3
    assert "member" in err
    assert not agents


def test_my_jobs_only_makes_me_the_owner_with_my_own_credential(
    stranger: HubDouble, potluck: Potluck, agents: list[AgentSettings]
) -> None:
    token = settings.make_token("member")
    settings.save_profile(settings.Profile(stranger.address, token, role="member", name="ann"))
    stranger.routes["POST", "/workers/own"] = lambda _: worker("ann")

    code, _, err = potluck("join", link(stranger), "--name", "box", "--from", "me", "--runtime", "any")

    assert code == 0, err
    assert agents[0].house.owner == "ann"
    assert agents[0].house.rules.whose == "me"
    method, _, body = next(asked for asked in stranger.asked if asked[1] == "/workers/own")
    assert (method, body) == ("POST", {"worker_token": agents[0].token})
    claimed = len(stranger.asked)
    assert potluck("join", "--name", "box")[0] == 0
    assert not [asked for asked in stranger.asked[claimed:] if asked[1] == "/workers/own"], "once is enough"
    assert agents[1].house.owner == "ann"


@pytest.mark.parametrize("wrong", ["room", "a b=c", "=x"])
def test_a_label_that_is_none_is_refused(stranger: HubDouble, potluck: Potluck, wrong: str) -> None:
    code, _, err = potluck("join", link(stranger), "--name", "box", "--label", wrong)

    assert code == 2
    assert "KEY=VALUE" in err
