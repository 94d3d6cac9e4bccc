"""How is the same recipe trained on this machine alone, with no hub?

The loader, the recipe, the tastes and the share are the pool's; what is missing is everything between machines. The one
file that matters, checkpoint.safetensors, is written at every taste and at the end, and `resume` goes on from it at the
very sample, with the same random numbers: a run that was stopped and resumed gives the weights of one that was not.
"""

from __future__ import annotations

import contextlib
import copy
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from potluck.errors import BadInput, PotluckError
from potluck.protocol import Dataset, RecipeRef
from potluck.train import checkpoint
from potluck.train import device as devices
from potluck.train import taste as tastes
from potluck.train.data import ShardReader, to_float
from potluck.train.export import export
from potluck.train.pool import seed_noise
from potluck.train.recipe import Recipe, current, load_recipe, where
from potluck.train.tasks import build
from potluck.train.watch import NotFinite, Watch
from potluck.train.weights import gather, layout_of

CHECKPOINT = "checkpoint.safetensors"
AVERAGE_EVERY = 8  # steps
SAY_EVERY_S = 5.0
SMALLEST_BATCH = 2  # BatchNorm cannot learn from one sample


@dataclass(frozen=True)
class Plan:
    """How far and how to train. The first limit that is reached ends it."""

    samples: int | None = None
    epochs: float | None = None
    duration_s: float | None = None  # of training, tastes not counted
    seed: int = 0
    share: float = 1.0
    device: str = "auto"
    ema_decay: float = 0.5  # per 1,000 samples, as in the pool
    taste_every_s: float = 20.0  # 0: only the first and the last
    taste_count: int = 64
    evaluate: bool = True


@dataclass
class LocalResult:
    samples: int  # in all, resumed ones included
    steps: int
    seconds: float  # of training, tastes and checkpoints not counted
    samples_per_s: float  # of this call
    stopped: bool  # before the plan's end
    first_metrics: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    picture: Path | None = None


def train_local(
    ref: RecipeRef,
    dataset: Dataset,
    shard_paths: Sequence[str],
    out_dir: Path,
    plan: Plan,
    *,
    recipe_path: str | Path = "",
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> LocalResult:
    """Train as `plan` says and leave checkpoint, sample grids and an export in `out_dir`.

    Ctrl-C or `stop` ends it after the present step, with a checkpoint; a second Ctrl-C at once, without.
    """
    recipe = load_recipe(ref, recipe_path, dataset)
    session = _Session(recipe, dataset, shard_paths, out_dir, plan)
    if resume:
        session.resume()
        say(f"resuming at sample {session.at.position:,}")
    out_dir.mkdir(parents=True, exist_ok=True)
    before_samples, before_s = session.at.position, session.at.seconds
    with interrupts() as asked:
        first = session.taste(say)
        session.run(say, lambda: asked.is_set() or stop())
        session.save()
        last = session.taste(say) if session.at.position > before_samples else first
    session.export(ref, recipe_path)
    seconds = session.at.seconds - before_s
    return LocalResult(
        samples=session.at.position,
        steps=session.at.steps,
        seconds=session.at.seconds,
        samples_per_s=(session.at.position - before_samples) / seconds if seconds else 0.0,
        stopped=not session.is_over(),
        first_metrics=first,
        metrics=last,
        picture=session.picture,
    )


class _Session:
    def __init__(self, recipe: Recipe, dataset: Dataset, shard_paths: Sequence[str], out: Path, plan: Plan) -> None:
        self.recipe, self.dataset, self.paths, self.out, self.plan = recipe, dataset, list(shard_paths), out, plan
        self.device = devices.pick(plan.device)
        torch.manual_seed(plan.seed)
        self.models = {name: model.to(self.device).train() for name, model in build(recipe).items()}
        self.optimizers = recipe.optimizers(self.models)
        self.averages: dict[str, nn.Module] = {}
        if plan.ema_decay > 0:
            self.averages = {name: copy.deepcopy(self.models[name]).requires_grad_(False) for name in recipe.ema}
        self.at = checkpoint.Progress(origin=self.origin())
        self.picture: Path | None = None
        self.metrics: dict[str, float] = {}  # of the last taste
        seed_noise(plan.seed, "local")

    def origin(self) -> dict[str, Any]:
        return {
            "recipe": type(self.recipe).__name__,
            "settings": current(self.recipe),
            "data": [shard.blob.hash for shard in self.dataset.shards],
            "seed": self.plan.seed,
        }

    def resume(self) -> None:
        path = self.out / CHECKPOINT
        if not path.exists():
            raise BadInput(f"there is no {path} to resume from: start without --resume")
        self.at = checkpoint.load(path, self.models, self.averages, self.optimizers, self.origin())

    def save(self) -> None:
        checkpoint.save(self.out / CHECKPOINT, self.models, self.averages, self.optimizers, self.at)

    @property
    def target(self) -> int | None:
        """The position to end at."""
        limits = [self.plan.samples] if self.plan.samples is not None else []
        if self.plan.epochs is not None:
            limits.append(round(self.plan.epochs * self.dataset.train_samples))
        return min(limits, default=None)

    def is_over(self) -> bool:
        if self.plan.duration_s is not None and self.at.seconds >= self.plan.duration_s:
            return True
        return self.target is not None and self.target - self.at.position < SMALLEST_BATCH

    def run(self, say: Callable[[str], None], stop: Callable[[], bool]) -> None:
        last = self.target if self.target is not None else self.at.position + 10**15
        batches = ShardReader(self.paths, self.dataset, self.plan.seed).batches(
            [(self.at.position, last)], self.recipe.batch_size
        )
        watch = Watch()
        said = tasted = now = time.monotonic()
        mark = self.at.position
        while not self.is_over() and not stop():
            batch = next(batches, None)
            if batch is None or len(batch) < SMALLEST_BATCH:
                break
            x = to_float(batch.x, self.device)
            y = batch.y.to(self.device) if batch.y is not None else None
            try:
                watch.add(self.recipe.step(self.models, self.optimizers, x, y))
            except NotFinite as error:
                raise PotluckError(f"{error}: a lower lr may help. The last checkpoint is {self.out}") from None
            except Exception as error:
                raise PotluckError(f"the recipe's step failed: {where(error)}") from error
            self.at.position += len(batch)
            self.at.steps += 1
            if self.at.steps % AVERAGE_EVERY == 0:
                self.average(len(batch) * AVERAGE_EVERY)
            if self.plan.share < 1:
                devices.finish(self.device)
                time.sleep(devices.pause_s(time.monotonic() - now, self.plan.share))
            before, now = now, time.monotonic()
            self.at.seconds += now - before
            if now - said >= SAY_EVERY_S:
                figures = ", ".join(f"{name} {value:.3g}" for name, value in watch.recent().items())
                of = f" of {self.target:,}" if self.target else ""
                say(f"{self.at.position:,}{of} samples, {(self.at.position - mark) / (now - said):,.0f}/s, {figures}")
                said, mark = now, self.at.position
            if self.plan.taste_every_s and now - tasted >= self.plan.taste_every_s:
                self.save()
                self.taste(say)
                spent = time.monotonic() - now
                said, now = said + spent, now + spent
                tasted = now

    @torch.no_grad()
    def average(self, samples: int) -> None:
        """The pool's rule: `ema_decay` per 1,000 samples, a young average over the last tenth of what there was."""
        young = (self.at.position - samples) / self.at.position
        decay = min(self.plan.ema_decay ** (samples / 1000), max(young, 0.0) ** 9)
        for name, average in self.averages.items():
            torch._foreach_lerp_(list(average.parameters()), list(self.models[name].parameters()), 1 - decay)

    def taste(self, say: Callable[[str], None]) -> dict[str, float]:
        folder = self.out / "samples"
        with torch.random.fork_rng(devices=[]):
            metrics, picture = tastes.taste(
                self.recipe,
                {**self.models, **self.averages},
                self.paths,
                folder,
                seed=self.plan.seed,
                count=self.plan.taste_count,
                evaluate=self.plan.evaluate,
                cache=self.out / "judges",
            )
        for model in self.models.values():
            model.train()
        if picture:
            self.picture = picture.replace(folder / f"{self.at.position:09d}.png")
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"samples": self.at.position, "seconds": self.at.seconds, **metrics}) + "\n")
        if metrics:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            say(f"tasted at {self.at.position:,} samples: {shown}")
        self.metrics = metrics
        return metrics

    def export(self, ref: RecipeRef, source: str | Path) -> None:
        layout = layout_of(self.models)
        state = {"ema": gather({**self.models, **self.averages}, layout).params} if self.averages else {}
        weights = gather(self.models, layout)
        about = {
            "run": {"name": f"{ref.name}, trained here", "mode": "local", "steps": self.at.steps},
            "version": self.at.steps,
            "weights_sha256": weights.sha256(),
            "samples": self.at.position,
            "metrics": self.metrics,
        }
        export(weights, state, layout, ref, self.out, source=source, dataset=self.dataset, about=about)


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, the second one interrupts."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
