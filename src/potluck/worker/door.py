"""Which other workers can this one reach, at which of their addresses, and how good is the way there?

Before machines train together they must have reached each other: not their hub, each other. So each worker that takes jobs
has a door: one TCP port that does nothing but give back what it is sent, for a moment, to whoever was sent by the hub.

    knocker ──► nonce, proof("knock")                                 the door says nothing to whoever cannot prove
    knocker ◄── nonce, proof("open")                                  that the hub gave them its key; and it proves
    knocker ──► proof("come")                                         that it is the one that was meant, and no other
    knocker ◄─► whatever it sends: five bytes one by one, then as much as goes in 0.3 s, 1 MB at most

So 127.0.0.1 is found to work only where both workers are on one machine, and an address that another machine has, too
(192.168.0.10 is in every home), only where it leads to the right one. A large piece that does not come back tells of a
tunnel that swallows what does not fit into it: a gang would hang there.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from potluck.protocol import Door, Knock, Reached
from potluck.worker import addresses

CONNECT_S = 1.0
ANSWER_S = 2.0  # for a proof, or for a byte to come back
ROUNDS = 5
BULK_BYTES = 1_000_000
BULK_S = 0.3
_VISIT_S = 8.0
_MOST_ECHO = 4 * BULK_BYTES
_GUESTS = 16  # at once; who comes then is not let in
_AT_ONCE = 4  # knocks of ours
_PIECE = 65536
_MOST_ADDRESSES = 16
_NONCE, _PROOF = 16, 32


class Porter:
    """This worker's door, and its knocks at other ones. All methods may be called from any thread."""

    def __init__(self, on_news: Callable[[], None] = lambda: None) -> None:
        """OSError if this machine lets us have no port."""
        self._on_news = on_news
        self._key = secrets.token_hex(32)
        self._socket = _listen()
        self.port = int(self._socket.getsockname()[1])
        self._guests = threading.Semaphore(_GUESTS)
        self._lock = threading.Lock()
        self._waiting: dict[str, Knock] = {}  # by worker, in the order in which they were asked for
        self._flying: set[str] = set()
        self._found: dict[str, Reached] = {}
        self._measuring = threading.Lock()  # two at once would take the line from each other
        self._closed = False
        threading.Thread(target=self._open, name="door", daemon=True).start()

    @property
    def door(self) -> Door:
        """What the hub tells those whom it sends. The addresses are those of this moment."""
        return Door(self.port, self._key, addresses.here())

    @property
    def is_out(self) -> bool:
        """Is an answer to a knock still to come?"""
        with self._lock:
            return bool(self._waiting or self._flying)

    def knock(self, knocks: Sequence[Knock]) -> bool:
        """Find out whether these can be reached. Was there one among them that is not being asked already?"""
        with self._lock:
            fresh = [
                knock
                for knock in knocks
                if knock.worker not in self._waiting
                and knock.worker not in self._flying
                and knock.worker not in self._found
                and not self._closed
            ]
            for knock in fresh:
                self._waiting[knock.worker] = knock
            threads = min(len(self._waiting), _AT_ONCE - len(self._flying))
        for _ in range(threads):
            threading.Thread(target=self._go, name="knock", daemon=True).start()
        return bool(fresh)

    def found(self) -> list[Reached]:
        """What came of the knocks, and was not `told` yet."""
        with self._lock:
            return list(self._found.values())

    def told(self, found: Sequence[Reached]) -> None:
        """The hub knows these now."""
        with self._lock:
            for one in found:
                if self._found.get(one.worker) is one:
                    del self._found[one.worker]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._waiting.clear()
        with contextlib.suppress(OSError):  # it wakes whoever waits in accept
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    # --- threads

    def _go(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                worker, knock = next(iter(self._waiting.items()))
                del self._waiting[worker]
                self._flying.add(worker)
            found = Reached(worker, reason="Potluck broke while knocking")
            try:
                found = reach(knock, measuring=self._measuring)
            finally:
                with self._lock:
                    self._flying.discard(worker)
                    self._found[worker] = found
                self._on_news()

    def _open(self) -> None:
        while not self._closed:
            try:
                guest, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # no descriptor is left for a moment
                continue
            if not self._guests.acquire(blocking=False):
                guest.close()
                continue
            threading.Thread(target=self._receive, args=(guest,), name="door-guest", daemon=True).start()

    def _receive(self, guest: socket.socket) -> None:
        try:
            with guest, contextlib.suppress(OSError):
                guest.settimeout(ANSWER_S)
                guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._is_sent_by_the_hub(guest):
                    guest.settimeout(_VISIT_S)  # it may have to wait for its other knocks
                    _give_back(guest)
        finally:
            self._guests.release()

    def _is_sent_by_the_hub(self, guest: socket.socket) -> bool:
        theirs = _read(guest, _NONCE)
        if not hmac.compare_digest(_read(guest, _PROOF), _proof(self._key, "knock", theirs)):
            return False
        both = theirs + (ours := secrets.token_bytes(_NONCE))
        guest.sendall(ours + _proof(self._key, "open", both))
        return hmac.compare_digest(_read(guest, _PROOF), _proof(self._key, "come", both))


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be switched off while the kernel has it
            return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("0.0.0.0", 0))


def _give_back(guest: socket.socket) -> None:
    until, left = time.monotonic() + _VISIT_S, _MOST_ECHO
    while left > 0 and time.monotonic() < until:
        piece = guest.recv(_PIECE)
        if not piece:
            return
        guest.sendall(piece)
        left -= len(piece)


# --- knocking


class _Strange(OSError):
    """Somebody is there, but not who was meant, or not as it should be."""


def reach(knock: Knock, *, measuring: threading.Lock | None = None) -> Reached:
    """Knock at each of the door's addresses in turn; the first that works. Takes about a second for each that does not."""
    problems = []
    for address in knock.door.addresses[:_MOST_ADDRESSES]:
        try:
            ipaddress.ip_address(address)  # names are not looked up: they lead elsewhere on every machine
            with socket.create_connection((address, knock.door.port), timeout=CONNECT_S) as line:
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                line.settimeout(ANSWER_S)
                _introduce(line, knock.door.key)
                with measuring or contextlib.nullcontext():
                    rtt_s = min(_round_trip(line) for _ in range(ROUNDS))
                    return Reached(knock.worker, address, rtt_s, _bulk(line, rtt_s))
        except (OSError, ValueError, OverflowError) as error:
            problems.append(f"{address} {_in_words(error)}")
    return Reached(knock.worker, reason="; ".join(problems) or "it has no address that others could reach")


def _introduce(line: socket.socket, key: str) -> None:
    ours = secrets.token_bytes(_NONCE)
    line.sendall(ours + _proof(key, "knock", ours))
    try:
        theirs, proof = _read(line, _NONCE), _read(line, _PROOF)
    except ConnectionError:
        raise _Strange("is somebody else's") from None
    both = ours + theirs
    if not hmac.compare_digest(proof, _proof(key, "open", both)):
        raise _Strange("is somebody else's")
    line.sendall(_proof(key, "come", both))


def _round_trip(line: socket.socket) -> float:
    began = time.perf_counter()
    line.sendall(b"?")
    _read(line, 1)
    return time.perf_counter() - began


def _bulk(line: socket.socket, rtt_s: float) -> float:
    """Bytes a second, there and back at once: a sum over a gang goes both ways, too."""
    line.setblocking(False)
    piece, sent, back = memoryview(bytes(_PIECE)), 0, 0
    began = time.perf_counter()
    while back < BULK_BYTES:
        passed = time.perf_counter() - began
        if passed > BULK_S + rtt_s and back:
            break
        if passed > ANSWER_S + rtt_s:
            raise _Strange(
                "answers, but nothing larger than a few bytes comes through (is the MTU of a tunnel too large?)"
            )
        readable, writable, _ = select.select([line], [line] if sent < BULK_BYTES else [], [], 0.05)
        with contextlib.suppress(BlockingIOError):
            if readable:
                got = len(line.recv(_PIECE))
                if not got:
                    raise ConnectionError("hung up")
                back += got
            if writable:
                sent += line.send(piece[: BULK_BYTES - sent])
    # The first byte was on its way for a round trip: that is no matter of how many go at once.
    passed = time.perf_counter() - began
    return back / max(passed - rtt_s, passed / 10)


def _in_words(error: Exception) -> str:
    if isinstance(error, _Strange):
        return str(error)
    if isinstance(error, TimeoutError):
        return "does not answer (a firewall?)"
    if isinstance(error, ConnectionRefusedError):
        return "refuses the connection"
    if isinstance(error, ConnectionError):
        return "hangs up"
    return f"cannot be tried ({getattr(error, 'strerror', None) or error})"


# --- both sides


def _proof(key: str, word: str, nonces: bytes) -> bytes:
    return hmac.digest(key.encode(), f"potluck {word} ".encode() + nonces, "sha256")


def _read(line: socket.socket, size: int) -> bytes:
    text = b""
    while len(text) < size:
        piece = line.recv(size - len(text))
        if not piece:
            raise ConnectionResetError("hung up")
        text += piece
    return text
