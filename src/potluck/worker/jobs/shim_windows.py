"""How does nothing of a job survive its end, or its agent's, on Windows?

The same pipes and the same plan as shim.py. What control groups and the reaper are there, a job object is here: the shim
enters one, its command is born into it, and Windows ends everything in it when the shim's last handle closes, however the
shim ends. It bounds the memory (an allocation beyond it fails) and the number of processes.

There is no SIGTERM: a command is asked to end by Ctrl-Break, which Python knows as SIGBREAK.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

# Potluck's own folder comes last: a bare interpreter knows the standard library only, and that goes first.
sys.path.append(os.path.dirname(os.path.abspath(__file__)).removesuffix(os.path.join("potluck", "worker", "jobs")))

from potluck.worker.jobs.below import DiskWatch

EXTENDED_LIMITS = 9  # JobObjectExtendedLimitInformation
ACTIVE_PROCESS, JOB_MEMORY, KILL_ON_CLOSE = 0x8, 0x200, 0x2000
TICK_S = 0.25
KILLED = 137


class Limits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION, its basic part and its counters laid out flat."""

    _fields_ = (
        ("process_time", ctypes.c_int64),
        ("job_time", ctypes.c_int64),
        ("flags", ctypes.c_uint32),
        ("least_working_set", ctypes.c_size_t),
        ("most_working_set", ctypes.c_size_t),
        ("active_processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("priority", ctypes.c_uint32),
        ("scheduling", ctypes.c_uint32),
        ("io", ctypes.c_uint64 * 6),
        ("process_memory", ctypes.c_size_t),
        ("job_memory", ctypes.c_size_t),
        ("peak_process_memory", ctypes.c_size_t),
        ("peak_job_memory", ctypes.c_size_t),
    )


class JobObject:
    def __init__(self, plan: dict[str, Any]) -> None:
        self._kernel: Any = getattr(ctypes, "WinDLL")("kernel32", use_last_error=True)  # noqa: B009 - Windows' own
        self._kernel.CreateJobObjectW.restype = ctypes.c_void_p
        self._kernel.GetCurrentProcess.restype = ctypes.c_void_p
        self._handle = ctypes.c_void_p(self._kernel.CreateJobObjectW(None, None))
        limits = Limits(flags=KILL_ON_CLOSE)
        if plan["watch"]["memory"]:
            limits.flags |= JOB_MEMORY
            limits.job_memory = plan["watch"]["memory"]
        if plan["watch"]["pids"]:
            limits.flags |= ACTIVE_PROCESS
            limits.active_processes = plan["watch"]["pids"] + 1  # and the shim
        size = ctypes.sizeof(limits)
        entered = self._kernel.SetInformationJobObject(
            self._handle, EXTENDED_LIMITS, ctypes.byref(limits), size
        ) and self._kernel.AssignProcessToJobObject(self._handle, ctypes.c_void_p(self._kernel.GetCurrentProcess()))
        if not entered:
            raise OSError(f"Windows refused a job object: error {ctypes.get_last_error()}")  # type: ignore[attr-defined]

    def peak(self) -> int:
        limits = Limits()
        size = ctypes.sizeof(limits)
        self._kernel.QueryInformationJobObject(self._handle, EXTENDED_LIMITS, ctypes.byref(limits), size, None)
        return int(limits.peak_job_memory)

    def end(self) -> None:
        """Everything in it, which includes the caller: the last that it does."""
        self._kernel.TerminateJobObject(self._handle, 0)


class Shim:
    def __init__(self, plan: dict[str, Any], process: subprocess.Popen[bytes]) -> None:
        self.plan = plan
        self.process = process
        self.why = ""
        self.started = time.monotonic()
        self._kill_at: float | None = None
        self._fence: float | None = None if plan["fence"] is None else self.started + plan["fence"]

    def hear(self, line: str | None) -> None:
        if line is None:
            return self.end("orphaned", 0.0)
        word, _, rest = line.strip().partition(" ")
        if word == "renew":
            self._fence = time.monotonic() + float(rest)
        elif word == "end":
            self.end("ended", float(rest))
        elif word == "kill":
            self.end("killed", 0.0)
        return None

    def end(self, why: str, grace_s: float) -> None:
        self.why = self.why or why
        due = time.monotonic() + grace_s
        if self._kill_at is None and grace_s > 0:
            with contextlib.suppress(OSError):
                self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
        self._kill_at = due if self._kill_at is None else min(due, self._kill_at)

    def tick(self, disk: DiskWatch) -> bool:
        """Is it time to kill it?"""
        now = time.monotonic()
        if self._fence is not None and now > self._fence:
            self.end("fenced", 0.0)
        timeout = self.plan["timeout"]
        if timeout is not None and not self.why and now > self.started + timeout:
            self.end("timeout", self.plan["grace"])
        if disk.over:
            self.end(disk.over, min(2.0, self.plan["grace"]))
        return self._kill_at is not None and now >= self._kill_at


def listen(heard: queue.SimpleQueue[str | None]) -> None:
    for line in sys.stdin:
        heard.put(line)
    heard.put(None)  # the agent is gone


def tell(message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def main() -> int:
    line = sys.stdin.readline()
    if not line:
        return 1
    plan = json.loads(line)
    disk = DiskWatch(plan["watch"])
    try:
        job = JobObject(plan)
        process = subprocess.Popen(
            plan["argv"],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            stderr=sys.stderr.fileno(),
            cwd=plan["cwd"],
            env=plan["env"],
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    except OSError as error:
        missing, forbidden = isinstance(error, FileNotFoundError), isinstance(error, PermissionError)
        tell({"failed": str(error), "missing": missing, "forbidden": forbidden})
        return 1
    tell({"started": process.pid})
    shim = Shim(plan, process)
    heard: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(heard,), daemon=True).start()
    disk.start()
    while process.poll() is None:
        with contextlib.suppress(queue.Empty):
            shim.hear(heard.get(timeout=TICK_S))
        if shim.tick(disk):
            process.kill()
            process.wait()
            process.returncode = KILLED
    tell(
        {
            "exit": process.returncode,
            "why": shim.why,
            "told": None,
            "left": 0,
            "survivors": [],
            "wall_s": round(time.monotonic() - shim.started, 3),
            "cpu_s": 0.0,
            "peak": job.peak(),
            "oom": 0,
            "added": disk.added,
        }
    )
    job.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
