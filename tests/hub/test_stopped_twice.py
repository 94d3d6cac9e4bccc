"""Does a hub that is told to stop come to its end in order, also when it is told twice?"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
from starlette.applications import Starlette

from potluck.hub.app import Server
from potluck.hub.commands.desk import Desk


@pytest.mark.parametrize("times", [1, 2])
def test_what_runs_beside_the_requests_is_ended_however_often_one_presses_ctrl_c(
    times: int, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    begun = threading.Event()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        begun.set()
        yield
        said.append("the ledger is closed")

    desk = SimpleNamespace(news=SimpleNamespace(close=lambda: said.append("the news are closed")))
    config = uvicorn.Config(Starlette(lifespan=lifespan), port=0, log_config=None)
    server = Server(config, cast(Desk, cast(Any, desk)))
    thread = threading.Thread(target=server.run)
    thread.start()
    assert begun.wait(20)

    server.force_exit = times > 1
    server.should_exit = True
    thread.join(20)

    assert not thread.is_alive()
    assert said == ["the news are closed", "the ledger is closed"]
    assert "Traceback" not in caplog.text
