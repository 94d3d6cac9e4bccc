"""How does training on one machine survive being stopped, and go on as if it had not been?

One safetensors file holds everything: the models, their averages, the optimizers' tensors, the random state, and, as
JSON in its metadata, the place on the sample line and the optimizers' numbers. It appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from potluck.errors import BadInput
from potluck.train import tensorio

FORMAT = 1
_KEY = "potluck"


@dataclass
class Progress:
    """Where the training is. `position` is the next sample of the line."""

    position: int = 0
    steps: int = 0
    seconds: float = 0.0  # of training
    origin: dict[str, Any] = field(
        default_factory=dict
    )  # recipe, settings, data and seed: what must be the same to go on


def save(
    path: Path,
    models: Mapping[str, nn.Module],
    averages: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    progress: Progress,
) -> None:
    tensors: dict[str, Tensor] = {f"random/{name}": state for name, state in _random_states().items()}
    for kind, group in (("model", models), ("average", averages)):
        for name, model in group.items():
            tensors |= {f"{kind}/{name}/{key}": tensor for key, tensor in model.state_dict().items()}
    numbers: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        state, numbers[name] = _flat(optimizer)
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in state.items()}
    about = {"format": FORMAT, "progress": vars(progress), "optimizers": numbers}
    tensorio.save(path, tensors, {_KEY: json.dumps(about)})


def load(
    path: Path,
    models: Mapping[str, nn.Module],
    averages: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    origin: Mapping[str, Any],
) -> Progress:
    """Put everything back in place. BadInput if the checkpoint is of another recipe, data or settings."""
    tensors, metadata = tensorio.load(path)
    try:
        about = json.loads(metadata[_KEY])
        progress = Progress(**about["progress"])
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path} is not a checkpoint of this Potluck: start without --resume") from None
    for key, value in json.loads(json.dumps(dict(origin))).items():
        if (before := progress.origin.get(key)) != value:
            raise BadInput(f"{path} was made with {key} {before}, not {value}: use the same, or start without --resume")
    for kind, group in (("model", models), ("average", averages)):
        for name, model in group.items():
            model.load_state_dict(_below(tensors, f"{kind}/{name}/"))
    for name, optimizer in optimizers.items():
        _restore(optimizer, _below(tensors, f"optimizer/{name}/"), about["optimizers"][name])
    _set_random_states(_below(tensors, "random/"))
    return progress


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _flat(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            else:
                numbers[f"{index}/{key}"] = value
    return tensors, {"groups": state["param_groups"], "numbers": numbers}


def _restore(optimizer: Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for place, value in [*tensors.items(), *numbers["numbers"].items()]:
        index, _, key = place.partition("/")
        state.setdefault(int(index), {})[key] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in numbers["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
