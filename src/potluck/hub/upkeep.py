"""What must happen though nobody asks? Silent workers' leases expire, rounds close, tastes are ordered, runs end."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from potluck.errors import PotluckError
from potluck.hub.commands import files, rounds, work
from potluck.hub.commands.desk import Desk
from potluck.telemetry import logger

log = logger("hub.upkeep")
RETURN_GRACE = timedelta(seconds=30)
"""How long workers have to come back after the hub was away, before their leases may expire."""


SWEEP_EVERY_S = 30.0


async def welcome_back(desk: Desk) -> None:
    """At start: nobody could send a heartbeat while the hub was down."""
    async with desk.ledger.transaction() as tx:
        await tx.run("spare_leases", grace=RETURN_GRACE)


async def run_once(desk: Desk) -> float:
    """Everything that is due now. Returns in how many seconds to look again, if there is no news before."""
    await work.expire(desk)
    wake = 1.0
    async with desk.ledger.transaction() as tx:
        live = await tx.rows("live_runs")
    for run in live:
        settled = await rounds.settle(desk, run["id"])
        if settled.text:
            log.info("run.settled", run=run["id"], what=settled.text)
        wake = min(wake, settled.wake_s)
    return wake


async def run_forever(desk: Desk) -> None:
    while not desk.news.closed:
        ticket = desk.news.ticket("rounds")
        try:
            wake = await run_once(desk)
        except PotluckError as error:
            log.warning("upkeep.waits", reason=str(error))
            wake = 1.0
        await desk.news.wait(ticket, wake)


async def sweep_forever(desk: Desk) -> None:
    while True:
        await asyncio.sleep(SWEEP_EVERY_S)
        try:
            if count := await files.sweep(desk):
                log.info("blobs.swept", count=count)
        except PotluckError as error:
            log.warning("sweep.waits", reason=str(error))


async def hear(desk: Desk) -> None:
    """Pass on what other hub copies, and our own transactions, notify."""

    def heard(news: str) -> None:
        desk.news.tell(news)
        if news:
            desk.news.tell("change")

    await asyncio.shield(desk.ledger.listen(heard))
