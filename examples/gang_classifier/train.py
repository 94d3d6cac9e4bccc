"""Which digit is it? A small network on 1,200 real handwritten digits (digits.png), on one machine or on several.

    python train.py                                    here, by itself
    potluck run --gang 2..8 --wait -- python train.py  on the machines of the hub, together

Ordinary PyTorch, and three lines more. Without them the script trains the same network on one machine alone.

digits.png: 120 of each digit from MNIST (Yann LeCun and Corinna Cortes, CC BY-SA 3.0), scaled down to 14 × 14.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import potluck

SIDE, EACH = 14, 120


def digits(dtype: torch.dtype) -> tuple[TensorDataset, TensorDataset]:
    """What is learned from, and every sixth digit to look whether it was."""
    sheet = Image.open(Path(__file__).with_name("digits.png"))
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width)
    rows, columns = sheet.height // SIDE, sheet.width // SIDE
    x = pixels.view(rows, SIDE, columns, SIDE).transpose(1, 2).reshape(-1, 1, SIDE, SIDE).to(dtype) / 127.5 - 1
    y = torch.arange(len(x)) // EACH
    unseen = torch.arange(len(x)) % 6 == 0
    return TensorDataset(x[~unseen], y[~unseen]), TensorDataset(x[unseen], y[unseen])


def network() -> nn.Module:
    """GroupNorm, because BatchNorm depends on how the batch is shared out."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


@torch.no_grad()
def look(model: nn.Module, unseen: TensorDataset) -> tuple[float, float]:
    """The loss on unseen digits, and how many of them are right."""
    x, y = unseen.tensors
    logits = model(x)
    return nn.functional.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=100, help="of all machines together")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--curve", type=Path, help="write the losses on unseen digits there")
    given = parser.parse_args()
    torch.manual_seed(0)

    seen, unseen = digits(torch.float64 if given.double else torch.float32)
    model = network().to(seen.tensors[0].dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = DataLoader(seen, batch_size=given.batch, shuffle=True)

    gang = potluck.gang.join()
    loader = gang.loader(seen, batch_size=given.batch, seed=0)
    model, optimizer = gang.wrap(model, optimizer)

    curve = []
    for epoch in range(given.epochs):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss, right = look(model, unseen)
        curve.append(loss)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, {right:.0%} of {len(unseen)} unseen digits are right", flush=True)
        if given.curve is not None:
            given.curve.write_text(json.dumps(curve))


if __name__ == "__main__":
    main()
