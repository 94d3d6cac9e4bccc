"""The two networks of the DCGAN and how they teach each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from potluck.recipes.dcgan import Dcgan


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_dcgan_64_has_the_size_that_the_benchmarks_speak_of() -> None:
    models = Dcgan(size=64, width=64).models()

    assert size(models["generator"]) / 1e6 == pytest.approx(3.58, abs=0.005)
    assert size(models["discriminator"]) / 1e6 == pytest.approx(2.77, abs=0.005)


@pytest.mark.parametrize("pixels", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_have_the_size_that_was_asked_for(pixels: int, channels: int) -> None:
    recipe = Dcgan(size=pixels, channels=channels, width=8, batch_size=4)
    models = recipe.models()
    x = torch.rand(4, channels, pixels, pixels) * 2 - 1

    figures = recipe.step(models, recipe.optimizers(models), x, None)
    pictures = recipe.sample(models, 3, torch.Generator().manual_seed(0))

    assert pictures.shape == (3, channels, pixels, pixels)
    assert pictures.abs().max() <= 1
    assert set(figures) == {"d_loss", "g_loss", "d_real", "d_fake"}


class Recorder(torch.optim.SGD):
    """Keeps what gradients it was given, and moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.seen: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]


def test_the_generators_loss_leaves_no_gradient_in_the_discriminator() -> None:
    recipe = Dcgan(size=32, width=4, latent=8, batch_size=8, flip=False)
    torch.manual_seed(0)
    models = recipe.models()
    recorders = {name: Recorder(model) for name, model in models.items()}
    x = torch.rand(8, 3, 32, 32) * 2 - 1

    torch.manual_seed(5)
    recipe.step(models, dict(recorders), x, None)

    # the textbook's gradient, on the same noise, from a copy
    torch.manual_seed(5)
    fake = models["generator"](torch.randn(8, 8, 1, 1)).detach()
    on_real, on_fake = models["discriminator"](x), models["discriminator"](fake)
    loss = F.binary_cross_entropy_with_logits(on_real, torch.full((8,), 0.9)) + F.softplus(on_fake).mean()
    wanted = torch.autograd.grad(loss, list(models["discriminator"].parameters()))
    for got, want in zip(recorders["discriminator"].seen, wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    # and after the whole step nothing has been added to it
    for parameter, want in zip(models["discriminator"].parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, want, atol=1e-6)
        assert parameter.requires_grad


def test_a_mirrored_half_of_the_batch_is_still_the_batch() -> None:
    recipe = Dcgan(size=32, width=4, latent=8, batch_size=64)
    seen: list[torch.Tensor] = []
    models = recipe.models()
    models["discriminator"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    x = torch.rand(64, 3, 32, 32)

    recipe.step(models, recipe.optimizers(models), x, None)

    mirrored = [bool(torch.equal(got, want.flip(2))) for got, want in zip(seen[0], x, strict=True)]
    straight = [bool(torch.equal(got, want)) for got, want in zip(seen[0], x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, straight, strict=True))
    assert 10 < sum(mirrored) < 54
