"""Who is told what happens in a gang? The member's log, and whoever watches."""

from __future__ import annotations

import sys
from collections.abc import Callable

from potluck.train.gang.profile import Event, StepRecord

Watcher = Callable[[StepRecord | Event], None]

_OWN = ("retry", "healed", "unfit", "advice")
"""Kinds of events that every member prints; the others happen to all alike, so only the first one does."""


class Voice:
    def __init__(self) -> None:
        self.step = 0
        self.is_first = True
        self._watchers: list[Watcher] = []
        self._said = ""

    def watch(self, watcher: Watcher) -> None:
        self._watchers.append(watcher)

    def say(self, kind: str, text: str) -> None:
        """An event. The same sentence is printed once in a row."""
        if (kind in _OWN or self.is_first) and text != self._said:
            self._said = text
            print(f"potluck: {text}", file=sys.stderr, flush=True)
        self.tell(Event(self.step, kind, text))

    def tell(self, what: StepRecord | Event) -> None:
        for watcher in self._watchers:
            watcher(what)
