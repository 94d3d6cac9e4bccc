"""The training script of the gangs in these tests, as a user would write it: an image classifier, three lines more than alone.

It keeps a diary for the tests. TASK is JSON: {"diary": folder, "length", "batch", "epochs", "dtype": "float64", "weights": 3}
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

SIDE, CLASSES = 40, 5


class Pictures(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Noisy copies of one picture a class; the same everywhere. Each knows its number."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        drafts = torch.randn(CLASSES, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, CLASSES, (length,), generator=generator)
        noise = torch.randn(length, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
        self.x = (drafts[self.y] + 8.0 * noise).to(dtype)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.x[i], self.y[i], i


def network(dtype: torch.dtype, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    left = (SIDE + 1) // 2
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh()),
        *(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(8 * left * left, CLASSES)),
    ).to(dtype)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def main() -> None:
    import potluck

    task = json.loads(os.environ["TASK"])
    torch.set_num_threads(1)
    dtype = getattr(torch, task.get("dtype", "float64"))
    model = network(dtype, task.get("weights", 3))
    optimizer = optimizer_of(model)
    dataset = Pictures(task["length"], dtype)

    gang = potluck.gang.join()
    loader = gang.loader(dataset, batch_size=task["batch"], seed=5)
    model, optimizer = gang.wrap(model, optimizer)

    file = Path(task["diary"], f"{gang.name}-{os.getpid()}.jsonl").open("a")  # noqa: SIM115 - open to the end

    def write(kind: str, **values: Any) -> None:
        file.write(json.dumps({"kind": kind, "at": time.time(), **values}) + "\n")
        file.flush()

    numbers: list[int] = []
    loss_sum = 0.0

    def watcher(told: Any) -> None:
        nonlocal loss_sum
        if hasattr(told, "text"):
            write("event", what=told.kind, text=told.text, step=told.step)
            return
        where = {"step": told.step, "epoch": told.epoch, "start": told.start, "shares": dict(told.shares)}
        write(
            "step",
            **where,
            committed=told.is_committed,
            mine=numbers.copy(),
            loss_sum=loss_sum,
            ready_s=dict(told.ready_s),
        )
        numbers.clear()
        loss_sum = 0.0

    gang.watch(watcher)
    write("begin")
    for _ in gang.epochs(task["epochs"]):
        for x, y, chosen in loader:
            numbers.extend(chosen.tolist())
            loss = nn.functional.cross_entropy(model(x), y)
            loss_sum += loss.item() * len(y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            gang.log(loss=loss.item())
    write("end", steps=gang.steps, weights=[value.tolist() for value in model.state_dict().values()])
    print(f"done after {gang.steps} steps", flush=True)


if __name__ == "__main__":
    main()
