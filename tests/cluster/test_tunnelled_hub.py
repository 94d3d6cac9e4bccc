"""A hub behind a tunnel: only its program reaches it, everybody else comes by the public name, over TLS.

The program is a stand-in that relays TCP for real (tests/tunnel_kit.py); nothing leaves this machine.
"""

from __future__ import annotations

import os
import re
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from potluck.domain.job import JobSpec
from potluck.protocol import InviteRequest
from potluck.testing import LocalCluster
from tunnel_kit import Doubles, install, use_here

PLAIN = ("--runtime", "any", "--yes", "--executor", "process")


@pytest.fixture
def doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doubles:
    doubles = install(tmp_path / "doubles", "cloudflared", "ngrok")
    use_here(doubles, monkeypatch)
    return doubles


@pytest.fixture
def cluster(tmp_path: Path, doubles: Doubles) -> Iterator[LocalCluster]:
    environment = {**doubles.environment, "POTLUCK_TUNNEL": "cloudflared"}
    with LocalCluster(tmp_path / "c", house_worker=False, environment=environment) as running:
        yield running
        print(running.tails())


def public(cluster: LocalCluster, doubles: Doubles, number: int) -> str:
    """The address that the stand-in got at its `number`th start, once the hub has it."""
    cluster.until(
        lambda: len(doubles.starts) == number and doubles.starts[-1]["address"] in cluster.log("hub"),
        timeout_s=60,
        what=f"tunnel {number}",
    )
    return str(doubles.starts[-1]["address"])


def browser(address: str, doubles: Doubles) -> httpx2.Client:
    return httpx2.Client(base_url=address, verify=ssl.create_default_context(cafile=doubles.folder / "cert.pem"))


def test_a_worker_joins_and_works_through_the_tunnel_and_by_the_new_address_after_its_death(
    cluster: LocalCluster, doubles: Doubles
) -> None:
    first = public(cluster, doubles, 1)
    link = cluster.hub.invite(InviteRequest("worker")).url
    assert link.startswith(f"{first}/j/") and "#" not in link
    assert f'potluck join "{first}/j/' in cluster.log("hub")
    hub = psutil.Process(cluster.processes["hub"].popen.pid)
    listening = {c.laddr.ip for c in hub.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}

    cluster.add_worker("ann", arguments=PLAIN)
    job = cluster.job_ends(cluster.submit(JobSpec(["/bin/sh", "-c", "cat words"]), {"words": "far away\n"}))

    assert job.state == "succeeded", job.reason
    assert cluster.output(job.id) == "far away\n"
    assert first in (cluster.folder / "workers" / "ann" / "credential.json").read_text()

    os.kill(doubles.starts[-1]["pid"], signal.SIGKILL)
    second = public(cluster, doubles, 2)

    assert second != first
    assert f"has another address now: {second}" in cluster.log("hub")
    codes = re.findall(r"potluck join \"https://[^/]+/j/([^\"]+)\"", cluster.log("hub"))
    assert len(codes) == 2 and codes[0] == codes[1]
    cluster.add_worker("bob", arguments=PLAIN)
    cluster.until(
        lambda: any(w.name == "bob" for w in cluster.hub.workers()), timeout_s=60, what="bob by the new address"
    )

    cluster.processes["hub"].popen.send_signal(signal.SIGTERM)
    assert cluster.processes["hub"].popen.wait(60) == 0
    assert not any(psutil.pid_exists(start["pid"]) for start in doubles.starts)


def test_a_browser_is_let_in_by_the_public_name_with_a_cookie_that_only_https_carries(
    cluster: LocalCluster, doubles: Doubles
) -> None:
    address = public(cluster, doubles, 1)
    code = cluster.hub.invite(InviteRequest("member")).url.rpartition("/")[2]
    local = cluster.hub.address

    with browser(address, doubles) as outside, httpx2.Client(base_url=local) as inside:
        page = outside.get(f"/j/{code}")
        foreign = outside.post(f"/j/{code}/enter", headers={"Origin": "https://evil.example"})
        entered = outside.post(f"/j/{code}/enter", headers={"Origin": address})
        seen = outside.get("/api/v1/jobs")
        other_site = outside.post("/sign-out", headers={"Origin": "https://evil.example", "Potluck-Page": "1"})
        other_name = outside.post("/sign-out", headers={"Origin": local, "Potluck-Page": "1"})
        out = outside.post("/sign-out", headers={"Origin": address, "Potluck-Page": "1"})
        at_home = inside.post(f"/j/{cluster.hub.invite(InviteRequest('member')).code}/enter", headers={"Origin": local})

    assert f"{address}/j/{code}" in page.text and "#fp=" not in page.text
    assert foreign.status_code == 403
    assert entered.status_code == 303
    assert "secure" in entered.headers["set-cookie"].lower()
    assert seen.status_code == 200
    assert (other_site.status_code, other_name.status_code) == (401, 401)
    assert out.status_code == 303
    assert at_home.status_code == 303
    assert "secure" not in at_home.headers["set-cookie"].lower()  # plain http to this very machine


def test_a_tunnel_program_that_is_missing_is_said_before_anything_starts(tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "potluck.cli", "host", "--tunnel", "--data-dir", str(tmp_path / "hub")],
        env={**os.environ, "PATH": str(tmp_path), "POTLUCK_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 3
    assert "cloudflared is not installed" in done.stderr and "https://github.com/cloudflare" in done.stderr
    assert not (tmp_path / "hub" / "ledger").exists()


@pytest.mark.parametrize("more", [("--bind", "0.0.0.0"), ("--tls",)])
def test_what_cannot_be_had_together_with_a_tunnel_is_refused(tmp_path: Path, more: tuple[str, ...]) -> None:
    from click.testing import CliRunner

    from potluck.cli.host import host_command
    from potluck.errors import BadInput

    done = CliRunner().invoke(host_command, ["--tunnel", "ngrok", "--data-dir", str(tmp_path), *more])

    assert isinstance(done.exception, BadInput) and "tunnel" in str(done.exception)
