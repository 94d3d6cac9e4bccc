"""How does a machine become a worker, or a person a member, with one pasted line?"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potluck import settings
from potluck.cli import output
from potluck.cli.options import DURATION, SHARE
from potluck.errors import BadInput, NotFound
from potluck.telemetry import clean, setup

if TYPE_CHECKING:
    from potluck.protocol import Hardware, JoinAnswer
    from potluck.worker.membership import Credential

CHOICES = "choices.json"


@click.command("join", epilog="Without LINK the worker that was joined here before goes on.")
@click.argument("link", required=False, envvar="POTLUCK_JOIN_LINK")
@click.option("--name", metavar="NAME", help="What people see. Default: this machine's name.")
@click.option("--device", metavar="DEVICE", help="auto (the fastest that works), cpu, cuda:0, mps. Default: auto.")
@click.option("--share", type=SHARE, metavar="PART", help="How much of the machine training may use, like 50%.")
@click.option("--once", is_flag=True, help="Do one unit, then leave.")
@click.option("--for", "for_s", type=DURATION, metavar="TIME", help="Leave after so long: 90m, 2h.")
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads that training uses. Default: every core."
)
@click.option("--no-screen", is_flag=True, help="Plain lines in place of the live view.")
@click.option("--home", type=click.Path(file_okay=False), metavar="DIR", help="Where this worker keeps its things.")
def join_command(
    link: str | None, home: str | None, once: bool, for_s: float | None, no_screen: bool, **flags: Any
) -> int:
    """Join a hub with the link from `potluck invite`."""
    os.environ.pop("POTLUCK_JOIN_LINK", None)  # no business of the children
    setup()
    from potluck.worker.hardware import choose_device, detect

    hardware = detect()
    name = settings.load(settings.WorkerSettings, flags).name
    folder = Path(home) if home else _home(name, hardware.hostname, link)
    if link is None:
        flags = {**_remembered(folder), **{key: value for key, value in flags.items() if value is not None}}
    chosen = settings.load(settings.WorkerSettings, flags)
    device = choose_device(chosen.device, hardware)
    entered = _enter(link, folder, chosen, device, hardware) if link else _saved(folder)
    if entered is None:  # a person, not a worker
        return 0
    settings.write_private(folder / CHOICES, json.dumps({"device": chosen.device, "share": chosen.share}) + "\n")
    return _work(entered, folder, chosen, device, once=once, for_s=for_s, screen=not no_screen)


def _work(
    credential: Credential,
    folder: Path,
    chosen: settings.WorkerSettings,
    device: str,
    *,
    once: bool,
    for_s: float | None,
    screen: bool,
) -> int:
    from potluck.client import Hub
    from potluck.worker.agent import Agent, AgentSettings

    with Hub(credential.hub, credential.token, credential.fingerprint) as hub:
        trusted = any(worker.trusted for worker in hub.workers() if worker.id == credential.worker_id)
    told = AgentSettings.of(
        credential,
        folder,
        device=device,
        share=chosen.share,
        threads=chosen.threads,
        trusted=trusted,
        once=once,
        for_s=for_s,
        cache_bytes=chosen.cache_bytes,
        screen=screen,
    )
    return Agent(told).run()


def _enter(
    link: str, folder: Path, chosen: settings.WorkerSettings, device: str, hardware: Hardware
) -> Credential | None:
    """Exchange the link for a credential. None if it was a person's: then the profile is saved and explained."""
    from potluck.client import Hub, parse_link
    from potluck.protocol import JoinRequest
    from potluck.worker import membership

    address, code, fingerprint = parse_link(link)
    known = membership.load(folder)
    if known and (known.hub, known.fingerprint) == (address, fingerprint) and role_of(code) == "worker":
        return membership.join(
            link, folder, name=chosen.name, device=chosen.device, share=chosen.share, hardware=hardware
        )
    token = settings.make_token(role_of(code))
    request = JoinRequest(
        code=code,
        name=chosen.name,  # empty: the hub takes the link's, or the machine's
        token_sha256=settings.hash_token(token),
        hardware=hardware,
        device=device,
        share=chosen.share,
    )
    with Hub(address, "", fingerprint) as hub:
        answer = hub.join(request)
    if answer.role != "worker":
        _welcome(answer, settings.Profile(address, token, fingerprint, answer.role, answer.name, answer.hub))
        return None
    credential = membership.Credential(address, token, fingerprint, answer.id, answer.name, answer.hub)
    membership.save(folder, credential)
    return credential


def _remembered(folder: Path) -> dict[str, Any]:
    """What its owner chose when this worker started last: it holds until they choose something else."""
    try:
        found = json.loads((folder / CHOICES).read_text(encoding="utf-8"))
        return {"device": str(found["device"]), "share": settings.parse_share(found["share"])}
    except (OSError, ValueError, KeyError, TypeError, BadInput):
        return {}


def role_of(code: str) -> str:
    """The role that a link's code begins with (`m-…`, `v-…`, `w-…`): only for the letter in our new credential."""
    return {"m": "member", "v": "viewer"}.get(code.partition("-")[0], "worker")


def _welcome(answer: JoinAnswer, profile: settings.Profile) -> None:
    path = settings.save_profile(profile)
    output.say(f"You are {clean(answer.name)}, {answer.role} of {clean(answer.hub)}. Your credential is in {path}.")
    if answer.role == "member":
        output.say("Start a run:    potluck train dcgan --data FOLDER")
    output.say("See the runs:   potluck ps")
    output.say("Take a model:   potluck export RUN DIR")


def _home(name: str, hostname: str, link: str | None) -> Path:
    """The folder of the worker of this name; without a name and a link, of the only one that there is."""
    if name or link:
        return settings.worker_dir(folder_name(name or hostname))
    found = sorted(path.parent for path in settings.workers_dir().glob("*/credential.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise BadInput(f"{len(found)} workers were joined here ({names}): say which with --name")
    if not found:
        raise NotFound("no worker was joined here yet: potluck join LINK, with the line from `potluck invite`")
    return found[0]


def folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "worker"


def _saved(folder: Path) -> Credential:
    from potluck.worker import membership

    credential = membership.load(folder)
    if credential is None:
        raise NotFound(f"no worker was joined in {folder} yet: potluck join LINK, with the line from `potluck invite`")
    return credential
