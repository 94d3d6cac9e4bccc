"""How does one request reach the hub, and its answer come back as a record or as one of our errors?"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
import msgspec

from potluck.client.reach import Translated, check_address, pinned_context
from potluck.errors import NotAHub, by_code
from potluck.protocol import PROTOCOL, PROTOCOL_HEADER, Problem
from potluck.settings import is_loopback

T = TypeVar("T")
API = "/api/v1"


class Line:
    """A hub's address, a credential, and the connections that are open to it."""

    def __init__(self, address: str, token: str = "", fingerprint: str = "", timeout_s: float = 30.0) -> None:
        self.address = check_address(address)
        self.fingerprint = fingerprint.lower().replace(":", "")
        self.timeout_s = timeout_s
        self.bytes_up = 0  # bodies only
        self.bytes_down = 0
        self._token = token
        self._client: httpx2.Client | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # --- one request

    def _json(self, method: str, path: str, kind: type[T], **more: Any) -> T:
        return decode(self._send(method, path, **more), kind, self.address)

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        content: bytes | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
    ) -> httpx2.Response:
        sent = dict(headers or {})
        if body is not None:
            content = msgspec.json.encode(body)
            sent["Content-Type"] = "application/json"
        elif content is not None:
            sent["Content-Type"] = "application/octet-stream"
        with self._translated():
            answer = self._http().request(
                method,
                API + path,
                content=content,
                params=params,
                headers=self._headers(sent),
                timeout=httpx2.Timeout(self.timeout_s, read=self.timeout_s + wait_s),
            )
        self._count(up=len(content or b""), down=len(answer.content))
        self._check(answer)
        return answer

    def _headers(self, more: Mapping[str, str]) -> dict[str, str]:
        own = {PROTOCOL_HEADER: str(PROTOCOL), "Accept": "application/json", **more}
        if self._token:
            own["Authorization"] = f"Bearer {self._token}"
        return own

    def _http(self) -> httpx2.Client:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> httpx2.Client:
        url = urlsplit(self.address)
        verify: Any = True
        if url.scheme == "http":
            verify = False  # no TLS here: do not read the system's certificates for nothing
        elif self.fingerprint:
            verify = pinned_context(url.hostname or "", url.port or 443, self.fingerprint, timeout_s=self.timeout_s)
        return httpx2.Client(
            base_url=self.address,
            verify=verify,
            timeout=self.timeout_s,
            # A proxy is for the world outside, not for this machine nor for a hub that we know by its certificate.
            trust_env=not self.fingerprint and not is_loopback(url.hostname or ""),
            # Shorter than a server's own patience, so that we never write into a line that it is just closing.
            limits=httpx2.Limits(max_connections=32, max_keepalive_connections=8, keepalive_expiry=3.0),
        )

    def _count(self, *, up: int = 0, down: int = 0) -> None:
        with self._lock:
            self.bytes_up += up
            self.bytes_down += down

    def _translated(self) -> Translated:
        return Translated(self.address, self.timeout_s)

    def _check(self, answer: httpx2.Response) -> None:
        """Raise what the hub says went wrong, or `NotAHub` if this was not a hub speaking."""
        if PROTOCOL_HEADER not in answer.headers:
            raise NotAHub(
                f"what answers at {self.address} is not a Potluck hub (status {answer.status_code}, "
                f"{answer.headers.get('content-type', 'no type')}): check the address and the port"
            )
        if answer.status_code < 300:
            return
        try:
            problem = msgspec.json.decode(answer.content, type=Problem)
        except msgspec.MsgspecError:
            raise NotAHub(
                f"{self.address} answered with status {answer.status_code} and no explanation: "
                "something between here and the hub may be answering for it"
            ) from None
        raise by_code(problem.code)(problem.detail or problem.title)


def decode(answer: httpx2.Response, kind: type[T], address: str) -> T:
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except msgspec.MsgspecError as error:
        raise NotAHub(
            f"{address} answered something that this Potluck cannot read ({error}): "
            "it may be much newer or older than this machine's; compare with `potluck doctor`"
        ) from None


def path_part(text: str) -> str:
    """A path segment that stays one, whatever it holds."""
    return quote(text, safe="") or "-"
