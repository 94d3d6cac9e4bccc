"""What does one take home: weights that any safetensors reader opens, and pictures made from them?

DIR/model.safetensors       the weights, by name
DIR/model_ema.safetensors   the same with the running average in the place of the models that have one
DIR/config.json             recipe, settings, data
DIR/recipe.py               the source, if the recipe is not one of Potluck's
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from potluck import __version__
from potluck.errors import BadInput, PotluckError
from potluck.protocol import Dataset, Layout, RecipeRef
from potluck.train import taste as tastes
from potluck.train import tensorio
from potluck.train.recipe import Recipe, current, has, load_recipe
from potluck.train.tasks import build
from potluck.train.weights import Weights, gather, layout_of, scatter

MODEL, AVERAGE, CONFIG, SOURCE = "model.safetensors", "model_ema.safetensors", "config.json", "recipe.py"


def export(
    weights: Weights,
    state: Mapping[str, Tensor],
    layout: Layout,
    ref: RecipeRef,
    folder: Path,
    *,
    source: str | Path = "",
    dataset: Dataset,
    about: Mapping[str, Any],
) -> list[Path]:
    """Write a run's weights into `folder`. `source` is where the recipe's file lies; `about` goes into config.json."""
    recipe = load_recipe(ref, source, dataset)
    folder.mkdir(parents=True, exist_ok=True)
    written = [tensorio.save(folder / MODEL, named(weights, layout))]
    if recipe.ema and "ema" in state:
        models = build(recipe)
        scatter(tastes.averaged(weights, state, layout, recipe.ema), models, layout)
        tastes.settle(recipe, models, recipe.ema)
        written.append(tensorio.save(folder / AVERAGE, named(gather(models, layout), layout)))
    if source:
        (folder / SOURCE).write_bytes(Path(source).read_bytes())
        written.append(folder / SOURCE)
    config = {
        "potluck": __version__,
        "recipe": {"name": ref.name, "settings": current(recipe), "file": ref.filename},
        "dataset": _about_data(dataset),
        **about,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [*written, folder / CONFIG]


def generate(folder: Path, count: int, seed: int, out: Path) -> Path:
    """A PNG of `count` pictures from an exported folder; by its running average if it has one."""
    recipe, models = load_export(folder)
    if not has(recipe, "sample"):
        raise BadInput(f"the recipe of {folder} makes no pictures: it has no `sample`")
    if not 1 <= count <= 4096:
        raise BadInput(f"count is {count}: it must lie between 1 and 4096")
    tastes.settle(recipe, models, ())
    tastes.grid(tastes.sampled(recipe, models, count, seed), out)
    return out


def load_export(folder: Path) -> tuple[Recipe, dict[str, nn.Module]]:
    """The recipe and its models with the weights of an exported folder, in eval mode."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        described = config["recipe"]
        ref = RecipeRef(described["name"], described["settings"], filename=described["file"])
        dataset = msgspec.convert({**config["dataset"], "shards": []}, Dataset)
    except FileNotFoundError:
        raise BadInput(f"{folder} has no {CONFIG}: give a folder that `potluck export` or --local wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / CONFIG} cannot be understood: {error!r}") from None
    recipe = load_recipe(ref, folder / SOURCE if ref.filename else "", dataset)
    models = build(recipe)
    layout = layout_of(models)
    path = folder / (AVERAGE if (folder / AVERAGE).exists() else MODEL)
    scatter(unnamed(path, layout), models, layout)
    for model in models.values():
        model.eval()
    return recipe, models


def named(weights: Weights, layout: Layout) -> dict[str, Tensor]:
    """The tensors by name."""
    tensors: dict[str, Tensor] = {}
    for slots, vector in (
        (layout.params, weights.params),
        (layout.buffers, weights.buffers),
        (layout.counters, weights.counters),
    ):
        parts = torch.split(vector, [torch.Size(shape).numel() for _, shape in slots]) if slots else ()
        tensors |= {name: part.view(shape) for (name, shape), part in zip(slots, parts, strict=True)}
    return tensors


def unnamed(path: Path, layout: Layout) -> Weights:
    """`named` backwards, from a file."""
    try:
        tensors, _ = tensorio.load(path)
    except (OSError, PotluckError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    weights = Weights.zeros(layout)
    for name, place in named(weights, layout).items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != place.shape:
            raise BadInput(f"{path} has no {name} of shape {list(place.shape)}: is it of another recipe or settings?")
        place.copy_(tensor)
    return weights


def _about_data(dataset: Dataset) -> dict[str, Any]:
    facts = asdict(dataset)
    del facts["shards"]
    return facts
