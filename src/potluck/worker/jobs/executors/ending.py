"""Why did a command end? What the shim saw, as an exit code, a signal and a sentence."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from potluck.protocol.jobs import Usage
from potluck.worker.jobs.box import Box, Ended

NEVER = "0001-01-01"  # when an engine says that a container which it could not start was started
NEARLY = 0.9  # of the memory limit: who was killed there was killed by it. A group's peak misses the page it died for


def how_it_ended(box: Box, result: Mapping[str, Any], *, asked: str = "", said: Sequence[str] = ()) -> Ended:
    """`asked` is the reason of whoever ended it; `said` the last lines of its output."""
    code, name = _code_and_signal(result["exit"])
    usage = Usage(result["wall_s"], result["cpu_s"], result["peak"])
    told, why = result["told"], result["why"]
    peak, limit = result["peak"], box.memory_bytes

    if told is not None and not why and (not told or NEVER in told):
        kind = "image" if box.image else "executor"
        return Ended(None, "", f"the container could not be started{_last(said)}", kind, usage)

    def ended(reason: str, kind: str) -> Ended:
        return Ended(code, name, reason, kind, usage)

    match why:
        case "timeout":
            return ended(f"stopped after its time limit of {span(box.timeout_s or 0)}", "timeout")
        case "disk":
            return ended(_disk(box, result["added"]), "disk")
        case "full":
            return ended("stopped because the machine's disk is nearly full", "disk")
        case "pids":
            return ended(f"killed because it had more than {box.pids} processes", "pids")
        case "memory":
            return ended(_memory(limit, peak), "memory")
        case "ended" | "killed":
            return ended(asked or "ended by its agent", "ended")
        case "orphaned":
            return ended("killed because its agent died", "fenced")
        case "fenced":
            return ended("killed because its lease lapsed while the hub was out of reach", "fenced")
    if result.get("oom") or (told or "").endswith("true") or (code == 137 and limit and peak >= NEARLY * limit):
        if code == 137:
            return ended(_memory(limit, peak), "memory")
        if code:
            return ended(f"exit code {code}, after one of its processes was {_memory(limit, peak)}", "memory")
    if name == "SIGXFSZ" and box.disk_bytes:
        return ended(_disk(box, max(result["added"], box.disk_bytes)), "disk")
    if name == "SIGKILL":
        return ended("killed from outside (SIGKILL), as the operating system does when memory runs out", "")
    if name:
        return ended(f"ended by {name}", "")
    if code == 127:
        return ended(f"exit code 127: a command was not found{_last(said)}", "")
    if code == 126:
        return ended(f"exit code 126: a command cannot be run{_last(said)}", "")
    return ended(f"exit code {code}", "")


def never_started(box: Box, failure: Mapping[str, Any], *, program: str = "") -> Ended:
    """The shim could not start it."""
    what = program or box.argv[0]
    if failure.get("missing"):
        return Ended(127, "", f"the command cannot be started: {what} was not found", "")
    if failure.get("forbidden"):
        return Ended(126, "", f"the command cannot be started: {what} may not be executed", "")
    return Ended(None, "", f"the command cannot be started: {failure['failed']}", "executor")


def _code_and_signal(status: int) -> tuple[int, str]:
    """A shell or a sandbox says 128 + n of a command that a signal ended."""
    number = -status if status < 0 else status - 128 if 128 < status < 160 else 0
    if not number:
        return status, ""
    try:
        return 128 + number, signal.Signals(number).name
    except ValueError:
        return 128 + number, f"signal {number}"


def _memory(limit: int, peak: int) -> str:
    used = f", used {size(peak, places=1)}" if peak else ""
    return f"killed by the memory limit: asked {size(limit)}{used}"


def _disk(box: Box, added: int) -> str:
    return f"stopped by the disk limit: asked {size(box.disk_bytes)}, wrote {size(added, places=1)}"


def _last(said: Sequence[str]) -> str:
    lines = [line.strip() for line in said if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""


def size(bytes_: float, *, places: int = 0) -> str:
    """`2 GB`; with places=1 `2.0 GB`."""
    units = ("B", "kB", "MB", "GB", "TB")
    index = 0
    while bytes_ >= 1000 and index < len(units) - 1:
        bytes_ /= 1000
        index += 1
    text = f"{bytes_:.{places}f}" if places or bytes_ == round(bytes_) else f"{bytes_:.3g}"
    return f"{text} {units[index]}"


def span(seconds: float) -> str:
    """`2 h`, `1 h 30 min`, `45 s`."""
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    words = [f"{count} {unit}" for count, unit in parts if count]
    return " ".join(words[:2]) if words else f"{seconds:g} s"
