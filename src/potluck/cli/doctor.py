"""Is this machine fit to host or to work, and is its hub within reach?"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from potluck import __version__, settings
from potluck.cli import output
from potluck.cli.options import read_token
from potluck.errors import NotFound, PotluckError
from potluck.protocol import OLDEST_PROTOCOL, PROTOCOL

PACKAGES = ("click", "httpx2", "msgspec", "numpy", "safetensors", "pillow", "fastapi", "psycopg", "uvicorn")
ENOUGH_DISK = 5 * 10**9  # torch's wheels, a packed data set and some versions of weights
CLOCK_SLACK_S = 30.0  # links and leases are judged by the hub's clock; more than this confuses people, not the hub


@dataclass(frozen=True)
class Finding:
    """One sentence. `ok` None: worth knowing, neither good nor bad."""

    about: str
    ok: bool | None
    text: str
    advice: str = ""


@click.command("doctor")
@click.option("--hub", "address", metavar="ADDRESS", help="http(s)://HOST:PORT, or the hub's data folder.")
@click.option("--token-file", type=click.Path(dir_okay=False), metavar="FILE", help="A file with the credential.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def doctor_command(address: str | None, token_file: str | None, as_json: bool) -> int:
    """Check this machine and its way to the hub."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        hardware,
        torch,
        disk,
        versions,
        postgres,
        lambda: hub(address or "", token_file or ""),
    )
    findings: list[Finding] = []
    for check in checks:
        for finding in check():
            findings.append(finding)
            if not as_json:
                _print(finding)
    healthy = all(finding.ok is not False for finding in findings)
    if as_json:
        output.print_json({"ok": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        output.say("All is well." if healthy else "Something needs your attention: see the lines with ✗.")
    return 0 if healthy else 1


def _print(finding: Finding) -> None:
    mark, colour = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "white")}[finding.ok]
    output.say(f"{click.style(mark, fg=colour)} {finding.text}" + (f" {finding.advice}" if finding.advice else ""))


def hardware() -> Iterator[Finding]:
    from potluck.worker.hardware import detect

    here = detect()
    yield Finding(
        "hardware",
        True,
        f"This is {here.hostname}: {here.os} on {here.arch}, {here.cpu or 'a CPU of unknown name'}, "
        f"{here.cpu_cores} cores and {output.size(here.memory_bytes)} of memory for us.",
    )
    gpus = [f"{gpu.get('name')} ({gpu.get('kind')}, {output.size(gpu.get('memory_bytes') or 0)})" for gpu in here.gpus]
    yield Finding("gpu", None, f"GPUs: {', '.join(gpus)}." if gpus else "No GPU that Potluck can use: the CPU trains.")


def torch() -> Iterator[Finding]:
    try:
        version = metadata.version("torch")
        from potluck.train import device
    except (metadata.PackageNotFoundError, ImportError, OSError) as error:
        advice = "To work here: pip install '.[train]'."
        yield Finding("torch", None, f"torch cannot be used here ({error}); a hub does not need it.", advice)
        return
    yield Finding("torch", True, f"torch {version} is here and would train on {device.pick('auto')}.")


def disk() -> Iterator[Finding]:
    folder = settings.cache_dir()
    place: Path = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    advice = "" if free > ENOUGH_DISK else f"Free some, or set POTLUCK_HOME to a disk with {output.size(ENOUGH_DISK)}."
    yield Finding("disk", free > ENOUGH_DISK, f"{output.size(free)} are free for {folder}.", advice)
    if not os.access(place, os.W_OK):
        yield Finding("disk", False, f"{place} cannot be written.", "Set POTLUCK_HOME to a folder of yours.")


def versions() -> Iterator[Finding]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("versions", True, f"Potluck {__version__}, Python {python}; {', '.join(found)}.")


def postgres() -> Iterator[Finding]:
    try:
        from potluck.hub.postgres.machine import find_binaries

        binaries = find_binaries()
    except (ImportError, PotluckError) as error:
        text = f"No PostgreSQL for a hub here: {str(error).rstrip('.')}."
        yield Finding("postgresql", None, text, "Only a hub needs one: pip install '.[hub]'.")
        return
    yield Finding("postgresql", True, f"A hub here would run PostgreSQL {binaries.major} ({binaries.origin}).")


def hub(address: str, token_file: str) -> Iterator[Finding]:
    try:
        access, origin = settings.find_hub_and_origin(address, read_token(token_file))
    except NotFound as error:
        yield Finding("hub", None, f"No hub to check: {error}.")
        return
    except PotluckError as error:
        yield Finding("hub", False, f"{str(error).rstrip('.')}.")
        return
    from potluck.client import Hub

    try:
        with Hub(access.address, access.token, access.fingerprint, timeout_s=10) as client:
            client.info()  # opens the connection, so that the next is the bare way there and back
            before, sent = time.monotonic(), output.utc_now()
            info = client.info()
            trip_s = time.monotonic() - before
    except PotluckError as error:
        yield Finding("hub", False, f"The hub {access.address} ({origin}): {str(error).rstrip('.')}.")
        return
    yield Finding("hub", True, f"The hub {info.name} at {access.address} ({origin}) answers in {1000 * trip_s:.0f} ms.")
    fits = info.oldest_protocol <= PROTOCOL and info.protocol >= OLDEST_PROTOCOL
    side = "upgrade potluck here" if info.oldest_protocol > PROTOCOL else "upgrade the hub"
    text = f"It is Potluck {info.version} and speaks protocol {info.oldest_protocol} to {info.protocol}, we {PROTOCOL}"
    yield Finding("protocol", fits, f"{text}." if fits else f"{text}: {side}.")
    ahead_s = (output.when(info.now) - sent).total_seconds() - trip_s / 2
    yield _clock(ahead_s)


def _clock(ahead_s: float) -> Finding:
    if abs(ahead_s) <= CLOCK_SLACK_S:
        return Finding("clock", True, f"The clocks agree within {max(0.1, abs(ahead_s)):.1f} s.")
    direction = "behind" if ahead_s > 0 else "ahead of"
    text = f"This machine's clock is {output.span(abs(ahead_s))} {direction} the hub's."
    return Finding("clock", False, text, "Switch on its time synchronisation.")
