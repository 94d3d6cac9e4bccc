"""Several real processes as a gang on loopback, and what they wrote in their diaries."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import gang_script

PATIENCE_S = 90.0


def until(found: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> Any:
    """Poll, bounded."""
    deadline = time.monotonic() + within_s
    while not (result := found()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(0.02)
    return result


class Nursery:
    """gang_nursery.py, once for all tests."""

    def __init__(self, script: str | Path = "gang_nursery.py") -> None:
        script = Path(__file__).parent / script
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"}
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._lock = threading.Lock()

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
            return answer

    def start(self, kind: str, log: Path, environment: dict[str, str], **given: Any) -> Process:
        return Process(self, self.ask(start=kind, log=str(log), environment=environment, **given)["pid"])

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.kill()  # its children have ended; its own end would take seconds
        self._process.wait()


@dataclass
class Process:
    nursery: Nursery
    pid: int

    def poll(self) -> int | None:
        status: int | None = self.nursery.ask(status=self.pid)["status"]
        return status

    def wait(self) -> int:
        until(lambda: self.poll() is not None, f"process {self.pid} ends")
        status = self.poll()
        assert status is not None
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@dataclass
class Member:
    name: str
    process: Process
    diary_path: Path
    log_path: Path

    @property
    def diary(self) -> list[dict[str, Any]]:
        if not self.diary_path.exists():
            return []
        lines = self.diary_path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.diary if entry["kind"] == kind]

    def events(self, what: str) -> list[str]:
        return [entry["text"] for entry in self.of("event") if entry["what"] == what]

    @property
    def committed(self) -> list[dict[str, Any]]:
        return [entry for entry in self.of("step") if entry["committed"]]

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def reached(self, step: int) -> bool:
        if (code := self.process.poll()) not in (None, 0):
            raise AssertionError(f"{self.name} ended with {code}: {self.log[-2000:]}")
        return any(entry["step"] >= step for entry in self.committed)

    def kill(self) -> None:
        self.process.kill()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> dict[str, Any]:
        """What it wrote at its end, which must be a good one."""
        code = self.process.wait()
        assert code == 0, f"{self.name}: {code}\n{self.log[-3000:]}"
        (entry,) = self.of("end")
        return entry


@dataclass
class Cluster:
    """A meeting place and its members. `engine`: torchft or plain."""

    nursery: Nursery
    folder: Path
    engine: str
    task: dict[str, Any]
    least: int = 1
    most: int = 4
    policy: str = "uniform"
    members: list[Member] = field(default_factory=list)
    meeting: Process | None = None
    address: str = ""

    def __enter__(self) -> Cluster:
        self.open_meeting()
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.process.kill()
            member.process.wait()
        self.close_meeting()

    def open_meeting(self, port: int = 0) -> None:
        log = self.folder / f"meeting-{time.monotonic_ns()}.log"
        given = {"host": "127.0.0.1", "port": port, "least": self.least}
        self.meeting = self.nursery.start(self.engine, log, dict(os.environ), **given)
        self.address = until(lambda: log.exists() and log.read_text().strip(), "the meeting starts")
        where = self.folder / "where.json"
        part = where.with_suffix(".part")
        part.write_text(json.dumps({self._key: self.address}))
        part.replace(where)

    def close_meeting(self) -> None:
        if self.meeting is not None:
            self.meeting.kill()
            self.meeting.wait()

    @property
    def _key(self) -> str:
        return "lighthouse" if self.engine == "torchft" else "store"

    def start(self, name: str, **changes: Any) -> Member:
        place = changes.pop("place", {})
        diary_path = self.folder / f"{name}-{len(self.members)}.jsonl"
        log_path = self.folder / f"{name}-{len(self.members)}.log"
        gang = {
            "member": name,
            "address": "127.0.0.1",
            self._key: self.address,
            "where": str(self.folder / "where.json"),
            "least": self.least,
            "most": self.most,
            "policy": self.policy,
            "engine": self.engine,
            "seed": 5,
            "wait_s": 60,
            **place,
        }
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")},
            "OMP_NUM_THREADS": "1",
            "POTLUCK_GANG": json.dumps(gang),
            "TASK": json.dumps({**self.task, "diary": str(diary_path), **changes}),
        }
        process = self.nursery.start("member", log_path, environment)
        member = Member(name, process, diary_path, log_path)
        self.members.append(member)
        return member

    # --- what must hold

    def ledger(self) -> dict[tuple[int, int], dict[str, Any]]:
        """The committed steps by (epoch, start). Members that wrote the same step must have written the same."""
        steps: dict[tuple[int, int], dict[str, Any]] = {}
        for member in self.members:
            for entry in member.committed:
                key = (entry["epoch"], entry["start"])
                known = steps.setdefault(key, entry)
                assert (known["step"], known["shares"]) == (entry["step"], entry["shares"]), (known, entry)
        return steps

    def assert_exactly_once(self) -> None:
        """Each sample entered one committed step of each epoch, and each member computed the ones that were its own."""
        length, epochs = self.task["length"], self.task["epochs"]
        steps = self.ledger()
        for epoch in range(epochs):
            seen: Counter[int] = Counter()
            order = epoch_order(length, epoch)
            for (of, start), entry in steps.items():
                if of == epoch:
                    seen.update(order[start : start + sum(entry["shares"].values())])
            assert seen == Counter(range(length)), f"epoch {epoch}: {seen.most_common(3)}, {len(seen)} of {length}"
        for member in self.members:
            for entry in member.committed:
                order, low = epoch_order(length, entry["epoch"]), entry["start"]
                for name, share in entry["shares"].items():
                    if name == member.name and share:
                        assert entry["mine"] == order[low : low + share]
                    low += share
        numbers = sorted(entry["step"] for entry in steps.values())
        assert numbers == list(range(len(numbers)))  # equal step counts, none twice


def epoch_order(length: int, epoch: int, seed: int = 5) -> list[int]:
    from potluck.domain.order import permutation

    return permutation(length, seed, 2, epoch)


def on_one_machine(task: dict[str, Any], *, skip: Callable[[int], bool] = lambda step: False) -> list[Tensor]:
    """The same training without a gang: plain PyTorch over the same order of samples."""
    data = gang_script.Points(task["length"])
    model = gang_script.network(task.get("model", "plain"))
    optimizer = gang_script.optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9) if task.get("schedule") else None
    step = 0
    for epoch in range(task["epochs"]):
        order = epoch_order(task["length"], epoch)
        for start in range(0, task["length"], task["batch"]):
            chosen = order[start : start + task["batch"]]
            step += 1
            if skip(step - 1):
                continue
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.x[chosen]), data.y[chosen]).backward()
            if task.get("clip"):
                nn.utils.clip_grad_norm_(model.parameters(), task["clip"])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return list(model.state_dict().values())


def furthest(weights: list[Any], expected: list[Tensor]) -> float:
    return max(
        float((torch.tensor(one, dtype=other.dtype) - other).abs().max())
        for one, other in zip(weights, expected, strict=True)
        if other.is_floating_point()
    )
