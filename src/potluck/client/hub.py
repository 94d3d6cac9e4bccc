"""How does Python talk to a hub? Every route as one typed function; every failure as one of our errors."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
import msgspec

from potluck.blobs import BlobStore, disk_errors, hash_bytes, hash_file, sync_folder
from potluck.client.reach import Patience, Translated, check_address, pinned_context
from potluck.errors import (
    BadInput,
    Conflict,
    HubUnreachable,
    LedgerError,
    NotAHub,
    NotFound,
    TryLater,
    by_code,
)
from potluck.protocol import (
    PROTOCOL,
    PROTOCOL_HEADER,
    Blob,
    Contribution,
    Curve,
    Event,
    HeartbeatAnswer,
    HeartbeatRequest,
    HubInfo,
    InviteAnswer,
    InviteRequest,
    JoinAnswer,
    JoinRequest,
    Json,
    Lease,
    LeaseRequest,
    Problem,
    Report,
    ReportAnswer,
    RunRequest,
    RunView,
    Taste,
    UploadAnswer,
    UploadRequest,
    Version,
    Why,
    WorkerView,
)
from potluck.settings import is_loopback

T = TypeVar("T")

PIECE_BYTES = 4 << 20
"""Uploads go in pieces of this size; the hub takes at most 8 MiB at once."""
PATIENCE_S = 120.0
"""An upload or download gives up after so many seconds without any progress."""
_API = "/api/v1"


class Hub:
    """One hub, seen by one credential."""

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

    # --- people and machines

    def join(self, request: JoinRequest) -> JoinAnswer:
        return self._json("POST", "/join", JoinAnswer, body=request)

    def info(self) -> HubInfo:
        return self._json("GET", "/hub", HubInfo)

    def invite(self, request: InviteRequest) -> InviteAnswer:
        return self._json("POST", "/invites", InviteAnswer, body=request)

    def invites(self) -> list[dict[str, Json]]:
        return self._json("GET", "/invites", list[dict[str, Json]])

    def revoke_invite(self, id_: str) -> None:
        self._send("DELETE", f"/invites/{_part(id_)}")

    def workers(self) -> list[WorkerView]:
        return self._json("GET", "/workers", list[WorkerView])

    def revoke_worker(self, id_: str) -> None:
        self._send("DELETE", f"/workers/{_part(id_)}")

    # --- work

    def heartbeat(self, request: HeartbeatRequest) -> HeartbeatAnswer:
        return self._json("POST", "/heartbeat", HeartbeatAnswer, body=request)

    def lease(self, request: LeaseRequest, wait_s: float = 0.0) -> Lease | None:
        """The next task, or None if there was none for `wait_s` seconds."""
        answer = self._send("POST", "/leases", params={"wait": f"{wait_s:g}"}, body=request, wait_s=wait_s)
        return None if answer.status_code == 204 else _decode(answer, Lease, self.address)

    def report(self, lease_id: str, report: Report) -> ReportAnswer:
        """Hand in an outcome. Sent twice, it is answered the same; `accepted` False says why not."""
        return self._json("POST", f"/leases/{_part(lease_id)}/report", ReportAnswer, body=report)

    def leave(self) -> None:
        self._send("POST", "/leave")

    def versions(self, run_id: str, after: int = -1, wait_s: float = 0.0) -> list[Version]:
        """The way from version `after` to the newest; waits up to `wait_s` if there is no newer one yet."""
        params = {"after": str(after), "wait": f"{wait_s:g}"}
        return self._json("GET", f"/runs/{_part(run_id)}/versions", list[Version], params=params, wait_s=wait_s)

    # --- runs

    def create_run(self, request: RunRequest, key: str = "") -> RunView:
        """Start a run. The same `key` again gives the same run, so a lost answer starts nothing twice."""
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self._json("POST", "/runs", RunView, body=request, headers=headers)

    def runs(self) -> list[RunView]:
        return self._json("GET", "/runs", list[RunView])

    def run(self, id_: str) -> RunView:
        return self._json("GET", f"/runs/{_part(id_)}", RunView)

    def set(self, id_: str, settings: Mapping[str, Json]) -> RunView:
        return self._json("PATCH", f"/runs/{_part(id_)}/settings", RunView, body=dict(settings))

    def pause(self, id_: str) -> RunView:
        return self._json("POST", f"/runs/{_part(id_)}/pause", RunView)

    def resume(self, id_: str) -> RunView:
        return self._json("POST", f"/runs/{_part(id_)}/resume", RunView)

    def stop(self, id_: str) -> RunView:
        return self._json("POST", f"/runs/{_part(id_)}/stop", RunView)

    def contributions(self, id_: str) -> list[Contribution]:
        return self._json("GET", f"/runs/{_part(id_)}/contributions", list[Contribution])

    def tastes(self, id_: str) -> list[Taste]:
        return self._json("GET", f"/runs/{_part(id_)}/tastes", list[Taste])

    def curve(self, id_: str) -> list[Curve]:
        return self._json("GET", f"/runs/{_part(id_)}/curve", list[Curve])

    def events(self, after: int = 0, run_id: str = "") -> list[Event]:
        path = f"/runs/{_part(run_id)}/events" if run_id else "/events"
        return self._json("GET", path, list[Event], params={"after": str(after)})

    def why(self, id_: str) -> Why:
        return self._json("GET", f"/why/{_part(id_)}", Why)

    # --- blobs

    def upload(
        self, source: Path | bytes, *, patience_s: float = PATIENCE_S, give_up: Callable[[], bool] = bool
    ) -> Blob:
        """Give the hub a file or bytes. Skips what it has, goes on where a broken line stopped.

        Raises the last error after `patience_s` without progress, or as soon as `give_up()` is true.
        """
        blob = hash_bytes(source) if isinstance(source, bytes) else hash_file(source)
        patience = Patience(patience_s, give_up)
        answer: UploadAnswer | None = None
        while True:
            try:
                if answer is None:
                    answer = self._json("POST", "/uploads", UploadAnswer, body=UploadRequest(blob))
                    patience.progressed(answer.offset)
                while not answer.done:
                    piece = _piece(source, answer.offset)
                    if not piece and blob.size_bytes:
                        raise NotAHub(
                            f"{self.address} has all {blob.size_bytes} bytes of an upload and does not finish it"
                        )
                    answer = self._json(
                        "PATCH",
                        f"/uploads/{_part(answer.upload_id)}",
                        UploadAnswer,
                        params={"offset": str(answer.offset)},
                        content=piece,
                    )
                    patience.progressed(answer.offset)
                return blob
            except (HubUnreachable, LedgerError, TryLater, Conflict, NotFound) as error:
                # Conflict: the hub has another offset. NotFound: it forgot the upload. Both: ask where to go on.
                patience.or_raise(error)
                answer = None

    def fetch(
        self,
        blob: Blob,
        store: BlobStore,
        *,
        patience_s: float = PATIENCE_S,
        give_up: Callable[[], bool] = bool,
    ) -> Path:
        """The blob's path in `store`, downloaded into it unless it is there. The bytes have the hash, or it raises."""
        if store.has(blob.hash):
            return store.touch(blob.hash)
        with store.alone(blob.hash):
            if store.has(blob.hash):  # another thread was at it
                return store.touch(blob.hash)
            self._pull(blob, store.part(blob.hash), Patience(patience_s, give_up))
            try:
                return store.commit(blob.hash)
            except BadInput:  # damaged, perhaps by an older part: once more from the start
                self._pull(blob, store.part(blob.hash), Patience(patience_s, give_up))
                return store.commit(blob.hash)

    def download(self, blob: Blob, to: Path, *, patience_s: float = PATIENCE_S) -> Path:
        """Write the blob to the file `to` in one step, verified. Goes on with `<to>.part` from an earlier try."""
        part = to.with_name(to.name + ".part")
        self._pull(blob, part, Patience(patience_s, bool))
        found = hash_file(part)
        if found.hash != blob.hash:
            part.unlink()
            raise BadInput(f"{to.name}: the bytes received do not have the hash {blob.hash[:12]}…: try again")
        with disk_errors(to):
            part.replace(to)
            sync_folder(to.parent)
        return to

    def _pull(self, blob: Blob, part: Path, patience: Patience) -> None:
        """Bring `part` to the blob's full length."""
        with disk_errors(part):
            part.parent.mkdir(parents=True, exist_ok=True)
        while True:
            offset = part.stat().st_size if part.exists() else 0
            if offset > blob.size_bytes:
                part.unlink()
                offset = 0
            if part.exists() and offset == blob.size_bytes:
                return
            patience.progressed(offset)
            try:
                self._pull_once(blob, part, offset)
            except (HubUnreachable, LedgerError, TryLater) as error:
                patience.or_raise(error)

    def _pull_once(self, blob: Blob, part: Path, offset: int) -> None:
        headers = self._headers({"Range": f"bytes={offset}-"} if offset else {})
        with (
            self._translated(),
            self._http().stream("GET", f"{_API}/blobs/{_part(blob.hash)}", headers=headers) as answer,
        ):
            if answer.status_code not in (200, 206):
                answer.read()
            self._check(answer)
            resumed = answer.status_code == 206
            with disk_errors(part), part.open("ab" if resumed else "wb") as file:
                size = offset if resumed else 0
                for chunk in answer.iter_bytes(1 << 18):
                    size += len(chunk)
                    self._count(down=len(chunk))
                    if size > blob.size_bytes:
                        raise NotAHub(
                            f"{self.address} sends more than the {blob.size_bytes} bytes of {blob.hash[:12]}…"
                        )
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        if size < blob.size_bytes:
            raise HubUnreachable(f"{self.address} stopped after {size} of {blob.size_bytes} bytes")

    # --- underneath

    def _json(self, method: str, path: str, kind: type[T], **more: Any) -> T:
        return _decode(self._send(method, path, **more), kind, self.address)

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
                _API + path,
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


def _decode(answer: httpx2.Response, kind: type[T], address: str) -> T:
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except msgspec.MsgspecError as error:
        raise NotAHub(
            f"{address} answered something that this Potluck cannot read ({error}): "
            "it may be much newer or older than this machine's; compare with `potluck doctor`"
        ) from None


def _piece(source: Path | bytes, offset: int) -> bytes:
    if isinstance(source, bytes):
        return source[offset : offset + PIECE_BYTES]
    with source.open("rb") as file:
        file.seek(offset)
        return file.read(PIECE_BYTES)


def _part(text: str) -> str:
    """A path segment that stays one, whatever it holds."""
    return quote(text, safe="") or "-"
