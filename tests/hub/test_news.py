"""Is everybody woken who waits, does the hub forget old topics, and does its upkeep go on after a bug?"""

from __future__ import annotations

import asyncio

import pytest

from hub_kit import Hub
from potluck.hub import upkeep
from potluck.hub.commands import placing
from potluck.hub.commands.desk import Desk, News


def test_news_since_the_ticket_is_heard_and_older_news_is_not() -> None:
    async def scene() -> tuple[bool, bool]:
        news = News()
        news.tell("job:a")
        ticket = news.ticket("job:a")
        nothing = await news.wait(ticket, 0)
        news.tell("job:a")
        return nothing, await news.wait(ticket, 0)

    assert asyncio.run(scene()) == (False, True)


def test_topics_of_long_ago_are_forgotten_and_nobody_misses_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(News, "MOST_TOPICS", 100)

    async def scene() -> None:
        news = News()
        news.tell("job:0")
        early, never = news.ticket("job:0"), news.ticket("job:never")
        waits = asyncio.ensure_future(news.wait(never, 0.01))
        for n in range(1, 1000):
            news.tell(f"job:{n}")
            assert await news.wait(early, 0) or len(news._last) > n  # at worst it is woken for nothing
            assert len(news._last) <= 101
        assert not await waits  # whoever waits is not disturbed
        late = news.ticket("job:0")
        assert not await news.wait(late, 0)
        news.tell("job:0")
        assert await news.wait(late, 0)

    asyncio.run(scene())


def test_placement_goes_on_after_a_bug(embedded_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = embedded_hub
    mia, box = hub.member("mia"), hub.join("box")
    hub.orders(box)
    job = hub.submit_job(mia)
    passes = placing.run_pass
    failed = asyncio.Event()

    async def fails_once(desk: Desk) -> placing.Pass:
        if not failed.is_set():
            failed.set()
            raise KeyError("a bug")
        return await passes(desk)

    monkeypatch.setattr(placing, "run_pass", fails_once)

    async def scene() -> None:
        loop = asyncio.ensure_future(upkeep.run_forever(hub.desk))
        try:
            async with asyncio.timeout(20):
                while hub.one("SELECT state FROM runs WHERE id = %(id)s", id=job) == "queued":
                    assert not loop.done()
                    await asyncio.sleep(0.02)  # a bounded poll, not a guess
        finally:
            loop.cancel()

    hub.run(scene())

    assert failed.is_set()
    assert hub.job(mia, job).state == "placed"
