"""Where does the cluster of a data folder live, and what must the next hub remember to find it?

    data_dir/  lock  place.json  password (0600)
    home/      postgresql.conf  startup.log            written by the hub's user only
               pgdata/  log/  socket/                  0700, the server's user

`home` is `data_dir` itself, or, when root's folder is closed to the user that the server runs as, a folder of
its own under /var/lib/potluck. The socket goes to the temporary folder if its path would be too long.
`place.json` remembers both.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from potluck.errors import LedgerError
from potluck.hub.postgres.machine import WINDOWS, ServerUser, is_private, shared_folder

PORT = 5432
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107


class Place(msgspec.Struct):
    """Where the cluster of a data folder is. `home` is "." for the data folder itself, else absolute."""

    home: str = "."
    socket: str = ""
    port: int = PORT
    made: bool = False

    def folder(self, data_dir: Path) -> Path:
        return data_dir / self.home

    def pgdata(self, data_dir: Path) -> Path:
        return data_dir / self.home / "pgdata"

    def is_there(self, data_dir: Path) -> bool:
        return (self.pgdata(data_dir) / "PG_VERSION").exists()

    def owner(self, data_dir: Path) -> int | None:
        pgdata = self.pgdata(data_dir)
        return pgdata.stat().st_uid if pgdata.exists() and not WINDOWS else None


def read_place(data_dir: Path) -> Place | None:
    try:
        return msgspec.json.decode((data_dir / "place.json").read_bytes(), type=Place)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise LedgerError(
            f"{data_dir / 'place.json'} cannot be read ({error}). It says where the ledger is; for the "
            "usual place "
            'write {"home": ".", "made": true} into it.'
        ) from None


def write_place(data_dir: Path, place: Place) -> None:
    path, new = data_dir / "place.json", msgspec.json.encode(place)
    if not path.exists() or path.read_bytes() != new:
        partial = path.with_suffix(".new")
        partial.write_bytes(new)
        partial.replace(path)


def read_password(data_dir: Path, *, must_exist: bool) -> str:
    path = data_dir / "password"
    if path.exists():
        return path.read_text().strip()
    if must_exist:
        raise LedgerError(f"The ledger's password, {path}, is missing. Restore it from a backup of {data_dir}.")
    write_private(path, password := secrets.token_urlsafe(32))
    return password


def choose_home(data_dir: Path, user: ServerUser, shared: Sequence[Path]) -> str:
    if user.can_enter(data_dir):
        return "."
    name = hashlib.sha256(str(data_dir).encode()).hexdigest()[:12] + "-" + secrets.token_hex(2)
    for root in filter(shared_folder, shared):
        home = root / "clusters" / name
        if shared_folder(home.parent) and shared_folder(home) and user.can_enter(home):
            (home / "belongs-to").write_text(f"{data_dir}\n")
            return str(home)
    raise LedgerError(
        f"The user {user.name}, who runs the ledger's server for root, cannot enter {data_dir}, nor "
        f"{' nor '.join(map(str, shared))}. Choose a --data-dir that others may pass through (mode 0711), "
        "run Potluck as an ordinary user, or name a server with --database postgresql://…"
    )


def socket_folder(remembered: str, home: Path, user: ServerUser) -> Path:
    """A private folder whose name is short and plain enough for a socket; a temporary one if need be."""
    preferred = home / "socket"
    if fits_a_socket(preferred):
        user.make_folder(preferred)
        return preferred
    known = Path(remembered)
    if remembered and known.exists() and is_private(known, user.uid):
        return known
    for root in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        made = Path(tempfile.mkdtemp(prefix="potluck-", dir=root))
        if fits_a_socket(made) and user.can_enter(made.parent):
            if user.other:
                os.chown(made, user.uid, user.gid)
            return made
        made.rmdir()
    raise LedgerError(
        f"The path {preferred} is too long for a Unix socket (at most {_LONGEST_SOCKET} bytes), and there "
        "is no temporary folder with a shorter one. Choose a shorter --data-dir, or set TMPDIR."
    )


def fits_a_socket(folder: Path) -> bool:
    """Short enough for the system, and free of characters with a meaning in a conninfo."""
    path = str(folder / f".s.PGSQL.{PORT}")
    return len(path) <= _LONGEST_SOCKET and re.fullmatch(r"[\w/.+-]+", path, re.ASCII) is not None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_plainly(path: Path, at_most: int = 65536) -> str:
    """The end of a text file; "" if there is none. Follows no link: who knows who put it there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return ""
    with open(descriptor, "rb") as file:
        file.seek(max(0, os.fstat(descriptor).st_size - at_most))
        return file.read(at_most).decode(errors="replace")


def write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
