"""Which machines work here, and how is one shut out?"""

from __future__ import annotations

import click

from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.options import hub_options, json_option
from potluck.errors import BadInput, NotFound
from potluck.telemetry import clean


@click.group("workers", invoke_without_command=True)
@json_option
@hub_options
@click.pass_context
def workers_command(ctx: click.Context, connect: Connect, as_json: bool) -> None:
    """List the workers, or revoke one."""
    ctx.obj = connect
    if ctx.invoked_subcommand:
        return
    with connect() as hub:
        workers = hub.workers()
    if as_json:
        output.print_json(workers)
        return
    if not workers:
        output.say("No workers yet. `potluck invite` prints the line for a machine to join with.")
        return
    now = output.utc_now()
    columns = ("WORKER", "ID", "STATE", "DEVICE", "SHARE", "PER S", "UNITS", "APPLIED", "SEEN", "DOING")
    rows = [
        (
            worker.name + (" (trusted)" if worker.trusted else ""),
            worker.id,
            worker.state,
            worker.device,
            output.share(worker.share),
            output.number(worker.samples_per_s),
            worker.units,
            f"{worker.fates.applied + worker.fates.late:,}",
            output.ago(worker.last_seen, now),
            worker.doing or "–",
        )
        for worker in sorted(workers, key=lambda worker: worker.joined_at)
    ]
    output.print_table(columns, rows, right=("SHARE", "PER S", "UNITS", "APPLIED"))


@workers_command.command("revoke")
@click.argument("ref", metavar="ID")
@click.pass_obj
def revoke(connect: Connect, ref: str) -> None:
    """Shut a worker out: its credential ends now, its leases go back. ID may also be its name."""
    with connect() as hub:
        found = [w for w in hub.workers() if ref in (w.id, w.name) or (ref and w.id.startswith(ref))]
        if not found:
            raise NotFound(f"no worker `{ref}`: `potluck workers` lists them")
        if len(found) > 1:
            names = ", ".join(f"{worker.name} ({worker.id})" for worker in found[:6])
            raise BadInput(f"`{ref}` names {len(found)} workers: {names}. Write the whole id.")
        hub.revoke_worker(found[0].id)
    output.say(f"{clean(found[0].name)} is shut out. To let it back in, invite it again: potluck invite")
