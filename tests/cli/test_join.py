"""What does a pasted link do?"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_double import HubDouble, make_run

from potluck import settings
from potluck.protocol import JoinAnswer

Potluck = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stranger(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> HubDouble:
    """A hub that this machine knows nothing of."""
    monkeypatch.delenv("POTLUCK_HUB")
    monkeypatch.delenv("POTLUCK_TOKEN")
    return hub


def test_a_members_link_leaves_a_private_credential_that_the_next_command_uses(
    stranger: HubDouble, potluck: Potluck, home: Path
) -> None:
    stranger.routes["POST", "/join"] = lambda _: JoinAnswer("m-1", "ann", "member", "Lab")
    stranger.knows(make_run())

    code, out, err = potluck("join", f"{stranger.address}/j/m-abcd-efgh", "--name", "ann")

    assert code == 0, err
    assert "You are ann, member of Lab" in out
    assert "potluck train" in out
    profile = home / "config" / "profile.json"
    assert stat.S_IMODE(profile.stat().st_mode) == 0o600
    token = json.loads(profile.read_text())["token"]
    assert settings.check_token(token) == "member"
    assert stranger.asked[-1][2]["token_sha256"] == settings.hash_token(token)
    assert token not in json.dumps(stranger.asked)
    assert potluck("ps")[0] == 0
    assert stranger.tokens[-1] == f"Bearer {token}"


def test_a_viewer_is_not_told_to_train(stranger: HubDouble, potluck: Potluck) -> None:
    stranger.routes["POST", "/join"] = lambda _: JoinAnswer("v-1", "vic", "viewer", "Lab")

    _, out, _ = potluck("join", f"{stranger.address}/j/v-abcd")

    assert "potluck ps" in out
    assert "train" not in out


def test_an_expired_link_says_what_the_hub_says(stranger: HubDouble, potluck: Potluck, home: Path) -> None:
    stranger.routes["POST", "/join"] = lambda _: (403, "not_allowed", "this link expired: ask for a fresh one")

    code, _, err = potluck("join", f"{stranger.address}/j/w-abcd")

    assert (code, err) == (4, "not_allowed: this link expired: ask for a fresh one\n")
    assert not list(home.rglob("credential.json"))


@pytest.mark.parametrize("link", ["hello", "http://127.0.0.1:1/", "ftp://127.0.0.1/j/x", "https://h:1/j/c#fp=12"])
def test_what_is_no_link_is_refused_without_a_call(link: str, potluck: Potluck) -> None:
    code, _, err = potluck("join", link)

    assert code == 2
    assert "link" in err


def test_without_a_link_and_without_an_earlier_worker_the_way_in_is_told(potluck: Potluck) -> None:
    code, _, err = potluck("join")

    assert code == 3
    assert "potluck invite" in err


def test_without_a_link_several_workers_have_to_be_told_apart(potluck: Potluck, home: Path) -> None:
    for name in ("ada", "bob"):
        settings.write_private(settings.worker_dir(name) / "credential.json", "{}")

    code, _, err = potluck("join")

    assert code == 2
    assert "ada, bob" in err


def test_a_device_that_is_not_there_is_told_before_the_link_is_used(stranger: HubDouble, potluck: Potluck) -> None:
    code, _, err = potluck("join", f"{stranger.address}/j/w-abcd", "--device", "cuda:99")

    assert (code, stranger.asked) == (2, [])
    assert "--device" in err


def test_a_worker_that_was_joined_before_goes_on_as_itself_and_leaves_when_its_time_is_over(
    stranger: HubDouble, potluck: Potluck
) -> None:
    joined = []
    stranger.routes["POST", "/join"] = lambda body: joined.append(body) or JoinAnswer("w-1", "ada", "worker", "Lab")
    stranger.routes["GET", "/workers"] = lambda _: []
    stranger.routes["POST", "/heartbeat"] = lambda _: {}
    stranger.routes["POST", "/leave"] = lambda _: None
    link = f"{stranger.address}/j/w-abcd"

    first = potluck("join", link, "--name", "ada", "--share", "25%", "--for", "0s", "--no-screen")
    again = potluck("join", "--for", "0s", "--no-screen")
    share_again = json.loads((settings.worker_dir("ada") / "choices.json").read_text())["share"]
    by_link = potluck("join", link, "--name", "ada", "--for", "0s", "--no-screen")

    assert (first[0], again[0], by_link[0]) == (0, 0, 0)
    assert [body["share"] for body in joined] == [0.25]
    assert share_again == 0.25
