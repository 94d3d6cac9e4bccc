"""Distances, statistics, grids; and on which device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from potluck.errors import BadInput
from potluck.protocol import Dataset, RecipeRef
from potluck.train import taste as tastes
from potluck.train.device import choose, pause_s
from potluck.train.judge import Judge, frechet, judge_for
from potluck.train.recipe import load_recipe
from potluck.train.watch import NotFinite, Watch
from potluck.train.weights import Weights, gather, layout_of


def discs(count: int, seed: int = 0) -> torch.Tensor:
    """Real pictures, nearly: discs of any colour, place and size on white."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    place = torch.rand(count, 2, 1, 1, generator=generator) * 16 + 8
    radius = torch.rand(count, 1, 1, generator=generator) * 6 + 3
    inside = ((rows - place[:, 0]) ** 2 + (columns - place[:, 1]) ** 2 < radius**2)[:, None]
    colour = torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1
    return torch.where(inside, colour, torch.ones(1))


DISCS = Dataset("discs", 500, [], [3, 32, 32])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def judge(cache: Path) -> Judge:
    return judge_for(DISCS, discs(500), None, cache)


def test_the_distance_of_two_normal_distributions_is_known() -> None:
    one, two = torch.zeros(2).double(), torch.tensor([3.0, 4.0]).double()
    cov = torch.diag(torch.tensor([4.0, 9.0])).double()

    assert frechet(one, cov, one, cov) == pytest.approx(0, abs=1e-9)
    assert frechet(one, cov, two, cov) == pytest.approx(25)
    assert frechet(one, cov, one, torch.eye(2).double()) == pytest.approx(1 + 4)


def test_the_distance_orders_pictures_by_how_good_they_are(judge: Judge) -> None:
    real = discs(500, seed=1)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(2)).mul(0.3)

    distances = [
        judge.figures(pictures)["distance"]
        for pictures in (real, (real + 0.5 * noise).clamp(-1, 1), (real * 0.3 + noise).clamp(-1, 1), noise)
    ]

    assert distances == sorted(distances)
    assert distances[0] < 2
    assert distances[-1] > 30


def test_gray_pictures_and_one_picture_over_and_over_are_seen(judge: Judge) -> None:
    gray = judge.figures(torch.full((64, 3, 32, 32), 0.1))
    same = judge.figures(discs(1).expand(64, 3, 32, 32))

    assert gray["contrast"] == pytest.approx(0, abs=0.01)
    assert same["diversity"] == pytest.approx(0, abs=0.01)
    assert min(gray["distance"], same["distance"]) > 10


def test_a_judge_comes_back_from_its_cache_the_same(judge: Judge, cache: Path) -> None:
    loaded = judge_for(DISCS, discs(500), None, cache)

    pictures = discs(64, seed=3)
    assert len(list(cache.iterdir())) == 1
    assert loaded.figures(pictures) == judge.figures(pictures)


def test_statistics_are_settled_for_the_weights_that_are_there() -> None:
    recipe = load_recipe(RecipeRef("dcgan", {"size": 32, "width": 4, "latent": 8}))
    torch.manual_seed(0)
    models = recipe.models()
    norm = next(m for m in models["generator"].modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.running_mean is not None
    norm.running_mean.fill_(100.0)
    before = next(m for m in models["discriminator"].modules() if isinstance(m, nn.BatchNorm2d)).running_mean

    tastes.settle(recipe, models, recipe.ema)

    assert norm.running_mean.abs().max() < 10
    assert not norm.training
    assert norm.momentum == 0.1
    assert before is not None
    assert before.abs().max() == 0


def test_the_fixed_noise_gives_the_same_first_pictures_whatever_the_count() -> None:
    recipe = load_recipe(RecipeRef("dcgan", {"size": 32, "width": 4, "latent": 8}))
    models = recipe.models()
    tastes.settle(recipe, models, recipe.ema)

    few, many = tastes.sampled(recipe, models, 9, 3), tastes.sampled(recipe, models, 100, 3)

    assert torch.allclose(few, many[:9], atol=1e-5)
    assert not torch.allclose(few, tastes.sampled(recipe, models, 9, 4), atol=1e-3)


def test_the_average_takes_the_place_of_the_named_models_only() -> None:
    models = {"generator": nn.Linear(2, 2), "other": nn.Linear(2, 1)}
    layout = layout_of(models)
    weights = gather(models, layout)
    ema = torch.arange(layout.param_count, dtype=torch.float32)

    mixed = tastes.averaged(weights, {"ema": ema}, layout, ("generator",))

    assert isinstance(mixed, Weights)
    assert torch.equal(mixed.params[:6], ema[:6])
    assert torch.equal(mixed.params[6:], weights.params[6:])
    assert tastes.averaged(weights, {}, layout, ("generator",)) is weights


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_is_a_picture_of_all_samples(tmp_path: Path, channels: int) -> None:
    pictures = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, channels, 8, 8)

    tastes.grid(pictures, tmp_path / "sub" / "grid.png")

    with Image.open(tmp_path / "sub" / "grid.png") as grid:
        assert grid.mode == ("RGB" if channels == 3 else "L")
        assert grid.width / grid.height == pytest.approx(1.5, rel=0.05)
        assert grid.convert("L").getpixel((grid.width // 6, grid.height // 4)) == 0
    with Image.open(tmp_path / "sub" / "grid.png") as grid:
        assert {0, 51, 102, 153, 204, 255} == {value for _, value in grid.convert("L").getcolors() or []}


# --- devices and figures


@pytest.mark.parametrize(
    ("wanted", "cuda", "mps", "chosen"),
    [
        ("auto", 2, False, "cuda:0"),
        ("auto", 0, True, "mps"),
        ("auto", 0, False, "cpu"),
        ("cpu", 2, True, "cpu"),
        ("cuda", 1, False, "cuda:0"),
        ("cuda:1", 2, False, "cuda:1"),
        ("mps", 0, True, "mps"),
    ],
)
def test_the_device_is_the_one_that_was_asked_for_or_the_best(wanted: str, cuda: int, mps: bool, chosen: str) -> None:
    assert choose(wanted, cuda=cuda, mps=mps) == chosen


@pytest.mark.parametrize("wanted", ["cuda", "cuda:2", "mps", "tpu", "cuda:x", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(wanted: str) -> None:
    with pytest.raises(BadInput, match="auto"):
        choose(wanted, cuda=0, mps=False)


def test_rest_is_what_makes_the_share() -> None:
    assert pause_s(1.0, 1.0) == 0
    assert pause_s(1.0, 0.5) == 1
    assert pause_s(2.0, 0.25) == 6


def test_figures_are_averaged_and_watched() -> None:
    watch = Watch()
    watch.add({"loss": torch.tensor(2.0, requires_grad=True), "accuracy": 0.5})
    watch.add({"loss": torch.tensor(4.0), "accuracy": 1.0})

    assert watch.recent() == {"loss": 3.0, "accuracy": 0.75}
    watch.add({"loss": 0.0, "accuracy": 0.0})
    assert watch.recent() == {"loss": 0.0, "accuracy": 0.0}
    assert watch.means() == {"loss": 2.0, "accuracy": 0.5}
    with pytest.raises(NotFinite, match="`loss` became inf at step 4"):
        watch.add({"loss": float("inf")})
