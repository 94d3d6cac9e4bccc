"""How does the agent hold on to a command: its orders to the shim, its output, and its end?"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from potluck.worker.jobs import limits
from potluck.worker.jobs.box import Box, Ended, clock
from potluck.worker.jobs.executors.common import Executor, outside_environment, try_out
from potluck.worker.jobs.executors.ending import how_it_ended, never_started

FOLDER = Path(__file__).parent.parent
SHIM = FOLDER / ("shim_windows.py" if os.name == "nt" else "shim.py")
PIECE = 65536
RENEW_S = 1.0


class Running:
    """A command at work in its box. Everything may be called from any thread, at any time, also after the end."""

    def __init__(
        self,
        executor: Executor,
        box: Box,
        plan: dict[str, Any],
        *,
        on_output: Callable[[bytes], None],
        deadline: Callable[[], float | None] | None = None,
    ) -> None:
        self._executor = executor
        self._box = box
        self._on_output = on_output
        self._asked = ""
        self._said: deque[bytes] = deque(maxlen=8)  # the last pieces: an engine's complaint is in them
        self._ended: Ended | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.started = threading.Event()  # the command's process is there
        until = deadline() if deadline is not None else None
        if until is not None:
            plan = {**plan, "fence": max(0.0, until - clock())}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SHIM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ.get("PATH", os.defpath), **_windows_environment()},
            cwd="/" if os.name != "nt" else None,
            start_new_session=os.name != "nt",
        )
        self.pid = self._process.pid
        self._order(json.dumps(plan))
        self._listener = threading.Thread(target=self._listen, name=f"job-output-{box.id}", daemon=True)
        self._listener.start()
        threading.Thread(target=self._await, name=f"job-end-{box.id}", daemon=True).start()
        if deadline is not None:
            threading.Thread(target=self._keep_alive, args=(deadline,), name=f"job-lease-{box.id}", daemon=True).start()

    def wait(self, timeout: float | None = None) -> Ended | None:
        """How it ended; None after `timeout` seconds. All of its output was given to `on_output` before."""
        self._over.wait(timeout)
        return self._ended

    def end(self, grace_s: float, reason: str) -> None:
        """SIGTERM to all of it, `grace_s`, SIGKILL. Returns at once. The first reason is what `Ended.reason` says."""
        self._asked = self._asked or reason
        self._order(f"end {max(0.0, grace_s):.3f}")

    def kill(self, reason: str = "") -> None:
        """Now, all of it."""
        self._asked = self._asked or reason
        self._order("kill")

    def renew(self, until_s: float) -> None:
        """It may live until `box.clock()` says `until_s`; past it the shim kills it, even if this process is frozen."""
        self._order(f"renew {max(0.0, until_s - clock()):.3f}")

    # --- threads

    def _order(self, line: str) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with self._lock, contextlib.suppress(OSError, ValueError):  # it has ended: there is nobody to be told
            stdin.write(line.encode() + b"\n")
            stdin.flush()

    def _keep_alive(self, deadline: Callable[[], float | None]) -> None:
        while not self._over.wait(RENEW_S):
            until = deadline()
            if until is not None:
                self.renew(until)

    def _listen(self) -> None:
        output = self._process.stderr
        assert output is not None
        heard = True
        with contextlib.suppress(OSError, ValueError):
            while piece := os.read(output.fileno(), PIECE):
                self._said.append(piece)
                try:
                    if heard:
                        self._on_output(piece)
                except BaseException:  # noqa: BLE001 - whatever the listener's trouble is
                    heard = False  # go on reading: a full pipe would hold the command up for ever
                    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    def _await(self) -> None:
        results = self._process.stdout
        assert results is not None
        messages = self._results(results)
        self._process.wait()
        if not any("exit" in message or "failed" in message for message in messages):
            # The shim was killed. The kernel killed its child with it; what is left is found by its group and folders.
            clean_up(self._executor, self._box.id, self._box.work)
        self._listener.join(5.0)  # no longer: what would not even die may hold the pipe
        self._ended = self._how(messages)
        self._over.set()
        self.started.set()
        with self._lock:
            for pipe in (self._process.stdin, results):
                with contextlib.suppress(OSError):
                    pipe.close() if pipe is not None else None
        if not self._listener.is_alive() and self._process.stderr is not None:
            self._process.stderr.close()

    def _results(self, lines: IO[bytes]) -> list[dict[str, Any]]:
        messages = []
        for line in lines:
            with contextlib.suppress(ValueError):
                messages.append(json.loads(line))
            if messages and "started" in messages[-1]:
                self.started.set()
        return messages

    def _how(self, messages: list[dict[str, Any]]) -> Ended:
        said = b"".join(self._said).decode(errors="replace").splitlines()
        for message in messages:
            if "exit" in message:
                return how_it_ended(self._box, message, asked=self._asked, said=said)
            if "failed" in message:
                return never_started(self._box, message)
        reason = self._asked or "lost: the process that watches over it was killed from outside"
        return Ended(137, "SIGKILL", reason, "ended" if self._asked else "executor")


def clean_up(executor: Executor, id_: str, folder: Path) -> None:
    """End what is left of a box that has no shim any more."""
    limits.sweep([id_])
    kill_those_of(folder)
    for argv in executor.cleanup(id_):
        try_out(argv)


def kill_those_of(folder: Path) -> int:
    """Kill every process of ours that works in `folder` or was told of it in its environment."""
    mark = os.fsencode(str(folder))
    killed = 0
    for _ in range(20):
        found = [pid for pid in _processes() if pid != os.getpid() and _belongs(pid, mark)]
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, 9)
                killed += 1
        if not found:
            break
    return killed


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _belongs(pid: int, mark: bytes) -> bool:
    with contextlib.suppress(OSError):
        place = os.fsencode(os.readlink(f"/proc/{pid}/cwd"))
        if place == mark or place.startswith(mark + b"/"):
            return True
    with contextlib.suppress(OSError):
        for setting in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            _, _, value = setting.partition(b"=")
            if value == mark or value.startswith(mark + b"/"):
                return True
    return False


def _windows_environment() -> dict[str, str]:
    """Windows finds its own libraries by these."""
    names = ("SYSTEMROOT", "TEMP", "TMP") if os.name == "nt" else ()
    return {name: os.environ[name] for name in names if name in os.environ}


__all__ = ["Running", "clean_up", "outside_environment"]
