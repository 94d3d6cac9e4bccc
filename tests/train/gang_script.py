"""A member of a gang in the tests: an ordinary training script, with a diary and with faults that a plan asks for.

`TASK` is JSON: what to train, how slow this "machine" is (it sleeps for each sample; only this script knows of it), and
which fault happens at which step and phase.
"""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import potluck
from potluck.domain import gangs
from potluck.domain.balance import Balancer
from potluck.train.gang import papers, reduce
from potluck.train.gang.profile import Event, StepRecord

WIDTH = 12


class Points(Dataset):
    """Made up, the same everywhere; each sample knows its number."""

    def __init__(self, length: int, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, WIDTH, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, 4, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int):
        return self.x[i], self.y[i], i


def network(kind: str = "plain", seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)]
    if kind == "norm":
        layers.insert(1, nn.BatchNorm1d(24))
    if kind == "wide":
        layers[2] = nn.Linear(24, 25)
        layers[4] = nn.Linear(25, 4)
    return nn.Sequential(*layers).double()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


class Diary:
    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, kind: str, **values: object) -> None:
        self._file.write(json.dumps({"kind": kind, "at": time.time(), **values}) + "\n")
        self._file.flush()


def main() -> None:
    task = json.loads(os.environ["TASK"])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook")
    reduce.BUCKET_BYTES = task.get("bucket_bytes", 2048)  # several buckets, though the model is small
    if task.get("weights"):  # fixed shares, whatever is measured
        Balancer._shares = lambda self, batch, members, paces: gangs.proportional(
            batch, [task["weights"].get(name, 1) for name in members]
        )
    if task.get("papers"):  # as if this member had another torch, or another script
        written = papers.write
        papers.write = lambda *given: {**written(*given), **task["papers"]}
    diary = Diary(Path(task["diary"]))
    faults: list[tuple[int, str, str]] = [tuple(fault) for fault in task.get("faults", [])]

    gang = potluck.gang.join()
    in_hand: list[int] = []

    def watcher(told: StepRecord | Event) -> None:
        if isinstance(told, Event):
            diary.write("event", what=told.kind, text=told.text, step=told.step)
            return
        diary.write(
            "step",
            step=told.step,
            epoch=told.epoch,
            start=told.start,
            shares=dict(told.shares),
            committed=told.is_committed,
            skipped=told.is_skipped,
            mine=list(in_hand),
            total_s=told.times.total_s,
        )
        in_hand.clear()

    gang.watch(watcher)

    def fault(phase: str) -> None:
        due = next((i for i, (at, when, _) in enumerate(faults) if when == phase and at <= gang.steps), None)
        match faults.pop(due)[2] if due is not None else None:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                diary.write("stopped")
                os.kill(os.getpid(), signal.SIGSTOP)
            case "nan":
                poison.append(1)
            case "drift":
                with torch.no_grad():
                    next(iter(gang_model.parameters())).add_(1e-3)

    poison: list[int] = []
    dataset = Points(task["length"], task.get("data_seed", 1))
    # a member's own seed must not matter: the first member's weights are taken over
    model = network(task.get("model", "plain"), task.get("seed", 3))
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9) if task.get("schedule") else None
    loader = gang.loader(
        dataset, batch_size=task["batch"], at_once=task.get("at_once", 0), workers=task.get("workers", 1)
    )
    gang_model, optimizer = gang.wrap(model, optimizer, compress=task.get("compress", "none"))
    if scheduler is not None:
        gang.keep(scheduler=scheduler)
    if task.get("clip"):
        gang.clip_grad_norm(task["clip"])
    if task.get("resume"):
        gang.resume(task["resume"])
    next(gang_model.children()).register_full_backward_hook(lambda *_: fault("backward"))
    delay_s = task.get("delay_s", 0.0)
    diary.write("begin")
    for epoch in gang.epochs(task["epochs"]):
        diary.write("epoch", epoch=epoch)
        for x, y, numbers in loader:
            if not in_hand and task.get("slow_from", -1) >= 0 and gang.steps >= task["slow_from"]:
                delay_s = task["slow_delay_s"]
            in_hand.extend(numbers.tolist())
            fault("forward")
            time.sleep(task.get("base_s", 0.0) + delay_s * len(y))
            loss = nn.functional.cross_entropy(gang_model(x), y)
            if poison:
                loss = loss * float("nan")
                poison.clear()
            loss.backward()
            fault("commit")
            optimizer.step()
            fault("after")
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            gang.log(loss=loss.item())
            if task.get("save_every") and gang.committed and gang.steps % task["save_every"] == 0:
                gang.save(task["save"])
    weights = [value.tolist() for value in gang_model.state_dict().values()]
    diary.write(
        "end",
        weights=weights,
        steps=gang.steps,
        noise=gang.noise_scale,
        figures=gang.figures,
        sentence=gang.profile.sentence(),
        means=gang.profile.means(),
    )


if __name__ == "__main__":
    main()
