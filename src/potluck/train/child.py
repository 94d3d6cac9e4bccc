"""What is the process in which training happens, and how does it talk to the agent?

    stdin           one JSON line an instruction (protocol.ToChild); its end is the end of this process, at once
    POTLUCK_EVENTS_FD   one JSON line an event (protocol.FromChild); stdout and stderr are free for a recipe's print()

A thread reads instructions with the time of their arrival; all else happens in the main thread, between two steps. A
task that goes wrong is a `Failed` event with a sentence. Only what leaves the process unusable ends it: no memory, a
faulted GPU. The agent sees the exit and starts another.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import BinaryIO

import msgspec
import torch

from potluck.errors import PotluckError
from potluck.protocol import (
    ChildEvent,
    DoInit,
    DoMerge,
    DoTaste,
    DoUnit,
    Drop,
    Failed,
    Finished,
    HandIn,
    Ready,
    Rebase,
    ToChild,
)
from potluck.train import device as devices
from potluck.train import tasks
from potluck.train.pool import RUNS_KEPT, Contributor, Held, explain

FATAL_EXIT = 70
Task = DoInit | DoMerge | DoTaste


class Child:
    """Takes instructions from a queue and works; `None` in the queue ends it."""

    def __init__(self, emit: Callable[[ChildEvent], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.inbox: queue.SimpleQueue[tuple[float, ToChild] | None] = queue.SimpleQueue()
        self._emit = emit
        self._clock = clock
        self._contributor = Contributor(emit, clock)
        self._tasks: deque[Task] = deque()
        self._held: OrderedDict[str, Held] = OrderedDict()  # weights for merges and tastes, by run

    def run(self) -> None:
        while self._receive():
            if self._contributor.next_at is not None:
                self._contributor.work()
            elif self._tasks:
                self._do(self._tasks.popleft())

    def _receive(self) -> bool:
        """Take what has come; wait if there is nothing to do yet. False: the end."""
        while True:
            try:
                came = self.inbox.get(timeout=self._patience())
            except queue.Empty:
                return True
            if came is None:
                return False
            arrived, instruction = came
            match instruction:
                case DoUnit() | Rebase() | HandIn():
                    self._contributor.take(instruction, arrived)
                case Drop(lease_id=lease_id):
                    self._contributor.take(instruction, arrived)
                    self._tasks = deque(task for task in self._tasks if task.lease_id != lease_id)
                case DoInit() | DoMerge() | DoTaste():
                    self._tasks.append(instruction)

    def _patience(self) -> float | None:
        next_at = self._contributor.next_at
        if next_at is not None:
            return max(0.0, next_at - self._clock())
        return 0.0 if self._tasks else None

    def _do(self, task: Task) -> None:
        try:
            match task:
                case DoInit():
                    report, files = tasks.init(task)
                case DoMerge():
                    report, files = tasks.merge_updates(task, self._held_of(task.run_id))
                case DoTaste():
                    report, files = tasks.taste(task, self._held_of(task.run_id))
        except Exception as error:
            if not isinstance(error, PotluckError):
                traceback.print_exc()
            code, reason = explain(error)
            self._emit(Failed(lease_id=task.lease_id, code=code, reason=reason))
            if devices.is_fatal(error):
                raise
        else:
            self._emit(Finished(lease_id=task.lease_id, report=report, files=files))

    def _held_of(self, run_id: str) -> Held:
        held = self._held.setdefault(run_id, Held())
        self._held.move_to_end(run_id)
        while len(self._held) > RUNS_KEPT:
            self._held.popitem(last=False)
        return held


def read_instructions(stream: BinaryIO, child: Child, at_end: Callable[[], None]) -> None:
    """Put every line into the child's inbox. A line that is no instruction is said on stderr and passed over."""
    decoder = msgspec.json.Decoder(ToChild)
    for line in stream:
        arrived = time.monotonic()
        try:
            child.inbox.put((arrived, decoder.decode(line)))
        except msgspec.MsgspecError as error:
            print(f"not an instruction: {error}: {line[:200]!r}", file=sys.stderr, flush=True)
    at_end()


def events_to(fd: int) -> Callable[[ChildEvent], None]:
    encoder = msgspec.json.Encoder()

    def emit(event: ChildEvent) -> None:
        line = encoder.encode(event) + b"\n"
        while line:
            line = line[os.write(fd, line) :]

    return emit


def main() -> None:
    devices.use_threads()
    # Ctrl-C goes to the whole terminal; what it means for the work is the agent's to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    emit = events_to(int(os.environ.get("POTLUCK_EVENTS_FD", "1")))
    child = Child(emit)
    # Without the agent there is nobody to work for: leave at once, even in the middle of a long step.
    leave = threading.Thread(
        target=read_instructions,
        args=(sys.stdin.buffer, child, lambda: os._exit(0)),
        name="instructions",
        daemon=True,
    )
    leave.start()
    try:
        emit(Ready(torch=str(torch.__version__), device=str(devices.pick("auto"))))
        child.run()
    except BrokenPipeError:
        os._exit(0)
    except Exception:  # noqa: BLE001 (the process ends, with another exit code than the interpreter's)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(FATAL_EXIT)  # not exit(): a faulted device can hang the interpreter's clean-up
