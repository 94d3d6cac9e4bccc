"""How does a recipe and a folder of data become a run?"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potluck.cli import output
from potluck.cli.follow import ENDED, Connect, come_back, exit_code, follow
from potluck.cli.options import DURATION, SAMPLES, SHARE, hub_options, json_option, key_values, timeout_option
from potluck.cli.runfile import read_run_file
from potluck.cli.runs import print_run
from potluck.errors import BadInput, Conflict, NotFound, PotluckError, TimedOut, UnknownSetting
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import Blob, Dataset, RecipeRef, RunView
    from potluck.train.recipe import Recipe

EITHER = ("samples", "epochs")  # two ways to say the same: the command line's replaces the file's


def _take_file(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Let the values of run.yaml be the defaults of this call."""
    if path is None:
        return None
    names = {_key_of(p): p.name for p in ctx.command.params if p.name not in ("file", "address", "token_file", "help")}
    values = read_run_file(Path(path), names)
    ctx.meta["potluck.set"] = values.pop("set", {})
    ctx.default_map = {str(names[key]): value for key, value in values.items()}
    return path


def _key_of(param: click.Parameter) -> str:
    return max(param.opts, key=len).lstrip("-")


@click.command("train", epilog="RECIPE is a name (dcgan, classifier) or FILE.py:CLASS.")
@click.argument("recipe", required=False)
@click.option("--data", metavar="SOURCE", help="A folder, zip, .npz, hf://datasets/…, or a known set: mnist5k, emoji …")
@click.option("--samples", type=SAMPLES, metavar="N", help="Stop after so many samples: 50k, 2M.")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Stop after N times the data.")
@click.option("--for", "duration", type=DURATION, metavar="TIME", help="Stop after so long: 10m, 2h.")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A setting of the recipe or of the pool.")
@click.option(
    "-f",
    "--file",
    "file",
    type=click.Path(),
    metavar="run.yaml",
    is_eager=True,
    callback=_take_file,
    expose_value=False,
    help="Take these options from a file; flags win.",
)
@click.option("--name", default="", metavar="NAME", help="What the run is called.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the weights and of the order.")
@click.option("--local", is_flag=True, help="Train on this machine alone, without a hub.")
@click.option("--resume", is_flag=True, help="Go on with the run of this name or recipe; with --local: with --out.")
@click.option("--out", type=click.Path(file_okay=False), metavar="DIR", help="With --local: where results go.")
@click.option("--device", metavar="DEVICE", help="With --local: auto, cpu, cuda:0, mps.")
@click.option("--share", type=SHARE, metavar="PART", help="With --local: how much of the machine, like 50%.")
@click.option("--wait", is_flag=True, help="Wait for the end without a live view.")
@click.option("--detach", is_flag=True, help="Return as soon as the run is started.")
@timeout_option("Stop waiting")
@json_option
@hub_options
@click.pass_context
def train_command(ctx: click.Context, /, connect: Connect, **given: Any) -> int:
    """Train a recipe on data, with every machine that joined."""
    _drop_overruled(ctx, given)
    wish = Wish(
        **{f.name: given[f.name] for f in fields(Wish) if f.name != "settings"},
        settings={**ctx.meta.get("potluck.set", {}), **key_values(given["pairs"])},
    )
    if not wish.recipe:
        raise BadInput("which recipe? Write `potluck train RECIPE --data SOURCE`, for example `potluck train dcgan`")
    if not wish.data:
        raise BadInput(f"which data? Write `potluck train {wish.recipe} --data SOURCE`, for example --data mnist5k")
    if wish.samples and wish.epochs:
        raise BadInput("--samples and --epochs both say how much: take one of them")
    if given["wait"] and given["detach"]:
        raise BadInput("--wait and --detach exclude one another: take one of them")
    if given["local"]:
        return _train_here(wish, given)
    for key, why in {
        "device": "each worker chooses when it joins",
        "share": "each worker chooses when it joins",
        "out": "`potluck export` writes a run's results",
    }.items():
        if given[key]:
            raise BadInput(f"--{key} is for --local: {why}")
    with connect() as hub:
        return _train_in_pool(hub, wish, given)


def _drop_overruled(ctx: click.Context, given: dict[str, Any]) -> None:
    typed = [name for name in EITHER if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE]
    if len(typed) == 1:
        given[EITHER[1 - EITHER.index(typed[0])]] = None


@dataclass(frozen=True)
class Wish:
    """What the user asked to have trained."""

    recipe: str
    data: str
    samples: int | None
    epochs: float | None
    duration: float | None  # seconds
    name: str
    seed: int
    settings: Mapping[str, Any]  # of recipe and pool together

    def target(self, dataset: Dataset) -> int | None:
        return round(self.epochs * dataset.train_samples) if self.epochs else self.samples


def _train_in_pool(hub: Hub, wish: Wish, given: Mapping[str, Any]) -> int:
    hub.info()  # before anything is packed: is it there, and does it know us?
    run = _earlier(hub, wish) if given["resume"] else _create(hub, wish)
    if given["detach"]:
        _answer(hub, run, given["as_json"], f"Started {run.name} ({run.id}). {come_back(run)}")
        return 0
    output.note(f"{clean(run.name)} ({run.id}) is {run.state}.")
    if not any(worker.state in ("working", "idle") for worker in hub.workers()):
        output.note("No worker is here yet: `potluck invite` prints the line for a machine to join with.")
    run = follow(hub, run, timeout_s=given["timeout"], quiet=given["wait"] or given["as_json"])
    _answer(hub, run, given["as_json"], "")
    if not given["as_json"]:
        output.note(f"Next: potluck export {run.name} DIR · potluck generate {run.name} · potluck show {run.name}")
    return exit_code(run)


def _answer(hub: Hub, run: RunView, as_json: bool, sentence: str) -> None:
    if as_json:
        output.print_json(run)
    elif sentence:
        output.say(sentence)
    else:
        print_run(run, hub.contributions(run.id))


def _earlier(hub: Hub, wish: Wish) -> RunView:
    """The newest run that this command line may have started, going on."""
    stem = Path(wish.recipe.rpartition(":")[2] or wish.recipe).name
    found = [run for run in hub.runs() if (run.name == wish.name if wish.name else run.recipe.name == stem)]
    if not found:
        what = f"named `{wish.name}`" if wish.name else f"of the recipe {stem}"
        raise NotFound(f"there is no run {what} to go on with: start it without --resume")
    run = max(found, key=lambda run: run.created_at)
    if run.state in ENDED:
        raise Conflict(f"run {run.name} is {run.state}: it cannot go on. Start another without --resume")
    return hub.resume(run.id) if run.state == "paused" else run


def _create(hub: Hub, wish: Wish) -> RunView:
    from dataclasses import replace

    from potluck.protocol import RunRequest

    ref, recipe, source, pool = load_wish(wish)
    if source is not None:
        ref = replace(ref, source=hub.upload(source))
    dataset = pack_data(wish.data, recipe, hub.upload, "are at the hub")  # which skips what it has
    request = RunRequest(
        recipe=ref,
        dataset=dataset,
        name=wish.name,
        samples=wish.target(dataset),
        duration_s=wish.duration,
        settings={"preset": recipe.preset, **pool},
        seed=wish.seed,
    )
    if request.samples is None and request.duration_s is None:
        output.note("This run has no end of its own (--samples, --epochs or --for would give it one): stop it when")
        output.note("you like what you see.")
    return hub.create_run(request, secrets.token_hex(16))


def load_wish(wish: Wish) -> tuple[RecipeRef, Recipe, bytes | None, dict[str, Any]]:
    """The recipe's reference, the recipe itself, its source if it is a file, and the settings of the pool."""
    from dataclasses import replace

    try:
        from potluck.train.recipe import find_recipe, load_recipe, settings_of
    except ModuleNotFoundError as error:
        raise without_torch(error) from error

    ref, source = find_recipe(wish.recipe)
    path = _path_in(wish.recipe) if source is not None else ""
    try:
        kind = type(load_recipe(ref, path))
    except ModuleNotFoundError as error:
        raise without_torch(error) from error
    of_recipe, of_pool = split_settings(wish.settings, list(settings_of(kind)), ref.name)
    ref = replace(ref, settings=of_recipe)
    return ref, load_recipe(ref, path), source, of_pool


def split_settings(
    settings: Mapping[str, Any], of_recipe: Sequence[str], recipe: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which settings are the recipe's and which the pool's; a name that both have is the recipe's."""
    import difflib

    from potluck.domain.pool import PoolSettings

    of_pool = [f.name for f in fields(PoolSettings)]
    for key in settings:
        if key not in of_recipe and key not in of_pool:
            near = difflib.get_close_matches(key, [*of_recipe, *of_pool], n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"{recipe} has {', '.join(of_recipe)}; "
            raise UnknownSetting(
                f"neither {recipe} nor the pool has a setting `{key}`: {hint}"
                + ("" if near else f"the pool has {', '.join(of_pool)}")
            )
    pool = {key: value for key, value in settings.items() if key not in of_recipe}
    PoolSettings().changed(pool)  # a value that does not fit is told before anything is sent
    return {key: value for key, value in settings.items() if key in of_recipe}, pool


def _path_in(text: str) -> str:
    return text if text.endswith(".py") else text.rpartition(":")[0]


def without_torch(error: ModuleNotFoundError) -> PotluckError:
    if (error.name or "").startswith("potluck"):
        raise error
    return PotluckError(f"this needs the package {error.name}, which is not here: pip install '.[train]'")


def pack_data(source: str, recipe: Recipe, add: Callable[[bytes], Blob], where: str) -> Dataset:
    """Pack `source` the way `recipe` wants it, shard by shard through `add`."""
    from potluck import settings
    from potluck.train.sources import open_source, pack

    if recipe.images is None:
        raise BadInput(
            "this recipe does not say how pictures are packed: give it `size: int = 32` and `channels: int = 3`"
        )
    opened = open_source(source, images=recipe.images, cache_dir=settings.cache_dir() / "data", say=output.note)
    dataset = pack(opened, add, progress=_packed if sys.stderr.isatty() else None)
    remarks = [f"{dataset.samples:,} samples", f"{dataset.held_out:,} of them held out to evaluate"]
    remarks += [f"{dataset.skipped:,} could not be read and are left out"] if dataset.skipped else []
    output.note(f"Data {clean(dataset.name)}: {', '.join(remarks)}; {len(dataset.shards):,} shard(s) {where}.")
    return dataset


def _packed(seen: int, count: int) -> None:
    click.echo(f"\rPacking: {seen:,} of {count:,}\x1b[K" + ("\n" if seen == count else ""), nl=False, err=True)


def _train_here(wish: Wish, given: Mapping[str, Any]) -> int:
    """`--local`: the same recipe, loader and tastes on this machine alone."""
    from potluck import settings
    from potluck.blobs import BlobStore

    ref, recipe, source, pool = load_wish(wish)
    from potluck.train.local import Plan, train_local

    local = {"ema_decay", "taste_every_s", "taste_count"}
    if other := [key for key in pool if key not in local]:
        raise BadInput(
            f"`{other[0]}` is about the pool: with --local only {', '.join(sorted(local))} of its settings act"
        )
    store = BlobStore(settings.cache_dir() / "blobs")
    dataset = pack_data(wish.data, recipe, store.add_bytes, "are packed")
    plan = Plan(
        samples=wish.samples,
        epochs=wish.epochs,
        duration_s=wish.duration,
        seed=wish.seed,
        share=given["share"] or 1.0,
        device=given["device"] or "auto",
        **pool_values(pool),
    )
    out = Path(given["out"] or f"out/{wish.name or ref.name}")
    ends = time.monotonic() + given["timeout"] if given["timeout"] is not None else float("inf")
    result = train_local(
        ref,
        dataset,
        [str(store.path(shard.blob.hash)) for shard in dataset.shards],
        out,
        plan,
        recipe_path=_path_in(wish.recipe) if source is not None else "",
        resume=given["resume"],
        say=output.note,
        stop=lambda: time.monotonic() >= ends,
    )
    if given["as_json"]:
        output.print_json(result)
    else:
        speed = f"{output.number(result.samples_per_s)}/s"
        output.say(
            f"{result.samples:,} samples in {output.span(result.seconds)}, {speed}: {output.figures(result.metrics)}"
        )
        output.say(f"Everything is in {out}. Go on with --resume; draw with `potluck generate {out}`.")
    if result.stopped and time.monotonic() >= ends:
        raise TimedOut(f"--timeout is over after {result.samples:,} samples: go on with --resume")
    return 130 if result.stopped else 0


def pool_values(pool: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of the pool that were given, as the types they have there."""
    from potluck.domain.pool import PoolSettings

    settled = PoolSettings().changed(pool)
    return {key: getattr(settled, key) for key in pool}
