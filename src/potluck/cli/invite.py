"""How do machines and people get in?"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.options import DURATION, hub_options, json_option


@click.command("invite")
@click.option(
    "--role",
    type=click.Choice(["worker", "member", "viewer"]),
    default="worker",
    show_default=True,
    help="worker: a machine that trains; member: a person who starts runs; viewer: one who only looks.",
)
@click.option("--uses", type=click.IntRange(min=1), default=30, show_default=True, help="How often the link works.")
@click.option("--ttl", type=DURATION, default="3h", show_default=True, metavar="TIME", help="How long the link works.")
@click.option("--name", default="", metavar="NAME", help="The name its users get (with a number, if several).")
@click.option("--trusted", is_flag=True, help="A worker that may also merge and taste: a machine of your own.")
@json_option
@hub_options
def invite_command(connect: Connect, role: str, uses: int, ttl: float, name: str, trusted: bool, as_json: bool) -> None:
    """Print one line that lets machines or people join."""
    from potluck.protocol import InviteRequest

    request = InviteRequest(role=role, uses=uses, ttl_s=ttl, name=name, trusted=trusted)
    with connect() as hub:
        answer = hub.invite(request)
    if as_json:
        output.print_json(answer)
        return
    output.say(f'potluck join "{answer.url}"')  # double quotes: every shell, Windows' too, takes them
    left = (output.when(answer.expires_at) - output.utc_now()).total_seconds()
    times = "once" if answer.uses == 1 else f"{answer.uses} times"
    output.note(f"For a {answer.role}; works {times}, for {output.span(left)}.")
    output.note(f"To take it back, with all who joined by it: potluck invites revoke {answer.id}")
    if output.is_terminal():
        import segno

        segno.make(answer.url, error="l").terminal(compact=True)


@click.group("invites", invoke_without_command=True)
@click.option("--all", "everything", is_flag=True, help="Also those that expired, were used up or revoked.")
@json_option
@hub_options
@click.pass_context
def invites_command(ctx: click.Context, connect: Connect, everything: bool, as_json: bool) -> None:
    """List the invitations that are open, or revoke one."""
    ctx.obj = connect
    if ctx.invoked_subcommand:
        return
    with connect() as hub:
        invites = [invite for invite in hub.invites() if everything or invite["usable"]]
    if as_json:
        output.print_json(invites)
        return
    if not invites:
        output.say("No invitation is open. `potluck invite` makes one.")
        return
    now = output.utc_now()
    rows = [
        (
            invite["id"],
            invite["role"] + (" (trusted)" if invite["trusted"] else ""),
            invite["name"] or "–",
            f"{invite['used']} of {invite['uses']}",
            _standing(invite, now),
        )
        for invite in invites
    ]
    output.print_table(("ID", "ROLE", "NAME", "USED", "STATE"), rows, right=("USED",))


def _standing(invite: dict[str, Any], now: datetime) -> str:
    if invite["usable"]:
        return f"open for {output.span((output.when(invite['expires_at']) - now).total_seconds())}"
    if invite["revoked_at"]:
        return f"revoked {output.ago(invite['revoked_at'], now)}"
    return "used up" if invite["used"] >= invite["uses"] else f"expired {output.ago(invite['expires_at'], now)}"


@invites_command.command("revoke")
@click.argument("invite_id", metavar="ID")
@click.pass_obj
def revoke(connect: Connect, invite_id: str) -> None:
    """Close an invitation, and shut out everybody who joined by it."""
    with connect() as hub:
        hub.revoke_invite(invite_id)
    output.say(f"{invite_id} is closed, and who joined by it is shut out. `potluck invite` makes a fresh link.")
