"""How is a training child started, heard, told and ended?

The child leads its own process group, so that ending it ends everything it started. It gets instructions on stdin and
gives events on a pipe of its own (POTLUCK_EVENTS_FD); what it or a user's code prints goes to a log file. No credential
of this process is in its environment. It ends with us in every case: the end of its stdin is one sign, the kernel's
death signal (Linux) another, for a child that hangs in the middle of a step.

Windows has no inherited descriptors by number: there the events come on the child's stdout, and only stderr is the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec

from potluck.protocol import FromChild, ToChild

GRACE_S = 3.0
LOG_BYTES = 4_000_000
COMMAND = (sys.executable, "-m", "potluck.train")

_ERROR = re.compile(r"[\w.]*(Error|Exception)\b|Fatal\b")  # how the line that matters begins in a traceback
_SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|COOKIE|^POTLUCK_|^PG[A-Z]|^SSH_|DATABASE_URL", re.I
)


class Runner(Protocol):
    """A child at work."""

    def tell(self, message: ToChild) -> None: ...
    def end(self, *, gently: bool) -> None: ...


class ProcessRunner:
    """One child process. `on_event` and, once at the end, `on_exit` are called from threads of this object."""

    def __init__(
        self,
        *,
        on_event: Callable[[FromChild], None],
        on_exit: Callable[[str], None],
        log: Path,
        threads: int,
        command: Sequence[str] = COMMAND,
        extra_env: dict[str, str] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self._on_event = on_event
        self._on_exit = on_exit
        self._grace_s = grace_s
        self._said: deque[str] = deque(maxlen=40)
        self._ended = ""
        self._gone = threading.Event()
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._log = _Log(log)
        environment = {**child_environment(os.environ, threads=threads), **(extra_env or {})}
        events, self._process = _start(list(command), environment)
        self.pid = self._process.pid
        output = self._process.stderr if os.name == "nt" else self._process.stdout
        listener = threading.Thread(target=self._listen, args=(events,), name="child-events", daemon=True)
        logger = threading.Thread(target=self._write_log, args=(output,), name="child-log", daemon=True)
        self._threads = (listener, logger)
        for thread in self._threads:
            thread.start()
        threading.Thread(target=self._speak, name="child-stdin", daemon=True).start()
        threading.Thread(target=self._await, name="child-exit", daemon=True).start()

    def tell(self, message: ToChild) -> None:
        """Never blocks; an instruction for a child that has just died is lost with it."""
        self._lines.put(msgspec.json.encode(message) + b"\n")

    def end(self, *, gently: bool) -> None:
        """End the child and all that it started. Returns at once; `on_exit` follows."""
        self._ended = "it was asked to end" if gently else "it was killed"
        if gently:
            self._lines.put(None)  # the end of stdin, after what was said before
        else:
            self._signal("SIGTERM")
        threading.Thread(target=self._kill_late, name="child-end", daemon=True).start()

    def kill(self) -> None:
        """At once, without a word."""
        self._ended = self._ended or "it was killed"
        self._signal("SIGKILL")

    def wait(self, timeout_s: float) -> bool:
        """Is it gone, with everything it had to say heard?"""
        return self._gone.wait(timeout_s)

    def _kill_late(self) -> None:
        if not self._gone.wait(self._grace_s):
            self._signal("SIGTERM")
            self._gone.wait(min(1.0, self._grace_s))
            self._signal("SIGKILL")

    def _signal(self, name: str) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "nt":
                self._process.kill()
            elif self._process.returncode is None:
                # Its group bears its number until it is waited for, so this can never hit a stranger's.
                os.killpg(self._process.pid, getattr(signal, name))

    def _speak(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError, ValueError):
            while (line := self._lines.get()) is not None:
                stdin.write(line)
                stdin.flush()
        with contextlib.suppress(OSError):
            stdin.close()

    def _listen(self, events: IO[bytes]) -> None:
        decoder = msgspec.json.Decoder(FromChild)
        with events:
            for line in events:
                try:
                    event = decoder.decode(line)
                except msgspec.MsgspecError as error:
                    self._log.write(f"not an event: {error}: {line[:200]!r}\n".encode())
                    continue
                self._on_event(event)

    def _write_log(self, output: IO[bytes] | None) -> None:
        assert output is not None
        with output:
            for line in output:
                self._said.append(line.decode(errors="replace").rstrip())
                self._log.write(line)
        self._log.close()

    def _await(self) -> None:
        if os.name == "nt":
            code = self._process.wait()
        else:
            # Look without reaping, end what the child left behind in its group, and only then let the number go.
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            else:
                self._process.wait()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        self._lines.put(None)
        for thread in self._threads:
            thread.join(5.0)  # everything it said comes before its end
        self._gone.set()
        self._on_exit(self._ended or why_it_ended(code, list(self._said)))


def why_it_ended(code: int, said: Sequence[str]) -> str:
    """An exit code and the last lines of a log, as a sentence."""
    lines = [line.strip() for line in reversed(said) if line.strip()]
    last = next((line for line in lines if _ERROR.match(line)), lines[0] if lines else "")
    told = f": {last[:300]}" if last else ""
    number = -code if code < 0 else code - 128 if 128 < code < 160 else 0
    if number == 9:
        return (
            "it was killed from outside (SIGKILL), as the operating system does when memory runs out: "
            f"a smaller batch or fewer threads need less{told}"
        )
    if number:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"it was ended by {name}{told}"
    if code == 0:
        return f"it left without being asked{told}"
    return f"exit code {code}{told}"


def child_environment(environment: Any, *, threads: int) -> dict[str, str]:
    """What the child may know: everything but secrets and our own settings; and its number of threads."""
    kept = {name: value for name, value in environment.items() if not _SECRET.search(name)}
    return {
        **kept,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait must not spin on cores that others use
        "PYTHONUNBUFFERED": "1",
    }


def _start(command: list[str], environment: dict[str, str]) -> tuple[IO[bytes], subprocess.Popen[bytes]]:
    if os.name == "nt":
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, "POTLUCK_EVENTS_FD": "1"},
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        assert process.stdout is not None
        return process.stdout, process
    ours, theirs = os.pipe()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, "POTLUCK_EVENTS_FD": str(theirs)},
            pass_fds=(theirs,),
            start_new_session=True,
            preexec_fn=_die_with_us(),
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return os.fdopen(ours, "rb"), process


def _die_with_us() -> Callable[[], None] | None:
    """For the child to do first (Linux): ask the kernel for SIGKILL when the thread that started it ends."""
    if sys.platform != "linux":
        return None
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    parent = os.getpid()

    def ask() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)  # we are gone already

    return ask


class _Log:
    """A log file and the one before it, at most LOG_BYTES each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._lock = threading.Lock()

    def write(self, line: bytes) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):  # a full disk must not stop the training
            if self._file.tell() > LOG_BYTES:
                self._file.close()
                self._path.replace(self._path.with_suffix(".old.log"))
                self._file = self._path.open("ab")
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        with self._lock:
            self._file.close()
