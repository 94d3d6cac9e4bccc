"""How does a run become a folder that anybody can use?

DIR/  model.safetensors      the newest version, tensors named "<model>.<tensor>"
      model_ema.safetensors  the same with the running average in the models that have one
      config.json            recipe, settings, data, version, figures
      recipe.py              the recipe, if it was a file
      samples/               the grid of every taste
      contributions.csv      who gave what
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potluck import settings
from potluck.blobs import BlobStore
from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.options import find_run, hub_options, json_option
from potluck.cli.train import without_torch
from potluck.errors import Conflict
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import Blob, Contribution, RunView, Version, WeightFile


@click.command("export", epilog="RUN is an id or its beginning, a name, or `last`.")
@click.argument("ref", metavar="RUN")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@json_option
@hub_options
def export_command(connect: Connect, ref: str, folder: str, as_json: bool) -> None:
    """Write a run's weights, samples and contributions into a folder."""
    target = Path(folder)
    with connect() as hub:
        run = find_run(hub, ref)
        written = write_model(hub, run, target)
        written += write_samples(hub, run, target / "samples")
        written += write_contributions(hub.contributions(run.id), target / "contributions.csv")
    if as_json:
        output.print_json({"run": run.id, "folder": str(target), "files": [str(path) for path in written]})
        return
    output.say(f"{clean(run.name)}, in {target}:")
    for path in written:
        output.say(f"  {path.relative_to(target)}  {output.size(path.stat().st_size)}")


def write_model(hub: Hub, run: RunView, target: Path) -> list[Path]:
    """Weights, average, config.json and the recipe's source. The weights are checked against the merger's hash."""
    try:
        from potluck.train.export import export
        from potluck.train.recipe import load_recipe
        from potluck.train.tasks import build
        from potluck.train.weights import apply_chain, layout_of, load_state
    except ModuleNotFoundError as error:
        raise without_torch(error) from error

    store = BlobStore(settings.cache_dir() / "blobs")
    chain = hub.versions(run.id, -1)
    files = weight_files(chain, lambda blob: hub.fetch(blob, store))
    newest = chain[-1]
    source = hub.fetch(run.recipe.source, store) if run.recipe.source else ""
    layout = layout_of(build(load_recipe(run.recipe, source, run.dataset)))
    state = load_state(hub.fetch(newest.state, store), layout) if newest.state else {}
    about = {
        "run": {
            key: getattr(run, key) for key in ("id", "name", "mode", "state", "created_at", "started_at", "ended_at")
        },
        "pool": run.settings,
        "version": newest.number,
        "weights_sha256": newest.weights_sha256,
        "trained": {"samples": run.fates.applied + run.fates.late},
        "metrics": run.metrics,
    }
    weights = apply_chain(None, files, layout)
    return export(weights, state, layout, run.recipe, target, source=source, dataset=run.dataset, about=about)


def weight_files(chain: Sequence[Version], fetch: Callable[[Blob], Path]) -> list[WeightFile]:
    """The files to apply, one after the other, from a snapshot on. `fetch` gives a blob's path."""
    from potluck.protocol import WeightFile
    from potluck.worker.orders import blob_of, way

    steps = way(chain, None)
    if not steps:
        raise Conflict("this run has no weights yet: `potluck why` tells what it waits for")
    return [
        WeightFile(step[0], step[1].number, step[1].codec, str(fetch(blob_of(step))), step[1].weights_sha256)
        for step in steps
    ]


def write_samples(hub: Hub, run: RunView, folder: Path) -> list[Path]:
    """The grid of every taste, `version-000012.png`."""
    written = []
    for taste in hub.tastes(run.id):
        if taste.image is not None:
            folder.mkdir(parents=True, exist_ok=True)
            written.append(hub.download(taste.image, folder / f"version-{taste.version:06d}.png"))
    return written


def write_contributions(contributions: Sequence[Contribution], path: Path) -> list[Path]:
    """One line a worker."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        fates = ("handed_out", "applied", "late", "superseded", "rejected", "lost", "pending")
        plain = ("worker", "worker_id", "device", "share", "units")
        rest = ("seconds", "samples_per_s", "first", "last", "bytes_up", "bytes_down")
        table.writerow([*plain, *fates, *rest])
        for c in contributions:
            row = [getattr(c, key) for key in plain] + [getattr(c.fates, key) for key in fates]
            table.writerow([_cell(value) for value in row + [getattr(c, key) for key in rest]])
    return [path]


def _cell(value: Any) -> Any:
    """A worker's name must not be a formula to the spreadsheet that opens this."""
    if isinstance(value, str):
        text = clean(value)
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
    return round(value, 3) if isinstance(value, float) else value
