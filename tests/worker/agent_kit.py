"""What the tests of the agent have in common."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from potluck.worker.agent import Agent, AgentSettings
from potluck.worker.screen import Facts

T = TypeVar("T")
HERE = Path(__file__).parent
CHILD = [sys.executable, str(HERE / "fake_child.py")]


def until(look: Callable[[], T], what: str = "", timeout_s: float = 30.0) -> T:
    """Wait until `look()` is true; its value."""
    end = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < end, f"it did not come about: {what or look}"
        threading.Event().wait(0.02)
    return found


def answers(address: str) -> bool:
    """Does somebody listen at this "IP:PORT"?"""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


class Heard:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.facts: list[Facts] = []

    def say(self, text: str, bad: bool = False) -> None:
        self.said.append(text)

    def show(self, facts: Facts) -> None:
        self.facts.append(facts)

    def close(self) -> None:
        return

    def has(self, words: str) -> bool:
        return any(words in line for line in self.said)


class AgentThread:
    def __init__(self, settings: AgentSettings) -> None:
        self.screen = Heard()
        self.agent = Agent(settings, command=CHILD, screen=self.screen, longest_wait_s=0.5)
        self.exit: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.exit = self.agent.run()

    def wait(self, timeout_s: float = 30.0) -> int:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"the agent did not end: {self.screen.said}"
        assert self.exit is not None
        return self.exit

    def end(self) -> None:
        self.agent.stop(at_once=True)
        self.wait()


def told(log: Path) -> list[dict[str, Any]]:
    """What the children heard and did, in order."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
