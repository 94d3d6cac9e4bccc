"""Which runs are there, how do they stand, why, and what can be changed?"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import click

from potluck.cli import output
from potluck.cli.follow import Connect, exit_code, follow
from potluck.cli.options import choose_run, find_run, hub_options, json_option, key_values, timeout_option
from potluck.errors import BadInput, NotFound
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.protocol import Contribution, RunView

RUN = click.argument("ref", metavar="RUN")
RUN_HELP = "RUN is an id or its beginning, a name, or `last`."


@click.command("ps")
@json_option
@hub_options
def ps_command(connect: Connect, as_json: bool) -> None:
    """List the runs."""
    with connect() as hub:
        runs = hub.runs()
    if as_json:
        output.print_json(runs)
        return
    if not runs:
        output.say("No runs yet. Start one: potluck train RECIPE --data SOURCE")
        return
    now = output.utc_now()
    columns = (
        "RUN",
        "ID",
        "RECIPE",
        "DATA",
        "STATE",
        "DONE",
        "SAMPLES",
        "PER S",
        "WORKERS",
        "LOSSES",
        "STARTED",
    )
    rows = [
        (
            run.name,
            run.id,
            run.recipe.name,
            run.dataset.name,
            run.state,
            output.share(far) if (far := output.fraction(run)) is not None else "–",
            f"{run.fates.applied + run.fates.late:,}",
            output.number(run.samples_per_s),
            run.active_workers,
            output.figures(run.losses),
            output.ago(run.started_at or run.created_at, now),
        )
        for run in sorted(runs, key=lambda run: run.created_at)
    ]
    output.print_table(columns, rows, right=("DONE", "SAMPLES", "PER S", "WORKERS"))


@click.command("show", epilog=RUN_HELP)
@RUN
@click.option("--follow", "-f", "live", is_flag=True, help="Watch until the run has ended.")
@timeout_option("With --follow: stop watching")
@json_option
@hub_options
def show_command(connect: Connect, ref: str, live: bool, timeout: float | None, as_json: bool) -> int:
    """Show one run: progress, losses, who works on it."""
    if timeout is not None and not live:
        raise BadInput("--timeout is for --follow: without it there is nothing to wait for")
    with connect() as hub:
        run = find_run(hub, ref)
        if live:
            run = follow(hub, run, timeout_s=timeout, quiet=as_json)
        contributions = hub.contributions(run.id)
    if as_json:
        import msgspec

        output.print_json({**msgspec.to_builtins(run), "contributions": msgspec.to_builtins(contributions)})
    else:
        print_run(run, contributions)
    return exit_code(run) if live else 0


def print_run(run: RunView, contributions: list[Contribution]) -> None:
    output.say(f"{clean(run.name)} ({run.id}): {run.recipe.name} on {clean(run.dataset.name)}")
    rows = [
        *output.run_rows(run),
        ("fates", output.fates_sentence(run.fates)),
        ("traffic", f"{output.size(run.bytes_up)} to the hub, {output.size(run.bytes_down)} from it"),
        ("recipe", " ".join(f"{key}={value}" for key, value in run.recipe.settings.items()) or "as it comes"),
        ("settings", " ".join(f"{key}={value}" for key, value in run.settings.items()) or "as they come"),
    ]
    width = max(len(heading) for heading, _ in rows)
    for heading, text in rows:
        output.say(f"  {heading.ljust(width)}  {clean(text)}")
    if contributions:
        output.say()
        print_contributions(contributions)


def print_contributions(contributions: list[Contribution]) -> None:
    columns = (
        "WORKER",
        "DEVICE",
        "SHARE",
        "UNITS",
        "APPLIED",
        "LATE",
        "SUPERSEDED",
        "REJECTED",
        "LOST",
        "PER S",
        "UP",
    )
    rows = [
        (
            c.worker,
            c.device,
            output.share(c.share),
            c.units,
            f"{c.fates.applied:,}",
            f"{c.fates.late:,}",
            f"{c.fates.superseded:,}",
            f"{c.fates.rejected:,}",
            f"{c.fates.lost:,}",
            output.number(c.samples_per_s),
            output.size(c.bytes_up),
        )
        for c in sorted(contributions, key=lambda c: -c.fates.applied)
    ]
    output.print_table(columns, rows, right=columns[2:])


@click.command("why", epilog="ID is a run's, task's, lease's or worker's id, a run's name, or `last`.")
@click.argument("subject", metavar="ID")
@json_option
@hub_options
def why_command(connect: Connect, subject: str, as_json: bool) -> None:
    """Explain why a run, task or worker is in the state it is in."""
    with connect() as hub:
        with suppress(NotFound, BadInput):  # not a run's: the hub knows the other ids
            subject = choose_run(hub.runs(), subject).id
        answer = hub.why(subject)
    if as_json:
        output.print_json(answer)
        return
    output.say(clean(answer.text, keep="\n"))
    if answer.advice:
        output.say(clean(answer.advice, keep="\n"))


@click.command("set", epilog=RUN_HELP)
@RUN
@click.argument("pairs", metavar="KEY=VALUE...", nargs=-1, required=True)
@json_option
@hub_options
def set_command(connect: Connect, ref: str, pairs: tuple[str, ...], as_json: bool) -> None:
    """Change settings of a run while it trains."""
    from potluck.domain.pool import PoolSettings

    changes = key_values(pairs)
    PoolSettings().changed(changes)  # a slip is told here, before anything is sent
    with connect() as hub:
        run = hub.set(find_run(hub, ref).id, changes)
    if as_json:
        output.print_json(run)
    else:
        output.say(f"{run.name}: " + ", ".join(f"{key} is now {run.settings.get(key)}" for key in changes) + ".")


@click.command("pause", epilog=RUN_HELP)
@RUN
@json_option
@hub_options
def pause_command(connect: Connect, ref: str, as_json: bool) -> None:
    """Pause a run: no new units, nothing is lost."""
    with connect() as hub:
        run = hub.pause(find_run(hub, ref).id)
    _tell(run, as_json, f"Go on with `potluck resume {run.name}`.")


@click.command("resume", epilog=RUN_HELP)
@RUN
@json_option
@hub_options
def resume_command(connect: Connect, ref: str, as_json: bool) -> None:
    """Go on with a paused run."""
    with connect() as hub:
        run = hub.resume(find_run(hub, ref).id)
    _tell(run, as_json, f"Watch it with `potluck show {run.name} --follow`.")


@click.command("stop", epilog=RUN_HELP)
@RUN
@click.option("--wait", is_flag=True, help="Return when the last merge is done.")
@timeout_option("With --wait: give up")
@json_option
@hub_options
def stop_command(connect: Connect, ref: str, wait: bool, timeout: float | None, as_json: bool) -> None:
    """End a run: what was handed in is merged first."""
    with connect() as hub:
        run = hub.stop(find_run(hub, ref).id)
        if wait or timeout is not None:
            run = follow(hub, run, timeout_s=timeout, quiet=True)
    _tell(run, as_json, f"Take the model with `potluck export {run.name} DIR`.")


def _tell(run: RunView, as_json: bool, next_step: str) -> None:
    if as_json:
        output.print_json(run)
    else:
        reason = f" ({clean(run.reason)})" if run.reason else ""
        output.say(f"{clean(run.name)} is {run.state}{reason}. {next_step}")
