"""How does one teach a network to name what is in a small picture? Three convolutions, then a vote.

Works for gray and colour pictures of 16 pixels and more. It has no batch statistics (GroupNorm instead of BatchNorm),
so that the weights are all there is to share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from potluck.train.recipe import Recipe


class Classifier(Recipe):
    preset = "nesterov"
    ema = ("net",)  # the average of the last steps names better than the last step does

    batch_size: int = 32
    size: int = 28  # pixels
    channels: int = 1  # 1: gray, 3: colour
    width: int = 16  # channels of the first layer
    classes: int = 10  # at least as many as the data has
    lr: float = 2e-3
    weight_decay: float = 0.01
    shift: int = 2  # pixels by which training pictures are moved about, so that it does not learn places by heart

    def __post_init__(self) -> None:
        if self.size < 16 or self.width % 4:
            raise ValueError("size must be at least 16, and width a multiple of 4")

    def models(self) -> dict[str, nn.Module]:
        if len(self.labels) > self.classes:
            raise ValueError(f"the data has {len(self.labels)} classes: --set classes={len(self.labels)}")
        w = self.width
        net = nn.Sequential(
            *block(self.channels, w),
            *block(w, 2 * w),
            *block(2 * w, 4 * w),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(4 * w * 9, self.classes),
        )
        return {"net": net}

    def optimizers(self, models: dict[str, nn.Module]) -> dict[str, Optimizer]:
        return {"net": AdamW(models["net"].parameters(), self.lr, weight_decay=self.weight_decay)}

    def step(
        self, models: dict[str, nn.Module], optimizers: dict[str, Optimizer], x: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        scores = models["net"](moved(x, self.shift))
        loss = F.cross_entropy(scores, labels(y))
        optimizers["net"].zero_grad()
        loss.backward()
        optimizers["net"].step()
        return {"loss": loss, "accuracy": (scores.detach().argmax(1) == y).float().mean()}

    def evaluate(self, models: dict[str, nn.Module], x: Tensor, y: Tensor | None) -> dict[str, float]:
        scores, y = models["net"](x), labels(y)
        return {
            "loss": F.cross_entropy(scores, y).item(),
            "accuracy": (scores.argmax(1) == y).float().mean().item(),
        }


def block(inputs: int, outputs: int) -> list[nn.Module]:
    """See patterns, keep the channels on one scale, halve the pixels."""
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.ReLU(True),
        nn.MaxPool2d(2),
    ]


def moved(x: Tensor, pixels: int) -> Tensor:
    """The batch, moved by up to so many pixels each way; what comes in at the edge is what was at the edge."""
    if not pixels:
        return x
    down, right = (int(n) for n in torch.randint(-pixels, pixels + 1, (2,)))
    padded = F.pad(x, (pixels,) * 4, mode="replicate")
    height, width = x.shape[2:]
    return padded[:, :, pixels + down :, pixels + right :][:, :, :height, :width]


def labels(y: Tensor | None) -> Tensor:
    if y is None:
        raise ValueError("this data has no labels: give a folder with one subfolder a class, or arrays with labels")
    return y
