"""One machine of the gang benchmark, and the process from which all of them are forked.

    python benchmarks/gang_member.py       the nursery: it has imported torch, and answers one JSON line for each

    {"start": role, "log": path, "environment": {…}, "first": bool, …} → {"pid"}
    {"status": pid} → {"status": null while it runs, else its exit code, negative for a signal}

Roles: `gang` (our library, in a script as a user would write it), `ddp` (plain DistributedDataParallel with equal shares),
`solo` (plain PyTorch, one machine), and `cost` (both loops in one process, to compare).

`TASK` is JSON. A machine's speed is `sample_s`, for which it sleeps; the arithmetic is then that of a few rows, so that two
cores can be four machines. With `rows` 0 it computes all of them and sleeps never: the speed is a CPU quota's business.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer of a process imports it, for seconds
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset

import potluck
from potluck.train.gang import member  # noqa: F401 - once, for all that are forked
from potluck.train.gang.profile import Event, StepRecord

with suppress(ImportError):  # or each member would, for seconds
    importlib.import_module("potluck.train.gang.torchft_engine")

WIDTH = 256


class Machine:
    """How long this one needs for its samples, and its diary."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self._diary = Path(task["diary"]).open("a")  # noqa: SIM115 - as long as the process
        self._random = random.Random(task.get("chance", 0))
        self.is_stuck = False

    def write(self, kind: str, **values: Any) -> None:
        self._diary.write(json.dumps({"kind": kind, "at": time.monotonic(), **values}) + "\n")
        self._diary.flush()

    def begin(self) -> None:
        """All is made that a training needs. From here on the machine is as slow as it is."""
        if group := self.task.get("group", ""):
            Path(group, "cgroup.procs").write_text("0")
        self.write("begin")

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
        """The forward pass, as slow as this machine is."""
        if self.is_stuck:
            self.write("stuck", step=step)
            while True:
                time.sleep(60)
        if sample_s := self.task.get("sample_s", 0.0):
            time.sleep(sample_s * len(y) * self._factor(step))
        rows = self.task.get("rows", 8) or len(y)
        loss: Tensor = nn.functional.cross_entropy(model(x[:rows]), y[:rows])
        return loss

    def _factor(self, step: int) -> float:
        factor = next((f for since, f in reversed(self.task.get("changes", [])) if step >= since), 1.0)
        if noise := self.task.get("noise", 0.0):
            factor *= max(0.5, self._random.gauss(1, noise))
        if self._random.random() < self.task.get("spikes", 0.0):
            factor *= 3
        return float(factor)


def points(length: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(4096, WIDTH, generator=generator)
    labels = torch.randint(0, 10, (4096,), generator=generator)
    where = torch.arange(length) % 4096
    return TensorDataset(few[where], labels[where])


def network(hidden: int = 1024) -> nn.Module:
    """0.53 million parameters: 2.1 MB to be summed at each step."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


# --- the three ways to train ------------------------------------------------------------------------------------------


def train_gang(machine: Machine) -> None:
    task = machine.task

    def watcher(told: StepRecord | Event) -> None:
        if isinstance(told, Event):
            machine.write("event", what=told.kind, text=told.text, step=told.step)
        elif told.is_committed:
            machine.write("step", step=told.step, shares=dict(told.shares), ready_s=dict(told.ready_s))

    def stick(*_: object) -> None:
        machine.is_stuck = True

    signal.signal(signal.SIGUSR1, stick)
    gang = potluck.gang.join()
    gang.watch(watcher)
    loader = gang.loader(points(task["length"]), batch_size=task["batch"])
    model = network(task.get("hidden", 1024))
    model, optimizer = gang.wrap(model, optimizer_of(model))
    machine.begin()
    for _ in gang.epochs(task.get("epochs", 1)):
        for x, y in loader:
            machine.loss(model, x, y, gang.steps).backward()
            optimizer.step()
            optimizer.zero_grad()
    machine.write("end", means=gang.profile.means())


def train_ddp(machine: Machine) -> None:
    """As everybody does it: equal shares, the mean over the ranks."""
    task = machine.task
    rank, size = task["rank"], task["size"]
    store = dist.TCPStore("127.0.0.1", task["port"], size, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    model = DistributedDataParallel(network(task.get("hidden", 1024)))
    data = points(task["length"])
    train(machine, model, whole_batches(data, DistributedSampler(data), task["batch"] // size), task["batch"])
    dist.destroy_process_group()


def train_solo(machine: Machine) -> None:
    """This machine alone, with the whole batch, for some seconds."""
    task = machine.task
    model, data = network(task.get("hidden", 1024)), points(task["batch"] * 64)
    train(machine, model, whole_batches(data, RandomSampler(data), task["batch"]), task["batch"], task["seconds"])


def whole_batches(data: TensorDataset, sampler: Any, size: int) -> DataLoader[Any]:
    """The fastest way without Potluck: not sample by sample, which is as slow as a small model."""
    return DataLoader(data, batch_size=None, sampler=BatchSampler(sampler, size, drop_last=False))


def train(machine: Machine, model: nn.Module, loader: Any, batch: int, seconds: float = 1e9) -> None:
    optimizer = optimizer_of(model)
    model(torch.zeros(8, WIDTH)).sum().backward()  # what is made at the first step only
    optimizer.zero_grad()
    machine.begin()
    ends_at = time.monotonic() + seconds
    for step, (x, y) in enumerate(loader):
        machine.loss(model, x, y, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        machine.write("step", step=step, batch=batch)
        if time.monotonic() > ends_at:
            break
    machine.write("end")


def compare_cost(machine: Machine) -> None:
    """What the library costs a machine alone: CPU seconds of the same training, with it and without it."""
    task = machine.task
    gang = potluck.gang.join()
    ours, plain, data = network(), network(), points(task["length"])
    loader = gang.loader(data, batch_size=task["batch"])
    ours, our_optimizer = gang.wrap(ours, optimizer_of(ours))
    ways = [
        ("ours", iter(loader), ours, our_optimizer),
        ("plain", iter(whole_batches(data, RandomSampler(data), task["batch"])), plain, optimizer_of(plain)),
    ]
    for _ in range(task["blocks"]):
        for name, source, model, optimizer in ways:
            spent_s = time.process_time()
            for _ in range(task["steps"]):
                x, y = next(source)
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            machine.write(name, cpu_s=time.process_time() - spent_s)


ROLES = {"gang": train_gang, "ddp": train_ddp, "solo": train_solo, "cost": compare_cost}


# --- the nursery ------------------------------------------------------------------------------------------------------


def start(command: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if command.get("first"):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for mine, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(mine, number)
        os.environ.clear()
        os.environ.update(command["environment"])
        run(command)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:  # noqa: BLE001 - as an interpreter does at its end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(code)


def run(command: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    ROLES[command["start"]](Machine(json.loads(os.environ["TASK"])))


def main() -> None:
    torch.set_num_threads(1)
    known: dict[int, int] = {}
    answers = os.fdopen(os.dup(1), "w")  # a forked process has another standard output
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            answer: dict[str, Any] = {"pid": start(command)}
        else:
            pid = command["status"]
            if pid not in known:
                done, how = os.waitpid(pid, os.WNOHANG)
                if done:
                    known[pid] = os.waitstatus_to_exitcode(how)
            answer = {"status": known.get(pid)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
