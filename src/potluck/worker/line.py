"""What does an agent do while its hub does not answer, and when does it stop asking?

It waits, between half a second and fifteen, by chance (so that thirty machines do not come back in one instant), and
tries again, for as long as somebody still wants the answer. A refusal of this worker itself ends the agent.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from potluck.client import Hub
from potluck.errors import (
    DiskFull,
    HubUnreachable,
    LedgerError,
    NotAllowed,
    PotluckError,
    TimedOut,
    TryLater,
    VersionMismatch,
)

T = TypeVar("T")
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0


class GivenUp(Exception):
    """Nobody wants the answer any more."""


def is_passing(error: PotluckError) -> bool:
    """May the same request succeed later?"""
    return isinstance(error, HubUnreachable | LedgerError | TryLater | TimedOut) or error.code == "internal"


class Line:
    """The agent's connection to its hub, shared by all its threads."""

    def __init__(
        self,
        hub: Hub,
        *,
        closed: threading.Event,
        say: Callable[[str, bool], None],
        refused: Callable[[PotluckError], None],
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        self.hub = hub
        self.closed = closed
        self.is_away = False
        self._say = say
        self._refused = refused
        self._longest_wait_s = longest_wait_s
        self._lock = threading.Lock()

    def call(
        self,
        ask: Callable[[Hub], T],
        *,
        give_up: Callable[[], bool] = bool,
        also: tuple[type[PotluckError], ...] = (),
        refusal: type[NotAllowed] = NotAllowed,
        longest_wait_s: float | None = None,
    ) -> T:
        """The hub's answer, however long it takes. `GivenUp` when `give_up()`; errors that will not pass are raised.

        `refusal`: what ends the agent. `NotKnown` where a no may concern only what was asked for, like a lease.
        """
        longest_s = self._longest_wait_s if longest_wait_s is None else min(longest_wait_s, self._longest_wait_s)
        ceiling_s = min(FIRST_WAIT_S, longest_s)
        while True:
            if self.closed.is_set() or give_up():
                raise GivenUp
            try:
                answer = ask(self.hub)
            except PotluckError as error:
                if isinstance(error, refusal | VersionMismatch):
                    self._refused(error)
                    raise GivenUp from error
                if not (is_passing(error) or isinstance(error, also)):
                    raise
                if isinstance(error, HubUnreachable):
                    self._away(error)
            else:
                self._back()
                return answer
            self._wait(random.uniform(0.05, ceiling_s), give_up)
            ceiling_s = min(2 * ceiling_s, longest_s)

    def _wait(self, seconds: float, give_up: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.closed.wait(min(left, 0.2)) or give_up():
                return

    def _away(self, error: PotluckError) -> None:
        with self._lock:
            first, self.is_away = not self.is_away, True
        if first:
            self._say(f"{error}. Going on with what is here, and trying again", True)

    def _back(self) -> None:
        with self._lock:
            was_away, self.is_away = self.is_away, False
        if was_away:
            self._say("the hub is back", False)


LOCAL = (DiskFull,)
"""Errors that pass when the hub, not we, has them: worth another try when it is the hub that speaks."""
