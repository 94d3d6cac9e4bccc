"""How does a script take part in a gang? What it calls; what happens then is in steps.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from potluck.domain.balance import Balancer
from potluck.domain.gangs import ShareError
from potluck.errors import BadInput, PotluckError
from potluck.train.gang import papers, place, trial
from potluck.train.gang.engine import Engine, Solo
from potluck.train.gang.journal import Journal, Standing
from potluck.train.gang.loader import Loader
from potluck.train.gang.machine import Machine
from potluck.train.gang.norms import ADVICE, Norms
from potluck.train.gang.place import Place
from potluck.train.gang.profile import Profile
from potluck.train.gang.pulse import Pulse
from potluck.train.gang.reduce import Reducer
from potluck.train.gang.state import State
from potluck.train.gang.steps import Steps
from potluck.train.gang.voice import Voice, Watcher

Model = TypeVar("Model", bound=nn.Module)
Optim = TypeVar("Optim", bound=Optimizer)


def join() -> Gang:
    """Take the place that Potluck gave this process; a gang of one where it gave none, or where speed is measured."""
    where, steps = place.read(), trial.read()
    if steps:
        where = replace(where, lighthouse="", store="", where="", least=1, most=1)
    return Gang(where, solo_steps=steps)


class Gang:
    """This process as a member. Made by `potluck.gang.join()`."""

    def __init__(self, where: Place, *, solo_steps: int = 0, solo_s: float = 0.0) -> None:
        """`solo_steps`, `solo_s`: only measure how fast this machine is, for so long (trial.py)."""
        self.name = where.member
        self._solo = (solo_steps, solo_s) if solo_steps or solo_s else None
        self._place = where
        self._voice = Voice()
        self._loader: Loader | None = None
        self._wrapped: tuple[nn.Module, Optimizer, Reducer, Norms, str] | None = None
        self._kept: dict[str, Any] = {}
        self._max_norm: float | None = None
        self._resume: Path | None = None
        self._made: Steps | None = None

    # --- before the first batch

    def loader(
        self,
        dataset: Any,
        batch_size: int,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        workers: int = 1,
        shuffle: bool = True,
        seed: int | None = None,
        at_once: int = 0,
    ) -> Loader:
        """Batches of this member's share. `batch_size` is the whole gang's, and never changes with its members.

        `workers`: threads that read ahead, 0: none. `at_once`: samples that fit into this machine's memory; a larger
        share comes in several batches, and `optimizer.step()` acts after the last of them.
        """
        if self._loader is not None:
            raise BadInput("gang.loader was called twice: a gang trains on one data set (join two with ConcatDataset)")
        batch = self._place.batch or batch_size
        if batch < 1:
            raise ShareError(f"a batch of {batch} has no samples: batch_size must be at least 1")
        if batch < self._place.most:
            raise ShareError(
                f"a batch of {batch} cannot feed up to {self._place.most} members: raise batch_size to at least "
                f"{self._place.most}, or ask for fewer machines"
            )
        self._loader = Loader(
            lambda wanted: self._steps.epoch(wanted),
            dataset,
            batch=batch,
            collate=collate_fn,
            workers=workers,
            shuffle=shuffle,
            seed=self._place.seed if seed is None else seed,
            at_once=at_once or self._place.at_once,
        )
        return self._loader

    def wrap(
        self, model: Model, optimizer: Optim, *, loss: str = "mean", compress: str = "none"
    ) -> tuple[Model, Optim]:
        """The same two objects, from now on with the global batch's gradient.

        `loss`: "mean" over the local batch, as losses are by default, or "sum" over its samples. `compress`: how gradients
        travel over a slow network: "none", "fp16", "powersgd", or "auto" (fp16 where it is seen to be needed).
        """
        if self._wrapped is not None:
            raise BadInput("gang.wrap was called twice: put all networks into one nn.Module with one optimizer")
        if loss not in ("mean", "sum"):
            raise BadInput(f"gang.wrap has loss=`{loss}`: it must be `mean` or `sum`")
        reducer = Reducer(model, lambda: self._steps.sum_up(), compress)
        self._wrapped = (model, optimizer, reducer, Norms(model), loss)
        inner, clear = optimizer.step, optimizer.zero_grad

        def step(optimizer: Optimizer, closure: None = None) -> Any:
            if closure is not None:
                raise BadInput("a gang cannot use an optimizer with a closure (LBFGS): take SGD or Adam")
            return self._steps.step(inner)

        def zero_grad(optimizer: Optimizer, set_to_none: bool = True) -> None:
            if self._made is None or not self._made.holds_gradients:
                clear(set_to_none)

        if hasattr(inner, "_wrapped_by_lr_sched"):
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # or the scheduler warns that we lost its own
        # on the object, not on its class: a scheduler may have put its own on it, and must find them
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer.zero_grad = MethodType(zero_grad, optimizer)  # type: ignore[method-assign]
        return model, optimizer

    def keep(self, **things: Any) -> None:
        """Whatever else has a `state_dict` and must be the same everywhere: schedulers, a GradScaler, an average.

        A newcomer gets it. A scheduler's step() is ignored after a batch that is taken again, or was only a part of this
        member's share, so that it may be called for each batch.
        """
        for name, thing in things.items():
            if not hasattr(thing, "state_dict") or not hasattr(thing, "load_state_dict"):
                raise BadInput(f"gang.keep cannot keep `{name}`: {type(thing).__name__} has no state_dict")
            if self._made is not None:
                raise BadInput(f"gang.keep({name}=…) must be called before the first batch")
            self._kept[name] = thing
            if isinstance(thing, LRScheduler):
                self._hold_back(thing)

    def _hold_back(self, scheduler: LRScheduler) -> None:
        kind = type(scheduler)

        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            return kind.step(scheduler, *args, **kwargs) if self._made is None or self._made.has_moved else None

        # on its class: what is on the object itself would be in its state_dict
        scheduler.__class__ = type(kind.__name__, (kind,), {"step": step})

    def clip_grad_norm(self, max_norm: float) -> None:
        """Scale the global gradient down to this norm before each step."""
        if not max_norm > 0:
            raise BadInput(f"gang.clip_grad_norm({max_norm}): the norm must be above 0")
        self._max_norm = max_norm
        if self._made is not None:
            self._made.max_norm = max_norm

    def resume(self, path: str | os.PathLike[str]) -> bool:
        """Go on from what `save` wrote, if it is there. Before the first batch; one member that has it is enough."""
        if self._made is not None:
            raise BadInput("gang.resume must be called before the first batch")
        self._resume = Path(path) if Path(path).exists() else None
        return self._resume is not None

    def watch(self, watcher: Watcher) -> None:
        """Be told of each step and each event."""
        self._voice.watch(watcher)

    # --- while it trains

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs that are left to do of `count`: a member that comes late begins where the others are."""
        steps, loader = self._steps, self._need_loader()
        before: tuple[int, int] | None = None
        if steps.crew is None:
            steps.arrive()  # to know which epoch it is
        while (cursor := steps.state.cursor).epoch < count:
            if (now := (cursor.epoch, cursor.step)) == before:
                raise BadInput("the body of `for epoch in gang.epochs(…)` did not iterate over gang.loader")
            before, loader.passes = now, cursor.epoch
            yield cursor.epoch

    def count(self, number: float) -> None:
        """Of what the loss is the mean, if not of samples: tokens that are not padding, say. Before backward()."""
        self._steps.count(number)

    def log(self, **values: Any) -> None:
        """Figures of this member's batch; `potluck.log` gets their means over all members, weighted by samples."""
        self._steps.log(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything needed to go on: model, optimizer, place in the data, shares. The first member writes it."""
        if self.is_first and self._solo is None:
            self._steps.state.save(Path(path))

    def leave(self) -> None:
        """Take leave of the others. It happens by itself when the process ends."""
        if self._made is not None:
            self._made.leave()

    @property
    def committed(self) -> bool:
        """Did the last optimizer.step() change the weights?"""
        return self._made is not None and self._made.committed

    @property
    def is_first(self) -> bool:
        """Exactly one member is: for what only one should print or write."""
        return self._made is None or self._made.crew is None or self._made.crew.rank == 0

    @property
    def members(self) -> tuple[str, ...]:
        crew = self._made.crew if self._made is not None else None
        return crew.names if crew is not None else (self.name,)

    @property
    def shares(self) -> dict[str, int]:
        """Of the next whole batch."""
        return dict(self._steps.state.balancer.shares)

    @property
    def steps(self) -> int:
        """Committed ones."""
        return self._steps.state.cursor.step

    @property
    def epoch(self) -> int:
        return self._steps.state.cursor.epoch

    @property
    def figures(self) -> Mapping[str, float]:
        """The newest means of what gang.log was given; they come with the next step's gradient."""
        return self._steps.means

    @property
    def profile(self) -> Profile:
        return self._steps.profile

    @property
    def noise_scale(self) -> float:
        """The batch beyond which more samples a step stop paying; 0: not known."""
        return self._steps.state.noise.scale

    # --- inside

    @property
    def _steps(self) -> Steps:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _need_loader(self) -> Loader:
        if self._loader is None:
            raise BadInput("call gang.loader(dataset, batch_size=…) first")
        return self._loader

    def _make(self) -> Steps:
        loader = self._need_loader()
        if self._wrapped is None:
            raise BadInput("call gang.wrap(model, optimizer) before the first batch of gang.loader")
        model, optimizer, reducer, norms, loss = self._wrapped
        plan = {
            "batch": loader.batch,
            "loss": loss,
            "seed": loader.seed,
            "at_once": loader.at_once,
            "compress": reducer.compression.asked,
        }
        state = State(
            self.name,
            Balancer(loader.batch, self._place.policy),
            model,
            optimizer,
            papers.write(model, optimizer, loader.dataset, loader.items, plan) if self._has_others else {**plan},
            reducer.compression,
            self._kept,
        )
        state.papers.setdefault("length", loader.length)
        if self._resume is not None:
            state.load(self._resume)
        if self._has_others:
            state.check()
            if norms:
                self._voice.say("advice", ADVICE)
        steps = Steps(
            state,
            loader,
            reducer,
            norms,
            _engine(self._place, state, self._voice),
            loss=loss,
            at_once=loader.at_once,
            pulse=Pulse(self._place.pulse),
            voice=self._voice,
        )
        steps.max_norm, steps.publish = self._max_norm, self._publish
        device = next(model.parameters()).device
        if self._solo is None:
            self._keep_journal(device)
        else:
            kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            measured = trial.Trial(
                loader.batch,
                device=kind,
                gradient_bytes=reducer.size_bytes,
                steps=self._solo[0],
                seconds=self._solo[1],
            )
            steps.whole = measured.batch
            self._voice.watch(measured)
        return steps

    def _keep_journal(self, device: torch.device) -> None:
        """Where somebody collects what a member says."""
        output, collects = os.environ.get("POTLUCK_OUTPUT_DIR"), bool(os.environ.get("POTLUCK_METRICS_DIR"))
        if not output and not collects:
            return
        from potluck.job import log

        journal = Journal(
            self.name,
            self._place.gang,
            machine=Machine(device),
            standing=self._standing,
            loss=lambda: self.figures,
            log=log if collects else None,
            output=Path(output) if output else None,
        )
        self._voice.watch(journal)
        journal.close_at_the_end()

    def _standing(self) -> Standing:
        steps, loader = self._steps, self._need_loader()
        crew, balancer = steps.crew, steps.state.balancer
        fit = balancer.fits.get(self.name)
        means = steps.profile.means()
        rest_s = means["optimizer_s"] + means["outside_s"]
        alone_s = fit.pace.ready_s(loader.batch) + rest_s if fit is not None and fit.pace is not None else 0.0
        return Standing(
            rank=crew.rank if crew is not None else 0,
            members=len(crew.cards) if crew is not None else 1,
            batch=loader.batch,
            alone_per_s=loader.batch / alone_s if alone_s else 0.0,
            noise_scale=self.noise_scale,
        )

    @property
    def _has_others(self) -> bool:
        return not self._place.is_alone

    def _publish(self, step: int, means: Mapping[str, float]) -> None:
        if self.is_first and os.environ.get("POTLUCK_METRICS_DIR"):
            from potluck.job import log

            log(step, **means)


def _engine(where: Place, state: State, voice: Voice) -> Engine:
    """The engine that this machine and this gang can use."""
    if where.is_alone:
        return Solo(state)
    kind = where.engine
    if kind == "auto":
        kind = "torchft" if where.now().lighthouse else "plain"
    if kind == "torchft":
        try:
            from potluck.train.gang.torchft_engine import TorchftEngine
        except ImportError as error:
            raise PotluckError(
                f"this gang uses torchft, and {error.name} is not installed here: pip install "
                '"potluck-train[gang]", or start the gang with the plain engine'
            ) from error
        return TorchftEngine(where, state, voice.say)
    from potluck.train.gang.plain_engine import PlainEngine

    return PlainEngine(where, state, voice.say)
