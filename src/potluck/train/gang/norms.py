"""How do BatchNorm's running statistics stay equal on all members, and right?

Each member normalises with its own share, as plain DistributedDataParallel does, so the gradient is not quite that of one
machine with the whole batch: GroupNorm or LayerNorm are exact. What can be made right are the running statistics: at each
commit every member gets the mean and the variance over all shares together, weighted by their samples,

    μ = Σ w μ_i        σ² = Σ w (σ_i² + μ_i²) − μ²

A step that is given up leaves no trace in them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from potluck.errors import BadInput

ADVICE = (
    "the model has BatchNorm, which normalises with each machine's own share of the batch: its running statistics are "
    "kept equal, but GroupNorm or LayerNorm would give the same gradient as one machine"
)


class Norms:
    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
        ]
        if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise BadInput(
                "SyncBatchNorm needs torch's own process group, which a gang has not: use GroupNorm, or BatchNorm"
            )
        self._before: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._modules)

    def remember(self) -> None:
        """A step begins."""
        self._before = [tensor.clone() for tensor in self.tensors()]

    def forget(self) -> None:
        """The step was given up."""
        with torch.no_grad():
            for tensor, before in zip(self.tensors(), self._before, strict=bool(self._before)):
                tensor.copy_(before)

    def share(self, weight: float) -> Tensor:
        """This member's part of the sums."""
        parts: list[Tensor] = []
        for module in self._modules:
            mean, var = _statistics(module)
            parts += [mean * weight, (var + mean * mean) * weight]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def settle(self, sums: Tensor, weight: float) -> None:
        """Take the statistics over all members; a step of any number of parts counts as one batch."""
        if not self._modules or weight <= 0:
            return
        place = 0
        with torch.no_grad():
            for module in self._modules:
                size = module.num_features
                mean = sums[place : place + size] / weight
                var = sums[place + size : place + 2 * size] / weight - mean * mean
                place += 2 * size
                running_mean, running_var = module.running_mean, module.running_var
                assert running_mean is not None and running_var is not None
                running_mean.copy_(mean)
                running_var.copy_(var.clamp_min(0))
            counters = [tensor for tensor in self.tensors() if not tensor.is_floating_point()]
            before = [tensor for tensor in self._before if not tensor.is_floating_point()]
            for counter, old in zip(counters, before, strict=True):
                counter.copy_(old + 1 if bool(counter != old) else old)

    def tensors(self) -> list[Tensor]:
        """All of their statistics, where they are."""
        found = []
        for module in self._modules:
            for tensor in (module.running_mean, module.running_var, module.num_batches_tracked):
                if tensor is not None:
                    found.append(tensor)
        return found


def _statistics(module: _BatchNorm) -> tuple[Tensor, Tensor]:
    mean, var = module.running_mean, module.running_var
    assert mean is not None and var is not None
    return mean.detach().double().cpu(), var.detach().double().cpu()
