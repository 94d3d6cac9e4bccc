"""Who merges when nobody else is trusted? The house worker: an ordinary agent, in a process of its own, on this machine.

It takes jobs, too: everybody's if a container runtime works here, and the admin's own in any case, because the admin is its
owner. It keeps its credential in the hub's data folder. If it dies it is started again; if the hub dies it goes on knocking,
and the next hub finds it by its lock and does not start a second one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

from potluck.errors import PotluckError
from potluck.hub.commands import machines, people
from potluck.hub.commands.desk import Caller, Desk
from potluck.protocol import InviteRequest
from potluck.settings import write_private
from potluck.telemetry import logger

log = logger("hub.house")
_ALREADY_RUNNING = 5  # exit code of an agent whose home is in use
_NOT_WELCOME = (1, 4)  # revoked, or the ledger is another one: join anew


async def keep(desk: Desk, home: Path, address: str, admin_token: str) -> None:
    """Run the house worker for ever."""
    owner = await people.authenticate(desk, admin_token)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    pause = 0.5
    while True:
        started = asyncio.get_running_loop().time()
        code = await _run_once(desk, home, address, owner)
        if code == _ALREADY_RUNNING:
            await asyncio.sleep(5)  # the one of the hub before us; take over when it ends
            continue
        if code in _NOT_WELCOME:
            (home / "credential.json").unlink(missing_ok=True)
        lived = asyncio.get_running_loop().time() - started
        pause = 0.5 if lived > 60 else min(pause * 2, 30)
        log.warning("house.ended", code=code, again_in_s=pause)
        await asyncio.sleep(pause)


async def _run_once(desk: Desk, home: Path, address: str, owner: Caller) -> int:
    environment = dict(os.environ)
    credential = home / "credential.json"
    if credential.exists():  # the hub may be at another port than last time
        known = json.loads(credential.read_text()) | {"hub": address, "fingerprint": desk.fingerprint}
        write_private(credential, json.dumps(known))
    else:
        request = InviteRequest("worker", uses=1, ttl_s=600, name="house", trusted=True)
        code = (await people.invite(desk, request, actor="the hub")).code
        # By the environment: other users of this machine can read command lines.
        environment["POTLUCK_JOIN_LINK"] = f"{address}/j/{code}" + (
            f"#fp={desk.fingerprint}" if desk.fingerprint else ""
        )
    with (home / "agent.log").open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "potluck.cli",
            "join",
            "--home",
            str(home),
            "--name",
            "house",
            "--device",
            "auto",
            "--no-screen",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    owning = asyncio.create_task(_own(desk, credential, owner))
    try:
        return await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 12)
        if process.returncode is None:
            process.kill()
        raise
    finally:
        owning.cancel()


async def _own(desk: Desk, credential: Path, owner: Caller) -> None:
    """Once it has joined, make the admin its owner: then the admin's jobs need no container here."""
    while not credential.exists():
        await asyncio.sleep(0.2)
    known = json.loads(credential.read_text())
    try:
        found = await people.workers(desk, totals=False, only=known["worker_id"])
        if found and not found[0].owner:
            await machines.own(desk, owner, known["token"])
    except PotluckError as error:
        log.warning("house.not_owned", reason=str(error))
