"""How does one train a generator of pictures? The DCGAN of Radford, Metz and Chintala (2015), for 32 or 64 pixels.

Two networks play against each other. The generator turns random numbers into a picture; the discriminator says how
real a picture looks. Each step first teaches the discriminator to tell real pictures from made ones, and then teaches
the generator to make pictures that the discriminator takes for real.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Adam, Optimizer

from potluck.train.recipe import Recipe


class Dcgan(Recipe):
    preset = "average"  # an outer momentum ruins a GAN
    ema = ("generator",)

    batch_size: int = 16  # small: on a few thousand pictures many steps matter more than many pictures a second
    size: int = 64  # pixels: 32 or 64
    channels: int = 3  # 3: colour, 1: gray
    width: int = 64  # channels of the widest picture inside; work grows with its square
    latent: int = 100  # random numbers a picture is made from
    lr: float = 2e-4
    beta1: float = 0.5  # a GAN chases a moving target: less momentum than Adam's usual 0.9
    smoothing: float = (
        0.9  # what the discriminator is told of real pictures; below 1 it stays unsure and teaches better
    )
    flip: bool = True  # also train on mirrored pictures; switch it off for writing

    def __post_init__(self) -> None:
        if self.size not in (32, 64):
            raise ValueError(f"size is {self.size}: this recipe draws 32 or 64 pixels")

    def models(self) -> dict[str, nn.Module]:
        doublings = 3 if self.size == 64 else 2  # from 4 pixels: 8, 16, (32,) and the last layer doubles once more
        generator = make_generator(self.latent, self.width, self.channels, doublings)
        discriminator = make_discriminator(self.width, self.channels, doublings)
        for model in (generator, discriminator):
            model.apply(initialise)
        return {"generator": generator, "discriminator": discriminator}

    def optimizers(self, models: dict[str, nn.Module]) -> dict[str, Optimizer]:
        return {name: Adam(model.parameters(), self.lr, (self.beta1, 0.999)) for name, model in models.items()}

    def step(
        self, models: dict[str, nn.Module], optimizers: dict[str, Optimizer], x: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        generator, discriminator = models["generator"], models["discriminator"]
        if self.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        fake = generator(torch.randn(len(x), self.latent, 1, 1, device=x.device))

        # The discriminator's turn. `detach`: this loss teaches the generator nothing.
        optimizers["discriminator"].zero_grad()
        on_real = discriminator(x)
        on_fake = discriminator(fake.detach())
        d_loss = bce(on_real, self.smoothing) + bce(on_fake, 0.0)
        d_loss.backward()
        optimizers["discriminator"].step()

        # The generator's turn: it wants its pictures to be called real. The discriminator passes the gradient on, but
        # must collect none of it: that would teach it to be fooled.
        discriminator.requires_grad_(False)
        optimizers["generator"].zero_grad()
        g_loss = bce(discriminator(fake), 1.0)
        g_loss.backward()
        optimizers["generator"].step()
        discriminator.requires_grad_(True)

        return {
            "d_loss": d_loss,
            "g_loss": g_loss,
            "d_real": on_real.detach().sigmoid().mean(),  # how real it finds real pictures, 0 to 1
            "d_fake": on_fake.detach().sigmoid().mean(),
        }

    def sample(self, models: dict[str, nn.Module], count: int, generator: Generator) -> Tensor:
        noise = torch.randn(count, self.latent, 1, 1, generator=generator)
        device = next(models["generator"].parameters()).device
        pictures: Tensor = models["generator"](noise.to(device))
        return pictures


def make_generator(latent: int, width: int, channels: int, doublings: int) -> nn.Module:
    """`latent` numbers → 4×4 pixels of many channels → twice the pixels, half the channels, … → a picture."""
    wide = width << doublings
    layers: list[nn.Module] = [
        nn.ConvTranspose2d(latent, wide, 4, 1, 0, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU(True),
    ]
    for _ in range(doublings):
        layers += [
            nn.ConvTranspose2d(wide, wide // 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(wide // 2),
            nn.ReLU(True),
        ]
        wide //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(wide, channels, 4, 2, 1, bias=False), nn.Tanh())


def make_discriminator(width: int, channels: int, halvings: int) -> nn.Module:
    """The generator's mirror image: a picture → half the pixels, twice the channels, … → one number."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for _ in range(halvings):
        layers += [
            nn.Conv2d(width, width * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width * 2),
            nn.LeakyReLU(0.2, True),
        ]
        width *= 2
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 0, bias=False), nn.Flatten(0))


def initialise(module: nn.Module) -> None:
    """Small random weights, as the paper has them."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def bce(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy against one target for the whole batch."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
