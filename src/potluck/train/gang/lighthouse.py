"""How does torchft's lighthouse run without torch?

It is Rust, in the one extension of torchft's package, whose Python imports torch. A gang that lost its lighthouse stands
still until the next one is there: a tenth of a second instead of seconds, and a tenth of the memory.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import Any
from urllib.parse import urlsplit

from potluck.errors import NotFound

_EXTENSION = "torchft._torchft"


def lighthouse(host: str, port: int, *, least: int) -> Any:
    """torchft's lighthouse in this process, with a gang's times. It stops when the object goes."""
    return _extension().LighthouseServer(
        bind=f"{_in_url(host)}:{port}",
        min_replicas=least,
        join_timeout_ms=10_000,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=400,
    )


def reachable(address: str, host: str) -> str:
    """The lighthouse's own address, with the host as the others reach it."""
    return f"http://{_in_url(host)}:{urlsplit(address).port}"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _extension() -> Any:
    if _EXTENSION not in sys.modules:  # it can be loaded once: whoever imports torchft after us finds it there
        package = importlib.util.find_spec("torchft")
        places = package.submodule_search_locations if package is not None else None
        found = importlib.machinery.PathFinder.find_spec(_EXTENSION, places)
        if not places or found is None or found.loader is None:
            raise NotFound(
                'there is no torchft for this Python: pip install "potluck-train[gang]", or --gang-engine plain'
            )
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        sys.modules[_EXTENSION] = module
    return sys.modules[_EXTENSION]
