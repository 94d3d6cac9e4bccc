"""What does a member leave behind of its training?

    points     at most one a second by potluck.log, named gang/…: live on the hub's pages
    events     $POTLUCK_OUTPUT_DIR/gang-events.jsonl, one JSON object a line
    metrics    $POTLUCK_OUTPUT_DIR/experiments/<gang>/logs/rank_<r>_metrics.json, at the end, however it comes

The last one is a list of records whose names and units (seconds, percent, MB) are those of the trainer that Potluck's
gangs replace, so that its readers read ours.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potluck.train.gang.machine import Machine
from potluck.train.gang.profile import PHASES, Event, StepRecord

POINT_EVERY_S = 1.0
WRITE_EVERY_S = 60.0
"""A process that is killed without notice loses no more of its metrics file than this."""
MOST_RECORDS = 5000
"""Beyond, every other one is left out: they are of two seconds then, and so on."""
_MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Standing:
    """What a point tells beside times: asked for once a second, so it may take a moment."""

    rank: int
    members: int
    batch: int
    alone_per_s: float  # what this member would do by itself; 0: not known
    noise_scale: float


@dataclass(slots=True)
class _Since:
    """What has been committed since the last point."""

    at: float
    steps: int = 0
    samples: int = 0
    own: int = 0
    spans: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


class Journal:
    """A watcher of one member's steps and events (Gang.watch)."""

    def __init__(
        self,
        member: str,
        gang: str,
        *,
        machine: Machine,
        standing: Callable[[], Standing],
        loss: Callable[[], Mapping[str, float]],
        log: Callable[..., None] | None,
        output: Path | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._member, self._gang, self._machine = member, gang, machine
        self._standing, self._loss, self._log, self._output, self._clock = standing, loss, log, output, clock
        self._since = _Since(clock())
        self._records: list[dict[str, Any]] = []
        self._every, self._left_out = 1, 0
        self._written_at = clock()
        self._last: tuple[int, int] = (0, 0)  # step and share of the newest committed step
        self._epoch = self._rank = 0
        self._pid = os.getpid()

    def __call__(self, told: StepRecord | Event) -> None:
        if isinstance(told, Event):
            self._note(told)
        elif told.is_committed:
            self._add(told)

    # --- points

    def _add(self, told: StepRecord) -> None:
        since = self._since
        share = told.shares.get(self._member, 0)
        since.steps += 1
        since.samples += sum(told.shares.values())
        since.own += share
        for phase in PHASES:
            since.spans[phase] += getattr(told.times, phase)
        self._last, self._epoch = (told.step + 1, share), told.epoch
        now = self._clock()
        if now - since.at >= POINT_EVERY_S:
            self._point(now)
            if now - self._written_at >= WRITE_EVERY_S:
                self._written_at = now
                self.write()

    def _point(self, now: float) -> None:
        since, (step, share) = self._since, self._last
        if not since.steps:
            return
        standing, seconds = self._standing(), max(now - since.at, 1e-9)
        self._rank = standing.rank
        means = {phase: total / since.steps for phase, total in since.spans.items()}
        figures = {
            "rank": standing.rank,
            "members": standing.members,
            "share": share,
            "step_s": sum(means.values()),
            **means,
            "samples_per_s": since.own / seconds,
            "total_per_s": since.samples / seconds,
            "batch": standing.batch,
            **{
                name: value
                for name in ("alone_per_s", "noise_scale")
                if (value := getattr(standing, name)) > 0  # 0: not known
            },
            **self._machine.figures,
        }
        if self._log is not None:
            self._log(step, **{f"gang/{name}": value for name, value in figures.items()})
        self._record(step, figures)
        self._since = _Since(now)

    def _record(self, step: int, figures: Mapping[str, float]) -> None:
        self._left_out += 1
        if self._left_out < self._every:
            return
        self._left_out = 0
        memory = figures.get("gpu_memory_bytes")
        self._records.append(
            {
                "timestamp": round(time.time(), 3),
                "rank": int(figures["rank"]),
                "member": self._member,
                "world_size": int(figures["members"]),
                "epoch": self._epoch,
                "iteration": step,
                "batch_size": int(figures["share"]),
                "global_batch_size": int(figures["batch"]),
                "loss": self._loss().get("loss"),
                "iteration_time": figures["step_s"],
                "data_loading_time": figures["load_s"],
                "forward_time": figures["forward_s"],
                "backward_time": figures["backward_s"],
                "all_reduce_time": figures["sum_s"],
                "optimizer_time": figures["optimizer_s"],
                "other_time": figures["meet_s"] + figures["outside_s"],
                "throughput": figures["samples_per_s"],
                "total_throughput": figures["total_per_s"],
                "gpu_utilization": _percent(figures.get("gpu")),
                "gpu_memory_used_mb": None if memory is None else memory / _MB,
                "temperature": figures.get("temperature_c"),
                "cpu_percent": _percent(figures.get("cpu")),
                "ram_used_mb": figures["memory_bytes"] / _MB if "memory_bytes" in figures else None,
            }
        )
        if len(self._records) > MOST_RECORDS:
            del self._records[1::2]
            self._every *= 2

    # --- events

    def _note(self, told: Event) -> None:
        if self._output is None:
            return
        line = {"at": round(time.time(), 3), "step": told.step, "member": self._member, "kind": told.kind}
        try:
            with (self._output / "gang-events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "text": told.text}, ensure_ascii=False) + "\n")
        except OSError:
            return  # a full disk: it is in the log as well, and no reason to end a training

    # --- the end

    def write(self) -> None:
        """The metrics file, as far as there is something to write."""
        if self._output is None or not self._records:
            return
        name = re.sub(r"[^\w.-]+", "-", self._gang).strip(".-") or "gang"
        path = self._output / "experiments" / name / "logs" / f"rank_{self._rank}_metrics.json"
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = ",\n".join(json.dumps(record, separators=(",", ":")) for record in self._records)
            part.write_text(f"[\n{lines}\n]\n")
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """The last point, and the file. Only once, and only in the process that trained."""
        atexit.unregister(self.close)
        if os.getpid() != self._pid:
            return
        self._machine.close()
        self._point(self._clock())
        self.write()

    def close_at_the_end(self) -> None:
        """By itself, when the process ends, also by SIGTERM, if the script does nothing else upon it."""
        atexit.register(self.close)
        if (
            threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        ):
            return

        def end(number: int, frame: object) -> None:
            self.close()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)  # so that whoever waits for us sees by what we ended

        signal.signal(signal.SIGTERM, end)


def _percent(part: float | None) -> float | None:
    return None if part is None else 100 * part
