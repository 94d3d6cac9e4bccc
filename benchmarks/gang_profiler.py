"""What does a gang's profiler cost? The same training with it and without it, taken in turn, in processor time.

    python benchmarks/gang_profiler.py [--json]

With: the means of all members, a journal that writes points, events and the metrics file, and the thread that looks at the
machine. Without: none of them. Processor time and not the clock on the wall, because that also has what other processes do.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from machine import facts
from potluck.train.gang.member import Gang
from potluck.train.gang.place import Place
from potluck.train.gang.profile import PHASES, Profile

BLOCK = 50
BLOCKS = 24
MEMBERS = 8
BATCH = 128


class Blind(Profile):
    """A profile that looks away; the steps behave as in their first moments."""

    def add(self, batch: int, times: Any) -> None:
        if not self.recent:
            self.recent.append((batch, times))


def training(with_profiler: bool) -> Iterator[None]:
    """One step for each `next`."""
    names = ("POTLUCK_METRICS_DIR", "POTLUCK_OUTPUT_DIR")
    for name in names:
        os.environ.pop(name, None)
        if with_profiler:
            os.environ[name] = tempfile.mkdtemp()
    torch.manual_seed(0)
    gang = Gang(Place())
    data = TensorDataset(torch.randn(4096, 256), torch.randint(0, 10, (4096,)))
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    loader = gang.loader(data, batch_size=BATCH, workers=0)
    model, optimizer = gang.wrap(model, torch.optim.SGD(model.parameters(), lr=0.01))
    spans = {str(i): dict.fromkeys(PHASES, 0.001) for i in range(MEMBERS)}
    if not with_profiler:
        gang._steps.profile = Blind()
    while True:
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if with_profiler:
                gang.profile.hear(spans)  # what so many members would have said
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[bool, list[float]] = {True: [], False: []}
    kinds = {kind: training(kind) for kind in (True, False)}
    for kind in kinds.values():
        for _ in range(BLOCK):
            next(kind)
    for _ in range(BLOCKS):
        for kind, steps in kinds.items():
            began_s = time.process_time()
            for _ in range(BLOCK):
                next(steps)
            found[kind].append((time.process_time() - began_s) / BLOCK)
    with_s, without_s = median(found[True]), median(found[False])
    pairs = [a - b for a, b in zip(found[True], found[False], strict=True)]
    figures = {
        "profiler_overhead": round(median(pairs) / without_s, 4),
        "profiler_us_per_step": round(median(pairs) * 1e6, 1),
        "step_ms_with": round(with_s * 1e3, 3),
        "step_ms_without": round(without_s * 1e3, 3),
    }
    if given.json:
        print(json.dumps({**figures, **facts()}))
        return
    print(f"with the profiler     {with_s * 1e3:.2f} ms of processor time a step ({MEMBERS} members)")
    print(f"without               {without_s * 1e3:.2f} ms")
    print(f"overhead              {median(pairs) / without_s:.1%} ({median(pairs) * 1e6:.0f} µs a step)")
    print("  ".join(facts().values()))


if __name__ == "__main__":
    main()
