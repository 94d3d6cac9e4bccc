"""How does a machine become a worker of a hub, and how is it known again tomorrow?

The machine makes its own secret; the hub learns only its hash. The credential lies in <home>/credential.json, readable
by its owner alone. A folder belongs to one agent at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from potluck.client import Hub, parse_link
from potluck.errors import BadInput, Conflict, NotAllowed
from potluck.protocol import Hardware, JoinRequest
from potluck.settings import hash_token, make_token, write_private
from potluck.worker.hardware import choose_device, detect


@dataclass(frozen=True)
class Credential:
    """What <home>/credential.json holds."""

    hub: str  # the address
    token: str
    fingerprint: str
    worker_id: str
    name: str
    hub_name: str = ""


def join(
    link: str,
    home: Path,
    *,
    name: str = "",
    device: str = "auto",
    share: float = 1.0,
    hardware: Hardware | None = None,
    timeout_s: float = 30.0,
) -> Credential:
    """Join with a link, or come back as the worker that this machine already is at that hub.

    The same link again uses nothing up. A hub that forgot or revoked this machine is joined anew.
    """
    address, code, fingerprint = parse_link(link)
    hardware = hardware or detect()
    chosen = choose_device(device, hardware)
    known = load(home)
    if known and known.hub == address and known.fingerprint == fingerprint:
        try:
            with Hub(address, known.token, fingerprint, timeout_s=timeout_s) as hub:
                hub.info()
            return known
        except NotAllowed:
            pass
    token = make_token("worker")
    request = JoinRequest(
        code=code,
        name=name or hardware.hostname or "worker",
        token_sha256=hash_token(token),
        hardware=hardware,
        device=chosen,
        share=share,
    )
    with Hub(address, "", fingerprint, timeout_s=timeout_s) as hub:
        answer = hub.join(request)
    if answer.role != "worker":
        raise BadInput(
            f"this link is for a {answer.role}, not for a worker: ask for one made with `potluck invite --role worker`"
        )
    credential = Credential(address, token, fingerprint, answer.id, answer.name, answer.hub)
    save(home, credential)
    return credential


def save(home: Path, credential: Credential) -> None:
    write_private(home / "credential.json", msgspec.json.encode(credential).decode() + "\n")


def load(home: Path) -> Credential | None:
    """The credential that this folder holds, if there is one."""
    path = home / "credential.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Credential)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise BadInput(f"{path} cannot be read ({error}): delete it and join again") from None


@contextmanager
def only_agent(home: Path) -> Iterator[None]:
    """Hold `home` for this process. `Conflict` if another agent has it; the lock ends with the process."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("a+b") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read(20).decode(errors="replace").strip() or "another process"
            raise Conflict(
                f"another agent (process {holder}) works in {home}: two cannot share one folder. "
                "Stop it first, or give this one its own --name"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield
