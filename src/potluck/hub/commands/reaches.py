"""Which workers can reach which, by which address, and how fast?

    worker  ── its door (port, key, addresses) ──►  workers.door
    the hub wants a pair  ──►  reaches.wanted_at, workers.must_knock, news `orders:<source>`
    source  ◄── Knock ──  told_at          source  ── Reached ──►  a finding: `at`, `address`

A finding is about the door that the source was told: when the target's agent is started again it has another one, and what
was found out before says nothing any more. How long findings count is in the statement `ways`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from potluck.hub.commands.desk import Desk, as_json, as_type, pass_on, spread
from potluck.hub.commands.forms import MOST_BYTES, amount, one_line
from potluck.hub.store import Transaction
from potluck.protocol import Door, Knock, Link, Reached

NEIGHBOURS = 4
"""So many other workers are tried when one comes: enough to see what the network is like."""
MOST_KNOCKS = 16
"""So many in one answer; each may take seconds."""
MOST_WANTED = 500
"""So many pairs are wanted by one placement pass; the next ones by the next."""
MOST_ADDRESSES = 16
MOST_REACHED = 64


# --- what workers say -----------------------------------------------------------------------------------------------


def clean_door(door: Door | None) -> Door | None:
    """What a worker may say of its door; None if nobody could find it there."""
    if door is None or not 0 < door.port < 1 << 16 or not 8 <= len(door.key) <= 200:
        return None
    if not (door.key.isascii() and door.key.isprintable()) or " " in door.key:
        return None
    addresses = list(dict.fromkeys(filter(None, map(as_address, door.addresses[:MOST_ADDRESSES]))))
    return Door(door.port, door.key, addresses) if addresses else None


def as_address(text: str) -> str:
    """An address to which another machine could connect, in its usual form; else "".

    Debian gives 127.0.1.1 to a machine's own name: it means nothing to anybody else.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    useless = address.is_unspecified or address.is_multicast or address.is_link_local
    lost = address.is_loopback and str(address) not in ("127.0.0.1", "::1")
    return "" if useless or lost else str(address)


async def open_door(tx: Transaction, worker_id: str, door: Door | None) -> None:
    await tx.run("set_door", worker_id=worker_id, door=None if door is None else as_json(door))


async def found(tx: Transaction, worker_id: str, reached: Sequence[Reached]) -> bool:
    """Keep what came of knocks. Whether anything was new: of pairs that nobody asked for nothing is kept."""
    rows = [
        {
            "target": each.worker,
            "address": as_address(each.address),
            "rtt_s": amount(each.rtt_s, 3600.0),
            "bytes_per_s": amount(each.bytes_per_s, MOST_BYTES),
            "reason": one_line(each.reason, 200),
        }
        for each in reached[:MOST_REACHED]
    ]
    return await tx.run("keep_findings", source=worker_id, findings=as_json(rows)) > 0


# --- what the hub wants to know -------------------------------------------------------------------------------------


async def want(desk: Desk, pairs: Sequence[tuple[str, str]]) -> None:
    """Have these (from, to) found out, now. Not those that were asked for a moment ago."""
    async with desk.ledger.transaction(relaxed=True) as tx:
        rows = await tx.rows(
            "want_reaches",
            sources=[source for source, _ in pairs],
            targets=[target for _, target in pairs],
            most=MOST_WANTED,
        )
        workers = [row["id"] for row in rows]
        await spread(tx, "orders", workers)
    pass_on(desk, "orders", workers)


async def meet_neighbours(desk: Desk, worker_id: str) -> None:
    """A worker came, or has another door: find out whether it and some of the others reach each other."""
    async with desk.ledger.transaction() as tx:
        others = [row["id"] for row in await tx.rows("neighbours", worker_id=worker_id, most=NEIGHBOURS)]
    if others:
        await want(desk, [pair for other in others for pair in ((worker_id, other), (other, worker_id))])


async def knocks(desk: Desk, worker_id: str) -> list[Knock]:
    """What this worker shall find out, of what it was not told a moment ago."""
    async with desk.ledger.transaction(relaxed=True) as tx:
        rows = await tx.rows("tell_knocks", source=worker_id, most=MOST_KNOCKS)
        if not rows:
            await tx.run("no_knocks_left", worker_id=worker_id)
    return [Knock(row["target"], as_type(row["door"], Door)) for row in rows]


# --- looking --------------------------------------------------------------------------------------------------------


async def links(desk: Desk) -> list[Link]:
    """The newest finding of each pair of workers that are still here."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("links")
    return [
        Link(
            source=row["source"],
            target=row["target"],
            address=row["address"],
            rtt_s=row["rtt_s"],
            bytes_per_s=row["bytes_per_s"],
            reason=row["reason"],
            seconds_ago=row["seconds_ago"],
        )
        for row in rows
    ]
