"""How far are made pictures from real ones? The Fréchet distance on features of a small network trained on the spot.

    distance = |μ_real − μ_made|² + tr(Σ_real + Σ_made − 2 (Σ_real Σ_made)^½)

FID (Heusel et al. 2017) takes the features from a network trained on ImageNet; we have none and want none: a small
encoder learns the data itself within seconds (its classes if there are labels, how far a picture was turned, and what
it looks like at 8×8 pixels). The features are scaled so that each has variance 1 over the real pictures: 0 is "no
different", a single repeated average picture gets about the number of features (32), an untrained generator hundreds.
Numbers compare within a data set, never between data sets.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potluck.protocol import Dataset
from potluck.train import tensorio

FEATURES = 32
REAL = 2048  # pictures that it learns from and compares with, at most
STEPS, BATCH = 160, 48
VERSION = 1  # raise it when the numbers change meaning: it names the cache


@dataclass
class Judge:
    """A trained encoder and what it says of the real pictures."""

    encoder: nn.Module
    mean: Tensor  # of the real features, float64
    cov: Tensor
    contrast: float  # mean over pictures of the spread of a picture's pixels
    diversity: float  # mean over pixels of their spread between pictures

    def figures(self, made: Tensor) -> dict[str, float]:
        """`distance`; relative to real pictures, `contrast` (near 0: gray) and `diversity` (near 0: all the same)."""
        mean, cov = moments(features(self.encoder, made))
        return {
            "distance": frechet(self.mean, self.cov, mean, cov),
            "contrast": contrast(made) / max(self.contrast, 1e-6),
            "diversity": diversity(made) / max(self.diversity, 1e-6),
        }


def judge_for(dataset: Dataset, real: Tensor, labels: Tensor | None, cache: Path | None) -> Judge:
    """The judge of a data set, from the folder `cache` or trained on `real` [n, C, H, W] in [-1, 1]."""
    path = cache / f"judge-{_key(dataset, len(real))}.safetensors" if cache else None
    encoder = make_encoder(real.shape[1])
    if path and path.is_file():
        tensors, _ = tensorio.load(path)
        mean, cov = tensors.pop("real.mean"), tensors.pop("real.cov")
        encoder.load_state_dict(tensors)
    else:
        train(encoder, real, labels)
        mean, cov = moments(features(encoder, real))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensorio.save(path, encoder.state_dict() | {"real.mean": mean, "real.cov": cov})
    encoder.eval()
    return Judge(encoder, mean, cov, contrast(real), diversity(real))


def _key(dataset: Dataset, count: int) -> str:
    facts = [VERSION, count, dataset.shape, [shard.blob.hash for shard in dataset.shards]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def make_encoder(channels: int) -> nn.Module:
    def down(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.LeakyReLU(0.1, True)]

    return nn.Sequential(
        nn.AdaptiveAvgPool2d(32),  # every size costs the same
        *down(channels, 16),
        *down(16, 32),
        *down(32, 64),
        nn.Flatten(),
        nn.Linear(64 * 16, FEATURES),
        nn.BatchNorm1d(FEATURES, affine=False),  # variance 1: the scale of the distance
    )


def train(encoder: nn.Module, real: Tensor, labels: Tensor | None) -> None:
    """Teach the encoder the data. The same data give the same encoder (on one kind of machine)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d | nn.GroupNorm | nn.Linear | nn.BatchNorm1d):
                module.reset_parameters()
        classes = int(labels.max()) + 1 if labels is not None else 0
        turn, name = nn.Linear(FEATURES, 4), nn.Linear(FEATURES, max(classes, 1))
        draw = nn.Linear(FEATURES, real.shape[1] * 64)
        parts = nn.ModuleList([encoder, turn, name, draw]).train()
        optimizer = torch.optim.Adam(parts.parameters(), 2e-3)
        for _ in range(STEPS):
            chosen = torch.randint(len(real), (min(BATCH, len(real)),))
            # half of the batch stays upright, the rest is turned by one, two or three quarters
            parts_of_x = [real[part].rot90(k, (2, 3)) for k, part in enumerate(_split(chosen))]
            x = torch.cat(parts_of_x)
            turns = torch.cat([torch.full((len(part),), k) for k, part in enumerate(parts_of_x)])
            seen = encoder(x)
            loss = F.cross_entropy(turn(seen), turns)
            loss = loss + 4 * F.mse_loss(draw(seen), F.adaptive_avg_pool2d(x, 8).flatten(1))
            if labels is not None:
                loss = loss + F.cross_entropy(name(seen), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # the scale is set by the real pictures as they are, not by the turned ones
        with torch.no_grad():
            norm = encoder[-1] if isinstance(encoder, nn.Sequential) else None
            assert isinstance(norm, nn.BatchNorm1d)
            norm.reset_running_stats()
            norm.momentum = None
            encoder(real)
    encoder.eval()


def _split(chosen: Tensor) -> list[Tensor]:
    half, sixth = len(chosen) // 2, len(chosen) // 6
    return list(chosen.split([half, sixth, sixth, len(chosen) - half - 2 * sixth]))


@torch.no_grad()
def features(encoder: nn.Module, pictures: Tensor) -> Tensor:
    return torch.cat([encoder(part) for part in pictures.split(256)])


def moments(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance, in float64."""
    seen = seen.double()
    return seen.mean(0), torch.cov(seen.T)


def frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Distance of two normal distributions; never negative."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(0.0, float(distance))


def contrast(pictures: Tensor) -> float:
    return float(pictures.flatten(1).std(1).mean())


def diversity(pictures: Tensor) -> float:
    return float(pictures.std(0).mean())
