"""What does Potluck say about a database that somebody names with --database?"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from potluck.errors import LedgerError
from potluck.hub.postgres import check_server, redact
from potluck.hub.postgres.address import advise, judge_rights, judge_version

SECRET = "hunter2-never-shown"


def test_a_good_database_is_accepted(both_dsn: str) -> None:
    server = check_server(both_dsn)
    assert (server.database, server.user) == ("potluck", "potluck")
    assert int(server.version.split(".")[0]) >= 15


def test_an_ordinary_owner_is_enough(fresh_dsn: str) -> None:
    with role(fresh_dsn, "login") as (name, dsn), psycopg.connect(fresh_dsn, autocommit=True) as admin:
        admin.execute(f"alter database {conninfo_to_dict(fresh_dsn)['dbname']} owner to {name}")
        assert check_server(dsn).user == name
        admin.execute(f"alter database {conninfo_to_dict(fresh_dsn)['dbname']} owner to potluck")


def test_a_user_without_rights_is_told_which_statement_helps(fresh_dsn: str) -> None:
    with role(fresh_dsn, "login") as (name, dsn):
        error = refusal(dsn)
        assert f'GRANT CREATE ON SCHEMA "public" TO "{name}"' in error
        with psycopg.connect(fresh_dsn, autocommit=True) as admin:
            admin.execute(f'grant create on schema "public" to "{name}"')
            assert check_server(dsn)
            admin.execute(f"drop owned by {name}")


def test_a_read_only_database_is_refused(fresh_dsn: str) -> None:
    name = conninfo_to_dict(fresh_dsn)["dbname"]
    with psycopg.connect(fresh_dsn, autocommit=True) as admin:
        admin.execute(f"alter database {name} set default_transaction_read_only = on")
    assert "read-only" in refusal(fresh_dsn)


def test_a_missing_search_path_is_refused(fresh_dsn: str) -> None:
    assert "no schema" in refusal(make_conninfo(fresh_dsn, options="-c search_path=nowhere"))


def test_another_encoding_is_refused() -> None:
    said = judge_rights(read_only=False, encoding="SQL_ASCII", schema="public", may_create=True, user="u", database="d")
    assert "ENCODING 'UTF8'" in said


def test_wrong_password(embedded_dsn: str) -> None:
    error = refusal(make_conninfo(embedded_dsn, password=SECRET))
    assert "the user or the password is wrong" in error


def test_no_password(embedded_dsn: str) -> None:
    parts = {k: v for k, v in conninfo_to_dict(embedded_dsn).items() if k not in ("password", "require_auth")}
    assert "wants a password" in refusal(make_conninfo("", **parts))


def test_no_such_database(embedded_dsn: str) -> None:
    assert "no such database" in refusal(make_conninfo(embedded_dsn, dbname="nowhere"))


def test_nothing_listens_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refused for sure
        error = refusal(f"postgresql://ada:{SECRET}@127.0.0.1:{taken.getsockname()[1]}/potluck")
    assert "nothing listens there" in error
    assert "ada" in error


def test_no_such_socket() -> None:
    assert "no such socket" in refusal("postgresql:///potluck?host=/nowhere/at/all")


def test_no_such_host() -> None:
    assert "no host of that name" in refusal(f"postgresql://ada:{SECRET}@no-such-host.invalid/potluck")


def test_an_address_that_cannot_be_read_is_not_shown() -> None:
    for dsn in (f"postgresql://ada:{SECRET}@[::1/potluck", f"{SECRET} host=x", f"host=x passwort={SECRET}"):
        assert "cannot be read" in refusal(dsn)


def test_something_else_answers() -> None:
    with fake_server(lambda link: link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as address:
        assert "not PostgreSQL" in refusal(address)


def test_a_server_that_never_answers() -> None:
    with fake_server(lambda link: link.recv(1)) as address:
        assert "does not answer" in refusal(address)


def test_an_old_server_is_refused_by_version() -> None:
    with fake_server(greet_as("13.4")) as address:
        assert "PostgreSQL 13.4, and Potluck needs 15" in refusal(address)


@pytest.mark.parametrize(
    ("number", "shown"), [(90624, "9.6"), (100000, "10.0"), (140012, "14.12"), (150000, ""), (180006, "")]
)
def test_versions(number: int, shown: str) -> None:
    said = judge_version(number)
    assert shown in said
    assert bool(said) == bool(shown)


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        (f"postgresql://ada:{SECRET}@db.example:5433/pot", "postgresql://ada:…@db.example:5433/pot"),
        ("postgresql://db.example/pot", "postgresql://db.example/pot"),
        (f"postgresql:///pot?host=/run/pg&user=ada&password={SECRET}", "postgresql://ada:…@/run/pg/pot"),
        (f"host=a,b port=1,2 user=ada password='{SECRET}' dbname=pot", "postgresql://ada:…@a:1,b:2/pot"),
        (f"host=a user=ada sslpassword={SECRET} dbname=pot", "postgresql://ada@a/pot"),
        (f"postgresql://ada:{SECRET}@[::1", "postgresql://…"),
        ("", "postgresql:///"),
    ],
)
def test_redact(dsn: str, shown: str) -> None:
    assert redact(dsn) == shown


def test_the_servers_word_goes_before_the_networks() -> None:
    both = 'connection to "::1" failed: Connection refused; connection to "127.0.0.1" failed: FATAL: password authentication failed for user "ada"'
    assert advise(both).startswith("the user or the password is wrong")
    assert advise("something unheard of") == "something unheard of"


def refusal(dsn: str) -> str:
    with pytest.raises(LedgerError) as caught:
        check_server(dsn, timeout_s=2)
    said = str(caught.value)
    assert SECRET not in said
    assert str(_password(dsn)) not in said
    return said


def _password(dsn: str) -> object:
    try:
        return conninfo_to_dict(dsn).get("password", SECRET)
    except psycopg.ProgrammingError:
        return SECRET


@contextmanager
def role(dsn: str, rights: str) -> Iterator[tuple[str, str]]:
    name = f"role_{conninfo_to_dict(dsn)['dbname']}"
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(f"create role {name} {rights} password '{SECRET}'")  # type: ignore[call-overload]
        try:
            yield name, make_conninfo(dsn, user=name, password=SECRET)
        finally:
            admin.execute(f"drop role {name}")  # type: ignore[call-overload]


@contextmanager
def fake_server(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """A listener that answers each connection once it said something, and keeps it open until the test is over."""
    links: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            links.append(link)
            link.recv(1024)
            answer(link)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            port = listener.getsockname()[1]
            yield f"postgresql://ada:{SECRET}@127.0.0.1:{port}/pot?sslmode=disable&gssencmode=disable"
        finally:
            for link in links:
                link.close()
            listener.shutdown(socket.SHUT_RDWR)


def greet_as(version: str) -> Callable[[socket.socket], object]:
    """The first words of a PostgreSQL server of that version, to a client that it trusts."""

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("!i", len(body) + 4) + body

    parameters = {"server_version": version, "client_encoding": "UTF8", "server_encoding": "UTF8"}
    words = message(b"R", struct.pack("!i", 0))
    words += b"".join(message(b"S", f"{k}\0{v}\0".encode()) for k, v in parameters.items())
    words += message(b"K", struct.pack("!ii", 1, 1)) + message(b"Z", b"I")
    return lambda link: link.sendall(words)
