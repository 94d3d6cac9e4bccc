"""How do many requests become one question to the ledger?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from potluck.errors import BadInput

Rows = list[dict[str, Any]]
Values = dict[str, Any]
MOST = 200
"""Questions in one statement."""


class Shared:
    """A statement that answers many at once. At most one is on its way; who comes meanwhile goes with the next."""

    def __init__(self, ask: Callable[[list[Values]], Awaitable[list[Rows]]]) -> None:
        self._ask = ask
        self._waiting: list[tuple[object, Values, asyncio.Future[Rows]]] = []
        self._driver: asyncio.Task[None] | None = None

    async def ask(self, apart: object, values: Values) -> Rows:
        """The rows for `values`. Never out of a statement that was sent before this call."""
        future: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        self._waiting.append((apart, values, future))
        if self._driver is None:
            # a task of its own: if the first to ask hangs up, the others still get their answers
            self._driver = asyncio.create_task(self._drive())
        return await future

    async def _drive(self) -> None:
        try:
            while batch := self._next():
                await self._answer(batch)
        finally:
            self._driver = None

    def _next(self) -> list[tuple[Values, asyncio.Future[Rows]]]:
        batch: list[tuple[Values, asyncio.Future[Rows]]] = []
        later, taken = [], set()
        for apart, values, future in self._waiting:
            if future.done():  # it was given up
                continue
            if len(batch) == MOST or (apart is not None and apart in taken):
                later.append((apart, values, future))
                continue
            taken.add(apart)
            batch.append((values, future))
        self._waiting = later
        return batch

    async def _answer(self, batch: list[tuple[Values, asyncio.Future[Rows]]]) -> None:
        try:
            answers = await self._ask([values for values, _ in batch])
        except BadInput as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            for one in batch:  # the fault of one of them: it is not the others'
                await self._answer([one])
        except BaseException as error:
            _fail(batch, error)
            if not isinstance(error, Exception):
                raise
        else:
            for (_, future), rows in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(rows)


def _fail(batch: list[tuple[Values, asyncio.Future[Rows]]], error: BaseException) -> None:
    for _, future in batch:
        if future.done():
            continue
        if isinstance(error, asyncio.CancelledError):
            future.cancel()
        else:
            future.set_exception(error)
