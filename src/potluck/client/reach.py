"""How is a hub reached, and if it is not, what should a person do about it?"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import httpx2

from potluck.errors import BadInput, Conflict, HubUnreachable, NotAHub, NotAllowed, NotFound, PotluckError
from potluck.settings import is_loopback

if TYPE_CHECKING:
    import ssl


class Translated:
    """Turns what the HTTP library raises into a sentence about the hub."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, httpx2.HTTPError | httpx2.StreamError | httpx2.InvalidURL):
            raise explain(error, self.address, self.timeout_s) from error
        if isinstance(error, RuntimeError) and "client has been closed" in str(error):
            raise HubUnreachable(f"the connection to {self.address} was closed") from error


def explain(error: Exception, address: str, timeout_s: float) -> PotluckError:
    """Why the hub could not be reached, for a person."""
    import socket
    import ssl

    cause: BaseException | None = error
    chain: list[BaseException] = []
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(c) for c in chain)
    if isinstance(error, httpx2.TimeoutException | TimeoutError):
        return HubUnreachable(
            f"no answer from {address} within {timeout_s:g} s: is the hub running, and is the network slow or blocked?"
        )
    if any(isinstance(c, socket.gaierror) for c in chain):
        return HubUnreachable(
            f"no machine called {urlsplit(address).hostname} can be found: check the address in the link"
        )
    if any(isinstance(c, ConnectionRefusedError) for c in chain) or "refused" in text:
        return HubUnreachable(
            f"nothing listens at {address}: is the hub running (`potluck host`), and is the port right?"
        )
    if any(isinstance(c, ssl.SSLCertVerificationError) for c in chain) or "CERTIFICATE_VERIFY" in text:
        return HubUnreachable(
            f"the certificate of {address} is not one that this machine trusts: "
            "use the whole join link, with the #fp=… at its end"
        )
    if any(isinstance(c, ssl.SSLError) for c in chain) or "SSL" in text:
        return NotAHub(f"{address} does not speak TLS: write http:// if the hub runs without it")
    if isinstance(error, httpx2.ProtocolError) and "disconnected" not in text:
        return NotAHub(f"what answers at {address} does not speak HTTP: check the port, and http:// or https://")
    return HubUnreachable(f"the connection to {address} broke: {str(error) or type(error).__name__}")


def check_address(address: str) -> str:
    """`http(s)://host[:port]` without a slash at the end. Plain http leaves this machine only if the user insists."""
    address = address.strip().rstrip("/")
    url = urlsplit(address)
    try:
        host, _ = url.hostname, url.port
    except ValueError:
        host = None
    if url.scheme not in ("http", "https") or not host or url.path or url.query or url.fragment:
        raise BadInput(f"`{address}` is not a hub's address: it looks like https://HOST:PORT")
    if url.scheme == "http" and not is_loopback(host) and os.environ.get("POTLUCK_INSECURE") != "1":
        raise NotAllowed(
            f"{address} is plain http to another machine, so anybody on the way could read the credential: "
            "start the hub with TLS (`potluck host --tls`) and use its https link, "
            "or set POTLUCK_INSECURE=1 if you trust this network"
        )
    return address


class Link(NamedTuple):
    """A join link, taken apart."""

    address: str
    code: str
    fingerprint: str  # of a self-signed certificate, else ""


def parse_link(link: str) -> Link:
    """`http(s)://HOST:PORT/j/CODE#fp=…` in its parts."""
    url = urlsplit(link.strip().strip("\"'<>"))
    code = url.path.removeprefix("/j/").rstrip("/")
    if (
        url.scheme not in ("http", "https")
        or not url.netloc
        or not url.path.startswith("/j/")
        or not code
        or "/" in code
    ):
        raise BadInput(
            "this is not a join link: it looks like https://HOST:PORT/j/CODE. "
            "Copy all of it, as `potluck invite` printed it"
        )
    fingerprint = url.fragment.removeprefix("fp=").lower() if url.fragment.startswith("fp=") else ""
    if fingerprint and (len(fingerprint) != 64 or fingerprint.strip("0123456789abcdef")):
        raise BadInput("the link's fingerprint (#fp=…) is not whole: copy the link again, to its very end")
    return Link(check_address(f"{url.scheme}://{url.netloc}"), code, fingerprint)


def pinned_context(host: str, port: int, fingerprint: str, *, timeout_s: float) -> ssl.SSLContext:
    """TLS with exactly the certificate whose SHA-256 is `fingerprint`, whoever signed it and whatever name it has."""
    import socket
    import ssl

    look = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    look.check_hostname, look.verify_mode = False, ssl.CERT_NONE
    address = f"https://{host}:{port}"
    try:
        with (
            socket.create_connection((host, port), timeout_s) as plain,
            look.wrap_socket(plain, server_hostname=host) as line,
        ):
            certificate = line.getpeercert(binary_form=True) or b""
    except OSError as error:
        raise explain(error, address, timeout_s) from error
    found = hashlib.sha256(certificate).hexdigest()
    if found != fingerprint:
        raise NotAHub(
            f"{address} shows another certificate ({found[:16]}…) than the one in the join link ({fingerprint[:16]}…): "
            "the hub was set up anew, or somebody is in between. Ask its owner for a new link"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # this very certificate is enough, signed by whomever
    context.load_verify_locations(cadata=certificate)
    return context


class Patience:
    """How long to go on trying: waits a little longer after every failure, starts again with every byte of progress."""

    def __init__(self, patience_s: float, give_up: Callable[[], bool]) -> None:
        self._patience_s = patience_s
        self._give_up = give_up
        self._best = -1
        self._tries = 0
        self._deadline = time.monotonic() + patience_s

    def progressed(self, offset: int) -> None:
        if offset > self._best:
            self._best, self._tries = offset, 0
            self._deadline = time.monotonic() + self._patience_s

    def or_raise(self, error: PotluckError) -> None:
        """Wait before the next try, or raise `error` if there is none."""
        if isinstance(error, Conflict | NotFound) and self._tries >= 3:
            raise error
        wait_s = random.uniform(0.05, min(10.0, 0.5 * 2**self._tries))
        self._tries += 1
        until = time.monotonic() + wait_s
        while True:
            now = time.monotonic()
            if self._give_up() or now > self._deadline:
                raise error
            if now >= until:
                return
            time.sleep(min(0.1, until - now))
