"""What does each machine do alone, what does the network give, what would a gang reach, and who would slow it?"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.jobfile import FLAGS, JobFile, read_flags, read_job_file
from potluck.cli.logs import last_lines
from potluck.cli.options import DURATION, hub_options, json_option
from potluck.cli.watch import LOOK_S, newest_attempt
from potluck.domain.forecast import Forecast, Solo, Way, forecast
from potluck.domain.job import ENDED
from potluck.errors import BadInput
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.domain.job import JobSpec
    from potluck.protocol import Blob, JobView, Link, WorkerView

MEASURE = ["python", "-m", "potluck.train.gang", "solo"]
STEPS = "POTLUCK_GANG_SOLO"  # so many steps alone, then the script ends and says how fast it was
EACH = 64  # samples for each machine in a step, where nobody says how large the batch is
TAIL = 200  # lines of the output that the answer is looked for in
LEAST = 0.05  # of a sample's usual time: none is free, though a noisy measurement may say so
WORTH_IT = 1.1  # a larger batch is advised from here on
LARGER = 4


@click.command(
    "profile",
    context_settings={"allow_interspersed_args": False},
    epilog="Without a command each machine trains a small standard model; with one, your script for a few steps, alone.",
)
@click.argument("command", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@click.option("-f", "--file", "file", type=click.Path(), metavar="FILE", help="Another file than potluck.yaml.")
@click.option("--folder", type=click.Path(), metavar="DIR", help="The project; else the one you are in.")
@click.option("--batch", type=click.IntRange(min=2), metavar="N", help="Samples in a step of the gang; else by size.")
@click.option("--seconds", type=click.IntRange(1, 600), default=8, show_default=True, help="Of the standard model.")
@click.option("--steps", type=click.IntRange(3, 10_000), default=40, show_default=True, help="Of your own script.")
@click.option("--gpu", metavar="WHAT", help="As for `potluck run`: without it, processors are measured.")
@click.option("--cpu", metavar="N", help="Cores: 4, 0.5, 2..8")
@click.option("--memory", metavar="SIZE", help="8GB; also the limit.")
@click.option("--image", metavar="IMAGE", help="Run in this container image.")
@click.option("--requirements", metavar="FILE", help="requirements.txt or pyproject.toml.")
@click.option("--on", "labels", multiple=True, metavar="K=V", help="Only machines with this label.")
@click.option(
    "--timeout", type=DURATION, default="5m", show_default=True, metavar="TIME", help="For all measurements together."
)
@json_option
@hub_options
def profile_command(
    connect: Connect, command: tuple[str, ...], as_json: bool, timeout: float, batch: int | None, **given: Any
) -> int:
    """Measure each machine alone and the network, and say what a gang would reach."""
    spec, folder = wish(command, given)
    say = _nothing if as_json else output.note
    with connect() as hub:
        hub.info()
        project = send(hub, spec, folder if command else None)
        solos, lacks = measure(hub, spec, project, timeout_s=timeout, say=say)
        links = hub.links()
    asked = batch or (spec.gang.batch if spec.gang is not None else 0) or EACH * max(1, len(solos))
    ways = {(link.source, link.target): way(link) for link in links if {link.source, link.target} <= set(solos)}
    found = forecast(max(asked, len(solos)), solos, ways) if solos else None
    if as_json:
        output.print_json(
            {
                "links": links,
                "alone": {name: asdict(solo) for name, solo in solos.items()},
                "not_measured": lacks,
                "forecast": None if found is None else {**asdict(found), "samples_per_s": found.samples_per_s},
            }
        )
    else:
        tell(links, solos, lacks, found, ways)
    return 0 if found is not None else 1


def wish(command: tuple[str, ...], given: Mapping[str, Any]) -> tuple[JobSpec, Path]:
    """What is measured: with the demands of potluck.yaml and the flags, but with a command of its own."""
    from potluck.cli.submit import find_file, refuse_home

    path, folder = find_file(given["file"], given["folder"])
    written = read_job_file(path) if path else JobFile(None, {}, {})
    flags = read_flags({name: given.get(name) for name in FLAGS} | {"labels": given["labels"]}, ())
    # `env` sets the variable: names that begin with POTLUCK_ are not for potluck.yaml.
    own = ["env", f"{STEPS}={given['steps']}", *command] if command else [*MEASURE, "--seconds", str(given["seconds"])]
    spec = replace(written.with_flags(flags), values={**written.with_flags(flags).values, "command": own}).spec()
    if spec.gang is not None and spec.gang.compat:
        raise BadInput("a compat script does not say how fast it is: profile without it, the standard model will do")
    if command:
        refuse_home(folder)
    else:
        spec = replace(spec, requirements="")  # a file of the project, which is not sent
    return replace(spec, name="gang-profile", retries=0), folder


def send(hub: Hub, spec: JobSpec, folder: Path | None) -> Blob:
    """The project, or an empty one."""
    from potluck.cli.submit import send_project
    from potluck.client.project import pack

    if folder is not None:
        return send_project(hub, spec, folder, _nothing)[0]
    with tempfile.TemporaryDirectory() as empty:
        return hub.upload_tree(Path(empty), pack(Path(empty)))


def way(link: Link) -> Way:
    return Way(bool(link.address), link.rtt_s, link.bytes_per_s, link.reason)


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class _Measured:
    worker: WorkerView
    job: JobView


def measure(
    hub: Hub, spec: JobSpec, project: Blob, *, timeout_s: float, say: Any
) -> tuple[dict[str, Solo], dict[str, str]]:
    """What each machine does alone, by an ordinary job on each at the same time; and why some could not be measured."""
    from potluck.cli.gangrun import ask_each, pinned
    from potluck.protocol import JobRequest

    rooms = ask_each(hub, JobRequest(spec, project))
    lacks = {room.worker.name: room.reason for room in rooms if not room.takes}
    under_way = []
    for room in rooms:
        if room.takes:
            job = hub.submit(JobRequest(pinned(spec, room.worker), project))
            under_way.append(_Measured(room.worker, job))
    if under_way:
        say(f"measuring {', '.join(clean(one.worker.name) for one in under_way)} …")
    try:
        _until_ended(hub, under_way, timeout_s)
    finally:
        for one in under_way:
            if one.job.state not in ENDED:
                hub.stop_job(one.job.id)
    solos: dict[str, Solo] = {}
    for one in under_way:
        if one.job.state not in ENDED:
            lacks[one.worker.name] = f"it had not ended after {output.span(timeout_s)}: potluck logs {one.job.id}"
            continue
        solo = read_solo(last_lines(hub, one.job, newest_attempt(one.job), TAIL)[0] if one.job.attempts else "")
        if solo is None:
            why = one.job.reason or one.job.state
            lacks[one.worker.name] = f"its measurement gave no answer ({why}): potluck logs {one.job.id}"
        else:
            solos[one.worker.name] = solo
    return solos, lacks


def _until_ended(hub: Hub, under_way: list[_Measured], timeout_s: float) -> None:
    ends = time.monotonic() + timeout_s
    while waiting := [one for one in under_way if one.job.state not in ENDED]:
        if time.monotonic() >= ends:
            return
        first = waiting[0]
        first.job = hub.wait_job(first.job.id, first.job.state, min(LOOK_S, max(0.0, ends - time.monotonic())))
        for one in waiting[1:]:
            one.job = hub.job(one.job.id)


def read_solo(text: str) -> Solo | None:
    """The line with the measurement: the last one that is such a line."""
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
            speed = float(found["samples_per_s"])
            solo = Solo(
                max(0.0, float(found["fixed_s"])),
                max(float(found["per_sample_s"]), LEAST / speed),
                speed,
                int(found.get("gradient_bytes", 0)),
                clean(found.get("device", ""), limit=40),
            )
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
            continue
        if 0 < solo.per_sample_s < float("inf") and 0 < speed < float("inf") and solo.fixed_s < float("inf"):
            return solo
    return None


# --- telling --------------------------------------------------------------------------------------------------------


def tell(
    links: Iterable[Link],
    solos: Mapping[str, Solo],
    lacks: Mapping[str, str],
    found: Forecast | None,
    ways: Mapping[tuple[str, str], Way],
) -> None:
    if rows := [_link_row(link) for link in links]:
        output.print_table(("FROM", "TO", "ADDRESS", "RTT", "PER S", "FOUND"), rows, right=("RTT", "PER S"))
    else:
        output.say("Nobody has tried yet how the machines reach one another: they do before a gang begins.")
    output.say()
    if found is None:
        output.say("No machine could be measured.")
    else:
        columns = ("MACHINE", "DEVICE", "A STEP COSTS", "AND A SAMPLE", "ALONE, PER S", "SHARE")
        rows = [_solo_row(name, solo, found) for name, solo in sorted(solos.items())]
        output.print_table(columns, rows, right=columns[2:])
    for name, why in sorted(lacks.items()):
        output.say(f"{clean(name)} was not measured: {clean(why)}")
    if found is not None:
        output.say()
        for line in sentences(found, forecast(found.batch * LARGER, solos, ways)):
            output.say(clean(line))


def _link_row(link: Link) -> tuple[str, ...]:
    if not link.address:
        return link.source, link.target, "–", "–", "–", link.reason or "not reached"
    ago = f"{output.span(link.seconds_ago)} ago"
    return link.source, link.target, link.address, milliseconds(link.rtt_s), output.size(link.bytes_per_s), ago


def _solo_row(name: str, solo: Solo, found: Forecast) -> tuple[str, ...]:
    share = found.shares.get(name, 0)
    return (
        name,
        solo.device or "–",
        milliseconds(solo.fixed_s),
        milliseconds(solo.per_sample_s),
        output.number(solo.samples_per_s),
        f"{share} of {found.batch}" if share else "–",
    )


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def sentences(found: Forecast, larger: Forecast) -> Iterable[str]:
    """What a gang would reach, what holds it back, and what would help."""
    names = list(found.shares)
    if len(names) == 1:
        yield (
            f"With a batch of {found.batch}, {names[0]} alone is faster than any gang: "
            f"{output.number(found.samples_per_s)} samples/s."
        )
    else:
        yield (
            f"With a batch of {found.batch}, {', '.join(names)} would train {output.number(found.samples_per_s)} "
            f"samples/s in steps of {milliseconds(found.step_s)}: {found.samples_per_s / found.alone_per_s:.0%} of what "
            f"they do alone together. Equal shares would give {output.number(found.uniform_per_s)}."
        )
    yield from (f"{verdict}." for _, verdict in sorted(found.verdicts.items()))
    if found.slowest is None and len(names) > 1:
        yield "How fast the network between them is, is not known yet, and not in these figures."
    waits = found.network_s / found.step_s
    if found.slowest is not None and waits > 0.2:
        a, b = found.slowest
        yield (
            f"{waits:.0%} of each step would be waiting for the network, the slowest way is from {a} to {b}: a cable, a "
            "larger batch, or `potluck train`, whose machines exchange weights only every few seconds, would help."
        )
    if larger.samples_per_s > WORTH_IT * found.samples_per_s:
        yield (
            f"With a batch of {larger.batch} it would be {output.number(larger.samples_per_s)} samples/s, on "
            f"{', '.join(larger.shares)}."
        )


def _nothing(text: str) -> None:
    """With --json nothing is told on the way."""
