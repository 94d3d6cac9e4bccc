"""How does the benchmark bring machines together, read their diaries, and end them as an agent would?"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potluck.worker.jobs import limits
from potluck.worker.jobs.gangs import LOOK_S, Watch

PATIENCE_S = 60.0
QUOTA_PERIOD_US = 20_000  # short: a slow machine is slow all the time, it does not rest for 90 ms of 100


def until(found: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + within_s
    while not (result := found()):
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {within_s:g} s: {what}")
        time.sleep(0.01)
    return result


class Nursery:
    """gang_member.py, once for all: a machine is forked from it instead of importing torch for seconds."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("gang_member.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"},
        )
        self._lock = threading.Lock()

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
            return answer

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()


@dataclass
class Machine:
    """One process, and what it wrote."""

    name: str
    nursery: Nursery
    pid: int
    log_path: Path
    diary_path: Path
    pulse_path: Path
    _seen: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0

    @property
    def diary(self) -> list[dict[str, Any]]:
        if self.diary_path.exists():
            with self.diary_path.open() as file:
                file.seek(self._offset)
                while (line := file.readline()).endswith("\n"):
                    self._seen.append(json.loads(line))
                    self._offset = file.tell()
        return self._seen

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.diary if entry["kind"] == kind]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.of("step")

    def events(self, what: str) -> list[dict[str, Any]]:
        return [entry for entry in self.of("event") if entry["what"] == what]

    @property
    def status(self) -> int | None:
        status: int | None = self.nursery.ask(status=self.pid)["status"]
        return status

    def signal(self, number: int) -> float:
        """When it was sent."""
        os.kill(self.pid, number)
        return time.monotonic()

    def end(self, within_s: float = 200.0) -> None:
        """Wait for its end, which must be a good one."""
        until(lambda: self.status is not None, f"{self.name} ends", within_s)
        if self.status != 0:
            raise SystemExit(f"{self.name} ended with {self.status}: {self.log_path.read_text()[-2000:]}")

    def clear_away(self) -> None:
        if self.status is None:
            self.signal(signal.SIGKILL)
            until(lambda: self.status is not None, f"{self.name} is killed")


@dataclass
class Crew:
    """The machines of one measurement. A gang needs a meeting first: `meet`."""

    nursery: Nursery
    folder: Path
    engine: str
    task: dict[str, Any] = field(default_factory=dict)
    least: int = 1
    policy: str = "dynamic"
    goes_first: bool = True
    machines: list[Machine] = field(default_factory=list)
    _quotas: list[Path] = field(default_factory=list)
    _address: str = ""
    _meeting: subprocess.Popen[bytes] | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for machine in self.machines:
            machine.clear_away()
        if self._meeting is not None:
            self._meeting.kill()
            self._meeting.wait()
        for group in self._quotas:
            with contextlib.suppress(OSError):
                group.rmdir()

    def meet(self) -> None:
        """As the agent of one of the machines starts it."""
        command = [sys.executable, "-m", "potluck.train.gang", self.engine, "--host", "127.0.0.1", "--least"]
        log = self.folder / "meeting.log"
        with log.open("w") as file:
            self._meeting = subprocess.Popen([*command, str(self.least)], stdout=file, stderr=subprocess.DEVNULL)
        if self.goes_first and may_go_first():
            os.sched_setscheduler(self._meeting.pid, os.SCHED_RR, os.sched_param(1))
        self._address = until(lambda: log.read_text().strip(), "the meeting starts")

    def gang(self, name: str, *, quota: float = 0.0, **task: Any) -> Machine:
        """A member. The others are where the meeting is."""
        key = "lighthouse" if self.engine == "torchft" else "store"
        place = {
            "member": name,
            "address": "127.0.0.1",
            key: self._address,
            "least": self.least,
            "most": 8,
            "policy": self.policy,
            "engine": self.engine,
            "seed": 5,
            "wait_s": 60,
            "pulse": str(self.folder / f"{name}-{len(self.machines)}.pulse"),
        }
        return self.add(name, "gang", {"POTLUCK_GANG": json.dumps(place)}, quota=quota, **task)

    def ddp(self, names: Sequence[str], *, quotas: Sequence[float] = (), each: Sequence[Mapping[str, Any]]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank, name in enumerate(names):
            more = {"rank": rank, "size": len(names), "port": port, **each[rank]}
            self.add(name, "ddp", {"GLOO_SOCKET_IFNAME": "lo"}, quota=quotas[rank] if quotas else 0.0, **more)

    def add(self, name: str, role: str, environment: dict[str, str], *, quota: float = 0.0, **task: Any) -> Machine:
        group = self._quota(quota) if quota else ""
        machine = self._start(f"{name}-{len(self.machines)}", role, environment, {**self.task, **task}, group)
        machine.name = name
        self.machines.append(machine)
        return machine

    def _start(self, name: str, role: str, environment: dict[str, str], task: dict[str, Any], group: str) -> Machine:
        log, diary, pulse = (self.folder / f"{name}.{ending}" for ending in ("log", "jsonl", "pulse"))
        clean = {key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")}
        pid = self.nursery.ask(
            start=role,
            log=str(log),
            first=self.goes_first and not group and may_go_first(),
            environment={
                **clean,
                "OMP_NUM_THREADS": "1",
                "TASK": json.dumps({**task, "diary": str(diary), "group": group}),
                **environment,
            },
        )["pid"]
        return Machine(name, self.nursery, pid, log, diary, pulse)

    def _quota(self, cores: float) -> str:
        groups = limits.here()
        folder = Path(groups.folders["cpu"], f"potluck-bench-{os.getpid()}-{time.monotonic_ns()}")
        folder.mkdir()
        self._quotas.append(folder)
        quota = round(cores * QUOTA_PERIOD_US)
        if groups.version == 1:
            (folder / "cpu.cfs_period_us").write_text(str(QUOTA_PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(quota))
            (folder / "cpu.shares").write_text("200000")  # up to its quota it goes before others
        else:
            (folder / "cpu.max").write_text(f"{quota} {QUOTA_PERIOD_US}")
            (folder / "cpu.weight").write_text("10000")
        return str(folder)

    # --- what an agent does

    def fence(self) -> None:
        """From now on end members that hang, by their pulse, as their agents would."""
        threading.Thread(target=self._fence, daemon=True).start()

    def _fence(self) -> None:
        watches: dict[int, Watch] = {}
        while not self._over.wait(LOOK_S):
            for machine in self.machines:
                with contextlib.suppress(OSError):
                    text = machine.pulse_path.read_bytes()
                    if watches.setdefault(machine.pid, Watch()).look(text, time.monotonic()):
                        os.kill(machine.pid, signal.SIGKILL)

    # --- waiting

    def ends(self, within_s: float = 200.0) -> None:
        for machine in self.machines:
            machine.end(within_s)

    def first(self, machine: Machine, fits: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The first step of its diary that fits."""

        def found() -> dict[str, Any] | None:
            if machine.status not in (None, 0):
                raise SystemExit(f"{machine.name}: {machine.log_path.read_text()[-2000:]}")
            return next((step for step in machine.steps if fits(step)), None)

        entry: dict[str, Any] = until(found, what)
        return entry


@functools.cache
def may_go_first() -> bool:
    """May machines that sleep have real-time priority? They stand for machines with cores of their own.

    They use little, but a core that others use keeps each of them waiting for some milliseconds at each message.
    """
    if sys.platform != "linux":
        return False
    script = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def has_quotas() -> bool:
    return "cpu" in limits.here().folders


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    try:
        yield made
    finally:
        made.close()
