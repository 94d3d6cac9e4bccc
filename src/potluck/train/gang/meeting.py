"""Who takes part in the next step? The meeting place of the plain engine.

A member holds one connection to the meeting. Before each step it says that it is there, and is answered when it is clear
who takes part; between, a thread sends beats. So a killed member is gone at once (its kernel closes the connection), a
stopped or cut off one after `BEAT_LAPSE_S`.

    member → {"meet": step, "broken": bool, "card": …}       it is ready; broken: its group does not work any more
           → {"beat": 1}
    member ← {"generation": "…", "me": rank, "steps": […], "cards": […]}      cards only with another generation

Messages are JSON, one a line. The meeting keeps nothing that matters: it can be started again, elsewhere, at any time.
It needs the standard library only: `python -m potluck.train.gang` starts one.

`decide` follows the rules of torchft's lighthouse, so that both engines behave alike.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEAT_S = 0.1
BEAT_LAPSE_S = 0.5
GATHER_S = 0.3  # the first members wait so long for others that are just starting
TARRY_S = 10.0  # and all of them, for one that is alive but busy with something else
TICK_S = 0.02
LOOK_S = 1.0  # how long a member waits for an answer, before it looks whether the meeting is elsewhere by now
MAX_LINE = 8 << 20


@dataclass(frozen=True, slots=True)
class Seat:
    """What the meeting knows of a member."""

    session: str  # one life of a member's process
    is_alive: bool  # it has sent a beat lately
    waited_s: float | None  # since it said that it is ready; None: it did not


def decide(seats: Sequence[Seat], previous: frozenset[str], *, least: int) -> tuple[tuple[str, ...], str]:
    """The sessions that take part in the next step, in the order of their seats; or none yet, and why."""
    alive = [seat for seat in seats if seat.is_alive]
    ready = [seat for seat in alive if seat.waited_s is not None]
    everybody = tuple(seat.session for seat in ready)
    if previous and previous <= set(everybody):
        return everybody, "all of the last step are back"
    if len(ready) < least:
        return (), f"{len(ready)} of at least {least} members are here"
    if 2 * len(ready) <= len(alive):
        return (), f"{len(ready)} of {len(alive)} living members are no majority"
    waited = max(seat.waited_s or 0.0 for seat in ready)
    if len(ready) < len(alive) and waited < TARRY_S:
        return (), f"waiting for {len(alive) - len(ready)} that are alive"
    if not previous and waited < GATHER_S:
        return (), "waiting for others that are just starting"
    return everybody, "all that are alive" if len(ready) == len(alive) else f"the others tarried {TARRY_S:g} s"


# --- the server -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Guest:
    session: str
    name: str
    connection: socket.socket
    beat_at: float
    ready_at: float | None = None
    step: int = 0
    card: Any = None  # it comes with the first message
    broken: bool = False
    told: str = ""  # the generation whose cards it has


class Meeting:
    """The server. `address` is where it can be reached."""

    def __init__(self, host: str = "0.0.0.0", port: int = 0, *, least: int = 1) -> None:
        self._least = least
        self._guests: dict[str, _Guest] = {}  # by session, in the order in which they came
        self._previous: frozenset[str] = frozenset()
        self._generation = 0
        self._life = secrets.token_hex(4)  # so that no generation of an earlier meeting is taken for one of this
        self._changed = threading.Condition()
        self._closed = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=64)
        self.port = int(self._socket.getsockname()[1])
        for target in (self._welcome, self._preside):
            threading.Thread(target=target, name=f"potluck-meeting-{target.__name__}", daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            guests = list(self._guests.values())
            self._changed.notify_all()
        _hang_up(self._socket)
        for guest in guests:
            _hang_up(guest.connection)

    def _welcome(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        guest: _Guest | None = None
        try:
            with connection, connection.makefile("rb") as lines:
                while line := lines.readline(MAX_LINE):
                    message = json.loads(line)
                    with self._changed:
                        if guest is None:
                            guest = self._seat(message, connection)
                        self._heard(guest, message)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # it died, or it is no member: either way it is gone
        finally:
            with self._changed:
                if guest is not None and self._guests.get(guest.session) is guest:
                    del self._guests[guest.session]
                self._changed.notify_all()

    def _seat(self, message: Mapping[str, Any], connection: socket.socket) -> _Guest:
        guest = _Guest(str(message["session"]), str(message["name"]), connection, time.monotonic())
        for other in list(self._guests.values()):
            if other.name == guest.name:  # its process before this one
                del self._guests[other.session]
                _hang_up(other.connection)
        self._guests[guest.session] = guest
        return guest

    def _heard(self, guest: _Guest, message: Mapping[str, Any]) -> None:
        guest.beat_at = time.monotonic()
        if "meet" in message:
            guest.ready_at, guest.step, guest.broken = guest.beat_at, int(message["meet"]), bool(message["broken"])
            guest.card = message.get("card", guest.card)
            self._changed.notify_all()

    def _preside(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                seats = [
                    Seat(g.session, now - g.beat_at < BEAT_LAPSE_S, None if g.ready_at is None else now - g.ready_at)
                    for g in self._guests.values()
                ]
                chosen, _ = decide(seats, self._previous, least=self._least)
                if chosen:
                    self._announce([self._guests[session] for session in chosen])
                waiting = any(guest.ready_at is not None for guest in self._guests.values())
                self._changed.wait(TICK_S if waiting else None)

    def _announce(self, guests: list[_Guest]) -> None:
        sessions = frozenset(guest.session for guest in guests)
        if sessions != self._previous or any(guest.broken for guest in guests):
            self._generation += 1
        self._previous = sessions
        generation = f"{self._life}-{self._generation}"
        cards, steps = [guest.card for guest in guests], [guest.step for guest in guests]
        for rank, guest in enumerate(guests):
            answer: dict[str, Any] = {"generation": generation, "me": rank, "steps": steps}
            if guest.told != generation:
                answer["cards"] = cards
            guest.told, guest.ready_at = generation, None
            try:
                guest.connection.sendall(json.dumps(answer).encode() + b"\n")
            except OSError:
                continue  # it is noticed by its own thread


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was never connected, or is closed already
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


# --- the member's side ----------------------------------------------------------------------------------------------


class Line:
    """A member's connection. Any error means: hang up, and call again."""

    def __init__(self, place: str, name: str, *, timeout_s: float) -> None:
        self.place = place
        host, _, port = place.rpartition(":")
        self._socket = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")
        self._who = {"session": secrets.token_hex(8), "name": name}
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._has_card = False
        threading.Thread(target=self._beat, name="potluck-beat", daemon=True).start()

    def meet(
        self, step: int, card: Any, *, broken: bool, timeout_s: float, is_elsewhere: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Say that this member is ready, and wait for who takes part. The card is sent once.

        A machine that loses its power or its cable says no goodbye: so, while it waits, it asks `is_elsewhere`.
        """
        self._send({"meet": step, "broken": broken} | ({} if self._has_card else {"card": card}))
        self._has_card = True
        deadline = time.monotonic() + timeout_s
        while not self._has_answer():
            if is_elsewhere():
                raise ConnectionError("the gang meets elsewhere by now")
            if time.monotonic() > deadline:
                raise TimeoutError("the meeting gave no answer")
        self._socket.settimeout(max(deadline - time.monotonic(), LOOK_S))
        line = self._answers.readline(MAX_LINE)
        if not line:
            raise ConnectionError("the meeting hung up")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _has_answer(self) -> bool:
        """Or an end: `readline` will find out."""
        self._socket.settimeout(LOOK_S)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self._closed.set()
        _hang_up(self._socket)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            try:
                self._send({"beat": 1})
            except OSError:
                self.close()  # so that `meet` finds out, too
                return

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._sending:
            self._socket.sendall(json.dumps({**self._who, **message}).encode() + b"\n")


def serve(host: str, port: int, *, least: int, say: Callable[[str], None]) -> None:
    """Serve until the process is ended."""
    meeting = Meeting(host, port, least=least)
    say(f"{host}:{meeting.port}")
    threading.Event().wait()
