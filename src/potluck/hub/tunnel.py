"""How is a hub reached by machines outside its network, when nothing from outside can reach in?

    a notebook ── https ── Cloudflare or ngrok ══ their program, on this machine ── http ── the hub, on loopback only

The program dials out and keeps that line open. It has to be installed; nothing is ever downloaded. Its public address is
read from what it prints, and becomes the hub's own. The certificate there is one that every machine trusts, so links need
no fingerprint. If the program dies it is started again, mostly at another address; it ends with the hub (leash.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from potluck.errors import NotFound
from potluck.telemetry import clean, logger

log = logger("hub.tunnel")
PATIENCE_S = 90.0
"""An address comes within seconds; a program that has none by then is started anew."""
STEADY_S = 60.0
"""A tunnel that lived so long was a good one: the pauses between attempts begin from the first again."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 120.0
LEASH = Path(__file__).with_name("leash.py")

_ADDRESS = r"https://[a-z0-9][a-z0-9.-]*(?::\d{1,5})?"
_COMPLAINT = re.compile(r"^ERROR:|\blvl=(?:eror|crit)\b|\bERR\b|\bFTL\b")


@dataclass(frozen=True)
class Program:
    """One that opens tunnels."""

    name: str
    source: str  # where its makers give it away
    address: re.Pattern[str]  # what the line that says the public address looks like, and no other line
    arguments: tuple[str, ...]  # `{port}` stands for the hub's

    def command(self, path: str, port: int) -> list[str]:
        return [path, *(word.format(port=port) for word in self.arguments)]

    def address_in(self, line: str) -> str:
        """The public address, if this line says it."""
        found = self.address.search(line)
        return found[1] if found else ""


PROGRAMS = {
    program.name: program
    for program in (
        Program(
            "cloudflared",
            "https://github.com/cloudflare/cloudflared/releases",
            # In a box. Other lines name addresses, too: of the terms of use, of the service that refuses.
            re.compile(rf"\|\s+({_ADDRESS})\s+\|"),
            # A config.yml of its owner's would send the tunnel's requests elsewhere than --url says.
            ("tunnel", "--config", os.devnull, "--no-autoupdate", "--url", "http://127.0.0.1:{port}"),
        ),
        Program(
            "ngrok",
            "https://ngrok.com/download",
            re.compile(rf'msg="started tunnel".* url=({_ADDRESS})(?:\s|$)'),
            # Its inspector would show every credential to everybody who can open a port of this machine.
            ("http", "127.0.0.1:{port}", "--inspect=false", "--log", "stdout", "--log-format", "logfmt"),
        ),
    )
}


@dataclass(frozen=True)
class Tunnel:
    """A program that is installed here."""

    program: Program
    path: str

    async def keep(self, port: int, opened: Callable[[str], None]) -> None:
        """Keep a tunnel to this port of this machine open for ever; `opened` is told every address that it gets."""
        clock = asyncio.get_running_loop().time
        pause_s = 0.0
        while True:
            began = clock()
            reason = await self._run_once(port, opened)
            was_good = clock() - began > STEADY_S
            pause_s = FIRST_PAUSE_S if was_good or not pause_s else min(pause_s * 2, LONGEST_PAUSE_S)
            log.warning("tunnel.closed", program=self.program.name, reason=reason, again_in_s=pause_s)
            await asyncio.sleep(pause_s)

    async def _run_once(self, port: int, opened: Callable[[str], None]) -> str:
        """Why the program ended, once it has."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", str(LEASH)),
            *self.program.command(self.path, port),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the hub; the tunnel ends when the hub has ended
        )
        said: deque[str] = deque(maxlen=30)
        known = ""
        try:
            async with asyncio.timeout(PATIENCE_S) as patience:
                async for line in _lines(process.stdout):
                    said.append(line)
                    if (address := self.program.address_in(line)) and address != known:
                        patience.reschedule(None)
                        known = address
                        opened(address)
            code = await process.wait()
        except TimeoutError:
            return f"it said no public address within {PATIENCE_S:g} s; its last words: {last_words(said)}"
        finally:
            await _end(process)
        return f"it ended with code {code}: {last_words(said)}"


def find(name: str) -> Tunnel:
    """The program of this name, or `NotFound` that says where to get it."""
    program = PROGRAMS[name]
    path = shutil.which(name)
    if path is None:
        others = [other for other in PROGRAMS if other != name and shutil.which(other)]
        raise NotFound(
            f"{name} is not installed on this machine (no program of this name is on PATH), and Potluck downloads nothing: "
            f"get it from {program.source}" + (f", or use {others[0]}, which is here" if others else "")
        )
    return Tunnel(program, path)


def last_words(lines: Iterable[str]) -> str:
    """What the program gave as its reason, as far as it gave one."""
    said = [line for line in (clean(line, limit=400).strip() for line in lines) if line]
    plain = [line.removeprefix("ERROR:").strip() for line in said if line.startswith("ERROR:")]
    complaints = [line for line in said if _COMPLAINT.search(line)]
    words = " ".join(filter(None, plain)) or (complaints or said or ["nothing"])[-1]
    return clean(words, limit=400)


async def _lines(stream: asyncio.StreamReader | None) -> AsyncIterator[str]:
    assert stream is not None
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue  # longer than any line that matters: asyncio has thrown it away
        if not line:
            return
        yield line.decode(errors="replace").rstrip()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Let go of the leash; whoever hangs on is killed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), 8)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
