"""Training on one machine: stop, resume, export, generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from child_kit import TINY, lines_of, make_dataset
from PIL import Image
from safetensors.torch import load_file

from potluck.errors import BadInput, PotluckError
from potluck.protocol import RecipeRef
from potluck.train.export import generate, load_export
from potluck.train.local import Plan, train_local

GAN = RecipeRef("dcgan", {"size": 32, "width": 4, "latent": 8, "batch_size": 8})
QUICK = Plan(samples=96, taste_every_s=0, taste_count=4, evaluate=False, device="cpu", ema_decay=0.9)


def after(calls: int) -> Callable[[], bool]:
    """False so many times, then True."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def test_a_run_that_was_stopped_and_resumed_gives_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, shape=(3, 32, 32), labels=0)
    straight = train_local(GAN, *data, tmp_path / "straight", QUICK)
    first = train_local(GAN, *data, tmp_path / "halting", QUICK, stop=after(5))
    second = train_local(GAN, *data, tmp_path / "halting", QUICK, resume=True)

    assert (straight.samples, straight.stopped) == (96, False)
    assert (first.samples, first.stopped) == (40, True)
    assert (second.samples, second.steps, second.stopped) == (96, 12, False)
    for name in ("model.safetensors", "model_ema.safetensors"):
        a, b = load_file(tmp_path / "straight" / name), load_file(tmp_path / "halting" / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_local_training_learns_and_writes_its_curve(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(TINY)
    data = make_dataset(tmp_path)
    said: list[str] = []

    result = train_local(
        RecipeRef("Tiny", filename="tiny.py"),
        *data,
        tmp_path / "out",
        replace(QUICK, samples=None, epochs=10, evaluate=True),
        recipe_path=recipe,
        say=said.append,
    )

    assert result.samples == 560  # ten times the 64 samples without the 8 held-out ones
    assert result.metrics["accuracy"] >= 0.9
    assert [line["samples"] for line in lines_of(tmp_path / "out" / "metrics.jsonl")] == [0, 560]
    assert any("accuracy" in line for line in said)


def test_an_export_makes_the_same_pictures_again(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, shape=(3, 32, 32), labels=0)
    result = train_local(GAN, *data, tmp_path / "out", QUICK)

    generate(tmp_path / "out", 9, 5, tmp_path / "a.png")
    generate(tmp_path / "out", 9, 5, tmp_path / "b.png")
    generate(tmp_path / "out", 9, 6, tmp_path / "c.png")

    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png")]
    assert pictures[0] == pictures[1] != pictures[2]
    assert result.picture
    with Image.open(result.picture) as grid:
        assert grid.width == grid.height
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["recipe"]["settings"]["width"] == 4
    assert config["recipe"]["settings"]["lr"] == 2e-4


def test_an_export_of_a_recipe_from_a_file_takes_the_file_along(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(TINY)
    train_local(
        RecipeRef("Tiny", filename="mine.py"), *make_dataset(tmp_path), tmp_path / "out", QUICK, recipe_path=recipe
    )
    recipe.unlink()

    loaded, models = load_export(tmp_path / "out")

    assert type(loaded).__name__ == "Tiny"
    assert not models["net"].training
    with pytest.raises(BadInput, match="makes no pictures"):
        generate(tmp_path / "out", 4, 0, tmp_path / "x.png")


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, shape=(3, 32, 32), labels=0)
    train_local(GAN, *data, tmp_path / "out", replace(QUICK, samples=16))

    other = replace(GAN, settings={**GAN.settings, "lr": 1e-3})
    with pytest.raises(BadInput, match="was made with settings"):
        train_local(other, *data, tmp_path / "out", QUICK, resume=True)
    with pytest.raises(BadInput, match=r"there is no .*checkpoint.safetensors to resume from"):
        train_local(GAN, *data, tmp_path / "elsewhere", QUICK, resume=True)


def test_a_nan_stops_local_training_with_a_sentence(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(TINY)

    with pytest.raises(PotluckError, match="`loss` became nan at step 3"):
        train_local(
            RecipeRef("Tiny", {"nan_at": 2}, filename="tiny.py"),
            *make_dataset(tmp_path),
            tmp_path / "out",
            QUICK,
            recipe_path=recipe,
        )


def test_a_folder_that_is_no_export_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give a folder that"):
        generate(tmp_path, 4, 0, tmp_path / "x.png")
