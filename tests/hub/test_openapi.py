"""Is the API's description, docs/openapi.json, what the hub really answers?

python tests/hub/test_openapi.py     writes it again; the difference belongs into the review
"""

from __future__ import annotations

import asyncio
import json
import warnings
from pathlib import Path
from typing import Any

from potluck.blobs import BlobStore
from potluck.hub.app import make_app
from potluck.hub.commands.desk import Desk
from potluck.hub.store import Ledger

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"


async def document() -> dict[str, Any]:
    """What the app would send. Nothing is opened: neither the ledger nor a folder."""
    app = make_app(Desk(Ledger("dbname=nothing"), BlobStore(Path("nowhere"))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GET and HEAD of a blob share a function, and so an operation id
        found: dict[str, Any] = app.openapi()
    return stable(found)


def stable(found: dict[str, Any]) -> dict[str, Any]:
    """Without what changes with every release of ours or FastAPI's, and without the pages, which are for people."""
    paths = {path: item for path, item in found["paths"].items() if path.startswith("/api/") or path.endswith("z")}
    for item in paths.values():
        for operation in item.values():
            operation["responses"].pop("422", None)  # FastAPI's own form; ours is a Problem, as for every error
    schemas = {name: form for name, form in found["components"]["schemas"].items() if "ValidationError" not in name}
    return {**found, "info": {**found["info"], "version": "*"}, "paths": paths, "components": {"schemas": schemas}}


def written() -> str:
    return json.dumps(asyncio.run(document()), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_the_checked_in_document_is_the_apps() -> None:
    theirs, ours = json.loads(DOCUMENT.read_text("utf-8")), json.loads(written())

    assert sorted(theirs["paths"]) == sorted(ours["paths"])
    assert theirs == ours, "run: python tests/hub/test_openapi.py"


def test_every_operation_says_who_may_call_it() -> None:
    for path, item in json.loads(DOCUMENT.read_text("utf-8"))["paths"].items():
        for method, operation in item.items():
            assert operation["x-roles"], f"{method} {path}"


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(written(), "utf-8")
