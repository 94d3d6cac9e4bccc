"""What does a model make?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from potluck.cli import output
from potluck.cli.export import write_model
from potluck.cli.follow import Connect
from potluck.cli.options import find_run, hub_options
from potluck.cli.train import without_torch
from potluck.errors import BadInput
from potluck.telemetry import clean


@click.command("generate", epilog="SOURCE is a run (id, name, `last`) or a folder that `potluck export` wrote.")
@click.argument("source", metavar="RUN|DIR")
@click.option("--count", type=click.IntRange(1, 4096), default=64, show_default=True, metavar="N", help="How many.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Another seed, other samples.")
@click.option("--out", type=click.Path(dir_okay=False), default="grid.png", show_default=True, metavar="FILE.png")
@hub_options
def generate_command(connect: Connect, source: str, count: int, seed: int, out: str) -> None:
    """Draw a grid of samples with a run's or an exported model."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise BadInput(f"--out {out}: the grid is a PNG, so its name must end in .png")
    if Path(source).is_dir():
        draw(Path(source), count=count, seed=seed, path=path)
    else:
        with tempfile.TemporaryDirectory(prefix="potluck-") as folder:
            with connect() as hub:
                write_model(hub, find_run(hub, source), Path(folder))
            try:
                draw(Path(folder), count=count, seed=seed, path=path)
            except BadInput as error:  # it names a folder that nobody knows
                raise BadInput(str(error).replace(folder, f"run {source}")) from None
    output.say(f"{count} samples of {clean(source)} are in {path}.")


def draw(folder: Path, *, count: int, seed: int, path: Path) -> None:
    """Write the grid of an exported model, by its running average if it has one."""
    try:
        from potluck.train.export import generate
    except ModuleNotFoundError as error:
        raise without_torch(error) from error
    generate(folder, count, seed, path)
