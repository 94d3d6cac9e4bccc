"""A recipe of a user's own, outside the package: learn which half of an 8×8 picture is brighter."""

import time

import torch
import torch.nn.functional as F
from torch import nn

from potluck.train.recipe import Recipe


class Tiny(Recipe):
    preset = "nesterov"

    batch_size: int = 32
    size: int = 8
    channels: int = 1
    pause_ms: float = 20.0  # a slow device, slept instead of burnt: the tests' two cores are shared

    def models(self):
        return {"net": nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))}

    def optimizers(self, models):
        return {"net": torch.optim.Adam(models["net"].parameters(), 1e-3)}

    def step(self, models, optimizers, x, y):
        time.sleep(self.pause_ms / 1000)
        brighter = (x[..., :4].mean((1, 2, 3)) > x[..., 4:].mean((1, 2, 3))).long()
        optimizers["net"].zero_grad()
        loss = F.cross_entropy(models["net"](x), brighter)
        loss.backward()
        optimizers["net"].step()
        return {"loss": loss.detach()}
