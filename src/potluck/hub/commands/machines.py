"""What do people say about machines and about one another's share: labels, draining, whose they are, quotas?"""

from __future__ import annotations

from potluck.errors import BadInput, NotFound
from potluck.hub.commands import people
from potluck.hub.commands.desk import Caller, Desk, as_json, note, pass_on, spread
from potluck.hub.commands.forms import one_line
from potluck.hub.commands.orders import clean_labels
from potluck.hub.store import Transaction
from potluck.protocol import Quota, WorkerView


async def drain(desk: Desk, caller: Caller, ref: str, *, draining: bool, reason: str = "") -> WorkerView:
    """A worker that is drained takes nothing new; what runs there may end."""
    async with desk.ledger.transaction() as tx:
        id_, name = await _find(tx, ref)
        await tx.run("drain_worker", id=id_, draining=draining)
        verb = "drains" if draining else "no longer drains"
        why = one_line(reason, 300)
        text = f"{caller.name} {verb} {name}" + (f": {why}" if why else "")
        await note(tx, "worker.draining" if draining else "worker.undrained", id_, text, actor=caller.name)
        await spread(tx, "orders", [id_])
    pass_on(desk, "orders", [id_])
    desk.news.tell("place")
    desk.news.tell("change")
    return await _view(desk, id_)


async def label(desk: Desk, caller: Caller, ref: str, labels: dict[str, str]) -> WorkerView:
    """These are all the labels that the hub gives to the worker; its owner's stay, and the hub's win."""
    clean = clean_labels(labels)
    async with desk.ledger.transaction() as tx:
        id_, name = await _find(tx, ref)
        await tx.run("label_worker", id=id_, labels=as_json(clean))
        said = ", ".join(f"{key}={value}" for key, value in clean.items()) or "nothing"
        await note(tx, "worker.labelled", id_, f"{caller.name} labelled {name}: {said}", actor=caller.name)
    desk.news.tell("place")
    desk.news.tell("change")
    return await _view(desk, id_)


async def own(desk: Desk, caller: Caller, worker_token: str) -> WorkerView:
    """The caller becomes the owner of the worker whose secret this is: who has it, has the machine."""
    async with desk.ledger.transaction() as tx:
        row = await tx.row("own_worker", owner=caller.subject, token_sha256=people.sha256(worker_token))
        if row is None:
            raise NotFound("no worker has this secret: run this on the machine that joined, with its own folder")
        text = f"{row['name']} is {caller.name}'s"
        await note(tx, "worker.owned", row["id"], text, actor=caller.name)
        await spread(tx, "orders", [row["id"]])
    desk.news.tell("place")
    desk.news.tell("change")
    return await _view(desk, row["id"])


async def quotas(desk: Desk) -> list[Quota]:
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("quotas")
    return [Quota(row["name"], row["running"], row["gpu_hours"], row["cpu_hours"]) for row in rows]


async def set_quota(desk: Desk, caller: Caller, quota: Quota) -> list[Quota]:
    """What one person may use. Without any number there is no quota any more."""
    numbers = (quota.running, quota.gpu_hours, quota.cpu_hours)
    if any(number is not None and not 0 <= number <= 1e9 for number in numbers):
        raise BadInput("a quota is a number from 0 to a milliard, or nothing for no limit")
    async with desk.ledger.transaction() as tx:
        people_ = await tx.rows("find_person", ref=quota.owner)
        if not people_:
            raise NotFound(f"there is no member `{quota.owner}`: name somebody who joined as a member, or an admin")
        if len(people_) > 1 and people_[0]["subject"] != quota.owner:
            ids = ", ".join(row["subject"] for row in people_)
            raise BadInput(f"several people are called `{quota.owner}`: say which by id ({ids}, …)")
        subject, name = people_[0]["subject"], people_[0]["name"]
        if numbers == (None, None, None):
            await tx.run("remove_quota", owner=subject)
        else:
            await tx.run(
                "put_quota",
                owner=subject,
                running=quota.running,
                gpu_hours=quota.gpu_hours,
                cpu_hours=quota.cpu_hours,
            )
        said = f"running={quota.running}, GPU hours={quota.gpu_hours}, CPU hours={quota.cpu_hours}"
        await note(tx, "quota.set", subject, f"{caller.name} set the quota of {name}: {said}", actor=caller.name)
    desk.memory.forecast = None
    desk.news.tell("place")
    return await quotas(desk)


async def _find(tx: Transaction, ref: str) -> tuple[str, str]:
    row = await tx.row("find_worker", ref=ref)
    if row is None:
        raise NotFound(f"there is no worker {ref}: `potluck workers` shows them")
    return str(row["id"]), str(row["name"])


async def _view(desk: Desk, worker_id: str) -> WorkerView:
    found = await people.workers(desk, totals=False, only=worker_id)
    return found[0]
