"""Small real data, small recipes, and a real training child to talk to."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from potluck.protocol import (
    Blob,
    ChildEvent,
    Dataset,
    DoUnit,
    FromChild,
    Instruction,
    Layout,
    RecipeRef,
    Shard,
    UnitSpec,
    WeightFile,
)
from potluck.train.recipe import load_recipe
from potluck.train.weights import Weights, gather, layout_of, save_snapshot

TINY = '''
import torch
from torch import nn
from potluck.train.recipe import Recipe

class Tiny(Recipe):
    """Two layers on 4x4 pixels. Each step takes `step_s` on the test's clock, if it has one."""
    batch_size: int = 4
    size: int = 4
    channels: int = 1
    lr: float = 0.05
    step_s: float = 1.0
    norm: bool = False
    nan_at: int = -1
    broken: bool = False

    def models(self):
        first = nn.BatchNorm1d(16) if self.norm else nn.Identity()
        return {"net": nn.Sequential(nn.Flatten(), first, nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 2))}

    def optimizers(self, models):
        self.steps = 0
        return {"net": torch.optim.Adam(models["net"].parameters(), self.lr)}

    def step(self, models, optimizers, x, y):
        if self.broken:
            raise RuntimeError("this recipe is broken")
        try:
            from child_kit import CLOCK
            CLOCK.now += self.step_s
        except ImportError:
            pass
        loss = nn.functional.cross_entropy(models["net"](x), y)
        if self.steps == self.nan_at:
            loss = loss * float("nan")
        self.steps += 1
        optimizers["net"].zero_grad()
        loss.backward()
        optimizers["net"].step()
        return {"loss": loss}

    def evaluate(self, models, x, y):
        return {"accuracy": (models["net"](x).argmax(1) == y).float().mean().item()}
'''


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def make_dataset(
    folder: Path, *, samples: int = 64, shape: tuple[int, ...] = (1, 4, 4), held_out: int = 8, labels: int = 2
) -> tuple[Dataset, list[str]]:
    """Dark pictures are class 0, bright ones class 1, in shards of 32."""
    generator = torch.Generator().manual_seed(3)
    shards, paths = [], []
    for first in range(0, samples, 32):
        count = min(32, samples - first)
        y = torch.randint(2, (count,), generator=generator)
        x = torch.randint(0, 100, (count, *shape), generator=generator, dtype=torch.uint8)
        x += (y * 120).to(torch.uint8).view(-1, *[1] * len(shape))
        path = folder / f"shard-{first}.safetensors"
        save_file({"x": x, "y": y} if labels else {"x": x}, path)
        content = path.read_bytes()
        shards.append(Shard(Blob(hashlib.sha256(content).hexdigest(), len(content)), count))
        paths.append(str(path))
    names = ["dark", "bright"][:labels]
    return Dataset("tiny", samples, shards, list(shape), labels=names, held_out=held_out), paths


@dataclass
class Bench:
    """A run of the tiny recipe, as an agent knows it."""

    folder: Path
    dataset: Dataset
    paths: list[str]
    ref: RecipeRef
    recipe_path: str
    layout: Layout
    start: Weights

    def snapshot(self, version: int, weights: Weights | None = None) -> WeightFile:
        weights = weights or self.start
        path = save_snapshot(self.folder / f"v{version}.safetensors", weights)
        return WeightFile("snapshot", version, "fp32", str(path), weights.sha256())

    def shifted(self, by: float) -> Weights:
        weights = self.start.clone()
        weights.params.add_(by)
        return weights

    def unit(
        self,
        lease: str,
        *,
        weights: list[WeightFile] | None = None,
        tick_s: float = 10.0,
        share: float = 1.0,
        **spec: Any,
    ) -> DoUnit:
        base = UnitSpec([(0, 1000)], box_s=10.0, next_tick_s=tick_s, overlap_s=2.0, codec="fp32")
        return DoUnit(
            lease_id=lease,
            run_id="run",
            recipe=self.ref,
            recipe_path=self.recipe_path,
            dataset=self.dataset,
            shard_paths=self.paths,
            layout=self.layout,
            seed=1,
            spec=replace(base, **spec),
            tick_s=tick_s,
            weights=[] if weights is None else weights,
            device="cpu",
            share=share,
            out=str(self.folder / lease),
        )


def make_bench(folder: Path, **settings: Any) -> Bench:
    folder.mkdir(parents=True, exist_ok=True)
    dataset, paths = make_dataset(folder)
    path = folder / "recipe-blob"
    path.write_text(TINY)
    ref = RecipeRef("Tiny", settings, filename="tiny.py")
    torch.manual_seed(0)
    models = load_recipe(ref, path, dataset).models()
    layout = layout_of(models)
    return Bench(folder, dataset, paths, ref, str(path), layout, gather(models, layout))


class ChildProcess:
    """`python -m potluck.train`, as the agent starts it."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        source = Path(__file__).parents[2] / "src"
        environment = os.environ | {
            "POTLUCK_EVENTS_FD": str(writing),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(source),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "potluck.train"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[writing],
            env=environment,
        )
        os.close(writing)
        self.events: queue.Queue[ChildEvent] = queue.Queue()
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()
        self.errors = b""
        threading.Thread(target=self._drain, daemon=True).start()

    def _read(self, reading: int) -> None:
        decoder = msgspec.json.Decoder(FromChild)
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                self.events.put(decoder.decode(line))

    def _drain(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.errors += line

    def tell(self, *instructions: Instruction) -> None:
        for instruction in instructions:
            self.write(msgspec.json.encode(instruction) + b"\n")

    def write(self, line: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def wait_for(self, kind: type[ChildEvent], lease_id: str = "", timeout_s: float = 60.0) -> Any:
        """The next event of that kind; others are passed over."""
        while True:
            try:
                event = self.events.get(timeout=timeout_s)
            except queue.Empty:
                raise AssertionError(f"no {kind.__name__} came; stderr: {self.errors.decode()[-2000:]}") from None
            if isinstance(event, kind) and (not lease_id or getattr(event, "lease_id", "") == lease_id):
                return event

    def close(self) -> int:
        assert self.process.stdin
        if not self.process.stdin.closed:
            self.process.stdin.close()
        code = self.process.wait(timeout=30)
        assert self.process.stderr
        return code


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
