"""What must happen though nobody asks? Silent workers' leases expire, rounds close, jobs are placed, gangs kept together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from datetime import timedelta
from typing import TypeVar

from potluck.errors import PotluckError
from potluck.hub.commands import attempts, files, gang_upkeep, placing, rounds, work
from potluck.hub.commands.desk import Desk
from potluck.telemetry import logger

log = logger("hub.upkeep")
T = TypeVar("T")
RETURN_GRACE = timedelta(seconds=30)
"""How long workers have to come back after the hub was away, before their leases may expire."""
SWEEP_EVERY_S = 30.0
TOGETHER_S = 0.015
"""So long a placement pass waits for more news of the same moment."""


async def welcome_back(desk: Desk) -> None:
    """At start: nobody could send a heartbeat while the hub was down."""
    async with desk.ledger.transaction() as tx:
        await tx.run("spare_leases", grace=RETURN_GRACE)
        await tx.run("forget_hang_ups")


async def run_once(desk: Desk) -> float:
    """Everything that is due now. Returns in how many seconds to look again, if there is no news before."""
    await work.expire(desk)
    await attempts.expire(desk)
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
    async with asyncio.TaskGroup() as all_:
        all_.create_task(_settle_forever(desk))
        all_.create_task(_place_forever(desk))
        all_.create_task(_tend_forever(desk))


async def _settle_forever(desk: Desk) -> None:
    while not desk.news.closed:
        ticket = desk.news.ticket("rounds")
        wake = await _tried("upkeep", run_once(desk), 1.0)
        await desk.news.wait(ticket, wake)


async def _place_forever(desk: Desk) -> None:
    """A pass whenever there is news, and now and then while anything waits."""
    while not desk.news.closed:
        ticket = desk.news.ticket("place")
        done = await _tried("placing", placing.run_pass(desk), placing.Pass(mine=False, took_s=0.5))
        if done.placed:
            log.info("jobs.placed", count=done.placed, waiting=done.waiting, took_ms=round(done.took_s * 1000))
        wait_s = (2.0 if done.waiting else 10.0) if done.mine else 0.1
        await desk.news.wait(ticket, wait_s)
        # News comes in crowds. And half of the time belongs to others, however long the line is.
        await asyncio.sleep(max(TOGETHER_S, done.took_s))


async def _tend_forever(desk: Desk) -> None:
    """Gangs, whenever something happened to a member, and each second for what happens without a word."""
    clock = asyncio.get_running_loop().time
    begun = clock()
    while not desk.news.closed:
        ticket = desk.news.ticket("gangs")
        # Right after the hub was away all workers were silent for a while, and none of them is to blame.
        back = clock() - begun > RETURN_GRACE.total_seconds()
        await _tried("gangs", gang_upkeep.tend(desk, silent=gang_upkeep.SILENT if back else 2 * RETURN_GRACE), 0)
        await desk.news.wait(ticket, 1.0)
        await asyncio.sleep(TOGETHER_S)


async def sweep_forever(desk: Desk) -> None:
    while True:
        await asyncio.sleep(SWEEP_EVERY_S)
        if count := await _tried("sweep", files.sweep(desk), 0):
            log.info("blobs.swept", count=count)


async def _tried(what: str, work: Awaitable[T], otherwise: T) -> T:
    """What `work` gives. A loop that ended at its first bug would stop all jobs and runs until the hub is started anew."""
    try:
        return await work
    except PotluckError as error:
        log.warning(f"{what}.waits", reason=str(error))
    except Exception as error:
        log.error(f"{what}.bug", exc_info=error)
    return otherwise


async def hear(desk: Desk) -> None:
    """Pass on what other hub copies, and our own transactions, notify."""

    def heard(news: str) -> None:
        topic, _, ids = news.partition(":")
        for id_ in ids.split(",") if "," in ids else [ids]:  # desk.spread puts many into one
            desk.news.tell(f"{topic}:{id_}" if id_ else topic)
        if news:
            desk.news.tell("change")

    await asyncio.shield(desk.ledger.listen(heard))
