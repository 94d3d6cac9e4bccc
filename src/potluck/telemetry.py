"""How does Potluck say what happens: one sentence for people, one event name and fields for machines?

    log = telemetry.logger("agent")
    log.info("unit.done", say="Unit 41 is done: 512 samples in 9.8 s.", unit=41, samples=512)

On a terminal that prints the sentence; with POTLUCK_LOG=json it is one JSON object a line.
Importing this sets up nothing.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    import structlog

# Stable event names: dashboards and scripts count them. Add here; never change the meaning of one.
HUB_STARTED = "hub.started"
HUB_STOPPED = "hub.stopped"
HUB_LOST = "hub.lost"  # a worker cannot reach its hub
HUB_BACK = "hub.back"
WORKER_JOINED = "worker.joined"
WORKER_LEFT = "worker.left"
WORKER_AWAY = "worker.away"
WORKER_REVOKED = "worker.revoked"
RUN_STARTED = "run.started"
RUN_ENDED = "run.ended"
UNIT_LEASED = "unit.leased"
UNIT_DONE = "unit.done"
UNIT_LOST = "unit.lost"
UNIT_REJECTED = "unit.rejected"
MERGE_DONE = "merge.done"
MERGE_FAILED = "merge.failed"
TASTE_DONE = "taste.done"
CHILD_STARTED = "child.started"
CHILD_DIED = "child.died"
BUG = "bug"

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x1b\\|\x07|\x9c|$)"  # OSC, DCS, SOS, PM, APC, up to their end
    r"|\x9b[0-?]*[ -/]*[@-~]"  # CSI in one byte
    r"|\x1b[ -/]*[0-~]?",  # any other
    re.DOTALL,
)
# Characters that change the reading order: a name must not be able to turn the rest of a line around.
_TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C, 0x2028, 0x2029}


def clean(text: object, *, keep: str = "", limit: int = 4000) -> str:
    """`text` from a stranger, safe to print: no escape sequences or control characters, not too long.

    Line breaks and tabs become spaces, so that it stays on one line, unless `keep` has them.
    """
    plain = _ESCAPES.sub("", str(text)[: limit * 4])
    kept = "".join(_safe(c, keep) for c in plain)
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def _safe(c: str, keep: str) -> str:
    if c in keep:
        return c
    if c in "\n\r\t\v\f":
        return " "
    return "" if unicodedata.category(c) in ("Cc", "Cs") or ord(c) in _TURNING else c


def setup(words: str | None = None, *, stream: TextIO | None = None) -> None:
    """Send all logs, the libraries' too, to `stream` (stderr). `words`: json, debug, quiet, with commas."""
    import logging

    import structlog

    asked = {word.strip() for word in (os.environ.get("POTLUCK_LOG", "") if words is None else words).split(",")}
    level = logging.DEBUG if "debug" in asked else logging.WARNING if "quiet" in asked else logging.INFO
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _clean_fields,
    ]
    render: Any = structlog.processors.JSONRenderer(default=str) if "json" in asked else People(stream or sys.stderr)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("httpx", "httpx2", "httpcore", "httpcore2", "uvicorn.access", "PIL", "filelock"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING) if level > logging.DEBUG else logging.INFO)


def logger(name: str, **fields: object) -> structlog.stdlib.BoundLogger:
    """A logger whose lines carry `name` and `fields`."""
    import structlog

    bound: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(f"potluck.{name}", **fields)
    return bound


def _clean_fields(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """No field can move the reader's cursor or forge a line. A traceback keeps its lines."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = clean(value, keep="\n\t" if key in ("exception", "stack") else "", limit=20000)
    return event


class People:
    """A line for people: the time, then the sentence, or the event's name and fields if there is none."""

    COLOURS: ClassVar = {
        "warning": "\x1b[33m",
        "error": "\x1b[31m",
        "critical": "\x1b[31;1m",
        "debug": "\x1b[2m",
    }

    def __init__(self, stream: TextIO) -> None:
        self.colours = stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
        clock = str(event.pop("timestamp", ""))[11:19]
        level = str(event.pop("level", "info"))
        name = str(event.pop("logger", ""))
        code = str(event.pop("event", ""))
        say = str(event.pop("say", "") or "")
        details = [str(event.pop(key)) for key in ("exception", "stack") if event.get(key)]
        extra = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("exc_info", "stack_info"))
        word = {"warning": "warning: ", "error": "error: ", "critical": "error: "}.get(level, "")
        text = say or (f"{code} {extra}".rstrip() if name.startswith("potluck") else code)
        line = f"{clock} {word}{text}"
        if self.colours and level in self.COLOURS:
            line = f"{self.COLOURS[level]}{line}\x1b[0m"
        return "\n".join([line, *details])
