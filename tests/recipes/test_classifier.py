"""The classifier learns, for gray and colour, and says what it lacks."""

from __future__ import annotations

import pytest
import torch

from potluck.protocol import Dataset, RecipeRef
from potluck.recipes.classifier import Classifier, moved
from potluck.train.recipe import load_recipe


def stripes(count: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class 0 has upright stripes, class 1 lying ones, both shifted at random."""
    y = torch.arange(count) % 2
    x = torch.zeros(count, channels, 16, 16)
    for i in range(count):
        lines = (torch.arange(16) + torch.randint(4, ())) % 4 < 2
        x[i] = lines.view(1, 1, 16) if y[i] == 0 else lines.view(1, 16, 1)
    return x * 2 - 1, y


@pytest.mark.parametrize("channels", [1, 3])
def test_it_learns(channels: int) -> None:
    torch.manual_seed(0)
    recipe = Classifier(size=16, channels=channels, width=8)
    models = recipe.models()
    optimizers = recipe.optimizers(models)
    for _ in range(40):
        recipe.step(models, optimizers, *stripes(32, channels))

    figures = recipe.evaluate(models, *stripes(64, channels))

    assert figures["accuracy"] == 1.0
    assert figures["loss"] < 0.2


def test_moving_pictures_keeps_their_size_and_content() -> None:
    x = torch.rand(2, 1, 16, 16)

    assert torch.equal(moved(x, 0), x)
    for _ in range(20):
        y = moved(x, 2)
        assert y.shape == x.shape
        assert any(
            torch.equal(y[:, :, 2:14, 2:14], x[:, :, 2 + d : 14 + d, 2 + r : 14 + r])
            for d in range(-2, 3)
            for r in range(-2, 3)
        )


def test_data_without_labels_is_explained() -> None:
    recipe = Classifier()
    models = recipe.models()

    with pytest.raises(ValueError, match="no labels"):
        recipe.step(models, recipe.optimizers(models), torch.zeros(2, 1, 28, 28), None)


def test_too_many_classes_name_the_setting() -> None:
    dataset = Dataset("many", 10, [], [1, 28, 28], labels=[str(i) for i in range(12)])
    recipe = load_recipe(RecipeRef("classifier"), "", dataset)

    with pytest.raises(ValueError, match="--set classes=12"):
        recipe.models()
