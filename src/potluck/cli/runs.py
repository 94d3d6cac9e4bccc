"""Which runs and jobs are there, how do they stand, why, and what can be changed?"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING

import click

from potluck.cli import output
from potluck.cli.follow import Connect, exit_code, follow
from potluck.cli.gang import gang_json, machines_word, show_gang, speed_word, stop_gang, why_gang
from potluck.cli.jobs import ended_sentence, job_json, print_job
from potluck.cli.options import (
    find_either,
    find_run,
    gangs_of,
    hub_options,
    json_option,
    key_values,
    timeout_option,
)
from potluck.cli.watch import exit_code as job_exit_code
from potluck.cli.watch import wait_until_gone, watch_states
from potluck.errors import BadInput, NotFound
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import Contribution, GangView, JobView, RunView

RUN = click.argument("ref", metavar="RUN")
RUN_HELP = "RUN is an id or its beginning, a name, or `last`."


@click.command("ps")
@json_option
@hub_options
def ps_command(connect: Connect, as_json: bool) -> None:
    """List the runs of the pool, the jobs and the gangs."""
    with connect() as hub:
        runs, jobs, gangs = hub.runs(), hub.jobs(), gangs_of(hub, 100)
    if as_json:
        import msgspec

        output.print_json([*msgspec.to_builtins(runs), *map(job_json, jobs), *map(gang_json, gangs)])
        return
    if not runs and not jobs and not gangs:
        output.say("Nothing yet. Start one: potluck train RECIPE --data SOURCE, or potluck run -- COMMAND")
        return
    now = output.utc_now()
    listed = {gang.id for gang in gangs}  # their members are told in one line
    rows = [(run.created_at, _run_row(run, now)) for run in runs]
    rows += [(job.created_at, _job_row(job, now)) for job in jobs if job.gang not in listed]
    rows += [(gang.created_at, _gang_row(gang, now)) for gang in gangs]
    rows.sort(key=lambda row: output.when(row[0]))
    output.print_table(("RUN", "ID", "WHAT", "STATE", "WHERE", "SO FAR", "STARTED"), [row for _, row in rows])


def _run_row(run: RunView, now: datetime) -> tuple[str, ...]:
    far = output.fraction(run)
    done = f"{run.fates.applied + run.fates.late:,} samples, {output.number(run.samples_per_s)}/s"
    return (
        run.name,
        run.id,
        f"{run.recipe.name} on {run.dataset.name}",
        run.state,
        f"{run.active_workers} workers",
        (f"{output.share(far)}, " if far is not None else "") + f"{done}, {output.figures(run.losses)}",
        output.ago(run.started_at or run.created_at, now),
    )


def _job_row(job: JobView, now: datetime) -> tuple[str, ...]:
    if job.started_at:
        ended = output.when(job.ended_at) if job.ended_at else now
        far = output.span((ended - output.when(job.started_at)).total_seconds())
    else:
        far = "–"
    exited = f" (exit {job.exit_code})" if job.exit_code else ""
    return (
        job.name,
        job.id,
        f"job of {job.owner}" + (f": {job.needs}" if job.needs else ""),
        job.state + exited,
        job.worker or "–",
        far + (f", {job.reason}" if job.reason and job.state not in ("running", "succeeded") else ""),
        output.ago(job.started_at or job.created_at, now),
    )


def _gang_row(gang: GangView, now: datetime) -> tuple[str, ...]:
    where = ", ".join(member.worker for member in gang.members if member.worker)
    speed = f"{speed_word(gang)} samples/s" if speed_word(gang) != "–" else ""
    return (
        gang.name,
        gang.id,
        f"gang of {gang.owner}: {machines_word(gang)} machines",
        gang.state + (f" (exit {gang.exit_code})" if gang.exit_code else ""),
        where or "–",
        ", ".join(filter(None, [speed, gang.reason if gang.state not in ("running", "succeeded") else ""])) or "–",
        output.ago(gang.started_at or gang.created_at, now),
    )


@click.command("show", epilog=RUN_HELP)
@RUN
@click.option("--follow", "-f", "live", is_flag=True, help="Watch until it has ended; a job: with its own exit code.")
@timeout_option("With --follow: stop watching")
@json_option
@hub_options
def show_command(connect: Connect, ref: str, live: bool, timeout: float | None, as_json: bool) -> int:
    """Show one run, job or gang: how far it is, where, and what came of it."""
    if timeout is not None and not live:
        raise BadInput("--timeout is for --follow: without it there is nothing to wait for")
    from potluck.protocol import GangView, JobView

    with connect() as hub:
        run = find_either(hub, ref)
        if isinstance(run, JobView):
            return _show_job(hub, run, live=live, timeout_s=timeout, as_json=as_json)
        if isinstance(run, GangView):
            return show_gang(hub, run, follows=live, timeout_s=timeout, as_json=as_json)
        if live:
            run = follow(hub, run, timeout_s=timeout, quiet=as_json)
        contributions = hub.contributions(run.id)
    if as_json:
        import msgspec

        output.print_json({**msgspec.to_builtins(run), "contributions": msgspec.to_builtins(contributions)})
    else:
        print_run(run, contributions)
    return exit_code(run) if live else 0


def _show_job(hub: Hub, job: JobView, *, live: bool, timeout_s: float | None, as_json: bool) -> int:
    if live:
        job = watch_states(hub, job, timeout_s=timeout_s)
    if as_json:
        output.print_json(job_json(job))
    else:
        print_job(hub, job)
    return job_exit_code(job) if live else 0


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


@click.command("why", epilog="ID is a run's, job's, gang's, task's, lease's or worker's id, a name, or `last`.")
@click.argument("subject", metavar="ID")
@json_option
@hub_options
def why_command(connect: Connect, subject: str, as_json: bool) -> None:
    """Explain why a run, job, gang, task or worker is in the state it is in."""
    from potluck.protocol import GangView

    with connect() as hub:
        found = None
        with suppress(NotFound, BadInput):  # not a run's or job's: the hub knows the other ids
            found = find_either(hub, subject)
        if isinstance(found, GangView):
            answer = why_gang(hub, found)
        else:
            answer = hub.why(found.id if found is not None else subject)
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
@click.option("--wait", is_flag=True, help="Return when the last merge is done, or nothing of the job runs any more.")
@timeout_option("With --wait: give up")
@json_option
@hub_options
def stop_command(connect: Connect, ref: str, wait: bool, timeout: float | None, as_json: bool) -> None:
    """End a run, a job or a gang: what was handed in is merged, a job gets time for a checkpoint."""
    from potluck.protocol import GangView, JobView

    with connect() as hub:
        run = find_either(hub, ref)
        if isinstance(run, GangView):
            stop_gang(hub, run, waits=wait or timeout is not None, timeout_s=timeout, as_json=as_json)
            return
        if isinstance(run, JobView):
            job = hub.stop_job(run.id)
            if wait or timeout is not None:
                job = wait_until_gone(hub, job, timeout_s=timeout)
            if as_json:
                output.print_json(job_json(job))
            else:
                output.say(ended_sentence(job))
            return
        run = hub.stop(run.id)
        if wait or timeout is not None:
            run = follow(hub, run, timeout_s=timeout, quiet=True)
    _tell(run, as_json, f"Take the model with `potluck export {run.name} DIR`.")


def _tell(run: RunView, as_json: bool, next_step: str) -> None:
    if as_json:
        output.print_json(run)
    else:
        reason = f" ({clean(run.reason)})" if run.reason else ""
        output.say(f"{clean(run.name)} is {run.state}{reason}. {next_step}")
