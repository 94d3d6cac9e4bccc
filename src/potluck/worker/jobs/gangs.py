"""What does a member of a gang need on its machine beside what every job gets?

    orders ──► Member.order      where the gang meets, or that it shall meet here (then: meetings.py)
    Member ──► where             a file of the job's, with the newest address: the library looks there when it is lost
    attempt ──► Member.wait      the command begins when the address is known
    job ──► pulse                a file of the job's, in which the library says what it does
    attempt ──► Member.trouble   one that computes for longer than it may hangs, and is to be killed

Both files lie in a folder of the job's, which can do with it what it likes: so the folder is opened before the job
begins, nothing is ever read or written but below that handle, and what is written has a new name first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from potluck.domain.job import GangSpec
from potluck.protocol import JobLease, Meeting, MeetOrder
from potluck.worker import addresses
from potluck.worker.jobs.meetings import MeetingPlace
from potluck.worker.jobs.outputs import OPEN

WHERE, PULSE = "where.json", "pulse.json"
LOOK_S = 0.1
"""Between two looks at the pulse."""
SUM_TIMES = 3.0
"""All members wait in a sum while one hangs, and give it up after their patience. Who does not, long after, hangs too."""
_MOST_PULSE = 4096


class Member:
    """One gang member that is on this machine. All methods may be called from any thread."""

    def __init__(
        self,
        lease: JobLease,
        *,
        root: Path,
        scratch: Path,
        until: Callable[[], float | None] = lambda: None,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        assert lease.gang is not None
        self.membership = lease.gang
        self._lease = lease
        self._gang = lease.spec.gang or GangSpec()
        self._meeting_folder = root / "meeting"
        self._folder = scratch / "gang"
        self._until = until
        self._on_news = on_news
        self._changed = threading.Condition()
        self._turn = 0
        self._address = ""
        self._place: MeetingPlace | None = None  # ours
        self._hosts = False
        self._failure = ""
        self._files: Files | None = None
        self._watch = Watch()
        self._closed = False

    # --- for the thread of orders

    def order(self, order: MeetOrder) -> bool:
        """The hub's word about the meeting place. Was it news?"""
        with self._changed:
            if self._closed or order.turn < self._turn:
                return False
            news = order.turn > self._turn or order.host != self._hosts
            self._turn = order.turn
            old, begin = None, False
            if order.host and not self._hosts:
                self._hosts, self._address, begin = True, "", True
            elif not order.host:
                if self._hosts:
                    self._hosts, old, self._place = False, self._place, None
                if news or order.address != self._address:
                    news = True
                    self._move(order.address)
        if old is not None:
            old.close()
        if begin:
            self._begin()
        return news

    def meeting(self) -> Meeting:
        """What the hub is told: what this member knows."""
        with self._changed:
            return Meeting(self._lease.id, self._turn, self._address, self._hosts)

    @property
    def is_opening(self) -> bool:
        """Shall the gang meet here, and where exactly is not known yet?"""
        with self._changed:
            return self._hosts and not self._address and not self._failure and not self._closed

    # --- for the attempt

    def prepare(self) -> None:
        """Make the job's folder. Called before the command, which makes it the job's own."""
        with self._changed:
            self._files = Files(self._folder)
            self._tell_where()

    def wait(self, timeout_s: float) -> bool:
        """Is it known where the gang meets? Waits for it, at most so long."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._address or self._failure), timeout_s)

    def trouble(self, now: float) -> tuple[str, str] | None:
        """Why the member cannot go on, as a code and a sentence; None: it can. `now` as box.clock() has it."""
        with self._changed:
            if self._failure:
                return "gang", f"the gang's meeting place cannot be opened on this machine: {self._failure}"
            files = self._files
        reason = self._watch.look(files.read(PULSE), now) if files is not None else ""
        return ("hung", reason) if reason else None

    def variables(self) -> dict[str, str]:
        """What the member's command finds in its environment, by what is known now."""
        with self._changed:
            address = self._address
        if self._gang.compat:
            return compat(self._lease, address)
        where = {name: str(self._folder / file) for name, file in (("where", WHERE), ("pulse", PULSE))}
        return {"POTLUCK_GANG": json.dumps({**place(self._lease), **told(address), **where})}

    def close(self) -> None:
        """The attempt is over: the gang cannot meet here any more."""
        with self._changed:
            self._closed = True
            place, self._place = self._place, None
            files, self._files = self._files, None
            self._changed.notify_all()
        if place is not None:
            place.close(wait_s=5.0)
        if files is not None:
            files.close()

    # --- underneath

    def _begin(self) -> None:
        """Open the meeting place here."""
        if self._gang.compat:  # the first member's own process opens it: it only has to know its port
            try:
                port = addresses.free_port(self.membership.address)
            except OSError as error:
                self._failed(f"{self.membership.address}: {error.strerror or error}")
            else:
                self._opened(f"{self.membership.address}:{port}")
            return
        place = MeetingPlace(
            self.membership.engine,
            self.membership.address,
            name=f"{self._meeting_folder.parent.name[:40]}-{secrets.token_hex(3)}",
            least=self._gang.least,
            folder=self._meeting_folder,
            until=self._until,
            on_address=self._opened,
            on_failure=self._failed,
        )
        with self._changed:
            if self._hosts and not self._closed:
                self._place = place
                return
        place.close()

    def _opened(self, address: str) -> None:
        with self._changed:
            if self._hosts and not self._closed:
                self._move(address)
        self._on_news()

    def _failed(self, reason: str) -> None:
        with self._changed:
            if self._hosts and not self._closed:
                self._failure = reason
            self._changed.notify_all()
        self._on_news()

    def _move(self, address: str) -> None:
        self._address = address
        self._tell_where()
        self._changed.notify_all()

    def _tell_where(self) -> None:
        """Nothing is told before the new place is known: until then the old one may still be there."""
        if self._files is not None and self._address and not self._gang.compat:
            self._files.write(WHERE, json.dumps(told(self._address)))


def told(address: str) -> dict[str, str]:
    """An address as the library wants to be told of it: torchft's is a URL."""
    return {"lighthouse" if address.startswith("http") else "store": address}


def place(lease: JobLease) -> dict[str, Any]:
    """The part of POTLUCK_GANG (train/gang/place.py) that stays as it is while the member lives."""
    membership, gang = lease.gang, lease.spec.gang or GangSpec()
    assert membership is not None
    return {
        "member": membership.name,  # workers have names of their own, and a machine has one member of a gang
        "gang": membership.gang_name,
        "address": membership.address,
        "least": gang.least,
        "most": gang.most,
        "batch": gang.batch,
        "policy": gang.policy,
        "seed": int.from_bytes(hashlib.sha256(membership.gang.encode()).digest()[:4], "big") >> 1,
        "engine": membership.engine,
    }


def compat(lease: JobLease, address: str) -> dict[str, str]:
    """What torchrun would tell the one process of a machine."""
    membership, gang = lease.gang, lease.spec.gang or GangSpec()
    assert membership is not None
    host, _, port = address.rpartition(":")
    interface = addresses.interface_of(membership.address)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ()
    return {
        "RANK": str(membership.member - 1),
        "WORLD_SIZE": str(gang.most),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(membership.member - 1),
        "MASTER_ADDR": host.strip("[]"),
        "MASTER_PORT": port,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else who joins again waits for a key that nobody writes
        **dict.fromkeys(names, interface),  # else they meet at what the machine's own name leads to: itself
    }


def alone(gang: GangSpec) -> dict[str, str]:
    """For a member without a hub: the same script, as a gang of one."""
    if gang.compat:
        return {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": "0",
            "MASTER_ADDR": addresses.LOOPBACK,
            "MASTER_PORT": str(addresses.free_port(addresses.LOOPBACK)),
        }
    return {"POTLUCK_GANG": json.dumps({"batch": gang.batch, "policy": gang.policy})}


# --- the pulse


class Watch:
    """Does a member hang, by what it writes?"""

    def __init__(self) -> None:
        self._seen: _Beat | None = None
        self._age_s = 0.0
        self._looked_at = 0.0

    def look(self, text: bytes, now: float) -> str:
        """The newest pulse; why its member is to be ended, or an empty string.

        Its own clock is not asked, which may be set. And between two looks no more time passes than usual: whoever did
        not look for an hour, because the machine slept, has not seen the member hang for an hour.
        """
        passed, self._looked_at = min(now - self._looked_at, 4 * LOOK_S), now
        beat = _beat(text)
        if beat is None:
            return ""
        if beat != self._seen:
            self._seen, self._age_s = beat, 0.0
            return ""
        self._age_s += max(0.0, passed)
        most_s = beat.patience_s
        match beat.phase:
            case "compute" if self._age_s > most_s:
                return f"hung: it computes step {beat.step} for longer than {most_s:.3g} s, and the others wait for it"
            case "load" if self._age_s > most_s:
                return f"hung: it waits for the data of step {beat.step} for longer than {most_s:.3g} s"
            case "sum" if self._age_s > SUM_TIMES * most_s:
                return (
                    f"hung: it is in the sum of step {beat.step} for {self._age_s:.3g} s; the others gave up long ago"
                )
        return ""


class _Beat(NamedTuple):
    phase: str
    step: int
    since: float
    patience_s: float
    pid: int


def _beat(text: bytes) -> _Beat | None:
    """What is in the file, if it is a beat: the job can write into it what it likes."""
    try:
        said = json.loads(text)
        patience_s = float(said["patience_s"])
        beat = _Beat(str(said["phase"]), int(said["step"]), float(said["since"]), patience_s, int(said["pid"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return beat if math.isfinite(patience_s) and patience_s > 0 else None


# --- files that two sides use


class Files:
    """A folder that is the job's, and that we opened before the job could put something else in its place."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        by_handle = os.rename in os.supports_dir_fd and os.open in os.supports_dir_fd
        self._at = os.open(folder, OPEN | os.O_DIRECTORY) if by_handle else None  # not on Windows
        self._lock = threading.Lock()
        self._closed = False

    def write(self, name: str, text: str) -> None:
        """Put it there in one piece, for the job to read. A full disk or a folder that is gone: then it is not there."""
        part = f".{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        with self._lock, contextlib.suppress(OSError):
            if self._closed:
                return
            file = os.open(self._path(part), flags, 0o644, dir_fd=self._at)
            try:
                if hasattr(os, "fchmod"):
                    os.fchmod(file, 0o644)  # whatever the umask is: the job may be another user
                os.write(file, text.encode())
            finally:
                os.close(file)
            os.replace(self._path(part), self._path(name), src_dir_fd=self._at, dst_dir_fd=self._at)

    def read(self, name: str) -> bytes:
        """What is there, if it is a plain file."""
        with self._lock, contextlib.suppress(OSError):
            if self._closed:
                return b""
            file = os.open(self._path(name), OPEN, dir_fd=self._at)
            try:
                return os.read(file, _MOST_PULSE) if stat.S_ISREG(os.fstat(file).st_mode) else b""
            finally:
                os.close(file)
        return b""

    def close(self) -> None:
        with self._lock:
            if not self._closed and self._at is not None:
                os.close(self._at)
            self._closed = True

    def _path(self, name: str) -> str:
        return name if self._at is not None else str(self._folder / name)
