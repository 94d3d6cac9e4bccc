"""How fast is this machine alone? A short measurement, of a small standard model or of a user's own script.

    python -m potluck.train.gang solo --seconds 8
    POTLUCK_GANG_SOLO=60 python train.py          the script as a gang of one, for 60 committed steps

Batches of three sizes tell what a step costs before its first sample from what each sample costs. Both print one line of
JSON and end:

    {"fixed_s": 0.004, "per_sample_s": 0.0002, "samples_per_s": 3120.0, "device": "cpu", "gradient_bytes": 2131496}

Seconds are of the whole step by the clock on the wall, with data, optimizer and whatever the script does between;
`samples_per_s` is that of the full batch.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import nn
from torch.utils.data import TensorDataset

from potluck.errors import BadInput
from potluck.train.gang.profile import Event, StepRecord

VARIABLE = "POTLUCK_GANG_SOLO"
_SIZES = (1, 2, 4)  # the batch is divided by these, in turn
_WARM_UP = len(_SIZES)


def read(environment: Mapping[str, str] = os.environ) -> int:
    """How many steps a trial is asked for; 0: none."""
    text = environment.get(VARIABLE, "")
    if not text:
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"{VARIABLE} is `{text}`: it must be a number of steps, at least 1")
    return int(text)


class Trial:
    """A watcher that ends the process after `steps` committed steps, or after `seconds`."""

    def __init__(self, full: int, *, device: str, gradient_bytes: int, steps: int = 0, seconds: float = 0.0) -> None:
        self._full, self._device, self._gradient_bytes = full, device, gradient_bytes
        self._steps, self._seconds = steps, seconds
        self._began_at = time.perf_counter()
        self._seen: list[tuple[int, float]] = []
        atexit.register(self._say)  # a script that ends before has been measured as well

    def batch(self, step: int) -> int:
        """Of this step."""
        return max(1, self._full // _SIZES[step % len(_SIZES)])

    def __call__(self, told: StepRecord | Event) -> None:
        if not isinstance(told, StepRecord) or not told.is_committed:
            return
        self._seen.append((sum(told.shares.values()), told.times.total_s))
        enough = len(self._seen) >= self._steps if self._steps else len(self._seen) > 2 * _WARM_UP
        if enough and time.perf_counter() - self._began_at >= self._seconds:
            self._say()
            raise SystemExit(0)

    def _say(self) -> None:
        atexit.unregister(self._say)
        if not self._seen:
            return
        fixed_s, sample_s = line(self._seen[_WARM_UP:] or self._seen)
        found = {
            "fixed_s": fixed_s,
            "per_sample_s": sample_s,
            "samples_per_s": self._full / max(fixed_s + sample_s * self._full, 1e-9),
            "device": self._device,
            "gradient_bytes": self._gradient_bytes,
        }
        print(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in found.items()}), flush=True)


def line(seen: list[tuple[int, float]]) -> tuple[float, float]:
    """Seconds a step and seconds a sample, neither negative, through the median of each size of batch."""
    sizes: dict[int, list[float]] = {}
    for batch, seconds in seen:
        sizes.setdefault(batch, []).append(seconds)
    points = [(batch, median(spans)) for batch, spans in sizes.items() if 2 * len(spans) >= len(seen) / len(sizes)]
    mean_b = sum(batch for batch, _ in points) / len(points)
    mean_s = sum(seconds for _, seconds in points) / len(points)
    spread = sum((batch - mean_b) ** 2 for batch, _ in points)
    steepest = mean_s / max(mean_b, 1.0)
    if spread <= 0:
        return 0.0, steepest
    slope = sum((batch - mean_b) * (seconds - mean_s) for batch, seconds in points) / spread
    slope = min(max(slope, 0.0), steepest)
    return mean_s - slope * mean_b, slope


def standard(seconds: float) -> None:
    """The small standard model on this machine's best device. It prints the line and ends the process."""
    from potluck.train.gang.member import Gang
    from potluck.train.gang.place import Place

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    pictures = TensorDataset(torch.randn(2048, 3, 32, 32), torch.randint(0, 10, (2048,)))
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, 10)),
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gang = Gang(Place(), solo_s=seconds)
    loader = gang.loader(pictures, batch_size=64)
    model, optimizer = gang.wrap(model, optimizer)
    while True:
        for x, y in loader:
            nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
