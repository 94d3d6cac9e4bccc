"""What do the weights of a version make, and how good is it?

Pictures on a fixed noise, so that the same place of the grid is the same picture growing up from version to version;
the distance to the real ones (judge.py); and the recipe's own `evaluate` on held-out samples. Models that the recipe
names in `ema` are tasted by their running average, whose BatchNorm statistics are estimated anew: those that travelled
belong to other weights, and with wrong ones good weights look untrained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from potluck.domain import order
from potluck.errors import BadInput, RecipeError
from potluck.protocol import Dataset, Layout
from potluck.train.data import Batch, ShardReader, to_float
from potluck.train.judge import REAL, Judge, judge_for
from potluck.train.recipe import Recipe, has
from potluck.train.weights import Weights

GRID_PIXELS = 768
"""A grid is magnified by a whole number to about this width."""
NORM_PASSES, NORM_BATCH = 8, 64
EVALUATED = 4096  # samples, at most

_judges: dict[tuple[object, ...], Judge] = {}  # of this process; training one takes seconds


def taste(
    recipe: Recipe,
    models: dict[str, nn.Module],
    shard_paths: Sequence[str],
    out: Path,
    *,
    seed: int,
    count: int,
    evaluate: bool,
    cache: Path | None,
) -> tuple[dict[str, float], Path | None]:
    """Metrics, and the grid if the recipe can sample. Leaves the models in eval mode."""
    assert recipe.dataset
    metrics: dict[str, float] = {}
    picture = None
    settle(recipe, models, recipe.ema)
    if has(recipe, "sample"):
        picture = out / "samples.png"
        grid(sampled(recipe, models, count, seed), picture)
        if evaluate and recipe.images and any(shard_paths):
            metrics |= judge_of(recipe.dataset, shard_paths, cache).figures(
                sampled(recipe, models, 1000 if recipe.images.size <= 32 else 400, seed + 1)
            )
    if evaluate and has(recipe, "evaluate"):
        metrics |= evaluated(recipe, models, shard_paths)
    return metrics, picture


def averaged(weights: Weights, state: Mapping[str, Tensor], layout: Layout, names: Sequence[str]) -> Weights:
    """`weights` with the running average in the place of the models in `names`; themselves if there is no average."""
    ema = state.get("ema")
    if ema is None or not names:
        return weights
    params = weights.params.clone()
    start = 0
    for name, shape in layout.params:
        end = start + torch.Size(shape).numel()
        if name.partition(".")[0] in names:
            params[start:end] = ema[start:end]
        start = end
    return Weights(params, weights.buffers, weights.counters)


@torch.no_grad()
def settle(recipe: Recipe, models: dict[str, nn.Module], names: Sequence[str]) -> None:
    """Put the models into eval mode; those in `names` get BatchNorm statistics that belong to the weights they have."""
    for model in models.values():
        model.eval()
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for name in names for m in models[name].modules() if isinstance(m, kind)]
    if not norms or not has(recipe, "sample"):
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all passes
        norm.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(NORM_PASSES):
        recipe.sample(models, NORM_BATCH, generator)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def sampled(recipe: Recipe, models: dict[str, nn.Module], count: int, seed: int) -> Tensor:
    """`count` pictures [count, C, H, W] in [-1, 1], on the CPU. The first ones are the same whatever the count."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for at in range(0, count, NORM_BATCH):
        wanted = min(NORM_BATCH, count - at)
        # always a whole chunk of noise: torch fills a tensor in an order that depends on its size
        part = recipe.sample(models, NORM_BATCH, generator)
        if not isinstance(part, Tensor) or part.ndim != 4 or len(part) != NORM_BATCH or part.shape[1] not in (1, 3):
            shape = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise RecipeError(f"the recipe's sample gave {shape}: it must be [{NORM_BATCH}, 1 or 3, height, width]")
        parts.append(part[:wanted].float().cpu())
    return torch.nan_to_num(torch.cat(parts)).clamp(-1, 1)


def grid(pictures: Tensor, path: Path) -> None:
    """Write pictures in [-1, 1] as a PNG of nearly square shape, white between them."""
    count, channels, height, width = pictures.shape
    root = math.isqrt(count - 1) + 1
    columns = next((c for c in range(root, 2 * root) if count % c == 0), root)
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + 2) + 2, columns * (width + 2) + 2), 255, dtype=torch.uint8)
    for i, picture in enumerate((pictures * 127.5 + 127.5).round().to(torch.uint8)):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        sheet[:, top : top + height, left : left + width] = picture
    shown = Image.fromarray(sheet.permute(1, 2, 0).squeeze(2).numpy())
    factor = max(1, GRID_PIXELS // shown.width)
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def evaluated(recipe: Recipe, models: dict[str, nn.Module], shard_paths: Sequence[str]) -> dict[str, float]:
    """The recipe's figures on the held-out samples; without any, on training samples and named so."""
    assert recipe.dataset
    held_out = has_held_out(recipe.dataset, shard_paths)
    reader = ShardReader(shard_paths, recipe.dataset, 0)
    device = next(p.device for model in models.values() for p in model.parameters())
    sums: dict[str, float] = {}
    total = 0
    batches = (
        _parts(reader.held_out(EVALUATED)) if held_out else training_batches(recipe.dataset, shard_paths, EVALUATED)
    )
    for batch in batches:
        y = batch.y.to(device) if batch.y is not None else None
        for name, value in recipe.evaluate(models, to_float(batch.x, device), y).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
        total += len(batch)
    return {name if held_out else f"train_{name}": value / total for name, value in sums.items()}


def judge_of(dataset: Dataset, shard_paths: Sequence[str], cache: Path | None) -> Judge:
    """The judge of this data set: of this process, from the cache, or trained now."""
    key = (tuple(shard.blob.hash for shard in dataset.shards), tuple(map(bool, shard_paths)))
    if key not in _judges:
        batches = []
        if has_held_out(dataset, shard_paths):
            batches.append(ShardReader(shard_paths, dataset, 0).held_out(REAL))
        batches += training_batches(dataset, shard_paths, REAL - sum(map(len, batches)))
        if not batches:
            raise BadInput(f"none of the shards of {dataset.name} is here to compare with")
        labels = [batch.y for batch in batches if batch.y is not None]
        real = torch.cat([to_float(batch.x, "cpu") for batch in batches])
        _judges[key] = judge_for(dataset, real, torch.cat(labels) if labels else None, cache)
    return _judges[key]


def has_held_out(dataset: Dataset, shard_paths: Sequence[str]) -> bool:
    """Are there held-out samples, and are they here?"""
    return dataset.held_out > 0 and all(shard_paths[shard] for shard in order.shards_held_out(dataset))


def training_batches(dataset: Dataset, shard_paths: Sequence[str], most: int) -> Iterator[Batch]:
    """Up to `most` training samples of the shards that are here, always the same ones."""
    here = [
        (s.position, s.position + s.stop - s.start)
        for s in order.segments([(0, dataset.train_samples)], dataset, 0)
        if shard_paths[s.shard]
    ]
    first, _ = order.take(order.union(here), most)
    return ShardReader(shard_paths, dataset, 0).batches(first, 256, ahead=1)


def _parts(batch: Batch) -> Iterator[Batch]:
    for at in range(0, len(batch), 256):
        yield Batch(batch.x[at : at + 256], None if batch.y is None else batch.y[at : at + 256], [])
