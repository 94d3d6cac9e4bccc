"""Does each of many requests get its own answer, though they asked the ledger together?"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from potluck.errors import BadInput, TryLater
from potluck.hub.store.shared import MOST, Rows, Shared, Values


class Slow:
    """A ledger that answers each question with its own words, as soon as it is let."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.may = asyncio.Event()

    async def __call__(self, asked: list[Values]) -> list[Rows]:
        words = [values["word"] for values in asked]
        self.asked.append(words)
        await self.may.wait()
        if "lost" in words:
            raise TryLater("the connection is gone")
        if "nonsense" in words:
            raise BadInput("nonsense does not fit")
        return [[{"word": word}] for word in words]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_who_comes_while_one_question_is_on_its_way_shares_the_next() -> None:
    async def story() -> None:
        ledger = Slow()
        shared = Shared(ledger)
        first = asyncio.create_task(shared.ask(None, {"word": 0}))
        await settled()
        others = [asyncio.create_task(shared.ask(None, {"word": number})) for number in range(1, MOST + 2)]
        await settled()
        ledger.may.set()
        answers = await asyncio.gather(first, *others)
        assert [rows[0]["word"] for rows in answers] == list(range(MOST + 2))
        assert [len(words) for words in ledger.asked] == [1, MOST, 1]

    asyncio.run(story())


def test_those_that_must_be_apart_never_share_and_keep_their_order() -> None:
    async def story() -> None:
        ledger = Slow()
        ledger.may.set()
        shared = Shared(ledger)
        asking = [("ann", 1), ("ann", 2), ("bob", 3), ("ann", 4)]
        answers = await asyncio.gather(*(shared.ask(who, {"word": word}) for who, word in asking))
        assert [rows[0]["word"] for rows in answers] == [1, 2, 3, 4]
        assert ledger.asked == [[1, 3], [2], [4]]

    asyncio.run(story())


def test_one_that_sends_nonsense_spoils_nothing_for_the_others() -> None:
    async def story() -> None:
        ledger = Slow()
        ledger.may.set()
        shared = Shared(ledger)
        words = ["good", "nonsense", "fine"]
        found = await asyncio.gather(*(shared.ask(None, {"word": word}) for word in words), return_exceptions=True)
        assert isinstance(found[1], BadInput)
        assert [found[0], found[2]] == [[{"word": "good"}], [{"word": "fine"}]]

    asyncio.run(story())


def test_a_lost_connection_is_told_to_all_who_asked_and_to_nobody_else() -> None:
    async def story() -> None:
        ledger = Slow()
        ledger.may.set()
        shared = Shared(ledger)
        found = await asyncio.gather(
            *(shared.ask(None, {"word": word}) for word in ("lost", "too")), return_exceptions=True
        )
        assert all(isinstance(error, TryLater) for error in found)
        assert await shared.ask(None, {"word": "again"}) == [{"word": "again"}]

    asyncio.run(story())


def test_one_that_hangs_up_takes_no_answer_from_the_others() -> None:
    async def story() -> None:
        ledger = Slow()
        shared = Shared(ledger)
        gone = asyncio.create_task(shared.ask(None, {"word": "gone"}))
        stays = asyncio.create_task(shared.ask(None, {"word": "stays"}))
        await settled()
        late = asyncio.create_task(shared.ask(None, {"word": "late"}))
        also_gone = asyncio.create_task(shared.ask(None, {"word": "also gone"}))
        await settled()
        gone.cancel()
        also_gone.cancel()
        ledger.may.set()
        assert await stays == [{"word": "stays"}]
        assert await late == [{"word": "late"}]
        for task in (gone, also_gone):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert ledger.asked == [["gone", "stays"], ["late"]]

    asyncio.run(story())
