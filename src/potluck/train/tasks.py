"""What does a trusted worker's child do besides units: build version 0, merge updates, taste a version?"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from potluck.errors import PotluckError, RecipeError
from potluck.protocol import Dataset, DoInit, DoMerge, DoTaste, Report
from potluck.train import device as devices
from potluck.train import taste as tastes
from potluck.train.codec import write_update
from potluck.train.data import to_float
from potluck.train.merge import initial_state, merge
from potluck.train.pool import Held
from potluck.train.recipe import Recipe, load_recipe, where
from potluck.train.watch import Watch
from potluck.train.weights import gather, layout_of, load_state, save_snapshot, save_state, scatter

Outcome = tuple[Report, dict[str, str]]
"""The report, and the files whose blobs it lacks: field name → path."""


def init(job: DoInit) -> Outcome:
    """Version 0, after a trial step on a copy: a recipe that cannot work fails here and not on thirty machines."""
    recipe = load_recipe(job.recipe, job.recipe_path, job.dataset)
    torch.manual_seed(job.seed)
    models = build(recipe)
    layout = layout_of(models)
    weights = gather(models, layout)
    try_out(recipe, job.dataset)
    out = _folder(job.out)
    snapshot = save_snapshot(out / "snapshot.safetensors", weights)
    state = save_state(out / "state.safetensors", initial_state(weights, job.policy))
    report = Report("done", version=0, weights_sha256=weights.sha256(), layout=layout)
    return report, {"snapshot": str(snapshot), "state": str(state)}


def build(recipe: Recipe) -> dict[str, torch.nn.Module]:
    """The recipe's models, checked."""
    try:
        models = recipe.models()
    except PotluckError:
        raise
    except Exception as error:
        raise RecipeError(f"the recipe's models failed: {where(error)}") from error
    if not isinstance(models, dict) or not models or not all(isinstance(m, torch.nn.Module) for m in models.values()):
        raise RecipeError("the recipe's `models` must give a dict of name → torch module, with at least one")
    if bad := [name for name in models if "." in name or not name]:
        raise RecipeError(f"a model is named `{bad[0]}`: names must not be empty or have a dot")
    if missing := [name for name in recipe.ema if name not in models]:
        raise RecipeError(f"the recipe's `ema` names `{missing[0]}`: its models are {', '.join(models)}")
    return models


def try_out(recipe: Recipe, dataset: Dataset) -> None:
    """One step on noise of the data's shape, with models of its own."""
    models = build(recipe)
    count = max(2, min(recipe.batch_size, 8))
    x = to_float(torch.randint(256, (count, *dataset.shape), dtype=torch.uint8), "cpu")
    y = torch.randint(len(dataset.labels), (count,)) if dataset.labels else None
    try:
        figures = recipe.step(models, recipe.optimizers(models), x, y)
        if not isinstance(figures, dict):
            raise TypeError("`step` must return a dict of figures, such as {'loss': loss}")
        Watch().add(figures)
    except PotluckError:
        raise
    except Exception as error:
        raise RecipeError(
            f"the recipe's first step, on data shaped like {dataset.name}, failed: {where(error)}"
        ) from error


def merge_updates(job: DoMerge, held: Held) -> Outcome:
    """Version base + 1: the delta that all replicas add, the outer state, perhaps a snapshot."""
    base = held.bring_up(job.weights, job.layout)
    spec = job.spec
    if held.version != spec.base.number:
        raise PotluckError(f"the merge is of version {spec.base.number}, and version {held.version} is here")
    state = load_state(job.state_path, job.layout) if job.state_path else initial_state(base, spec.policy)
    merged = merge(
        base,
        state,
        list(zip(spec.inputs, job.update_paths, strict=True)),
        base_version=spec.base.number,
        active=spec.active,
        policy=spec.policy,
        applied_samples=spec.applied_samples,
        layout=job.layout,
    )
    out = _folder(job.out)
    weights = merged.weights
    delta = write_update(out / "delta.safetensors", merged.delta, weights.buffers, weights.counters)
    files = {"delta": str(delta), "state": str(save_state(out / "state.safetensors", merged.state))}
    if spec.snapshot:
        files["snapshot"] = str(save_snapshot(out / "snapshot.safetensors", weights))
    report = Report(
        "done",
        codec=spec.policy.codec,
        base_version=spec.base.number,
        version=spec.base.number + 1,
        weights_sha256=weights.sha256(),
        verdicts=merged.verdicts,
        metrics=merged.metrics,
    )
    return report, files


def taste(job: DoTaste, held: Held) -> Outcome:
    """Sample grid and figures of a version."""
    weights = held.bring_up(job.weights, job.layout)
    if held.version != job.spec.version.number:
        raise PotluckError(f"the taste is of version {job.spec.version.number}, and version {held.version} is here")
    recipe = load_recipe(job.recipe, job.recipe_path, job.dataset)
    state = load_state(job.state_path, job.layout) if job.state_path else {}
    device = devices.pick(job.device)
    models = {name: model.to(device) for name, model in build(recipe).items()}
    scatter(tastes.averaged(weights, state, job.layout, recipe.ema), models, job.layout)
    out = _folder(job.out)
    metrics, picture = tastes.taste(
        recipe,
        models,
        job.shard_paths,
        out,
        seed=job.spec.seed,
        count=job.spec.count,
        evaluate=job.spec.evaluate,
        cache=cache_folder(out),
    )
    report = Report("done", version=job.spec.version.number, metrics=metrics)
    return report, {"image": str(picture)} if picture else {}


def cache_folder(out: Path) -> Path:
    """Where trained judges are kept: POTLUCK_CHILD_CACHE, else beside the task's own folder."""
    return Path(os.environ.get("POTLUCK_CHILD_CACHE") or out.resolve().parent / "judges")


def _folder(path: str) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
