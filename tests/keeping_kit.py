"""A job at a worker, written straight into the ledger: for tests of what comes after its placement."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import msgspec

from hub_kit import Hub
from potluck.hub.commands.desk import Caller, new_id
from potluck.protocol import Blob, Tree, TreeFile


@dataclass
class Placed:
    run_id: str
    lease_id: str
    number: int


def tree_of(hub: Hub, files: dict[str, bytes], **changes: Any) -> tuple[Blob, Tree]:
    """A tree whose blobs are all uploaded, and its own blob."""
    tree = Tree([TreeFile(path, hub.put(content)) for path, content in sorted(files.items())], **changes)
    return hub.put(msgspec.json.encode(tree)), tree


def job(hub: Hub, owner: Caller, project: Blob | None = None, name: str = "fit") -> str:
    """A job that waits."""
    run_id = new_id(10)
    project = project or tree_of(hub, {"train.py": b"print(1)"})[0]
    hub.sql("INSERT INTO runs (id, name, mode) VALUES (%(id)s, %(name)s, 'job')", id=run_id, name=name)
    task = hub.sql("INSERT INTO tasks (run_id, kind) VALUES (%(id)s, 'command') RETURNING id", id=run_id)[0]["id"]
    hub.sql(
        "INSERT INTO jobs (run_id, task_id, owner, spec, needs, project, retries_left)"
        " VALUES (%(id)s, %(task)s, %(owner)s, %(spec)s::jsonb, '{}', %(project)s::jsonb, 2)",
        id=run_id,
        task=task,
        owner=owner.subject,
        spec=msgspec.json.encode({"command": ["true"]}).decode(),
        project=msgspec.json.encode(project).decode(),
    )
    return run_id


def place(hub: Hub, run_id: str, worker: Caller) -> Placed:
    """The next attempt of the job, at the worker."""
    lease_id = str(uuid.uuid4())
    number: int = hub.one("SELECT COALESCE(max(number), 0) + 1 AS n FROM attempts WHERE run_id = %(r)s", r=run_id)
    values = {"id": lease_id, "r": run_id, "w": worker.subject, "n": number}
    hub.sql(
        "INSERT INTO leases (id, task_id, run_id, worker_id, kind, deadline)"
        " SELECT %(id)s, id, %(r)s, %(w)s, 'command', now() + interval '1 hour' FROM tasks WHERE run_id = %(r)s",
        **values,
    )
    hub.sql(
        "INSERT INTO attempts (run_id, number, lease_id, worker_id, granted, state)"
        " VALUES (%(r)s, %(n)s, %(id)s, %(w)s, '{}', 'running')",
        **values,
    )
    hub.sql("UPDATE jobs SET attempts = %(n)s WHERE run_id = %(r)s", **values)
    hub.sql("UPDATE runs SET state = 'running' WHERE id = %(r)s", **values)
    hub.sql("UPDATE tasks SET state = 'leased' WHERE run_id = %(r)s", **values)
    return Placed(run_id, lease_id, number)


def placed_job(hub: Hub, owner: Caller, worker: Caller, name: str = "fit") -> Placed:
    return place(hub, job(hub, owner, name=name), worker)


def end(hub: Hub, placed: Placed, *, finished: bool = True) -> None:
    """The attempt is over, and so is its lease."""
    values = {"id": placed.lease_id, "r": placed.run_id, "f": finished}
    hub.sql("UPDATE leases SET ended_at = now(), outcome = 'done' WHERE id = %(id)s", **values)
    hub.sql(
        "UPDATE attempts SET ended_at = now(), state = 'succeeded', exit_code = 0 WHERE lease_id = %(id)s", **values
    )
    hub.sql("UPDATE runs SET state = 'succeeded', ended_at = now() WHERE id = %(r)s", **values)
    hub.sql("UPDATE tasks SET state = 'done', ended_at = now() WHERE run_id = %(r)s", **values)
    hub.sql("UPDATE jobs SET finished = %(f)s WHERE run_id = %(r)s", **values)
