"""Does the hub notice over a real socket that an agent is gone, and bring news to one that waits?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable

import pytest
import uvicorn

from hub_kit import Hub, sha256
from potluck.hub.app import make_app
from potluck.hub.commands import jobs, machines, people, placing
from potluck.hub.commands.desk import Caller

ASKED = {
    "agent": "agent-1",
    "now": {"cpu_cores": 4, "memory_bytes": 8 * 10**9, "memory_free_bytes": 8 * 10**9, "disk_free_bytes": 10**12},
    "rules": {"runtime": "any"},
    "executors": ["process"],
}


@contextlib.asynccontextmanager
async def serving(hub: Hub) -> AsyncIterator[int]:
    """The hub's own application on a port of this very loop."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(make_app(hub.desk), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.ensure_future(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


async def ask(port: int, token: str, wait_s: int = 20) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(ASKED).encode()
    head = f"POST /api/v1/orders?wait={wait_s} HTTP/1.1\r\nHost: hub\r\nAuthorization: Bearer {token}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.02)  # a bounded poll, not a guess


@pytest.fixture
def worker(embedded_hub: Hub) -> tuple[Caller, str]:
    return embedded_hub.join_with_token("box")


def test_an_agent_that_dies_is_marked_at_once(embedded_hub: Hub, worker: tuple[Caller, str]) -> None:
    hub, (_, token) = embedded_hub, worker

    async def story() -> None:
        async with serving(hub) as port:
            _, writer = await ask(port, token)
            await until(lambda: hub.sql("SELECT id FROM workers WHERE ordered_at IS NOT NULL"))
            assert not hub.sql("SELECT id FROM workers WHERE hung_up_at IS NOT NULL")
            writer.close()  # what a kernel does for a process that is killed
            await until(lambda: hub.sql("SELECT id FROM workers WHERE hung_up_at IS NOT NULL"))
            _, writer = await ask(port, token)
            await until(lambda: not hub.sql("SELECT id FROM workers WHERE hung_up_at IS NOT NULL"))
            writer.close()

    hub.run(story())


def test_a_waiting_agent_gets_its_job_in_the_answer(embedded_hub: Hub, worker: tuple[Caller, str]) -> None:
    hub, (_, token) = embedded_hub, worker
    mia, request = hub.member("mia"), hub.job_request()

    async def story() -> bytes:
        async with serving(hub) as port:
            reader, writer = await ask(port, token)
            await until(lambda: hub.sql("SELECT id FROM workers WHERE ordered_at IS NOT NULL"))
            await jobs.submit(hub.desk, mia, request)
            assert (await placing.run_pass(hub.desk)).placed == 1
            async with asyncio.timeout(20):
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.read(1 << 20)
            writer.close()
            return head + body

    answer = hub.run(story())

    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"attempt":1' in answer.replace(b" ", b"")


def test_a_token_that_is_known_only_as_a_hash_makes_its_bearer_the_owner(
    embedded_hub: Hub, worker: tuple[Caller, str]
) -> None:
    hub, (_, token) = embedded_hub, worker
    mia = hub.member("mia")

    assert hub.run(machines.own(hub.desk, mia, token)).owner == "mia"
    assert people.sha256(token) == sha256(token)
