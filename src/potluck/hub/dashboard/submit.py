"""How is a job given in a browser? A plain form, which a script helps by sending a folder before it.

The form works without a script: then the job starts in an empty folder. What the script sends goes to the routes of
`pieces`, whose answers are JSON; the form afterwards only names the project that came of it.
"""

from __future__ import annotations

import re
import secrets as random_
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from potluck.domain import access
from potluck.domain.job import VARIABLE, JobSpec, from_mapping
from potluck.errors import BadInput, PotluckError
from potluck.hub.commands import giving, jobs, secrets
from potluck.hub.commands.desk import Caller, Desk
from potluck.hub.dashboard.answers import Page, page, see
from potluck.hub.entrance import Asking, At, form_of, read_body, roles
from potluck.protocol import Blob, JobRequest, Outlook

router = APIRouter(route_class=Page, include_in_schema=False)
pieces = APIRouter(prefix="/submit", include_in_schema=False)

FIELDS = {
    **dict.fromkeys(("command", "name", "gpu", "cpu", "memory", "disk", "labels", "image", "requirements"), ""),
    **dict.fromkeys(("env", "timeout", "retries", "priority", "project", "project_says", "key"), ""),
}
LABEL = {"cpu": "CPU cores", "gpu": "GPUs", "timeout": "time limit", "requirements": "packages from"}


@router.get("/submit", response_class=HTMLResponse, **roles(access.MEMBERS))
async def form_page(request: Request, desk: At, caller: Asking) -> Response:
    fields = FIELDS | {"key": random_.token_hex(16)}
    return await _form(request, desk, caller, fields)


@router.post("/submit", response_class=HTMLResponse, **roles(access.MEMBERS))
async def submit(request: Request, desk: At, caller: Asking) -> Response:
    fields = await form_of(request)
    try:
        view = await jobs.submit(desk, caller, await _request(desk, fields), key=fields.get("key") or None)
    except PotluckError as error:
        return await _form(request, desk, caller, fields, error=error)
    return see(f"/jobs/{view.id}")


@router.post("/submit/check", response_class=HTMLResponse, **roles(access.MEMBERS))
async def check(request: Request, desk: At, caller: Asking) -> Response:
    """Where would it run? Nothing is submitted, and the form stays filled in."""
    fields = await form_of(request)
    try:
        look = await jobs.outlook(desk, caller, await _request(desk, fields))
    except PotluckError as error:
        return await _form(request, desk, caller, fields, error=error)
    return await _form(request, desk, caller, fields, look=look)


async def _form(
    request: Request,
    desk: Desk,
    caller: Caller,
    fields: dict[str, str],
    *,
    error: PotluckError | None = None,
    look: Outlook | None = None,
) -> Response:
    if error is not None and error.status in (401, 403, 503):
        raise error
    return page(
        "submit.html",
        error.status if error else 200,
        request=request,
        caller=caller,
        hub=desk.name,
        form=FIELDS | {name: value for name, value in fields.items() if name in FIELDS},
        secrets=[each.name for each in await secrets.mine(desk, caller)],
        chosen_secrets=_ticked(fields),
        error=str(error) if error else "",
        look=look,
        most_bytes=giving.MAX_BYTES,
    )


async def _request(desk: Desk, fields: dict[str, str]) -> JobRequest:
    spec = spec_of(fields)
    project = fields.get("project", "")
    if not project:
        return JobRequest(spec, await giving.empty(desk))
    match = re.fullmatch(r"([0-9a-f]{64})-([0-9]{1,9})", project)
    if match is None:
        raise BadInput("the form names no project that was sent: choose the folder again")
    return JobRequest(spec, Blob(match[1], int(match[2])))


def spec_of(fields: dict[str, str]) -> JobSpec:
    """The job that a filled-in form describes: the same rules as for a potluck.yaml."""

    def text(name: str) -> str:
        return fields.get(name, "").strip()

    command = text("command").replace("\r\n", "\n")
    if not command:
        raise BadInput("there is no command: say what to run, like python train.py")
    values: dict[str, Any] = {"command": command}
    for name in ("name", "image", "requirements", "timeout", "retries", "priority"):
        if text(name):
            values[name] = text(name)
    resources: dict[str, Any] = {name: text(name) for name in ("gpu", "cpu", "memory", "disk") if text(name)}
    if text("labels"):
        resources["labels"] = _pairs("labels", re.split(r"[,\n]", text("labels")))
    if resources:
        values["resources"] = resources
    env = _pairs("environment variables", text("env").splitlines())
    if env:
        values["env"] = env
    if ticked := _ticked(fields):
        values["secrets"] = ticked
    return from_mapping(values)


def _pairs(what: str, lines: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for line in lines:
        if not line.strip():
            continue
        name, sign, value = line.partition("=")
        if not sign or not name.strip():
            raise BadInput(f"{what}: {line.strip()[:80]!r} is not of the form name=value")
        pairs[name.strip()] = value.strip()
    return pairs


def _ticked(fields: dict[str, str]) -> list[str]:
    names = [name.partition(":")[2] for name in fields if name.startswith("secret:")]
    return sorted(name for name in names if VARIABLE.fullmatch(name))


# --- what the script sends ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanRequest:
    files: list[tuple[str, int]]  # path and size
    ignores: dict[str, str] = field(default_factory=dict)  # path of an ignore file → its text


@dataclass(frozen=True)
class TreeRequest:
    files: list[giving.GivenFile]
    skipped: list[str] = field(default_factory=list)


Upload = Annotated[str, Query(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Query(ge=0)]


@pieces.post("/plan", **roles(access.MEMBERS))
async def plan(body: PlanRequest) -> giving.Plan:
    return await giving.plan(body.files, body.ignores)


@pieces.post("/batch", **roles(access.MEMBERS))
async def batch(request: Request, desk: At) -> list[giving.Given]:
    return await giving.add_small(desk, await read_body(request, giving.MAX_BATCH_BYTES, "what is sent at once"))


@pieces.post("/piece", **roles(access.MEMBERS))
async def piece(
    request: Request, desk: At, caller: Asking, upload: Upload, offset: Size, size: Size, keep: bool = False
) -> giving.Given | None:
    content = await read_body(request, giving.MAX_BATCH_BYTES, "what is sent at once")
    return await giving.add_piece(desk, caller, upload, offset, size, content, keep=keep)


@pieces.post("/tree", **roles(access.MEMBERS))
async def tree(desk: At, body: TreeRequest) -> giving.Project:
    return await giving.make_tree(desk, body.files, body.skipped)


@pieces.post("/zip", **roles(access.MEMBERS))
async def unzip(desk: At, caller: Asking, upload: Upload, size: Size) -> giving.Project:
    return await giving.open_zip(desk, caller, upload, size)
