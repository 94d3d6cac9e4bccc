"""What have the machines, what of it is free, and which jobs run where, this minute?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.options import hub_options, timeout_option
from potluck.errors import BadInput, HubUnreachable, LedgerError, TryLater
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import MachineNow, Outlook, WorkerView

EVERY_S = 2.0
COLUMNS = ("WORKER", "STATE", "CORES", "LOAD", "MEMORY FREE", "DISK FREE", "GPUS", "JOBS", "LABELS")
RIGHT = ("CORES", "LOAD", "MEMORY FREE", "DISK FREE")
GONE = ("left", "revoked")
MOST_WAITING = 5


@click.command("top")
@click.option("--once", is_flag=True, help="Print it once and leave, for scripts.")
@timeout_option("Leave")
@hub_options
def top_command(connect: Connect, once: bool, timeout: float | None) -> None:
    """Watch the machines: what they have, what is free, which jobs run there."""
    if once and timeout is not None:
        raise BadInput("--once leaves at once: there is nothing that --timeout could end")
    with connect() as hub:
        if once or not output.is_terminal():
            workers, waiting = look(hub)
            output.print_table(COLUMNS, map(row, workers), right=RIGHT)
            for line in waiting_lines(waiting):
                output.say(line)
            return
        watch(hub, timeout)


def look(hub: Hub) -> tuple[list[WorkerView], list[Outlook]]:
    workers = [worker for worker in hub.workers() if worker.state not in GONE]
    return sorted(workers, key=lambda worker: worker.name), hub.queue()


def row(worker: WorkerView) -> tuple[str, ...]:
    now = machine_of(worker)
    known = now.memory_bytes > 0
    return (
        worker.name,
        "draining" if worker.draining else worker.state,
        str(now.cpu_cores) if known else "–",
        f"{now.load:.1f}" if known else "–",
        f"{output.size(now.memory_free_bytes)} of {output.size(now.memory_bytes)}" if known else "–",
        output.size(now.disk_free_bytes) if known else "–",
        "; ".join(gpu_word(gpu) for gpu in now.gpus) or "–",
        ", ".join(worker.jobs) or worker.doing or "–",
        " ".join(f"{key}={value}" for key, value in sorted(worker.labels.items())) or "–",
    )


def machine_of(worker: WorkerView) -> MachineNow:
    """What it last said of itself; nothing for a worker that does not take jobs."""
    from potluck.protocol import MachineNow

    try:
        return msgspec.convert(worker.machine, MachineNow)
    except msgspec.ValidationError:  # of a much newer hub: the rest of the line is still worth showing
        return MachineNow()


def gpu_word(gpu: Any) -> str:
    heat = f" {gpu.temperature_c:.0f} °C" if gpu.temperature_c is not None else ""
    return f"{gpu.index}: {gpu.name} {output.size(gpu.free_bytes)} free, {output.share(gpu.busy)} busy{heat}"


def waiting_lines(waiting: list[Outlook]) -> list[str]:
    if not waiting:
        return ["Nothing waits."]
    lines = [f"{len(waiting)} job(s) wait:"]
    lines += [f"  {one.position}. {clean(one.job)}: {clean(one.reason)}" for one in waiting[:MOST_WAITING]]
    return lines + (
        [f"  … and {len(waiting) - MOST_WAITING} more: potluck queue"] if len(waiting) > MOST_WAITING else []
    )


def watch(hub: Hub, timeout_s: float | None) -> None:
    """Redraw until Ctrl-C, or until the time is over: both are how one leaves."""
    from rich.live import Live

    ends = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
    workers: list[WorkerView] = []
    waiting: list[Outlook] = []
    with Live(screen=True, auto_refresh=False) as live:
        while True:
            try:
                (workers, waiting), remark = look(hub), "Ctrl-C leaves."
            except (HubUnreachable, LedgerError, TryLater) as error:
                remark = f"{error} Trying again."
            live.update(picture(workers, waiting, remark), refresh=True)
            rest = ends - time.monotonic()
            if rest <= 0:
                return
            time.sleep(min(EVERY_S, rest))


def picture(workers: list[WorkerView], waiting: list[Outlook], remark: str) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in RIGHT else "left", overflow="fold")
    for worker in workers:
        table.add_row(*(Text(clean(cell)) for cell in row(worker)))
    return Group(table, Text(), *(Text(line) for line in waiting_lines(waiting)), Text(clean(remark), style="dim"))
