"""What does a gang make of unequal machines, and what do a death, a hang, an arrival and a slow-down cost it?

python benchmarks/gang.py [--json] [--quick] [--engine auto|torchft|plain]
                          [--only 4211,31,equal,replan,steady,kill,hang,seed,cost,quota]

ratio_4211, ratio_31        samples/s of the gang by the sum of what its machines do alone with the whole batch, from the
                            11th step on (`_whole`: from the first); plain DDP with equal shares beside (`uniform_…`);
                            `overhead_ms_…`: what a step takes beyond the sum of their speeds
ratio_…_quota               the same, with real arithmetic under CPU quotas instead of machines that sleep (needs root)
equal_vs_uniform            four equal machines: the gang by plain DDP
replan_steps_median         a machine becomes 3× slower: steps until the shares are within 3 % of the new optimum (of the
                            step's time, by the speeds that the machines really have); `_back`: 3× faster again
needless_replans_per_1000   nothing changes, but 3 % noise and a spike of 3× in 0.5 % of all steps
killed_next_commit_s        from kill -9 of one of three members until the next commit without it, the worst of several
hung_next_commit_s          from the moment in which a member hangs, or is stopped, until the others' next commit, the worst
                            of several; its agent looks at its pulse (`hung_alone_s`: stopped, and there is no agent)
joiner_pause_steps          the longest time between two commits of the others while a member joins, beyond the usual
seed_speedup                the predecessor's own test: 1:3 per sample, 6,400 samples in batches of 64, by plain DDP
                            (0.04 million parameters; all others have 0.53 million)
profiler_overhead           CPU seconds of a gang of one with its profiler by those without (gang_profiler.py), less 1
library_overhead            CPU seconds of a gang of one by those of plain PyTorch, at 20 ms of arithmetic a step, less 1

No hub: members are started as their agents would start them, at a meeting on loopback.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from gang_crew import Crew, Machine, Nursery, has_quotas, may_go_first, nursery, until
from machine import facts
from potluck.domain.gangs import Pace, split, step_s

NAMES = "abcd"


@dataclass
class Bench:
    nursery: Nursery
    engine: str
    folder: Path
    is_quick: bool

    def crew(self, **given: Any) -> Crew:
        folder = self.folder / f"crew-{time.monotonic_ns()}"
        folder.mkdir()
        return Crew(self.nursery, folder, self.engine, **given)

    def count(self, usual: int, quick: int) -> int:
        return quick if self.is_quick else usual


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="fewer steps and repetitions; noisier")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--engine", choices=("auto", "torchft", "plain"), default="auto")
    options = parser.parse_args()
    engine = options.engine
    if engine == "auto":
        engine = "torchft" if importlib.util.find_spec("torchft") else "plain"
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder, nursery() as made:
        bench = Bench(made, engine, Path(folder), options.quick)
        for part in options.only.split(","):
            began = time.monotonic()
            figures = PARTS[part](bench)
            rounded = {key: round(value, 4) for key, value in figures.items()}
            print(f"# {part}, {time.monotonic() - began:.0f} s: {rounded}", file=sys.stderr, flush=True)
            found |= rounded
    about = {"engine": engine, "priority": "real-time" if may_go_first() else "ordinary", **facts()}
    if options.json:
        print(json.dumps(found | about))
    else:
        for key, value in found.items():
            print(f"{key:28}{value:12,.4g}")
        for key, text in about.items():
            print(f"{key:28}{text}")
    return 0


# --- throughput -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Set:
    """Machines of these speeds, and what they train."""

    machines: Sequence[Mapping[str, Any]]  # each one's part of the task
    batch: int
    steps: int  # of the gang
    uniform_steps: int
    solo_s: float
    quotas: Sequence[float] = ()

    @property
    def names(self) -> str:
        return NAMES[: len(self.machines)]

    def quota(self, place: int) -> float:
        return self.quotas[place] if self.quotas else 0.0


def sleepers(costs: Sequence[float], **rest: Any) -> Set:
    return Set([{"sample_s": cost} for cost in costs], **rest)


def ratio_4211(bench: Bench) -> dict[str, float]:
    """Steps long enough that two cores can be four machines: all of them want to compute at the same moment."""
    steps = bench.count(26, 18)
    made = sleepers([0.0032, 0.0064, 0.0128, 0.0128], batch=512, steps=steps, uniform_steps=6, solo_s=6)
    return ratio(bench, made, "4211")


def ratio_31(bench: Bench) -> dict[str, float]:
    made = sleepers([0.002, 0.006], batch=148, steps=bench.count(60, 36), uniform_steps=12, solo_s=3)
    return ratio(bench, made, "31")


def ratio_quota(bench: Bench) -> dict[str, float]:
    """Real arithmetic. All quotas together are well below a machine, so that others may use it, too."""
    if not has_quotas():
        return {}
    steps = bench.count(20, 16)
    four = Set([{"rows": 0}] * 4, 4096, steps, uniform_steps=6, solo_s=3, quotas=(0.4, 0.2, 0.1, 0.1))
    two = Set([{"rows": 0}] * 2, 4096, steps, uniform_steps=6, solo_s=3, quotas=(0.6, 0.2))
    return ratio(bench, four, "4211_quota") | ratio(bench, two, "31_quota")


def ratio(bench: Bench, made: Set, key: str) -> dict[str, float]:
    """Alone, together, with equal shares, and alone again: the machine is shared, and its speed changes."""
    before = alone_per_s(bench, made)
    whole, late, shares = gang_per_s(bench, made)
    uniform = ddp_per_s(bench, made)
    alone = fmean([before, alone_per_s(bench, made)])
    print(f"# {key}: alone {alone:,.0f}, gang {late:,.0f}, DDP {uniform:,.0f} samples/s; {shares}", file=sys.stderr)
    return {
        f"ratio_{key}": late / alone,
        f"ratio_{key}_whole": whole / alone,
        f"uniform_{key}": uniform / alone,
        f"overhead_ms_{key}": 1e3 * made.batch * (1 / late - 1 / alone),
    }


def alone_per_s(bench: Bench, made: Set) -> float:
    """The sum over the machines, each for itself. At the same time, as the gang uses them at the same time, too."""
    with bench.crew(task={"batch": made.batch, "seconds": made.solo_s}) as crew:
        for i, name in enumerate(made.names):
            crew.add(name, "solo", {}, quota=made.quota(i), **made.machines[i])
        crew.ends()
        # from "begin" on, because the slowest of them does two steps only
        return sum(per_s(machine.of("begin") + machine.steps, made.batch) for machine in crew.machines)


def gang_per_s(bench: Bench, made: Set, *, skip: int = 10) -> tuple[float, float, dict[str, int]]:
    """From its first batch on, and without its first steps; and its last shares."""
    with bench.crew(task={"batch": made.batch, "length": made.batch * made.steps}, least=len(made.names)) as crew:
        crew.meet()
        for i, name in enumerate(made.names):
            crew.gang(name, quota=made.quota(i), **made.machines[i])
        crew.ends()
        steps = crew.machines[0].steps
        return per_s(steps, made.batch), per_s(steps, made.batch, skip=skip), steps[-1]["shares"]


def ddp_per_s(bench: Bench, made: Set) -> float:
    with bench.crew(task={"batch": made.batch, "length": made.batch * made.uniform_steps}) as crew:
        crew.ddp(made.names, quotas=made.quotas, each=made.machines)
        crew.ends()
        return per_s(crew.machines[0].steps, made.batch, skip=2)


def per_s(steps: Sequence[Mapping[str, Any]], batch: int, *, skip: int = 0) -> float:
    """Samples by the clock on the wall. The first step's beginning is not known, so it only sets the clock."""
    chosen = steps[skip:]
    return batch * (len(chosen) - 1) / (chosen[-1]["at"] - chosen[0]["at"])


def equal(bench: Bench) -> dict[str, float]:
    made = sleepers([0.0064] * 4, batch=256, steps=bench.count(42, 26), uniform_steps=18, solo_s=0)
    _, ours, _ = gang_per_s(bench, made)
    return {"equal_vs_uniform": ours / ddp_per_s(bench, made)}


def seed(bench: Bench) -> dict[str, float]:
    """A whole epoch, from the first batch on, nothing known before. A step is short, so the model is: 0.04 million."""
    made = sleepers([0.001, 0.003], batch=64, steps=100, uniform_steps=100, solo_s=0)
    took = {}
    for way in ("ddp", "gang"):
        with bench.crew(task={"batch": made.batch, "length": 6400, "hidden": 64}, least=2) as crew:
            if way == "gang":
                crew.meet()
                for name, task in zip(made.names, made.machines, strict=True):
                    crew.gang(name, **task)
            else:
                crew.ddp(made.names, each=made.machines)
            crew.ends()
            steps = crew.machines[0].steps
            took[way] = steps[-1]["at"] - steps[0]["at"]
    print(f"# seed: {6336 / took['ddp']:,.0f} → {6336 / took['gang']:,.0f} samples/s", file=sys.stderr)
    return {"seed_speedup": took["ddp"] / took["gang"]}


# --- balance ----------------------------------------------------------------------------------------------------------

COSTS = {"a": 0.0008, "b": 0.0016, "c": 0.0032, "d": 0.0032}


def replan(bench: Bench) -> dict[str, float]:
    """One machine after the other becomes slower for a while."""
    every, batch = 20, 256
    slow = ("a", "b", "c", "a")[: bench.count(4, 3)]
    changes: dict[str, list[tuple[int, float]]] = {name: [] for name in COSTS}
    for number, name in enumerate(slow):
        changes[name] += [(every * (2 * number + 1), 3.0), (every * (2 * number + 2), 1.0)]
    length = batch * every * (2 * len(slow) + 1)
    with bench.crew(task={"batch": batch, "length": length}, least=4) as crew:
        crew.meet()
        for name, cost in COSTS.items():
            crew.gang(name, sample_s=cost, changes=changes[name], noise=0.03, chance=ord(name))
        crew.ends()
        steps = crew.machines[0].steps
    # Without the short ramp of what a step costs besides: the machines' own speeds, which we know.
    worth = [efficiency(step["shares"], speeds(changes, step["step"]), batch) for step in steps]
    took = [next((k for k in range(every) if worth[at + k] >= 0.97), every) for at in range(every, len(worth), every)]
    found = {"start": [next(k for k, w in enumerate(worth) if w >= 0.97)], "down": took[0::2], "back": took[1::2]}
    print(f"# replan: {found}, mean efficiency {fmean(worth):.3f}", file=sys.stderr)
    return {
        "replan_steps_median": median(found["down"]),
        "replan_steps_worst": max(found["down"]),
        "replan_back_steps_median": median(found["back"]),
        "first_plan_steps": found["start"][0],
    }


def speeds(changes: Mapping[str, Sequence[tuple[int, float]]], step: int) -> dict[str, float]:
    return {
        name: cost * next((factor for since, factor in reversed(changes[name]) if step >= since), 1.0)
        for name, cost in COSTS.items()
    }


def efficiency(shares: Mapping[str, int], costs: Mapping[str, float], batch: int) -> float:
    """The best step's time by this one's."""
    paces = [Pace(0.0, costs[name]) for name in shares]
    return step_s(paces, split(batch, paces)) / step_s(paces, list(shares.values()))


def steady(bench: Bench) -> dict[str, float]:
    count, batch = bench.count(430, 230), 128
    with bench.crew(task={"batch": batch, "length": batch * count}, least=4) as crew:
        crew.meet()
        for name, cost in COSTS.items():
            crew.gang(name, sample_s=cost, noise=0.03, spikes=0.005, chance=ord(name))
        crew.ends()
        first = crew.machines[0]
        needless = [event for event in first.events("replan") if event["step"] > 30]
    for event in needless:
        print(f"# steady, step {event['step']}: {event['text']}", file=sys.stderr)
    return {"needless_replans_per_1000": 1000 * len(needless) / (count - 30)}


# --- life -------------------------------------------------------------------------------------------------------------

LIVES = {"a": 0.001, "b": 0.002, "c": 0.002}  # 256 samples: 128 ms a step


def lively(bench: Bench) -> Crew:
    return bench.crew(task={"batch": 256, "length": 256 * 100, "epochs": 1000}, least=1)


def settle(crew: Crew) -> Machine:
    """Three members, balanced."""
    crew.meet()
    for name, cost in LIVES.items():
        crew.gang(name, sample_s=cost)
    first = crew.machines[0]
    crew.first(first, lambda step: step["step"] >= 10 and len(step["shares"]) == 3, "three members train")
    return first


def come_back(crew: Crew, first: Machine, name: str, more: int = 6) -> tuple[Machine, list[dict[str, Any]]]:
    """A new process for a lost member; the others' steps from its start until some after its arrival."""
    began = len(first.steps)
    came = crew.gang(name, sample_s=LIVES[name])
    arrival = crew.first(
        first, lambda step: step["step"] >= first.steps[began - 1]["step"] and name in step["shares"], name
    )
    crew.first(first, lambda step: step["step"] >= arrival["step"] + more, f"steps with {name}")
    return came, first.steps[began - 1 :]


def kill(bench: Bench) -> dict[str, float]:
    """A member is killed in some phase of a step, and comes back."""
    commits, pauses, pause_s, lost = [], [], [], 0
    with lively(bench) as crew:
        first = settle(crew)
        victim = crew.machines[2]
        for number in range(bench.count(5, 3)):
            seen = len(first.steps)
            crew.first(first, lambda step, seen=seen: step["step"] >= first.steps[seen - 1]["step"] + 3, "a step")
            time.sleep(0.128 * number / 5)  # not a wait: another phase of the step each time
            at = victim.signal(signal.SIGKILL)
            after = crew.first(first, lambda step, at=at: step["at"] > at and "c" not in step["shares"], "a commit")
            commits.append(after["at"] - at)
            usual_s = settled_s(crew, first, after)
            victim, around = come_back(crew, first, "c")
            gap_s = max(b["at"] - a["at"] for a, b in pairwise(around))
            pauses.append(gap_s / usual_s - 1)
            pause_s.append(gap_s - usual_s)
        numbers = [step["step"] for step in first.steps]
        lost = len(numbers) - len(set(numbers)) + numbers[-1] - numbers[0] + 1 - len(numbers)
    print(f"# kill: {[round(s, 2) for s in commits]} s; pauses {[round(p, 2) for p in pauses]}", file=sys.stderr)
    return {
        "killed_next_commit_s": max(commits),
        "killed_next_commit_s_median": median(commits),
        "killed_steps_lost": float(lost),
        "joiner_pause_steps": max(pauses),
        "joiner_pause_steps_median": median(pauses),
        "joiner_pause_s": max(pause_s),
    }


def settled_s(crew: Crew, first: Machine, after: Mapping[str, Any]) -> float:
    """A step's usual time without the lost one."""
    crew.first(first, lambda step: step["step"] >= after["step"] + 10, "steps of two")
    late = [step for step in first.steps if step["step"] >= after["step"] + 4]
    return median(b["at"] - a["at"] for a, b in pairwise(late))


def hang(bench: Bench) -> dict[str, float]:
    """A member's main thread does not come back, or its process is stopped."""
    commits: dict[str, list[float]] = {"stuck": [], "stopped": []}
    for is_fenced in (True, False):
        with lively(bench) as crew:
            first = settle(crew)
            victim = crew.machines[2]
            if is_fenced:
                crew.fence()
            for how in ("stuck", "stopped") * bench.count(2, 1) if is_fenced else ("alone",):
                at = victim.signal(signal.SIGUSR1 if how == "stuck" else signal.SIGSTOP)
                if how == "stuck":
                    at = until(partial(victim.of, "stuck"), "it hangs")[0]["at"]
                after = crew.first(first, lambda step, at=at: step["at"] > at and "c" not in step["shares"], "a commit")
                commits.setdefault(how, []).append(after["at"] - at)
                if is_fenced:
                    victim, _ = come_back(crew, first, "c", more=12)
    print(f"# hang: { {how: [round(s, 2) for s in found] for how, found in commits.items()} }", file=sys.stderr)
    return {
        "hung_next_commit_s": max(commits["stuck"] + commits["stopped"]),
        "hung_stuck_s": max(commits["stuck"]),
        "hung_stopped_s": max(commits["stopped"]),
        "hung_alone_s": max(commits["alone"]),
    }


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(bench: Bench) -> dict[str, float]:
    """The profiler by itself (gang_profiler.py); and blocks of steps with and without the library, in turns."""
    script = str(Path(__file__).with_name("gang_profiler.py"))
    told = subprocess.run([sys.executable, script, "--json"], capture_output=True, text=True, check=True).stdout
    blocks, steps, batch = bench.count(16, 8), 10, 384
    task = {"batch": batch, "length": batch * blocks * steps, "blocks": blocks, "steps": steps}
    with bench.crew(task=task, goes_first=False) as crew:
        machine = crew.add("a", "cost", {})
        crew.ends()
        ours, plain = machine.of("ours")[1:], machine.of("plain")[1:]
    by_block = [one["cpu_s"] / other["cpu_s"] for one, other in zip(ours, plain, strict=True)]
    step_ms = [1e3 * median(block["cpu_s"] for block in found) / steps for found in (ours, plain)]
    print(f"# cost: {step_ms[0]:.2f} by {step_ms[1]:.2f} ms of CPU a step", file=sys.stderr)
    return {
        "profiler_overhead": json.loads(told)["profiler_overhead"],
        "library_overhead": median(by_block) - 1,
    }


PARTS = {
    "4211": ratio_4211,
    "31": ratio_31,
    "equal": equal,
    "replan": replan,
    "steady": steady,
    "kill": kill,
    "hang": hang,
    "seed": seed,
    "cost": cost,
    "quota": ratio_quota,
}

if __name__ == "__main__":
    sys.exit(main())
