"""Which gangs are there, how do their members stand, what do they print, and how is one ended?"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.gangprofile import profile_command
from potluck.cli.gangwatch import (
    GangWatch,
    Lanes,
    come_back,
    gang_exit_code,
    gang_gone,
    see_to_the_end,
    watch_gang,
)
from potluck.cli.jobs import clock, print_events, shell_line
from potluck.cli.logs import last_lines, pieces, print_log
from potluck.cli.options import find_gang, hub_options, json_option, timeout_option
from potluck.cli.watch import newest_attempt
from potluck.domain.job import ENDED
from potluck.errors import BadInput, NotFound
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import GangView, JobView, MemberView, Why

GANG_HELP = "GANG is an id or its beginning, a name, or `last`."
GANG = click.argument("ref", metavar="GANG")


@click.group("gang")
def gang_command() -> None:
    """Train one model on several machines at once: list, watch, stop and profile gangs."""


gang_command.add_command(profile_command)


# --- ls -------------------------------------------------------------------------------------------------------------


@gang_command.command("ls")
@click.option("--open", "only_open", is_flag=True, help="Only those that have not ended.")
@json_option
@hub_options
def ls(connect: Connect, only_open: bool, as_json: bool) -> None:
    """List the gangs, the newest last."""
    with connect() as hub:
        gangs = hub.gangs(state="open" if only_open else "all")
    if as_json:
        output.print_json([gang_json(gang) for gang in gangs])
        return
    if not gangs:
        output.say("No gangs. Start one: potluck run --gang 2..8 -- python train.py")
        return
    now = output.utc_now()
    rows = [
        (
            gang.name,
            gang.id,
            gang.owner,
            gang.state,
            machines_word(gang),
            speed_word(gang),
            output.ago(gang.started_at or gang.created_at, now),
            gang.reason,
        )
        for gang in sorted(gangs, key=lambda gang: output.when(gang.created_at))
    ]
    columns = ("GANG", "ID", "OF", "STATE", "MACHINES", "PER S", "STARTED", "REASON")
    output.print_table(columns, rows, right=("PER S",))


def gang_json(gang: GangView) -> dict[str, Any]:
    """As the API says it, with the `mode` that tells it from a run of the pool and a job."""
    import msgspec

    return {"mode": "gang", **msgspec.to_builtins(gang)}


def machines_word(gang: GangView) -> str:
    """`3 of 2..8`: how many are there, of how many were asked for."""
    wanted = f"{gang.least}" if gang.least == gang.most else f"{gang.least}..{gang.most}"
    return wanted if gang.state in ENDED else f"{len(live(gang))} of {wanted}"


def live(gang: GangView) -> list[MemberView]:
    return [member for member in gang.members if member.state in ("placed", "preparing", "running")]


def speed_word(gang: GangView) -> str:
    now = sum(member.samples_per_s for member in live(gang))
    return output.number(now) if now else "–"


# --- show -----------------------------------------------------------------------------------------------------------


@gang_command.command("show", epilog=GANG_HELP)
@GANG
@click.option("--follow", "-f", "follows", is_flag=True, help="Watch until it has ended; with its own exit code.")
@timeout_option("With --follow: stop watching")
@json_option
@hub_options
def show(connect: Connect, ref: str, follows: bool, timeout: float | None, as_json: bool) -> int:
    """Show one gang: its members, their shares and speeds, and what came of it."""
    if timeout is not None and not follows:
        raise BadInput("--timeout is for --follow: without it there is nothing to wait for")
    with connect() as hub:
        return show_gang(hub, find_gang(hub, ref), follows=follows, timeout_s=timeout, as_json=as_json)


def show_gang(hub: Hub, gang: GangView, *, follows: bool, timeout_s: float | None, as_json: bool) -> int:
    if follows:
        lanes = Lanes()
        gang = see_to_the_end(GangWatch(hub, gang, show=None, say=lanes.note, timeout_s=timeout_s), lanes)
    if as_json:
        output.print_json(gang_json(gang))
    else:
        print_gang(hub, gang)
    return gang_exit_code(hub, gang) if follows else 0


def print_gang(hub: Hub, gang: GangView) -> None:
    output.say(f"{clean(gang.name)} ({gang.id}): a gang of {clean(gang.owner)}")
    rows = gang_rows(gang)
    width = max(len(heading) for heading, _ in rows)
    for heading, text in rows:
        output.say(f"  {heading.ljust(width)}  {clean(text)}")
    output.say()
    print_members(gang.members)
    if gang.mine:
        print_events(hub, gang.id)


def gang_rows(gang: GangView) -> list[tuple[str, str]]:
    """What there is to say of a gang, as (heading, text)."""
    rows = [("state", gang.state + (f": {gang.reason}" if gang.reason else ""))]
    rows.append(("machines", machines_word(gang)))
    if gang.engine:
        rows.append(("engine", gang.engine + (f", meeting at {gang.host}" if gang.host else "")))
    if gang.spec is not None:
        rows.append(("command", shell_line(gang.spec.command)))
        if gang.spec.gang is not None and gang.spec.gang.batch:
            rows.append(("batch", f"{gang.spec.gang.batch}, shared out: {gang.spec.gang.policy}"))
    if speed := speed_sentence(gang):
        rows.append(("speed", speed))
    rows.append(("queued", clock(gang.created_at)))
    if gang.started_at:
        rows.append(("started", clock(gang.started_at)))
    if gang.ended_at:
        begun = output.when(gang.started_at or gang.created_at)
        rows.append(
            (
                "ended",
                f"{clock(gang.ended_at)}, after {output.span((output.when(gang.ended_at) - begun).total_seconds())}",
            )
        )
    rows.append(("output", f"potluck logs {gang.id}; artefacts: potluck pull {gang.id}"))
    return rows


def speed_sentence(gang: GangView) -> str:
    """`412 samples/s together, 96 % of the 429 that its members would do alone`."""
    together = sum(member.samples_per_s for member in live(gang))
    alone = [member.alone_per_s for member in live(gang)]
    if not together:
        return ""
    said = f"{output.number(together)} samples/s together"
    if not all(alone):
        return said
    return f"{said}, {together / sum(alone):.0%} of the {output.number(sum(alone))} that its members would do alone"


def print_members(members: Iterable[MemberView]) -> None:
    rows = [
        (
            member.member,
            member.job,
            member.state,
            member.worker or "–",
            member.address or "–",
            member.rank if member.rank >= 0 else "–",
            member.share or "–",
            output.number(member.samples_per_s) if member.samples_per_s else "–",
            output.number(member.alone_per_s) if member.alone_per_s else "–",
            member.reason,
        )
        for member in members
    ]
    columns = ("MEMBER", "JOB", "STATE", "WORKER", "ADDRESS", "RANK", "SHARE", "PER S", "ALONE", "REASON")
    output.print_table(columns, rows, right=("MEMBER", "RANK", "SHARE", "PER S", "ALONE"))


def why_gang(hub: Hub, gang: GangView) -> Why:
    """Where it stands, what each member that is not there waits for, and what would help the first of them."""
    from potluck.protocol import Why

    lines = [f"{gang.id} is {gang.state}" + (f": {gang.reason}" if gang.reason else "")]
    waiting = [member for member in gang.members if member.state == "queued" and gang.state not in ENDED]
    reasons: dict[str, list[str]] = {}
    for member in waiting:
        if member.reason != gang.reason:
            reasons.setdefault(member.reason or "it waits for its turn", []).append(str(member.member))
    for reason, numbers in reasons.items():
        lines.append(f"member {', '.join(numbers)} waits: {reason}")
    advice = ""
    if waiting:
        with suppress(NotFound):
            advice = hub.why(waiting[0].job).advice
    return Why(gang.id, "\n".join(lines), advice)


# --- logs -----------------------------------------------------------------------------------------------------------


@gang_command.command("logs", epilog=GANG_HELP)
@GANG
@click.option("--follow", "-f", "follows", is_flag=True, help="Go on until the gang has ended, with its exit code.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Begin with the last N lines of each member.")
@click.option("--member", type=click.IntRange(min=1), metavar="K", help="Only the Kth member, without names in front.")
@timeout_option("With --follow: stop watching")
@hub_options
def logs(connect: Connect, ref: str, follows: bool, tail: int | None, member: int | None, timeout: float | None) -> int:
    """Print what the members printed, each line with its machine in front."""
    if timeout is not None and not follows:
        raise BadInput("--timeout is for --follow: without it there is nothing to wait for")
    with connect() as hub:
        gang = find_gang(hub, ref)
        if member is None:
            return gang_logs(hub, gang, tail=tail, follows=follows, timeout_s=timeout)
        job = member_job(hub, gang, member)
        first = max(1, newest_attempt(job))
        return print_log(hub, job, first, 0, tail=tail, live=follows, one=False, timeout_s=timeout)


def member_job(hub: Hub, gang: GangView, number: int) -> JobView:
    found = next((member for member in gang.members if member.member == number), None)
    if found is None:
        raise NotFound(f"{gang.id} has the members 1 to {len(gang.members)}, and no member {number}")
    return hub.job(found.job)


def gang_logs(hub: Hub, gang: GangView, *, tail: int | None, follows: bool, timeout_s: float | None) -> int:
    """The newest attempt of each member, one after the other; with `follows` as it happens, all together."""
    lanes = Lanes()
    offsets: dict[str, tuple[int, int]] = {}
    try:
        for member in gang.members:
            job = hub.job(member.job)
            newest = newest_attempt(job)
            if not newest:
                continue
            name = member.worker or member.job
            if tail is not None:
                text, end = last_lines(hub, job, newest, tail)
                lanes.output(name, text, last=not follows)
                offsets[member.job] = (newest, end)
            elif follows:
                offsets[member.job] = (newest, 0)
            else:
                for piece in pieces(hub, job, newest, 0):
                    lanes.output(name, piece.text, last=piece.over)
        if follows:
            watch = GangWatch(hub, gang, show=lanes.output, say=lanes.note, timeout_s=timeout_s, offsets=offsets)
            return gang_exit_code(hub, see_to_the_end(watch, lanes))
        if not any(member.worker for member in gang.members):
            lanes.note(f"{gang.id} is {gang.state} and has not begun: `potluck why {gang.id}` tells what it waits for.")
        return 0
    finally:
        lanes.end()


# --- stop, top ------------------------------------------------------------------------------------------------------


@gang_command.command("stop", epilog=GANG_HELP)
@GANG
@click.option("--wait", is_flag=True, help="Return when nothing of it runs any more.")
@timeout_option("With --wait: give up")
@json_option
@hub_options
def stop(connect: Connect, ref: str, wait: bool, timeout: float | None, as_json: bool) -> None:
    """End a gang: each member gets time for a checkpoint."""
    with connect() as hub:
        stop_gang(hub, find_gang(hub, ref), waits=wait or timeout is not None, timeout_s=timeout, as_json=as_json)


def stop_gang(hub: Hub, gang: GangView, *, waits: bool, timeout_s: float | None, as_json: bool) -> None:
    gang = hub.stop_gang(gang.id)
    if waits:
        gang = gang_gone(hub, gang, timeout_s=timeout_s)
    if as_json:
        output.print_json(gang_json(gang))
        return
    where = [clean(member.worker) for member in gang.members if member.worker]
    ending = f" Its members on {', '.join(where)} are being ended." if where and not waits else ""
    output.say(f"{clean(gang.id)} is {gang.state}.{ending}")


@gang_command.command("top", epilog=GANG_HELP)
@click.argument("ref", metavar="[GANG]", default="last")
@click.option("--once", is_flag=True, help="Print it once and leave, for scripts.")
@timeout_option("Leave")
@hub_options
def top(connect: Connect, ref: str, once: bool, timeout: float | None) -> None:
    """Watch a gang: its members as lanes, with their shares, times and speeds."""
    from potluck.cli import gangview

    if once and timeout is not None:
        raise BadInput("--once leaves at once: there is nothing that --timeout could end")
    with connect() as hub:
        gangview.show(hub, find_gang(hub, ref).id, once=once, timeout_s=timeout)


# --- for `potluck run` ----------------------------------------------------------------------------------------------


def follow_or_leave(hub: Hub, gang: GangView, *, follows: bool, timeout_s: float | None, as_json: bool) -> int:
    """What `potluck run --gang` does with the gang that it has just submitted; the exit code."""
    if follows:
        gang = watch_gang(hub, gang, timeout_s=timeout_s, quiet=as_json)
    if as_json:
        output.print_json(gang_json(gang))
    elif follows:
        output.note(f"What its members left: potluck pull {clean(gang.id)}")
    else:
        output.say(f"{clean(gang.id)}: {gang.state}" + (f": {clean(gang.reason)}" if gang.reason else ""))
        output.note(come_back(gang))
    return gang_exit_code(hub, gang) if follows else 0
