"""What becomes of a job when one of its attempts ends?

    exited      its command ran and ended, with a code or by a signal
    failed      it could not be started, or a limit ended it
    cancelled   it was ended because the hub said so
    returned    its worker gave it back
    lost        its worker vanished with it
    withdrawn   the hub took it back; neither the job nor its worker is to blame

A job that somebody stopped stays stopped, whatever its attempt says afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from potluck.domain.job import ENDED

MOST_RETURNS = 20
"""So often may workers give a job back before it ran; then it is the job that does not fit."""
OUTCOMES = ("exited", "failed", "cancelled", "returned")
"""What a worker may say."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended."""

    kind: str  # one of the six above
    worker: str  # its name
    exit_code: int | None = None
    signal: str = ""
    reason: str = ""
    ran: bool = False  # its command was started


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the job stands as the attempt ends."""

    number: int  # of the attempt
    cancelled_by: str | None
    retries_left: int
    retry_on: str
    returns: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of both, and why."""

    attempt: str  # its last state
    job: str  # queued: another attempt will follow
    reason: str  # of the job: a sentence
    attempt_reason: str
    retries_left: int
    returns: int
    avoid: bool = False  # not on this worker for a while

    @property
    def final(self) -> bool:
        return self.job in ENDED


def settle(ending: Ending, standing: Standing) -> Verdict:
    """The last state of an attempt, the next one of its job, and the reason."""
    attempt, said = _attempt(ending, standing)
    where = f"attempt {standing.number} on {ending.worker}"
    left, returns = standing.retries_left, standing.returns
    if standing.cancelled_by is not None:
        reason = f"stopped by {standing.cancelled_by}"
        return Verdict(attempt, "cancelled", reason, said or reason, left, returns)
    match ending.kind:
        case "exited" if attempt == "succeeded":
            return Verdict("succeeded", "succeeded", "exit code 0", said, left, returns)
        case "withdrawn":
            return Verdict(attempt, "queued", f"{where} was taken back: {said}", said, left, returns)
        case "returned" | "cancelled":
            returns += not ending.ran  # what ran for a while and had to move is no sign of a misfit
            if returns > MOST_RETURNS:
                reason = f"{returns} workers gave it back; the last, {ending.worker}: {said}"
                return Verdict(attempt, "failed", reason, said, left, returns)
            return Verdict(attempt, "queued", f"{where} was given back: {said}", said, left, returns, avoid=True)
    again = attempt == "lost" or standing.retry_on == "any"
    if again and left > 0:
        counted = "no retry" if left == 1 else f"{left - 1} {'retry' if left == 2 else 'retries'}"
        verb = "was lost" if attempt == "lost" else "failed"
        return Verdict(attempt, "queued", f"{where} {verb}: {said}; {counted} left", said, left - 1, returns)
    return Verdict(attempt, attempt, said, said, left, returns)


def _attempt(ending: Ending, standing: Standing) -> tuple[str, str]:
    """Its last state, and why in words."""
    match ending.kind:
        case "exited" if ending.exit_code == 0 and not ending.signal:
            return "succeeded", ending.reason
        case "lost":
            return "lost", ending.reason or "its worker fell silent"
    stopped = standing.cancelled_by is not None
    said = ending.reason or _in_words(ending)
    moved = ending.kind in ("returned", "cancelled", "withdrawn")
    return ("cancelled" if stopped or moved else "failed"), said


def _in_words(ending: Ending) -> str:
    if ending.signal:
        return f"ended by {ending.signal}"
    if ending.exit_code is not None:
        return f"exit code {ending.exit_code}"
    return {"returned": "no reason given", "cancelled": "ended on demand"}.get(ending.kind, "it failed without a word")
