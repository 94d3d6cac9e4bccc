"""`make demo`: a hub, three unequal workers, one GAN on real pictures, about three minutes of training.

Everything it prints is read from the hub that it starts; everything that it starts it also ends.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from potluck.protocol import Fates, InviteRequest
from potluck.settings import DEFAULT_PORT
from potluck.testing import LocalCluster

SHARES = {"gaming-pc": 1.0, "laptop": 0.5, "old-laptop": 0.25}
SETTINGS = ("size=32", "width=32", "unit_s=6", "taste_every_s=15", "ema_decay=0.9")  # the faces that come soonest
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", default="emoji-people", help="emoji-people, mnist5k, avatars, or a folder or zip of images"
    )
    parser.add_argument("--for", dest="duration", default="3m", help="how long to train")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    try:
        with LocalCluster(out / "cluster", port=_free(DEFAULT_PORT)) as cluster:
            return _show(cluster, options, out)
    except KeyboardInterrupt:
        console.print("\nstopped; nothing is left running")
        return 130


def _show(cluster: LocalCluster, options: argparse.Namespace, out: Path) -> int:
    page = cluster.hub.invite(InviteRequest("viewer", uses=100)).url
    console.print(f"[bold]A hub is open.[/] Its live page: [cyan]{page}[/]")
    for name, share in SHARES.items():
        cluster.add_worker(name, share=share)
    console.print(
        "Three workers join it by a link: " + ", ".join(f"{n} ({s:.0%} of a core)" for n, s in SHARES.items())
    )
    settings = [
        f"--set={each}"
        for each in ["size=32", "width=32", "unit_s=6", "taste_every_s=15", "ema_decay=0.9", *options.set]
    ]
    command = ["train", "dcgan", "--data", options.data, "--for", options.duration, "--name", "demo", *settings]
    console.print(f"[dim]$ potluck {' '.join(command)}[/]")
    environment = {key: value for key, value in cluster.admin_environment.items() if key != "NO_COLOR"}
    code = subprocess.run([sys.executable, "-m", "potluck.cli", *command], env=environment).returncode
    if code:
        return code
    run = cluster.hub.run("last")
    done = cluster.run_cli("export", run.id, str(out / "model"))
    if done.returncode:
        sys.stderr.write(done.stderr)
        return done.returncode
    grid = out / "samples.png"
    newest = cluster.hub.tastes(run.id)[-1]
    if newest.image is not None:
        cluster.hub.download(newest.image, grid)
    console.print(_table(cluster, run.id))
    fates = run.fates
    total = fates.applied + fates.late + fates.superseded + fates.rejected + fates.lost
    console.print(
        f"{fates.handed_out:,} samples credited = {fates.applied:,} applied + {fates.late:,} late + "
        f"{fates.superseded:,} superseded + {fates.rejected:,} rejected + {fates.lost:,} lost"
    )
    first, last = run.first_metrics.get("distance"), run.metrics.get("distance")
    if first and last:
        console.print(
            f"distance to the real pictures: {first:.2f} at version 0, [bold]{last:.2f}[/] at version {run.version}"
        )
    console.print(f"[bold]What it paints now:[/] {grid}")
    console.print(
        "\nNext, on your own:\n"
        "  potluck host                                      a hub for your class; it prints the line to join\n"
        f"  potluck generate {_short(out / 'model')} --count 64 --out faces.png\n"
        "  potluck train classifier --data mnist5k --local   the same recipes on this machine alone\n"
        "  make demo DATA=mnist5k                            other pictures, or a folder of your own"
    )
    return 0 if total == fates.handed_out else 1


def _table(cluster: LocalCluster, run: str) -> Table:
    table = Table(title="Who contributed what", title_justify="left")
    for name in (
        "machine",
        "share",
        "units",
        "samples/s",
        "credited",
        "applied",
        "late",
        "superseded",
        "rejected",
        "lost",
    ):
        table.add_column(name, justify="left" if name == "machine" else "right")
    for row in cluster.hub.contributions(run):
        counts = [f"{n:,}" for n in _counts(row.fates)]
        table.add_row(row.worker, f"{row.share:.0%}", str(row.units), f"{row.samples_per_s:,.0f}", *counts)
    table.add_section()
    fates = cluster.hub.run(run).fates
    table.add_row("all", "", "", "", *[f"{n:,}" for n in _counts(fates)])
    return table


def _counts(fates: Fates) -> tuple[int, ...]:
    return fates.handed_out, fates.applied, fates.late, fates.superseded, fates.rejected, fates.lost


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _free(port: int) -> int:
    """`port` if nobody listens there, else 0: any."""
    with socket.socket() as probe:
        return port if probe.connect_ex(("127.0.0.1", port)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
