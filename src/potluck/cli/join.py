"""How does a machine become a worker, or a person a member, with one pasted line?"""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potluck import settings
from potluck.cli import output
from potluck.cli.options import DURATION, SHARE
from potluck.errors import BadInput, NotAllowed, NotFound, PotluckError
from potluck.telemetry import clean, setup

if TYPE_CHECKING:
    from potluck.protocol import Hardware, JoinAnswer
    from potluck.worker.membership import Credential

CHOICES = "choices.json"
REMEMBERED = ("device", "share", "accept", "whose", "runtime", "max_tasks", "labels", "executor")


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
@click.option("--accept", type=click.Choice(["pool", "jobs", "all"]), help="What it works for. Default: all.")
@click.option("--from", "whose", type=click.Choice(["me", "hub"]), help="Whose jobs. Default: everybody's (hub).")
@click.option(
    "--runtime",
    type=click.Choice(["container", "any"]),
    help="How other people's jobs run: in a container (bubblewrap counts), or as a plain process, too. "
    "Default: container.",
)
@click.option("--max-tasks", type=click.IntRange(1, 1000), metavar="N", help="Jobs at once. Default: 1.")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="What jobs can ask for with --on. Repeatable.")
@click.option(
    "--executor",
    type=click.Choice(["podman", "docker", "apptainer", "bubblewrap", "process"]),
    help="Run every job in this one. Default: the best that works.",
)
@click.option("--yes", is_flag=True, help="Do not ask back about --runtime any.")
@click.option("--no-screen", is_flag=True, help="Plain lines in place of the live view.")
@click.option("--home", type=click.Path(file_okay=False), metavar="DIR", help="Where this worker keeps its things.")
def join_command(
    link: str | None,
    home: str | None,
    once: bool,
    for_s: float | None,
    no_screen: bool,
    yes: bool,
    labels: tuple[str, ...],
    **flags: Any,
) -> int:
    """Join a hub with the link from `potluck invite`."""
    os.environ.pop("POTLUCK_JOIN_LINK", None)  # no business of the children
    setup()
    from potluck.worker.hardware import choose_device, detect

    hardware = detect()
    flags["labels"] = ",".join(f"{key}={value}" for key, value in _pairs(labels)) if labels else None
    name = settings.load(settings.WorkerSettings, flags).name
    folder = Path(home).absolute() if home else _home(name, hardware.hostname, link)
    before = _remembered(folder)
    if link is None:
        kept = {name: before[name] for name in REMEMBERED if name in before}
        flags = {**kept, **{key: value for key, value in flags.items() if value is not None}}
    chosen = settings.load(settings.WorkerSettings, flags)
    for_strangers = chosen.runtime == "any" and chosen.whose == "hub" and chosen.accept != "pool"
    if for_strangers and not yes and before.get("runtime") != "any" and (link is None or _is_for_worker(link)):
        _ask_about_strangers()
    device = choose_device(chosen.device, hardware)
    entered = _enter(link, folder, chosen, device, hardware) if link else _saved(folder)
    if entered is None:  # a person, not a worker
        return 0
    same_hub = before.get("hub") == entered.hub
    owner = _claim(entered, chosen.whose, before.get("owner", "") if same_hub else "")
    choices = {name: getattr(chosen, name) for name in REMEMBERED}
    settings.write_private(folder / CHOICES, json.dumps({**choices, "owner": owner, "hub": entered.hub}) + "\n")
    return _work(entered, folder, chosen, device, owner=owner, once=once, for_s=for_s, screen=not no_screen)


def _work(
    credential: Credential,
    folder: Path,
    chosen: settings.WorkerSettings,
    device: str,
    *,
    owner: str,
    once: bool,
    for_s: float | None,
    screen: bool,
) -> int:
    from potluck.client import Hub
    from potluck.protocol import Rules
    from potluck.worker.agent import Agent, AgentSettings
    from potluck.worker.jobs.house import House

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
        house=House(
            Rules(chosen.accept, chosen.whose, chosen.runtime, chosen.max_tasks),
            settings.parse_labels(chosen.labels),
            chosen.executor,
            owner,
        ),
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


def _is_for_worker(link: str) -> bool:
    from potluck.client import parse_link

    return role_of(parse_link(link).code) == "worker"


def _pairs(labels: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(settings.parse_labels(",".join(labels)).items())


def _ask_about_strangers() -> None:
    """Foreign code as a plain process may do all that its user may do: only after a yes."""
    import sys

    warning = (
        "With --runtime any, where no container runtime works, other people's jobs run here as plain processes: they can "
        "read and change everything that you can, your files and keys too."
    )
    if not sys.stdin.isatty():
        raise NotAllowed(f"{warning} Say that you want this with --yes, or leave --runtime away.")
    click.echo(warning, err=True)
    if not click.confirm("Do you want this?", default=False, err=True):
        raise NotAllowed("then join without --runtime any: jobs run here in containers, or not at all")


def _claim(credential: Credential, whose: str, before: str) -> str:
    """Make the person whose credential lies on this machine the worker's owner; their name at the hub.

    Without one the worker belongs to nobody. That is no obstacle, unless it is to run its owner's jobs only.
    """
    from potluck.client import Hub

    if before:
        return before
    profile = settings.load_profile()
    token = profile.token if profile is not None and profile.address == credential.hub else ""
    if not token and whose == "me":
        token = settings.find_hub(credential.hub).token  # a hub's own machine has its admin's
    if not token or settings.check_token(token) not in ("member", "admin"):
        if whose == "hub":
            return ""
        raise NotFound(
            "--from me: nobody on this machine is a member of this hub, so whose jobs would that be? Open a member's link "
            "first (potluck join LINK, from `potluck invite --role member`), then join the worker again"
        )
    try:
        with Hub(credential.hub, token, credential.fingerprint) as hub:
            return hub.own(credential.token).owner
    except PotluckError as error:
        if whose == "me":
            raise
        output.note(f"This worker belongs to nobody: {clean(error)}")
        return ""


def _remembered(folder: Path) -> dict[str, Any]:
    """What its owner chose when this worker started last: it holds until they choose something else."""
    try:
        found = json.loads((folder / CHOICES).read_text(encoding="utf-8"))
        known = {f.name: f.metadata["read"] for f in fields(settings.WorkerSettings)}
        more = {name: str(found.get(name, "")) for name in ("owner", "hub")}
        return {**more, **{name: known[name](str(found[name])) for name in REMEMBERED if name in found}}
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
