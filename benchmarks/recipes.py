"""Recipes for the benchmarks only: one carries DCGAN-64's tensors and computes next to nothing, one steps in a blink."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from potluck.recipes.dcgan import Dcgan
from potluck.train.recipe import Recipe


class Carrier(Recipe):
    """The 6.3 million parameters of DCGAN-64, nudged a little at each step so that there is something to send."""

    preset = "average"
    batch_size: int = 256
    size: int = 8
    channels: int = 1

    def models(self) -> dict[str, nn.Module]:
        return Dcgan(size=64, width=64).models()

    def optimizers(self, models: dict[str, nn.Module]) -> dict[str, Optimizer]:
        return {name: SGD(model.parameters(), 1e-2) for name, model in models.items()}

    def step(
        self, models: dict[str, nn.Module], optimizers: dict[str, Optimizer], x: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        scale = float(x[0].mean())
        for model in models.values():
            for parameter in model.parameters():
                parameter.grad = parameter.detach() * scale
        for optimizer in optimizers.values():
            optimizer.step()
        return {"loss": x.new_tensor(scale)}


class Blink(Recipe):
    """A linear layer: a step takes well under a millisecond, so what is left is Potluck itself."""

    preset = "nesterov"
    batch_size: int = 64
    size: int = 8
    channels: int = 1

    def models(self) -> dict[str, nn.Module]:
        return {"net": nn.Linear(64, 10)}

    def optimizers(self, models: dict[str, nn.Module]) -> dict[str, Optimizer]:
        return {"net": SGD(models["net"].parameters(), 1e-3)}

    def step(
        self, models: dict[str, nn.Module], optimizers: dict[str, Optimizer], x: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        optimizers["net"].zero_grad()
        loss = models["net"](x.flatten(1)).square().mean()
        loss.backward()
        optimizers["net"].step()
        return {"loss": torch.as_tensor(loss.item())}
