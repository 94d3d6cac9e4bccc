"""For how long may a lane's child say nothing before it counts as hung?"""

from __future__ import annotations

SILENT_S = 60.0  # at least; else ten times the usual
FIRST_STEP_S = 300.0  # imports, the first batch, a compiler
LONG_TASK_S = 1800.0  # merges and tastes say nothing on the way
FROZEN_S = 10.0  # a gap between ticks that shows that we ourselves stood still


class Pulse:
    """When the child was heard, and how often it usually is."""

    def __init__(self, now: float) -> None:
        self._heard_at = now
        self._ticked_at = now
        self._usual_gap_s = 0.0
        self._stepped_at: float | None = None

    def heard(self, now: float) -> None:
        """From the child; or there is nothing that it could say."""
        self._heard_at = max(self._heard_at, now)

    def began(self) -> None:
        """A task: its first step may take long."""
        self._stepped_at = None

    def stepped(self, now: float) -> None:
        if self._stepped_at is not None:
            self._usual_gap_s = max(0.9 * self._usual_gap_s, now - self._stepped_at)
        self._stepped_at = now

    def gone(self) -> None:
        """The child has ended."""
        self._usual_gap_s, self._stepped_at = 0.0, None

    def ticked(self, now: float) -> None:
        """Time goes on, as it should every second."""
        if now - self._ticked_at > FROZEN_S:
            self.heard(now)  # we were frozen, and so was the child
            self._stepped_at = None
        self._ticked_at = now

    def silent_too_long_s(self, now: float, *, kind: str, at_work: bool) -> float | None:
        """The patience that it has used up with a task of this kind; None: it still has some."""
        patience_s = LONG_TASK_S
        if kind == "unit":
            known = at_work and self._stepped_at is not None
            patience_s = max(SILENT_S, 10 * self._usual_gap_s) if known else FIRST_STEP_S
        return patience_s if now - self._heard_at > patience_s else None
