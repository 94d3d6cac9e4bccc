"""A tunnel: what is read from the programs' words, and how they live and end. The whole hub: tests/cluster/test_tunnelled_hub.py."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from potluck import settings
from potluck.errors import NotFound
from potluck.hub import tunnel
from potluck.settings import HubSettings
from tunnel_kit import Doubles, install

CLOUDFLARED, NGROK = tunnel.PROGRAMS["cloudflared"], tunnel.PROGRAMS["ngrok"]


@pytest.fixture
def doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doubles:
    doubles = install(tmp_path / "doubles", "cloudflared", "ngrok")
    for key in ("PATH", "TUNNEL_DOUBLE"):
        monkeypatch.setenv(key, doubles.environment[key])
    monkeypatch.setattr(tunnel, "FIRST_PAUSE_S", 0.05)
    return doubles


# --- what they say


@pytest.mark.parametrize(
    ("program", "line", "address"),
    [
        (
            CLOUDFLARED,
            "2025-12-02T10:30:46Z INF |  https://purple-rain-4d7f.trycloudflare.com                         |",
            "https://purple-rain-4d7f.trycloudflare.com",
        ),
        (CLOUDFLARED, "|  https://words.trycloudflare.com  |", "https://words.trycloudflare.com"),
        (CLOUDFLARED, "2025-12-02T10:30:46Z INF Requesting new quick Tunnel on trycloudflare.com...", ""),
        (CLOUDFLARED, 'failed to request quick Tunnel: Post "https://api.trycloudflare.com/tunnel": dial tcp', ""),
        (CLOUDFLARED, "INF Terms of Use (https://www.cloudflare.com/website-terms/), and Cloudflare reserves", ""),
        (CLOUDFLARED, "INF |  http://words.trycloudflare.com  |", ""),
        (
            NGROK,
            't=2026-08-10T07:20:40+0000 lvl=info msg="started tunnel" obj=tunnels name=command_line '
            "addr=http://localhost:8501 url=https://zookeeper-pronto-ship.ngrok-free.dev",
            "https://zookeeper-pronto-ship.ngrok-free.dev",
        ),
        (NGROK, 't=2026 lvl=info msg="starting web service" obj=web addr=127.0.0.1:4040 allow_hosts=[]', ""),
        (
            NGROK,
            't=2026 lvl=info msg="started tunnel" obj=tunnels addr=//localhost:4444 url=tcp://0.tcp.jp.ngrok.io:1',
            "",
        ),
        (NGROK, "ERROR:  Sign up for an account: https://dashboard.ngrok.com/signup", ""),
    ],
)
def test_the_address_is_read_from_the_line_that_says_it_and_from_no_other(
    program: tunnel.Program, line: str, address: str
) -> None:
    assert program.address_in(line) == address


def test_the_last_words_are_the_reason_and_not_just_the_last_line() -> None:
    ngrok = [
        'lvl=eror msg="failed to auth" err="x"',
        "ERROR:  authentication failed: get an authtoken.",
        "ERROR:  ",
        "ERROR:  ERR_NGROK_4018",
        "",
    ]
    cloudflared = ["INF Requesting", "ERR Error unmarshaling QuickTunnel response: error code: 1015", "INF bye"]

    assert tunnel.last_words(ngrok) == "authentication failed: get an authtoken. ERR_NGROK_4018"
    assert "1015" in tunnel.last_words(cloudflared)
    assert tunnel.last_words(["", "\x1b[31mno such host\x1b[0m"]) == "no such host"
    assert tunnel.last_words([]) == "nothing"


def test_the_programs_are_called_so_that_nothing_of_their_owners_gets_in_between() -> None:
    assert CLOUDFLARED.command("/bin/cloudflared", 8470) == [
        *("/bin/cloudflared", "tunnel", "--config", os.devnull, "--no-autoupdate"),
        *("--url", "http://127.0.0.1:8470"),
    ]
    assert "--inspect=false" in NGROK.command("/bin/ngrok", 8470)
    assert "127.0.0.1:8470" in NGROK.command("/bin/ngrok", 8470)


def test_a_program_that_is_missing_is_named_with_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles = install(tmp_path / "doubles", "ngrok")
    monkeypatch.setenv("PATH", str(doubles.folder / "bin"))

    with pytest.raises(
        NotFound, match=r"cloudflared is not installed.*github.com/cloudflare.*or use ngrok, which is here"
    ):
        tunnel.find("cloudflared")

    assert tunnel.find("ngrok").path == str(doubles.folder / "bin" / "ngrok")


# --- how they live and end


async def run_until(keep: Awaitable[None], condition: Callable[[], bool]) -> None:
    """Let it work until the condition holds, then cancel it, as a hub does that stops."""
    task = asyncio.ensure_future(keep)
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end and not task.done(), task
        await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("name", ["cloudflared", "ngrok"])
def test_a_tunnel_that_dies_is_opened_anew_and_ends_with_who_keeps_it(doubles: Doubles, name: str) -> None:
    told: list[str] = []

    def opened(address: str) -> None:
        told.append(address)
        if len(told) < 3:
            os.kill(doubles.starts[-1]["pid"], signal.SIGKILL)

    asyncio.run(run_until(tunnel.find(name).keep(4711, opened), lambda: len(told) == 3))

    assert told == [start["address"] for start in doubles.starts]
    assert len(set(told)) == 3
    assert not any(is_alive(start["pid"]) for start in doubles.starts)
    assert "127.0.0.1:4711" in " ".join(doubles.starts[0]["argv"])


def test_a_tunnel_that_is_refused_says_why_and_is_tried_again_ever_more_seldom(
    doubles: Doubles, capfd: pytest.CaptureFixture[str]
) -> None:
    doubles.be("refuse")
    told: list[str] = []

    def condition() -> bool:
        if len(doubles.starts) == 3:
            doubles.be("")
        return bool(told)

    asyncio.run(run_until(tunnel.find("ngrok").keep(4711, told.append), condition))

    said = "".join(capfd.readouterr())
    assert "requires a verified account and authtoken" in said and "ERR_NGROK_4018" in said
    # one way in which it is written or the other, depending on who set the log up before
    assert re.findall(r"again_in_s(?:=|': )([\d.]+)", said) == ["0.05", "0.1", "0.2"]
    assert told == [doubles.starts[-1]["address"]]


def test_a_program_that_says_no_address_is_not_waited_for_for_ever(
    doubles: Doubles, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tunnel, "PATIENCE_S", 0.5)
    doubles.be("mute")

    asyncio.run(
        run_until(tunnel.find("cloudflared").keep(4711, lambda address: None), lambda: len(doubles.starts) == 2)
    )

    assert "said no public address within 0.5 s" in "".join(capfd.readouterr())
    assert not any(is_alive(start["pid"]) for start in doubles.starts)


@pytest.mark.parametrize("mood", ["", "stubborn"])
def test_the_program_ends_when_the_hub_is_killed(doubles: Doubles, mood: str) -> None:
    doubles.be(mood)
    hub = """
import asyncio, sys
from potluck.hub import tunnel
asyncio.run(tunnel.find("cloudflared").keep(4711, lambda address: print(address, flush=True)))
"""
    process = subprocess.Popen([sys.executable, "-c", hub], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("https://quiet-words-0.trycloudflare.com:")
    assert is_alive(doubles.starts[0]["pid"])

    process.kill()
    process.wait(10)
    process.stdout.close()

    end = time.monotonic() + 30
    while is_alive(doubles.starts[0]["pid"]):
        assert time.monotonic() < end, "the tunnel outlived its hub"
        time.sleep(0.05)  # a bounded poll


# --- what the settings make of it


def test_behind_a_tunnel_a_hub_listens_on_this_machine_only_and_speaks_plain_http(tmp_path: Path) -> None:
    asked = HubSettings(tmp_path, bind="0.0.0.0", tls=True, tunnel="ngrok")

    assert (asked.listen_on, asked.use_tls) == ("127.0.0.1", False)
    assert HubSettings(tmp_path).listen_on == "0.0.0.0"


def test_the_tunnel_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_TUNNEL", "ngrok")

    assert settings.load(HubSettings).tunnel == "ngrok"
