"""How is the embedded server made, started, found again and stopped?

It is a session of its own: it outlives kill -9 of the hub and a Ctrl-C in its terminal. The next `start`
finds it by asking at the socket, not by a remembered process id. Whether a cluster is alive is told by the
processes that work in `pgdata`; so neither a zombie nor a stranger with the old process id blocks a start.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import psutil
import psycopg
from psycopg.conninfo import make_conninfo

from potluck.errors import LedgerError
from potluck.hub.postgres.machine import (
    SHARED_ROOTS,
    WINDOWS,
    Binaries,
    find_binaries,
    programs_for,
    server_user,
)
from potluck.hub.postgres.place import (
    PORT,
    Place,
    choose_home,
    free_port,
    read_password,
    read_place,
    read_plainly,
    socket_folder,
    write_place,
    write_private,
)

if sys.platform != "win32":
    import fcntl

ROLE = DATABASE = "potluck"
PATIENCE_S = 120.0
_LAUNCHES = 20
_KNOCK_S = 3

SETTINGS = {
    "listen_addresses": "127.0.0.1" if WINDOWS else "",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "fsync": "on",
    "checkpoint_timeout": "15min",
    "random_page_cost": "1.1",
    "jit": "off",  # every statement is short
    "max_parallel_workers_per_gather": "0",  # the cores belong to training, and /dev/shm may be small
    "idle_in_transaction_session_timeout": "60s",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",  # we read its messages
    "logging_collector": "on",
    "log_filename": "postgresql-%a.log",  # seven files; each is emptied when its weekday comes again
    "log_rotation_age": "1d",
    "log_rotation_size": "0",
    "log_truncate_on_rotation": "on",
    "log_checkpoints": "off",
    "log_autovacuum_min_duration": "-1",
    "unix_socket_permissions": "0700",
}


class EmbeddedPostgres:
    """The life of one server. Every method may be called by any process, at any time, in any order."""

    def __init__(
        self,
        data_dir: Path,
        *,
        bin_dir: Path | None = None,
        shared_roots: Sequence[Path] = SHARED_ROOTS,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.data_dir = Path(data_dir).expanduser().absolute()
        self.reused = False  # the last start found the server running
        self._bin_dir, self._shared, self._patience_s = bin_dir, shared_roots, patience_s
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> str:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> str:
        """The server's conninfo, once it answers. A server that already runs for this folder is used as is."""
        with self._alone():
            self._settle()
            self._password = read_password(self.data_dir, must_exist=self._place.made)
            if not self._place.made:
                self._make_cluster()
            self._until_it_answers()
        return self._conninfo(DATABASE)

    def stop(self) -> None:
        """Stop the server, whoever started it: connections are cut, committed work is kept."""
        if not self.data_dir.is_dir():
            return
        with self._alone():
            place = read_place(self.data_dir)
            if place is not None and place.is_there(self.data_dir):
                self._settle()
                self._halt()

    # Settling: which programs, which user, which folders

    def _settle(self) -> None:
        place = read_place(self.data_dir)
        if place and place.made and not place.is_there(self.data_dir):
            raise LedgerError(
                f"The ledger of {self.data_dir} was kept in {place.pgdata(self.data_dir)}, and it is not "
                f"there any more. Put it back (from a backup), or delete {self.data_dir / 'place.json'} to "
                "begin an empty one."
            )
        binaries = find_binaries(self._bin_dir)
        _refuse_other_major((place or Place()).pgdata(self.data_dir), binaries)
        self._user = server_user((place or Place()).owner(self.data_dir))
        self._programs = programs_for(self._user, binaries, self._shared)
        self._place = place or Place(choose_home(self.data_dir, self._user, self._shared))
        self._place.made = self._place.is_there(self.data_dir)
        self._home, self._pgdata = self._place.folder(self.data_dir), self._place.pgdata(self.data_dir)
        if WINDOWS:
            self._place.port = self._place.port if self._place.made else free_port()
        else:
            self._place.socket = str(socket_folder(self._place.socket, self._home, self._user))
        write_place(self.data_dir, self._place)
        self._user.make_folder(self._home / "log")

    # Making the cluster

    def _make_cluster(self) -> None:
        """initdb beside the final name, then rename: a cluster is there completely or not at all."""
        fresh, secret = self._home / "pgdata.new", self._home / "initdb.secret"
        shutil.rmtree(fresh, ignore_errors=True)
        secret.unlink(missing_ok=True)
        self._user.make_folder(fresh)
        write_private(secret, self._password)
        if self._user.other:
            os.chown(secret, self._user.uid, self._user.gid)
        command: list[str | Path] = [self._programs / "initdb", "-D", fresh]
        command += [f"--username={ROLE}", f"--pwfile={secret}"]
        command += ["--auth-local=scram-sha-256", "--auth-host=scram-sha-256", "--encoding=UTF8"]
        command += ["--data-checksums", "--no-instructions"]
        try:
            done = self._user.run(*command, "--locale=C.UTF-8")
            if done.returncode != 0 and "invalid locale" in done.stdout:
                done = self._user.run(*command, "--locale=C")
        finally:
            secret.unlink(missing_ok=True)
        if done.returncode != 0:
            shutil.rmtree(fresh, ignore_errors=True)
            raise LedgerError(_failure("The ledger's files could not be made", done.stdout, self._home))
        fresh.rename(self._pgdata)
        self._place.made = True
        write_place(self.data_dir, self._place)

    # Running it

    def _until_it_answers(self) -> None:
        self._reap()
        give_up = time.monotonic() + self._patience_s
        launches, pause = 0, 0.02
        while (obstacle := self._knock()) is not None:
            alive = self._processes()
            if not alive:
                if launches and not self._may_try_again(launches):
                    raise LedgerError(_failure("The ledger's server did not start", self._log_tail(), self._home))
                self._forget_the_dead()
                self._launch()
                launches += 1
            elif self._is_cut_off():
                self._halt()
                continue
            if time.monotonic() > give_up:
                raise LedgerError(
                    f"The ledger's server (process {', '.join(map(str, alive)) or 'none'}) did not answer "
                    f"within {self._patience_s:.0f} s: {obstacle}. If it is recovering after a crash, it "
                    f"goes on by itself: start again to wait longer. Its log is in {self._home / 'log'} and "
                    f"ends with:\n{self._log_tail()}"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        self.reused = launches == 0

    def _knock(self) -> str | None:
        """None if the server answers and is ours; else what stands in the way for now."""
        try:
            with psycopg.connect(self._conninfo(DATABASE), connect_timeout=_KNOCK_S) as connection:
                row = connection.execute("show data_directory").fetchone()
        except psycopg.OperationalError as error:
            obstacle = " ".join(str(error).split())
        else:
            if row is not None and Path(row[0]).resolve() == self._pgdata.resolve():
                return None
            raise LedgerError(
                f"Another ledger ({row[0] if row else 'unknown'}) answers at {self._place.socket}: "
                f"{self.data_dir} looks like a copy. Stop the other hub, or delete the line `socket` in "
                f"{self.data_dir}/place.json."
            )
        if "password authentication failed" in obstacle:
            raise LedgerError(
                f"The ledger's server does not accept the password in {self.data_dir / 'password'}. "
                f"Restore that file from a backup of {self.data_dir}."
            )
        if f'database "{DATABASE}" does not exist' in obstacle:
            with suppress(psycopg.OperationalError):  # then the next knock tells
                self._make_database()
        return obstacle

    def _make_database(self) -> None:
        with psycopg.connect(self._conninfo("postgres"), connect_timeout=_KNOCK_S, autocommit=True) as connection:
            connection.execute(f"create database {DATABASE}")

    def _launch(self) -> None:
        config = self._home / "postgresql.conf"
        config.write_text(_config(self._pgdata, self._settings()))
        config.chmod(0o644)  # the server's user reads it; there is no secret in it
        log = self._home / "startup.log"
        if WINDOWS:  # pg_ctl gives up an administrator's rights, which postgres insists on
            command = (self._programs / "pg_ctl", "start", "-W", "-D", self._pgdata, "-l", log)
            self._user.run(*command, "-o", f'--config-file="{config}"')
            return
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                [str(self._programs / "postgres"), "-D", str(self._pgdata), f"--config-file={config}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **self._user.as_user(),
            )

    def _settings(self) -> dict[str, str]:
        built = self._user.run(self._programs / "pg_config", "--configure").stdout
        return SETTINGS | {
            "port": str(self._place.port),
            "unix_socket_directories": self._place.socket,
            "log_directory": str(self._home / "log"),
            "wal_compression": "lz4" if "with-lz4" in built else "off",  # pglz costs more than it saves
        }

    def _halt(self) -> None:
        self._reap()
        if self._processes():
            command = (self._programs / "pg_ctl", "stop", "-D", self._pgdata, "-m", "fast", "-w")
            done = self._user.run(*command, "-t", str(int(self._patience_s)), timeout=self._patience_s + 30)
            if self._child is not None:
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(5)
            if done.returncode != 0 and (left := self._processes()):
                raise LedgerError(
                    f"The ledger's server (process {', '.join(map(str, left))}) did not stop: "
                    f"{done.stdout.strip()}. Its log is in {self._home / 'log'}."
                )
        self._reap()

    def _reap(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._child = None

    def _processes(self) -> list[int]:
        """The live processes of this cluster: postmaster and, for a moment after its death, its backends."""
        self._reap()
        if self._child is not None:
            return [self._child.pid]
        pgdata = os.path.realpath(self._pgdata)
        return [process.pid for process in psutil.process_iter() if _works_in(process, pgdata)]

    def _is_cut_off(self) -> bool:
        """It runs, but somebody swept its socket out of the temporary folder."""
        lines = read_plainly(self._pgdata / "postmaster.pid").splitlines()
        ready = len(lines) > 7 and lines[7].strip() == "ready"
        return ready and not WINDOWS and not (Path(self._place.socket) / f".s.PGSQL.{PORT}").exists()

    def _forget_the_dead(self) -> None:
        """Remove lock files that name a zombie or a stranger; PostgreSQL removes those of vanished processes.

        Only called when no process works in `pgdata`, and alone (`lock`).
        """
        for file in (self._pgdata / "postmaster.pid", Path(self._place.socket) / f".s.PGSQL.{PORT}.lock"):
            first = read_plainly(file).split("\n", 1)[0].strip()
            if first.isdigit() and psutil.pid_exists(int(first)):
                file.unlink(missing_ok=True)

    def _may_try_again(self, launches: int) -> bool:
        return launches < _LAUNCHES and "lock file" in self._log_tail()

    def _log_tail(self, lines: int = 15) -> str:
        logs = [self._home / "startup.log", *(self._home / "log").glob("*.log")]
        ordered = sorted((log for log in logs if log.exists()), key=lambda log: log.stat().st_mtime)
        text = "\n".join(read_plainly(log) for log in ordered[-2:])
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def _conninfo(self, database: str) -> str:
        host = "127.0.0.1" if WINDOWS else self._place.socket
        # A server that is not ours must not be able to ask for the password in clear.
        strict: dict[str, str] = {"require_auth": "scram-sha-256"} if psycopg.pq.version() >= 160000 else {}
        return make_conninfo(
            "",
            host=host,
            port=self._place.port,
            user=ROLE,
            password=self._password,
            dbname=database,
            **strict,
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time starts or stops the server. System errors leave here as sentences."""
        try:
            if not self.data_dir.exists():
                self.data_dir.mkdir(mode=0o700, parents=True)
                if not WINDOWS and os.geteuid() == 0:
                    self.data_dir.chmod(0o711)  # the server's user passes through; what is in it is closed
            with (self.data_dir / "lock").open("a") as lock:
                self._wait_for(lock.fileno())
                yield
        except OSError as error:
            where = error.filename or self.data_dir
            raise LedgerError(
                _failure(f"The ledger cannot use {where}", error.strerror or str(error), self.data_dir)
            ) from error
        except subprocess.TimeoutExpired as error:
            raise LedgerError(
                f"{error.cmd[0]} did not end within {error.timeout:.0f} s. The disk under {self.data_dir} "
                "may be very slow or hang; look at the system's log, or choose another --data-dir."
            ) from None

    def _wait_for(self, lock: int) -> None:
        give_up = time.monotonic() + self._patience_s + 30
        while not WINDOWS:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise LedgerError(
                        f"Another process has been starting or stopping the ledger in {self.data_dir} for a "
                        "long time. Look for a second `potluck host` on the same data folder."
                    ) from None
                time.sleep(0.05)


# (what PostgreSQL or the system says, what to do about it)
_ADVICE = (
    (
        "No space left on device",
        "The disk is full. Free some space (a new ledger needs 60 MB) and start again.",
    ),
    ("Disk quota exceeded", "Your quota is used up. Free some space, or choose another --data-dir."),
    ("Read-only file system", "That disk is mounted read-only. Choose another --data-dir."),
    (
        "Address already in use",
        "Its port is taken. Stop the program that uses it, or delete `port` in place.json.",
    ),
    ("Permission denied", "Run Potluck as the user whose folder that is, or choose another --data-dir."),
    ("Operation not permitted", "That disk does not let files change owner. Choose another --data-dir."),
    ("could not resize shared memory", "/dev/shm is too small; in a container give it --shm-size=256m."),
    ("Cannot allocate memory", "There is too little memory. Close other programs and start again."),
    ("could not locate a valid checkpoint", "Its files are damaged. Restore the data folder from a backup."),
    ("invalid page in block", "Its files are damaged. Restore the data folder from a backup."),
)


def _failure(headline: str, text: str, folder: Path) -> str:
    advice = next((advice for sign, advice in _ADVICE if sign in text), "")
    return f"{headline}. {advice or 'What follows is what it said.'} (Folder: {folder})\n{text.strip()}"


def _refuse_other_major(pgdata: Path, binaries: Binaries) -> None:
    made_by = read_plainly(pgdata / "PG_VERSION").strip()
    if made_by and made_by != str(binaries.major):
        raise LedgerError(
            f"The ledger in {pgdata} was made by PostgreSQL {made_by}, and the programs found here "
            f"({binaries.origin}, {binaries.folder}) are PostgreSQL {binaries.version}; one cannot read the "
            f"other's files. Install PostgreSQL {made_by} or go back to the Potluck that brought it, move "
            "the ledger with pg_dump, or choose another --data-dir to begin an empty one."
        )


def _config(pgdata: Path, settings: Mapping[str, str]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"

    lines = [f"{name} = {quoted(value)}" for name, value in settings.items()]
    head = "# Written by Potluck at every start. Change a setting with ALTER SYSTEM: that wins over this file."
    return "\n".join([head, f"include = {quoted(str(pgdata / 'postgresql.conf'))}", *lines, ""])


def _works_in(process: psutil.Process, folder: str) -> bool:
    """Every process of a server works in its data folder; a zombie works nowhere."""
    try:
        return process.name().startswith("postgres") and process.cwd() == folder
    except psutil.Error:
        return False
