"""How does a training child contribute to a pool: unit after unit, without waiting for the network?

    ── unit n ───────────────┤ tick                    the update of n is written, the agent uploads it
                             ├─ overlap ─┬──────────── unit n+1 steps on with the weights it has
                                         Rebase        θ ← θ_new + (θ_now − θ_at_upload)

What the child keeps of a run: `have`, the newest version it was given, a CPU master copy that only files change; the
modules and optimizers, which drift from it while a unit is at work; and the encoder's feedback.

The law of the carry: whenever a base changes under a unit, what the unit itself has done is kept to the last bit, and
what the unit before did is dropped, because it travels in that unit's own update. If no newer version comes within the
overlap, θ_new is the version the child had before: the same sum.

`Contributor` knows no pipes and no clock of its own: `take` instructions, call `work` whenever `next_at` has come.
"""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from potluck.domain import order
from potluck.errors import BadUpdate, PotluckError
from potluck.protocol import (
    ChildEvent,
    DoUnit,
    Drop,
    Failed,
    Finished,
    HandIn,
    Layout,
    Positions,
    Rebase,
    Rebased,
    Report,
    Started,
    Stepping,
    WeightFile,
)
from potluck.train import codec as codecs
from potluck.train import device as devices
from potluck.train.data import Batch, ShardReader, to_float
from potluck.train.recipe import Recipe, load_recipe, where
from potluck.train.watch import NotFinite, Watch
from potluck.train.weights import Weights, apply_chain, gather, scatter

PROGRESS_EVERY_S = 0.5
RUNS_KEPT = 4
"""Runs whose weights stay in memory; the agent is told (`Failed` with code "weights") when one is gone."""

Emit = Callable[[ChildEvent], None]


@dataclass
class Held:
    """The newest weights of a run that this process was given."""

    weights: Weights | None = None
    version: int = -1

    def bring_up(self, files: Sequence[WeightFile], layout: Layout) -> Weights:
        """Follow the chain. Files that lead no further than what is held are passed over."""
        newer = [file for file in files if file.version > self.version]
        if newer:
            self.weights = apply_chain(self.weights, newer, layout)
            self.version = newer[-1].version
        if self.weights is None:
            raise PotluckError("there are no weights here yet: send a snapshot")
        return self.weights


@dataclass
class _Run:
    recipe: Recipe
    layout: Layout
    device: torch.device
    models: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    held: Held = field(default_factory=Held)
    residual: Tensor | None = None  # what earlier updates could not say
    step_s: float = 0.0  # recent, of one step
    reader: ShardReader | None = None  # with the shards it holds in memory
    reader_paths: list[str] = field(default_factory=list)

    @property
    def smallest_batch(self) -> int:
        """BatchNorm cannot learn from a single sample."""
        norms = nn.modules.batchnorm._BatchNorm
        return 2 if any(isinstance(m, norms) for model in self.models.values() for m in model.modules()) else 1


@dataclass
class _Unit:
    job: DoUnit
    run: _Run
    started: float
    ends: float  # the tick it hands in at
    base: Weights
    base_version: int
    batches: Generator[Batch, None, None]
    carry: Weights | None  # θ at the upload of the unit before, while the overlap lasts
    window_ends: float
    gradients: dict[str, GradientMean] | None
    left: int  # samples
    done: Positions = field(default_factory=list)
    samples: int = 0
    watch: Watch = field(default_factory=Watch)
    asked_in: bool = False
    told_at: float = 0.0  # of the last progress event

    def is_over(self, soonest: float) -> bool:
        """Is it better to hand in now than to begin another step at `soonest`?"""
        if self.left == 0:
            return True
        if self.samples == 0:
            return False
        return self.asked_in or soonest + self.run.step_s / 2 >= self.ends


def box_for(start: float, tick: float, box_s: float) -> float:
    """The time box that ends on a tick (`tick` + k·`box_s`) and lies in [box_s/2, 3·box_s/2)."""
    return box_s / 2 + (tick - start - box_s / 2) % box_s


class Contributor:
    """Works through units. Emits events; raises nothing but what the process cannot survive."""

    def __init__(self, emit: Emit, clock: Callable[[], float]) -> None:
        self._emit = emit
        self._clock = clock
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._queue: deque[tuple[float, DoUnit]] = deque()
        self._unit: _Unit | None = None
        self._rest_until = float("-inf")

    # --- instructions ------------------------------------------------------------------------------------------------

    def take(self, instruction: DoUnit | Rebase | HandIn | Drop, arrived: float) -> None:
        """Act on an instruction; a unit is queued. `arrived` is the time from which its tick counts."""
        match instruction:
            case DoUnit():
                if self._prepare(instruction):
                    self._queue.append((arrived, instruction))
            case Rebase():
                self._rebase(instruction)
            case HandIn(lease_id=lease_id):
                if self._unit and self._unit.job.lease_id == lease_id:
                    self._unit.asked_in = True
                elif self._unqueue(lease_id):
                    report = Report("returned", reason="it had not begun when it was to be handed in")
                    self._emit(Finished(lease_id=lease_id, report=report, files={}))
            case Drop(lease_id=lease_id):
                if self._unit and self._unit.job.lease_id == lease_id:
                    self._unit = None
                self._unqueue(lease_id)

    @property
    def next_at(self) -> float | None:
        """When `work` should be called: a time on the clock, or None if there is nothing to do."""
        if self._unit is None:
            return self._clock() if self._queue else None
        return min(self._rest_until, self._unit.ends)

    def work(self) -> None:
        """Begin a unit, do one step of it, or hand it in."""
        if self._unit is None:
            if self._queue:
                self._begin(*self._queue.popleft(), carry=None)
            return
        unit = self._unit
        try:
            self._advance(unit)
        except NotFinite as error:
            self._forget_step_state(unit.run)
            self._fail(unit, "nan", f"{error} of the unit: these steps are thrown away; a lower lr may help")
        except Exception as error:
            self._fail(unit, *explain(error, "step"))
            if devices.is_fatal(error):
                raise

    def local(self, run_id: str) -> Weights:
        """The weights in the run's modules now: those it holds, and what the unit at work has done to them."""
        run = self._runs[run_id]
        return gather(run.models, run.layout)

    # --- a unit ------------------------------------------------------------------------------------------------------

    def _prepare(self, job: DoUnit) -> bool:
        """Have the run here, with weights as new as the instruction's. At once: later chains build on them."""
        try:
            run = self._runs.get(job.run_id) or self._open(job)
            self._runs.move_to_end(job.run_id)
        except Exception as error:
            self._emit(Failed(lease_id=job.lease_id, code=explain(error)[0], reason=explain(error, "recipe")[1]))
            if devices.is_fatal(error):
                raise
            return False
        try:
            run.held.bring_up(job.weights, job.layout)
        except PotluckError as error:
            self._emit(Failed(lease_id=job.lease_id, code="weights", reason=str(error)))
            return False
        return True

    def _open(self, job: DoUnit) -> _Run:
        recipe = load_recipe(job.recipe, job.recipe_path, job.dataset)
        device = devices.pick(job.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            models = {name: model.to(device).train() for name, model in recipe.models().items()}
        run = _Run(recipe, job.layout, device, models, recipe.optimizers(models))
        while len(self._runs) >= RUNS_KEPT:
            self._runs.popitem(last=False)
        self._runs[job.run_id] = run
        return run

    def _begin(self, arrived: float, job: DoUnit, *, carry: Weights | None) -> None:
        now = self._clock()
        run = self._runs.get(job.run_id)
        if run is None or run.held.weights is None:
            reason = "the run's weights were put away: send a snapshot"
            self._emit(Failed(lease_id=job.lease_id, code="weights", reason=reason))
            return
        spec = job.spec
        is_gradient = spec.strategy == "gradient"
        if carry is None:
            scatter(run.held.weights, run.models, run.layout)
        seed_noise(job.seed, spec.seed, job.lease_id)
        if run.reader is None or run.reader_paths != job.shard_paths:
            run.reader, run.reader_paths = (
                ShardReader(job.shard_paths, job.dataset, job.seed),
                job.shard_paths,
            )
        box_s = box_for(now, arrived + job.tick_s, spec.box_s)
        self._unit = _Unit(
            job=job,
            run=run,
            started=now,
            ends=float("inf") if is_gradient else now + box_s,
            base=run.held.weights,
            base_version=run.held.version,
            batches=cast(Generator[Batch, None, None], run.reader.batches(spec.positions, run.recipe.batch_size)),
            carry=carry,
            window_ends=now + spec.overlap_s,
            gradients={n: GradientMean(o) for n, o in run.optimizers.items()} if is_gradient else None,
            left=order.count(spec.positions),
            told_at=now,
        )
        self._emit(Started(lease_id=job.lease_id, box_s=box_s, overlap=carry is not None))

    def _advance(self, unit: _Unit) -> None:
        now = self._clock()
        if unit.carry and now >= unit.window_ends:
            self._stand_on_held(unit)
        if not unit.is_over(max(now, self._rest_until)):
            if now < self._rest_until:
                return
            self._step(unit, now)
            now = self._clock()
            if now - unit.told_at >= PROGRESS_EVERY_S:
                self._tell(unit, now)
        if unit.is_over(max(now, self._rest_until)):
            self._hand_in(unit, now)

    def _step(self, unit: _Unit, now: float) -> None:
        run = unit.run
        batch = next(unit.batches, None)
        if batch is None or (count := len(batch)) < run.smallest_batch:
            unit.left = 0
            return
        x = to_float(batch.x, run.device)
        y = batch.y.to(run.device) if batch.y is not None else None
        optimizers = run.optimizers if unit.gradients is None else cast(dict[str, Optimizer], unit.gradients)
        for gradient in (unit.gradients or {}).values():
            gradient.batch = count
        unit.watch.add(run.recipe.step(run.models, optimizers, x, y))
        unit.samples += count
        unit.left -= count
        unit.done.extend(batch.positions)
        if unit.left < run.smallest_batch:
            unit.left = 0
        if unit.job.share < 1:
            devices.finish(run.device)
        took = self._clock() - now
        run.step_s = took if not run.step_s else 0.7 * run.step_s + 0.3 * took
        self._rest_until = now + took + devices.pause_s(took, unit.job.share)

    def _hand_in(self, unit: _Unit, now: float) -> None:
        run, job = unit.run, unit.job
        self._unit = None
        if not unit.samples:
            report = Report("returned", reason=f"its samples are too few for a step of {run.smallest_batch}")
            self._emit(Finished(lease_id=job.lease_id, report=report, files={}))
            return
        metrics = unit.watch.means()
        self._unit = unit  # a failure below is this unit's
        if unit.carry:
            self._stand_on_held(unit)
        local = gather(run.models, run.layout)
        delta = local.params - unit.base.params if unit.gradients is None else self._mean_gradient(unit)
        try:
            tensors, rest = codecs.encode_with_feedback(codecs.codec(job.spec.codec), delta, run.residual, run.layout)
        except BadUpdate as error:
            raise NotFinite(f"{error}, although the losses were numbers, after step {unit.watch.steps}") from error
        out = Path(job.out)
        out.mkdir(parents=True, exist_ok=True)
        path = codecs.write_update(out / "update.safetensors", tensors, local.buffers, local.counters)
        run.residual = rest
        report = Report(
            "done",
            codec=job.spec.codec,
            base_version=unit.base_version,
            steps=unit.watch.steps,
            samples=unit.samples,
            done=order.union(unit.done),
            seconds=now - unit.started,
            metrics=metrics,
        )
        self._unit = None
        self._emit(Finished(lease_id=job.lease_id, report=report, files={"update": str(path)}))
        if self._queue:
            arrived, coming = self._queue.popleft()
            overlaps = unit.gradients is None and coming.run_id == job.run_id and coming.spec.strategy == "local"
            self._begin(arrived, coming, carry=local if overlaps and coming.spec.overlap_s > 0 else None)

    def _tell(self, unit: _Unit, now: float) -> None:
        seconds = max(now - unit.started, 1e-9)
        unit.told_at = now
        event = Stepping(
            lease_id=unit.job.lease_id,
            steps=unit.watch.steps,
            samples=unit.samples,
            samples_per_s=unit.samples / seconds,
            fraction=min(1.0, max(seconds / (unit.ends - unit.started), unit.samples / (unit.samples + unit.left))),
            loss=unit.watch.recent(),
        )
        self._emit(event)

    def _mean_gradient(self, unit: _Unit) -> Tensor:
        """The gradients in the place of the parameters, in the layout's order."""
        sums: dict[int, Tensor] = {}
        for gradient in (unit.gradients or {}).values():
            sums |= gradient.means()
        found = {f"{n}.{k}": p for n, m in unit.run.models.items() for k, p in m.named_parameters()}
        means = [sums.get(id(found[name]), torch.zeros_like(found[name])) for name, _ in unit.run.layout.params]
        return torch.cat([mean.reshape(-1).float().cpu() for mean in means])

    # --- other bases -------------------------------------------------------------------------------------------------

    def _rebase(self, instruction: Rebase) -> None:
        unit = self._unit
        run = unit.run if unit else self._run_of(instruction.lease_id)
        if run is None:
            return
        try:
            run.held.bring_up(instruction.weights, run.layout)
        except PotluckError as error:  # the next unit's chain will not fit either, and says so to the agent
            print(f"cannot follow to a newer version: {error}", file=sys.stderr, flush=True)
            return
        if unit and unit.carry:
            self._stand_on_held(unit)

    def _stand_on_held(self, unit: _Unit) -> None:
        """θ ← θ_held + (θ_now − θ_at_upload); the overlap is over."""
        run, carry = unit.run, unit.carry
        held = run.held.weights
        assert carry is not None
        assert held is not None
        now = gather(run.models, run.layout)
        now.params.sub_(carry.params).add_(held.params)
        now.counters.sub_(carry.counters).add_(held.counters)
        # statistics are no sums of steps: take the merged ones, which the coming batches move on
        scatter(Weights(now.params, held.buffers, now.counters), run.models, run.layout)
        unit.base, unit.base_version, unit.carry = held, run.held.version, None
        self._emit(Rebased(lease_id=unit.job.lease_id, version=unit.base_version))

    # --- small things ------------------------------------------------------------------------------------------------

    def _run_of(self, lease_id: str) -> _Run | None:
        """The run of a queued unit, or else the one that was worked on last."""
        for _, job in self._queue:
            if job.lease_id == lease_id:
                return self._runs.get(job.run_id)
        return next(reversed(self._runs.values()), None)

    def _unqueue(self, lease_id: str) -> bool:
        before = len(self._queue)
        self._queue = deque(entry for entry in self._queue if entry[1].lease_id != lease_id)
        return len(self._queue) < before

    def _fail(self, unit: _Unit, code: str, reason: str) -> None:
        self._unit = None
        self._emit(Failed(lease_id=unit.job.lease_id, code=code, reason=reason))

    def _forget_step_state(self, run: _Run) -> None:
        """Optimizers that have met a NaN never forget it."""
        run.optimizers = run.recipe.optimizers(run.models)


class GradientMean:
    """Stands where an optimizer would: `step` adds the gradients up and moves nothing."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._sums: dict[int, Tensor] = {}
        self._samples = 0
        self.batch = 1  # samples behind the coming step

    def step(self, closure: object = None) -> None:
        self._samples += self.batch
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    total = self._sums.setdefault(id(p), torch.zeros_like(p, requires_grad=False))
                    total.add_(p.grad, alpha=self.batch)

    def means(self) -> dict[int, Tensor]:
        """Mean gradient over the samples, by the id of the parameter."""
        return {key: total / max(self._samples, 1) for key, total in self._sums.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def seed_noise(*key: object) -> None:
    """Random numbers of its own for every unit: two workers with the same noise would do the same work twice."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def explain(error: Exception, doing: str = "") -> tuple[str, str]:
    """(code, sentence) of an error in a task."""
    if isinstance(error, PotluckError):
        return error.code, str(error)
    if devices.is_fatal(error):
        return "oom", f"out of memory or a device fault: {error}"
    return "failed", f"the recipe's {doing or 'code'} failed: {where(error)}"
