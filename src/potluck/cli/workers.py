"""Which machines work here, what do they take, and how is one shut out?"""

from __future__ import annotations

import click

from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.options import find_worker, hub_options, json_option, text_pairs
from potluck.errors import BadInput
from potluck.telemetry import clean


@click.group("workers", invoke_without_command=True)
@json_option
@hub_options
@click.pass_context
def workers_command(ctx: click.Context, connect: Connect, as_json: bool) -> None:
    """List the workers; drain, label or revoke one."""
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
    columns = ("WORKER", "ID", "STATE", "DEVICE", "SHARE", "PER S", "UNITS", "APPLIED", "SEEN", "DOING", "JOBS")
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
            ", ".join(worker.jobs) or ("drained" if worker.draining else "–"),
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
        worker = find_worker(hub, ref)
        hub.revoke_worker(worker.id)
    output.say(f"{clean(worker.name)} is shut out. To let it back in, invite it again: potluck invite")


@workers_command.command("drain")
@click.argument("ref", metavar="ID")
@click.option("--reason", default="", metavar="TEXT", help="What others see, like `moves to another room`.")
@click.pass_obj
def drain(connect: Connect, ref: str, reason: str) -> None:
    """Give a worker no new jobs; what runs there may end. ID may also be its name."""
    with connect() as hub:
        worker = hub.drain(find_worker(hub, ref).id, reason)
    still = f" Still there: {', '.join(map(clean, worker.jobs))}." if worker.jobs else " No job runs there."
    output.say(f"{clean(worker.name)} takes no new jobs.{still} Back again: potluck workers undrain {worker.name}")


@workers_command.command("undrain")
@click.argument("ref", metavar="ID")
@click.pass_obj
def undrain(connect: Connect, ref: str) -> None:
    """Give a worker jobs again. ID may also be its name."""
    with connect() as hub:
        worker = hub.undrain(find_worker(hub, ref).id)
    output.say(f"{clean(worker.name)} takes jobs again.")


@workers_command.command("label")
@click.argument("ref", metavar="ID")
@click.argument("pairs", metavar="[K=V...]", nargs=-1)
@click.option("--clear", is_flag=True, help="Take away all that were given here.")
@click.pass_obj
def label(connect: Connect, ref: str, pairs: tuple[str, ...], clear: bool) -> None:
    """Label a worker, for `potluck run --on K=V`: these replace what was given before, not what its owner says."""
    if bool(pairs) == clear:
        raise BadInput(f"which labels? `potluck workers label {ref} room=B12 fast=yes`, or --clear")
    labels = text_pairs(pairs, "room=B12")
    with connect() as hub:
        worker = hub.label(find_worker(hub, ref).id, labels)
    words = ", ".join(f"{clean(key)}={clean(value)}" for key, value in sorted(worker.labels.items()))
    output.say(f"{clean(worker.name)} has {'the labels ' + words if words else 'no labels'}.")
