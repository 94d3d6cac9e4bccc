"""How is a job told in the terminal, started again, and moved in the queue?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.options import find_job, hub_options, json_option
from potluck.cli.watch import signal_number
from potluck.domain.job import ENDED
from potluck.errors import BadInput
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import AttemptView, JobView, Outlook

JOB_HELP = "JOB is an id or its beginning, a name, or `last`."
MOST_EVENTS = 30
MOST_FILES = 12  # of the artefacts that `show` lists


def job_json(job: JobView) -> dict[str, Any]:
    """As the API says it, with the `mode` that tells it from a run of the pool."""
    import msgspec

    return {"mode": "job", **msgspec.to_builtins(job)}


# --- one job --------------------------------------------------------------------------------------------------------


def print_job(hub: Hub, job: JobView) -> None:
    output.say(f"{clean(job.name)} ({job.id}): a job of {clean(job.owner)}")
    rows = job_rows(job)
    width = max(len(heading) for heading, _ in rows)
    for heading, text in rows:
        output.say(f"  {heading.ljust(width)}  {clean(text)}")
    if job.attempts:
        output.say()
        print_attempts(job.attempts)
    if job.mine:
        print_events(hub, job.id)
    if any(attempt.outputs for attempt in job.attempts):
        output.say()
        print_artefacts(hub, job)


def job_rows(job: JobView) -> list[tuple[str, str]]:
    """What there is to say of a job, as (heading, text)."""
    rows = [("state", job.state + (f": {job.reason}" if job.reason else ""))]
    last = job.attempts[-1] if job.attempts else None
    if job.spec is not None:
        rows.append(("command", shell_line(job.spec.command)))
    rows.append(("asks for", job.needs or "nothing in particular"))
    if job.worker:
        rows.append(("where", job.worker + (f", in {last.executor}" if last is not None and last.executor else "")))
    rows.append(("queued", clock(job.created_at)))
    if last is not None:
        rows.append(("placed", clock(last.placed_at)))
    if job.started_at:
        rows.append(("started", clock(job.started_at)))
    if job.ended_at:
        rows.append(("ended", clock(job.ended_at) + how_long(job)))
    if job.retries_left and job.state not in ENDED:
        rows.append(("retries", f"{job.retries_left} left"))
    if last is not None and last.environment:
        rows.append(("environment", environment_sentence(last.environment)))
    if job.git is not None:
        dirty = ", with changes that were not committed" if job.git.dirty else ""
        rows.append(("git", f"{job.git.branch} {job.git.commit[:12]}".strip() + dirty))
    if last is not None and last.checkpoint is not None:
        rows.append(("checkpoint", "kept at the hub: another attempt goes on from it"))
    if last is not None and last.log_bytes:
        rows.append(("output", f"{output.size(last.log_bytes)}: potluck logs {job.id}"))
    return rows


def how_long(job: JobView) -> str:
    if not (job.started_at and job.ended_at):
        return ""
    return f", after {output.span((output.when(job.ended_at) - output.when(job.started_at)).total_seconds())}"


def clock(iso: str) -> str:
    return output.when(iso).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def shell_line(command: list[str]) -> str:
    """The command as somebody would type it."""
    import shlex

    return command[2] if command[:2] == ["/bin/sh", "-c"] and len(command) == 3 else shlex.join(command)


def environment_sentence(environment: dict[str, Any]) -> str:
    """`python 3.11.2, torch 2.13.0, 84 packages`: what really ran, as far as it is short."""
    told = {key: value for key, value in environment.items() if value not in ("", "none") and key != "hash"}
    words = [f"{key} {value}" for key, value in told.items() if isinstance(value, str | int | float)]
    words += [f"{len(value)} {key}" for key, value in environment.items() if isinstance(value, list | dict) and value]
    return ", ".join(words) or "–"


def exit_word(attempt: AttemptView) -> str:
    """`0`, `1`, `SIGKILL (137)`."""
    if attempt.signal:
        number = signal_number(attempt)
        return attempt.signal + (f" ({128 + number})" if number else "")
    return "–" if attempt.exit_code is None else str(attempt.exit_code)


def print_attempts(attempts: list[AttemptView]) -> None:
    rows = [
        (
            attempt.number,
            attempt.worker,
            attempt.state,
            clock(attempt.started_at)[11:] if attempt.started_at else "–",
            clock(attempt.ended_at)[11:] if attempt.ended_at else "–",
            exit_word(attempt),
            output.span(attempt.usage.wall_s) if attempt.usage.wall_s else "–",
            output.span(attempt.usage.cpu_s) if attempt.usage.cpu_s else "–",
            output.size(attempt.usage.max_memory_bytes) if attempt.usage.max_memory_bytes else "–",
            attempt.reason,
        )
        for attempt in attempts
    ]
    columns = ("ATTEMPT", "WORKER", "STATE", "STARTED", "ENDED", "EXIT", "TIME", "CPU", "MEMORY", "REASON")
    output.print_table(columns, rows, right=("ATTEMPT", "TIME", "CPU", "MEMORY"))


def print_events(hub: Hub, run_id: str) -> None:
    """Each change of its state: when, why, by whom."""
    events = [event for event in hub.events(run_id=run_id) if event.kind != "job.points"]
    if events:
        output.say()
        rows = [(clock(event.at), event.kind, event.text, event.actor) for event in events[-MOST_EVENTS:]]
        output.print_table(("AT", "WHAT", "WHY", "BY"), rows)


def print_artefacts(hub: Hub, job: JobView) -> None:
    tree = hub.tree(job.id, "outputs")
    output.say(f"{len(tree.files)} artefact(s), {output.size(tree.size_bytes)}: potluck pull {clean(job.id)}")
    for file in tree.files[:MOST_FILES]:
        output.say(f"  {clean(file.path)}  {output.size(file.blob.size_bytes)}  {file.blob.hash[:12]}")
    if len(tree.files) > MOST_FILES:
        output.say(f"  … and {len(tree.files) - MOST_FILES} more")
    for skipped in tree.skipped[:MOST_FILES]:
        output.say(f"  left out: {clean(skipped)}")


def ended_sentence(job: JobView) -> str:
    """What `stop` says: where it is being ended, or that there was nothing to end."""
    name, last = clean(job.id), job.attempts[-1] if job.attempts else None
    if job.state != "cancelled":
        return f"{name} is {job.state}" + (f": {clean(job.reason)}" if job.reason else "")
    if last is None or last.ended_at:
        return f"{name} is cancelled; nothing of it runs any more."
    grace = f", and SIGKILL if it needs longer than {output.span(min(job.spec.grace_s, 10.0))}" if job.spec else ""
    return f"{name} is cancelled. It is being ended on {clean(last.worker)}: SIGTERM now{grace}."


# --- again ----------------------------------------------------------------------------------------------------------


@click.command("retry", epilog=JOB_HELP)
@click.argument("ref", metavar="JOB")
@json_option
@hub_options
def retry_command(connect: Connect, ref: str, as_json: bool) -> None:
    """Queue a job again that has ended; it goes on from its newest checkpoint."""
    with connect() as hub:
        job = hub.retry_job(find_job(hub, ref).id)
    if as_json:
        output.print_json(job_json(job))
    else:
        output.say(f"{clean(job.id)} is {job.state} again. Watch it with `potluck logs -f {job.id}`.")


# --- the queue ------------------------------------------------------------------------------------------------------


@click.group("queue", invoke_without_command=True)
@json_option
@hub_options
@click.pass_context
def queue_command(ctx: click.Context, connect: Connect, as_json: bool) -> None:
    """List the jobs that wait and why, or move one."""
    ctx.obj = connect
    if ctx.invoked_subcommand:
        return
    with connect() as hub:
        waiting = hub.queue()
        names = {job.id: job for job in hub.jobs(500, "open")} if waiting and not as_json else {}
    if as_json:
        output.print_json(waiting)
    elif not waiting:
        output.say("Nothing waits. `potluck ps` lists what runs.")
    else:
        print_queue(waiting, names)


def print_queue(waiting: list[Outlook], names: dict[str, JobView]) -> None:
    now = output.utc_now()
    rows = []
    for outlook in waiting:
        job = names.get(outlook.job)
        rows.append(
            (
                outlook.position,
                outlook.job,
                job.owner if job else "–",
                job.priority if job else "–",
                job.needs if job else "–",
                output.ago(job.created_at, now) if job else "–",
                outlook.reason,
            )
        )
    output.print_table(
        ("PLACE", "JOB", "OF", "PRIORITY", "ASKS FOR", "QUEUED", "WAITS BECAUSE"), rows, right=("PLACE",)
    )


@queue_command.command("move", epilog=JOB_HELP)
@click.argument("ref", metavar="JOB")
@click.option("--before", metavar="OTHER", help="Directly in front of this job.")
@click.option("--first", is_flag=True, help="In front of all.")
@json_option
@click.pass_obj
def move(connect: Connect, ref: str, before: str | None, first: bool, as_json: bool) -> None:
    """Move a job that waits: whoever runs the hub may."""
    from potluck.protocol import QueueMove

    if bool(before) == first:
        raise BadInput(f"where to? `potluck queue move {ref} --first`, or --before OTHER")
    with connect() as hub:
        job = find_job(hub, ref)
        other = find_job(hub, before) if before else None
        waiting = hub.move_in_queue(QueueMove(job.id, other.id if other else ""))
    place = next((outlook.position for outlook in waiting if outlook.job == job.id), None)
    if as_json:
        output.print_json(waiting)
    elif place is None:
        output.say(f"{clean(job.id)} does not wait any more: `potluck show {job.id}`")
    else:
        output.say(f"{clean(job.id)} is now number {place} of {len(waiting)} in the queue.")
