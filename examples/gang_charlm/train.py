"""Which letter comes next? A small recurrent network on real English text (text.txt), on one machine or on several.

    python train.py                                    here, by itself
    potluck run --gang 2..8 --wait -- python train.py  on the machines of the hub, together

Ordinary PyTorch, and three lines more. Without them the script trains the same network on one machine alone.

text.txt: six pages of Potluck's documentation and the Apache License.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import potluck

CONTEXT, WIDTH = 48, 128


class Windows(Dataset):
    """All pieces of CONTEXT letters, `stride` apart, each with the letters that follow."""

    def __init__(self, letters: Tensor, stride: int) -> None:
        self.letters, self.stride = letters, stride

    def __len__(self) -> int:
        return (len(self.letters) - CONTEXT - 1) // self.stride + 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        piece = self.letters[i * self.stride : i * self.stride + CONTEXT + 1]
        return piece[:-1], piece[1:]


class Letters(nn.Module):
    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(kinds, WIDTH // 2)
        self.memory = nn.GRU(WIDTH // 2, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, kinds)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.memory(self.embed(x))[0])


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def look(model: nn.Module, unseen: Windows) -> float:
    """The loss on the end of the text, which is not learned from."""
    pieces = [torch.stack(column) for column in zip(*(unseen[i] for i in range(len(unseen))), strict=True)]
    return loss_of(model, *pieces).item()


@torch.no_grad()
def write(model: nn.Module, alphabet: list[str], count: int = 60) -> str:
    """What it writes after a blank, always the likeliest letter."""
    text = [alphabet.index(" ")]
    for _ in range(count):
        text.append(int(model(torch.tensor([text[-CONTEXT:]]))[0, -1].argmax()))
    return "".join(alphabet[i] for i in text).replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64, help="of all machines together")
    parser.add_argument("--stride", type=int, default=16, help="letters between two pieces of the text")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--curve", type=Path, help="write the losses on unseen text there")
    given = parser.parse_args()
    torch.manual_seed(0)

    text = Path(__file__).with_name("text.txt").read_text()
    alphabet = sorted(set(text))
    letters = torch.tensor([alphabet.index(letter) for letter in text])
    split = int(0.95 * len(letters))
    seen, unseen = Windows(letters[:split], given.stride), Windows(letters[split:], CONTEXT)
    model = Letters(len(alphabet)).to(torch.float64 if given.double else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loader = DataLoader(seen, batch_size=given.batch, shuffle=True)

    gang = potluck.gang.join()
    loader = gang.loader(seen, batch_size=given.batch, seed=0)
    model, optimizer = gang.wrap(model, optimizer)

    curve = []
    for epoch in range(given.epochs):
        for x, y in loader:
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        curve.append(look(model, unseen))
        print(f"epoch {epoch + 1}: loss {curve[-1]:.3f} a letter, and it writes:{write(model, alphabet)}", flush=True)
        if given.curve is not None:
            given.curve.write_text(json.dumps(curve))


if __name__ == "__main__":
    main()
