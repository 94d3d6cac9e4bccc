"""Does a run come home as files that anybody can open, and does it draw from them?"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from hub_double import HubDouble, make_contribution, make_run
from PIL import Image

from potluck.blobs import hash_bytes
from potluck.protocol import Dataset, MergePolicy, RecipeRef, RunView, Taste, Version

Potluck = Callable[..., tuple[int, str, str]]

RECIPE = """
import torch
from torch import nn
from potluck.train.recipe import Recipe

class Tiny(Recipe):
    ema = ("net",)
    batch_size: int = 8
    size: int = 8
    channels: int = 3
    def models(self): return {"net": nn.Sequential(nn.Linear(4, 192), nn.BatchNorm1d(192))}
    def optimizers(self, models): return {"net": torch.optim.SGD(models["net"].parameters(), 0.1)}
    def step(self, models, optimizers, x, y): return {"loss": 0.0}
    def sample(self, models, count, generator):
        return models["net"](torch.randn(count, 4, generator=generator)).view(count, 3, 8, 8).tanh()
"""


@pytest.fixture
def trained(hub: HubDouble, tmp_path: Path) -> RunView:
    """A run of a recipe from a file, at version 0, with a running average and one taste."""
    from potluck.train.merge import initial_state
    from potluck.train.recipe import load_recipe
    from potluck.train.tasks import build
    from potluck.train.weights import gather, layout_of, save_snapshot, save_state

    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)

    def keep(content: bytes) -> Any:
        blob = hash_bytes(content)
        hub.routes["GET", f"/blobs/{blob.hash}"] = lambda _: content
        return blob

    ref = RecipeRef("Tiny", {}, source=keep(RECIPE.encode()), filename="tiny.py")
    models = build(load_recipe(ref, path))
    layout = layout_of(models)
    weights = gather(models, layout)
    state = initial_state(weights, MergePolicy(ema_decay=0.5))
    snapshot = keep(save_snapshot(tmp_path / "snapshot", weights).read_bytes())
    version = Version(
        0, weights.sha256(), snapshot=snapshot, state=keep(save_state(tmp_path / "s", state).read_bytes())
    )
    image = tmp_path / "taste.png"
    Image.new("RGB", (8, 8)).save(image)
    run = make_run(recipe=ref, dataset=Dataset("dots", 100, [], [3, 8, 8], licence="CC0"), version=0)
    hub.knows(run)
    taste = Taste(0, "2026-01-01T10:00:00+00:00", 0, {}, keep(image.read_bytes()))
    hub.routes["GET", f"/runs/{run.id}/tastes"] = lambda _: [taste]
    hub.routes["GET", f"/runs/{run.id}/versions"] = lambda _: [version]
    hub.routes["GET", f"/runs/{run.id}/contributions"] = lambda _: [make_contribution("=HYPERLINK(1)")]
    return run


def test_export_writes_weights_average_recipe_samples_and_contributions(
    trained: RunView, potluck: Potluck, tmp_path: Path
) -> None:
    folder = tmp_path / "model"

    code, out, err = potluck("export", "last", folder)

    assert code == 0, err
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        *["model.safetensors", "model_ema.safetensors", "config.json", "recipe.py", "contributions.csv"],
        "samples/version-000000.png",
    }
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert tensors["net.0.weight"].shape == (192, 4)
    config = json.loads((folder / "config.json").read_text())
    assert (config["recipe"]["name"], config["version"], config["dataset"]["licence"]) == ("Tiny", 0, "CC0")
    assert "model.safetensors" in out


def test_a_workers_name_is_never_a_formula_in_the_spreadsheet(
    trained: RunView, potluck: Potluck, tmp_path: Path
) -> None:
    potluck("export", "last", tmp_path / "model")

    (row,) = csv.DictReader((tmp_path / "model" / "contributions.csv").read_text().splitlines())
    assert row["worker"] == "'=HYPERLINK(1)"
    assert (row["applied"], row["handed_out"]) == ("400", "500")


def test_generate_draws_the_same_from_a_run_and_from_its_export(
    trained: RunView, potluck: Potluck, tmp_path: Path
) -> None:
    potluck("export", "last", tmp_path / "model")

    codes = [
        potluck("generate", "last", "--count", "9", "--seed", "3", "--out", tmp_path / "a.png")[0],
        potluck("generate", tmp_path / "model", "--count", "9", "--seed", "3", "--out", tmp_path / "b.png")[0],
        potluck("generate", tmp_path / "model", "--count", "9", "--seed", "4", "--out", tmp_path / "c.png")[0],
    ]

    assert codes == [0, 0, 0]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_weights_that_are_not_the_mergers_are_refused(
    trained: RunView, hub: HubDouble, potluck: Potluck, tmp_path: Path
) -> None:
    (version,) = hub.routes["GET", f"/runs/{trained.id}/versions"](None)
    hub.routes["GET", f"/runs/{trained.id}/versions"] = lambda _: [replace(version, weights_sha256="0" * 64)]

    code, _, err = potluck("export", "last", tmp_path / "model")

    assert code == 2
    assert "hash" in err
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_a_run_without_weights_cannot_be_exported_yet(
    trained: RunView, hub: HubDouble, potluck: Potluck, tmp_path: Path
) -> None:
    hub.routes["GET", f"/runs/{trained.id}/versions"] = lambda _: []

    code, _, err = potluck("export", "last", tmp_path / "model")

    assert code == 5
    assert "no weights yet" in err


def test_a_folder_that_is_no_export_cannot_draw(potluck: Potluck, tmp_path: Path) -> None:
    code, _, err = potluck("generate", tmp_path)

    assert code == 2
    assert "config.json" in err
