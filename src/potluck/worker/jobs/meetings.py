"""How does a gang's meeting place run on this machine, and where is it?

The place is torchft's lighthouse or the plain engine's meeting (`python -m potluck.train.gang`), in the agent's own Python.
It runs as a job's command does, below a shim, so that it can outlive neither the agent nor the member's lease. It keeps
nothing that matters: if it dies it is started again, at the same port if that is free, and the members come back.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from potluck.errors import PotluckError
from potluck.worker.jobs import executors
from potluck.worker.jobs.box import Box
from potluck.worker.jobs.executors import Running

TRIES = 3
_AGAIN_S = 0.3
_ADDRESS = re.compile(rb"(?:http://)?\S+:(\d{1,5})")
_LONGEST_LINE = 10_000


class MeetingPlace:
    """One place, from now until `close`. The callbacks come from a thread of its own."""

    def __init__(
        self,
        engine: str,
        host: str,
        *,
        name: str,
        least: int,
        folder: Path,
        until: Callable[[], float | None],
        on_address: Callable[[str], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._argv = [sys.executable, "-m", "potluck.train.gang", engine, "--host", host, "--least", str(least)]
        self._name = name
        self._folder = folder
        self._until = until
        self._on_address = on_address
        self._on_failure = on_failure
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._running: Running | None = None
        self._thread = threading.Thread(target=self._keep, name="gang-meeting", daemon=True)
        self._thread.start()

    def close(self, *, wait_s: float = 0.0) -> None:
        """End it, and wait for its end at most so long. To be called again does no harm."""
        with self._lock:
            self._stopped.set()
            running = self._running
        if running is not None:
            running.kill("the gang does not meet here any more")
            running.wait(wait_s)

    def _keep(self) -> None:
        number, port, failures = 0, 0, 0
        while not self._stopped.is_set():
            number += 1
            said = _Said(self._address)
            try:
                running = self._start(number, port, said)
            except (PotluckError, OSError) as error:
                failures, port, reason = failures + 1, 0, str(error)
            else:
                if running is None:
                    return
                ended = running.wait()
                assert ended is not None
                # Once it has said its address it can be opened here, and whatever ended it came from outside.
                failures = 0 if said.port else failures + 1
                port, reason = said.port, said.last_line or ended.reason
            if failures >= TRIES:
                self._on_failure(reason)
                return
            self._stopped.wait(_AGAIN_S)

    def _start(self, number: int, port: int, said: _Said) -> Running | None:
        argv = [*self._argv, *(["--port", str(port)] if port else [])]
        spare = self._folder / "spare"
        box = Box(
            id=f"{self._name[:50]}-m{number}",
            argv=argv,
            env={"RUST_LOG": "error"},
            work=self._folder,
            output=spare,
            checkpoint=spare,
            cache=spare,
            scratch=spare,
            grace_s=0.0,
        )
        with self._lock:
            if self._stopped.is_set():
                return None
            self._running = executors.run(executors.ALL["process"], box, on_output=said.hear, deadline=self._until)
            return self._running

    def _address(self, address: str) -> None:
        if not self._stopped.is_set():
            self._on_address(address)


class _Said:
    """What the process printed: one line with its address, and perhaps complaints."""

    def __init__(self, on_address: Callable[[str], None]) -> None:
        self.port = 0
        self.last_line = ""
        self._on_address = on_address
        self._rest = b""

    def hear(self, piece: bytes) -> None:
        *lines, self._rest = (self._rest + piece)[-_LONGEST_LINE:].split(b"\n")
        for line in lines:
            text = line.strip()
            found = _ADDRESS.fullmatch(text)
            if found is not None and not self.port:
                self.port = int(found[1])
                self._on_address(text.decode(errors="replace"))
            elif text:
                self.last_line = text.decode(errors="replace")[:300]
