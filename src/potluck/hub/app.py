"""How is a hub put together? The only place that knows all its parts.

serve ── PostgreSQL (ours or given) ── Ledger ─┐
      ├─ BlobStore (data_dir/blobs) ───────────┼─ Desk ── api, dashboard ── uvicorn
      ├─ upkeep, hear, watch (background) ─────┘
      └─ the house worker, a process like any worker's
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import uvicorn
from fastapi import FastAPI

import potluck
from potluck import settings as settings_
from potluck.blobs import BlobStore
from potluck.domain.names import clean_name
from potluck.errors import Conflict, PotluckError
from potluck.hub import api, certificate, dashboard, house, tunnel, upkeep
from potluck.hub.commands import people
from potluck.hub.commands.desk import Desk
from potluck.hub.limits import Limits
from potluck.hub.postgres import EmbeddedPostgres, check_server, redact
from potluck.hub.store import Ledger
from potluck.protocol import InviteRequest
from potluck.settings import HubSettings
from potluck.telemetry import logger

log = logger("hub")
Background = Callable[[], Awaitable[None]]


def make_app(desk: Desk, *background: Background) -> FastAPI:
    """The hub's HTTP application. `background` tasks live as long as it does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await desk.ledger.open()
        await upkeep.welcome_back(desk)
        tasks = [asyncio.ensure_future(start()) for start in background]
        for task in tasks:
            task.add_done_callback(_tell_if_dead)
        # What is here by now stays; and a thousand waiting requests are no garbage to be looked through each time.
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        yield
        desk.news.close()
        for task in tasks:
            task.cancel()
        _, stuck = await asyncio.wait(tasks, timeout=20) if tasks else (set(), set())
        if stuck:
            log.error("background.stuck", tasks=[str(task) for task in stuck])
        await desk.ledger.close()

    app = FastAPI(
        title="Potluck hub",
        version=potluck.__version__,
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.desk = desk
    api.install(app)
    dashboard.install(app)
    app.add_middleware(Limits)
    return app


def _tell_if_dead(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("background.died", reason=str(error), exc_info=error)


def serve(settings: HubSettings) -> int:
    """Run a hub until Ctrl-C. Returns the exit code."""
    # Root's PostgreSQL runs as somebody else, who must be able to pass through; every secret in it is 0600.
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o711 if _is_root() else 0o700)
    way_in = tunnel.find(settings.tunnel) if settings.tunnel else None
    listener = _listen(settings.listen_on, settings.port)
    with contextlib.ExitStack() as stack:
        postgres: EmbeddedPostgres | None = None
        if settings.database_url:
            check_server(settings.database_url)
            dsn = settings.database_url
            log.info("ledger.given", address=redact(dsn))
        else:
            postgres = EmbeddedPostgres(settings.data_dir / "ledger")
            dsn = postgres.start()
            stack.callback(postgres.stop)
        return _serve(settings, listener, dsn, postgres, way_in)


def _serve(
    settings: HubSettings,
    listener: socket.socket,
    dsn: str,
    postgres: EmbeddedPostgres | None,
    way_in: tunnel.Tunnel | None,
) -> int:
    tls = certificate.load_or_make(settings.data_dir / "tls", settings.bind) if settings.use_tls else None
    port = listener.getsockname()[1]
    scheme = "https" if tls else "http"
    place = Place(
        public=f"{scheme}://{_reachable_host(settings.listen_on)}:{port}",
        local=f"{scheme}://{_local_host(settings.listen_on)}:{port}",
        fingerprint=tls.fingerprint if tls else "",
    )
    desk = Desk(
        ledger=Ledger(dsn),
        blobs=BlobStore(settings.data_dir / "blobs"),
        name=clean_name(settings.name or socket.gethostname(), "potluck"),
        public_url=place.public,
        fingerprint=place.fingerprint,
    )
    token = _admin_token(settings.data_dir)

    async def announce() -> None:
        """Once the ledger is open: let the admin in, write hub.json, say where we are, start what runs beside us."""
        await people.put_admin(desk, token)
        note = {
            "address": place.local,
            "admin_token": token,
            "fingerprint": place.fingerprint,
            "pid": os.getpid(),
        }
        settings_.write_private(settings.data_dir / "hub.json", json.dumps(note, indent=1))
        hello = await make_hello(desk, settings)
        beside: list[Awaitable[None]] = []
        if settings.house_worker:
            beside.append(house.keep(desk, settings.data_dir / "house", place.local, token))
        if way_in is not None:

            def opened(address: str) -> None:
                desk.move(address)
                hello.say()

            beside.append(way_in.keep(port, opened))
        else:
            hello.say()
        await asyncio.gather(*beside)

    background: list[Background] = [announce, lambda: upkeep.run_forever(desk), lambda: upkeep.hear(desk)]
    background.append(lambda: upkeep.sweep_forever(desk))
    if postgres is not None:
        background.append(lambda: _watch(desk, postgres))
    config = uvicorn.Config(
        make_app(desk, *background),
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=3,
        timeout_keep_alive=75,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
        server_header=False,
    )
    server = Server(config, desk)
    server.run(sockets=[listener])
    return 0 if server.started else 1


class Server(uvicorn.Server):
    """Wakes those who wait before uvicorn begins to wait for them: the lifespan would only do it afterwards."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal once more when it is done, and PostgreSQL would be left behind."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._desk.news.close()
        await super().shutdown(sockets)
        if self.force_exit:  # a second Ctrl-C: uvicorn waits for no request then, and not for our own end either
            await self.lifespan.shutdown()


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


@dataclass(frozen=True)
class Place:
    """Where the hub can be found."""

    public: str
    local: str
    fingerprint: str


def _listen(bind: str, port: int) -> socket.socket:
    """The listening socket, before anything is started, so that a taken port costs nothing."""
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if sys.platform != "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((bind, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise Conflict(
            f"cannot listen on {bind} port {port}: {error.strerror}. "
            "Another hub may be running (`potluck ps`); choose another --port, or 0 for any free one"
        ) from None
    listener.set_inheritable(False)
    return listener


def _local_host(bind: str) -> str:
    return "127.0.0.1" if bind in ("0.0.0.0", "") else "[::1]" if bind == "::" else bind


def _reachable_host(bind: str) -> str:
    """The address that other machines of this network would use. Sends nothing."""
    if bind not in ("0.0.0.0", "", "::"):
        return f"[{bind}]" if ":" in bind else bind
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # a documentation address: connect() of UDP only asks the routing table
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def _admin_token(data_dir: Path) -> str:
    path = data_dir / "admin.token"
    if path.exists():
        return path.read_text().strip()
    token = settings_.make_token("admin")
    settings_.write_private(path, token)
    return token


async def make_hello(desk: Desk, settings: HubSettings) -> Hello:
    worker = await people.invite(desk, InviteRequest("worker", uses=100, ttl_s=12 * 3600), actor="the hub")
    viewer = await people.invite(desk, InviteRequest("viewer", uses=1000, ttl_s=7 * 86400), actor="the hub")
    return Hello(desk, settings, worker.code, viewer.code)


@dataclass
class Hello:
    """What whoever started this needs next, on standard output; once more whenever the hub has got another address."""

    desk: Desk
    settings: HubSettings
    worker_code: str  # of links: they hold at any address
    viewer_code: str
    said: str = ""  # the address that was named

    def say(self) -> None:
        url = self.desk.public_url
        join = f"{url}/j/{self.worker_code}" + (f"#fp={self.desk.fingerprint}" if self.desk.fingerprint else "")
        first = f"Potluck {potluck.__version__}: {self.desk.name} is open at {url}\n"
        again = f"{self.desk.name} has another address now: {url}\n"
        click.echo(
            (again if self.said else first) + f'  a worker joins with   potluck join "{join}"\n'
            f"  the page              {url}/j/{self.viewer_code}"
        )
        if self.said:
            click.echo(f"  who joined at {self.said} has to join again by the new line")
        else:
            click.echo(
                "  train something       potluck train dcgan --data emoji-people --for 10m\n"
                "  stop                  Ctrl-C; everything is kept, and `potluck host` goes on"
            )
            if not self.settings.house_worker:
                click.echo("  no house worker: somebody trusted must merge (potluck invite --trusted)")
        self.said = url
        sys.stdout.flush()


async def _watch(desk: Desk, postgres: EmbeddedPostgres) -> None:
    """Start the embedded server again if it dies. Workers see a hub that asks them to wait."""
    while True:
        await asyncio.sleep(2)
        try:
            async with desk.ledger.transaction() as tx:
                await tx.rows("live_runs")
        except PotluckError:
            log.warning("ledger.down", next="starting it again")
            try:
                await asyncio.to_thread(postgres.start)
                await upkeep.welcome_back(desk)
            except PotluckError as error:
                log.error("ledger.stays_down", reason=str(error))
