"""How does a folder and a command become a gang, or an answer to where it would train?"""

from __future__ import annotations

import json
import secrets as random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from potluck.cli import output
from potluck.cli.gang import follow_or_leave
from potluck.errors import BadInput
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.domain.job import GangSpec, JobSpec
    from potluck.protocol import Blob, GangRequest, JobRequest, Link, Outlook, WorkerView

WORKER_LABEL = "worker_id"  # every worker has it without being given it, so that a job can ask for this very one
WOULD_WAIT = 75  # exit code of --dry-run: try again later
GONE = ("left", "revoked", "away")


def submit_gang(
    hub: Hub, spec: JobSpec, project: Blob, *, follows: bool, timeout_s: float | None, as_json: bool
) -> int:
    """Queue the gang, and watch it unless the user leaves it at that; the exit code."""
    gang = hub.submit_gang(_request(spec, project), random.token_hex(16))
    return follow_or_leave(hub, gang, follows=follows, timeout_s=timeout_s, as_json=as_json)


def _request(spec: JobSpec, project: Blob) -> GangRequest:
    from potluck.protocol import GangRequest

    return GangRequest(spec, project)


# --- --dry-run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """Whether one machine would take a member now; `reason` says why not."""

    worker: WorkerView
    takes: bool
    reason: str


def dry_run(hub: Hub, request: JobRequest, *, as_json: bool) -> int:
    """Where the gang would train if it were submitted now. Nothing is stored."""
    gang = request.spec.gang
    assert gang is not None
    rooms = ask_each(hub, request)
    together, apart = reaching([room.worker for room in rooms if room.takes], hub.links())
    chosen = together[: gang.most]
    enough = len(chosen) >= gang.least
    if as_json:
        lacks = {room.worker.name: room.reason for room in rooms if not room.takes}
        output.print_json(
            {"would_run_on": chosen if enough else [], "least": gang.least, "lacks": lacks, "apart": apart}
        )
        return 0 if enough else WOULD_WAIT
    output.note("nothing was sent")
    for line in dry_lines(gang, rooms, chosen, apart):
        output.say(clean(line))
    return 0 if enough else WOULD_WAIT


def dry_lines(gang: GangSpec, rooms: list[Room], chosen: list[str], apart: list[str]) -> Iterable[str]:
    wanted = f"{gang.least}" if gang.least == gang.most else f"{gang.least}..{gang.most}"
    if len(chosen) >= gang.least:
        yield f"would train now on {', '.join(chosen)} ({len(chosen)} of {wanted} machines)"
    elif not rooms:
        yield f"would wait for {gang.least} machines: none is here that takes jobs"
        yield "`potluck invite` prints the line for a machine to join with"
    else:
        yield f"would wait: {len(chosen)} of at least {gang.least} machines could train it together now"
    for room in rooms:
        if not room.takes:
            yield f"  {room.worker.name}: {room.reason}"
    yield from (f"  {one}" for one in apart)
    missing = gang.least - len(chosen)
    if rooms and missing > 0:
        fewer = f", or begin with fewer, like --gang {len(chosen)}..{gang.most}" if len(chosen) >= 2 else ""
        yield f"It needs {missing} more: `potluck invite` lets a machine join{fewer if not gang.compat else ''}"


def machines_for_jobs(hub: Hub) -> list[WorkerView]:
    """The workers that are here and take jobs."""
    workers = [
        worker
        for worker in hub.workers()
        if worker.state not in GONE and worker.rules and worker.rules.get("accept") != "pool" and not worker.draining
    ]
    return sorted(workers, key=lambda worker: worker.name)


def ask_each(hub: Hub, request: JobRequest) -> list[Room]:
    """Of each machine whether it would take a member now, by the hub's own placement."""
    rooms = []
    for worker in machines_for_jobs(hub):
        try:
            outlook = hub.outlook(replace(request, spec=pinned(request.spec, worker)))
        except BadInput as error:  # it could never take it
            rooms.append(Room(worker, False, str(error)))
            continue
        rooms.append(Room(worker, bool(outlook.would_run_on), _lacks(outlook, worker)))
    return rooms


def pinned(spec: JobSpec, worker: WorkerView) -> JobSpec:
    """A single job that only this machine may take."""
    labels = {**spec.resources.labels, WORKER_LABEL: worker.id}
    return replace(spec, gang=None, resources=replace(spec.resources, labels=labels))


def _lacks(outlook: Outlook, worker: WorkerView) -> str:
    near = next((near.lacks for near in outlook.near if near.worker == worker.name), "")
    return near or outlook.reason


def reaching(workers: list[WorkerView], links: Iterable[Link]) -> tuple[list[str], list[str]]:
    """Machines that reach one another, as far as anybody has tried, and a sentence on each pair that does not.

    Of such a pair the machine stays out that fails to reach more of the others.
    """
    names = [worker.name for worker in workers]
    broken = {(link.source, link.target): link.reason for link in links if not link.address}
    broken = {pair: why for pair, why in broken.items() if pair[0] in names and pair[1] in names}
    said = [f"{a} cannot reach {b}" + (f": {why}" if why else "") for (a, b), why in sorted(broken.items())]
    while broken:
        worst = max(names, key=lambda name: sum(name in pair for pair in broken))
        names.remove(worst)
        broken = {pair: why for pair, why in broken.items() if worst not in pair}
    return names, said


# --- --local --------------------------------------------------------------------------------------------------------


def gang_of_one(spec: JobSpec, free_port: Callable[[], int]) -> JobSpec:
    """The same as a single job here: what the gang would tell a member goes into its variables."""
    gang = spec.gang
    assert gang is not None
    if gang.compat:
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        own = world | {"MASTER_PORT": str(free_port())}
    else:
        own = {"POTLUCK_GANG": json.dumps({"batch": gang.batch, "policy": gang.policy})}
    return replace(spec, gang=None, env={**spec.env, **own})


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
