"""Which secrets does a person have, and which of them go along with a lease?

A value comes in once. It leaves only inside a lease, to the worker that got the job; no answer to a person holds one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from potluck.errors import BadInput, NotFound
from potluck.hub.commands.desk import Caller, Desk
from potluck.hub.store import Transaction
from potluck.protocol import SecretValue, SecretView

MAX_BYTES = 64 << 10
MAX_SECRETS = 200
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"{name[:80]!r} cannot be a secret's name: it becomes a variable, so letters, digits and _, no digit first"
        )
    return name


def _check_value(name: str, value: str) -> None:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise BadInput(f"the value of {name} is not text (UTF-8): encode it first, for example with base64") from None
    if not value:
        raise BadInput(f"the value of {name} is empty: to take it away, potluck secret rm {name}")
    if size > MAX_BYTES:
        raise BadInput(f"the value of {name} has {size:,} bytes: at most {MAX_BYTES:,} are taken")
    if "\0" in value:
        raise BadInput(f"the value of {name} has a NUL character in it, which no variable can hold")


async def put(desk: Desk, caller: Caller, name: str, body: SecretValue) -> SecretView:
    """Set or replace one of the caller's secrets."""
    _check_value(check_name(name), body.value)
    sealed = await asyncio.to_thread(desk.keys.seal, caller.subject, name, body.value)
    async with desk.ledger.transaction() as tx:
        await tx.rows("lock_secrets_of", owner=caller.subject)
        names = {row["name"] for row in await tx.rows("secrets_of", owner=caller.subject)}
        if name not in names and len(names) >= MAX_SECRETS:
            raise BadInput(f"you have {len(names)} secrets, which is the most: remove one (potluck secret rm NAME)")
        row = await tx.row("put_secret", owner=caller.subject, name=name, sealed=sealed)
        assert row is not None
    return SecretView(name, row["changed_at"].isoformat())


async def mine(desk: Desk, caller: Caller) -> list[SecretView]:
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("secrets_of", owner=caller.subject)
    return [SecretView(row["name"], row["changed_at"].isoformat()) for row in rows]


async def remove(desk: Desk, caller: Caller, name: str) -> None:
    async with desk.ledger.transaction() as tx:
        if not await tx.run("remove_secret", owner=caller.subject, name=check_name(name)):
            raise NotFound(f"you have no secret {name}: potluck secret list")


async def check_there(tx: Transaction, owner: str, names: Sequence[str]) -> None:
    """Raise `BadInput` if the owner lacks one of these secrets: asked when a job is submitted, not when it starts."""
    there = {row["name"] for row in await tx.rows("secrets_of", owner=owner)}
    for name in names:
        if check_name(name) not in there:
            raise BadInput(f"you have no secret {name}: set it first, with potluck secret set {name}")


async def values(desk: Desk, tx: Transaction, owner: str, names: Sequence[str]) -> dict[str, str]:
    """The values that go along with a lease. One that was removed meanwhile is left out; `Conflict`: another key."""
    if not names:
        return {}
    rows = await tx.rows("sealed_secrets", owner=owner, names=list(names))
    return {row["name"]: desk.keys.open(owner, row["name"], bytes(row["sealed"])) for row in rows}
