"""Can the ledger live in the PostgreSQL at this address, and if not, what should the user do?

Every failure is a sentence that names the address without its password.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from potluck.errors import LedgerError
from potluck.hub.postgres.machine import OLDEST_MAJOR


@dataclass(frozen=True)
class Server:
    """A server that will do."""

    version: str
    database: str
    user: str


def check_server(dsn: str, *, timeout_s: float = 10) -> Server:
    """Connect, and see that the version, the encoding and our rights will do; else LedgerError."""
    address = redact(dsn)
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        raise LedgerError(
            "The database address cannot be read (it is not shown, since it may hold a password). It should "
            "look like postgresql://USER:PASSWORD@HOST:5432/DATABASE; write %40 for an @ in the password, "
            "%2F for a /."
        ) from None
    try:
        with psycopg.connect(
            dsn, connect_timeout=max(2, round(timeout_s)), application_name="potluck", autocommit=True
        ) as connection:
            version = connection.info.server_version
            problem = judge_version(version) or judge_rights(**_facts(connection))
            if problem:
                raise LedgerError(f"The ledger cannot live in {address}: {problem}")
            info = connection.info
            return Server(f"{version // 10000}.{version % 10000}", info.dbname, info.user)
    except psycopg.Error as error:
        said = _without_secrets(" ".join(str(error).split()), parts)
        raise LedgerError(f"The ledger's PostgreSQL, {address}, cannot be used: {advise(said)}") from None


def redact(dsn: str) -> str:
    """The address for people: user, host and database; never the password, nor what may hold one."""
    try:
        parts: dict[str, Any] = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        return "postgresql://…"
    user = f"{parts['user']}{':…' if 'password' in parts else ''}@" if parts.get("user") else ""
    hosts = str(parts.get("host") or parts.get("hostaddr") or "").split(",")
    ports = str(parts.get("port") or "").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    where = ",".join(f"{host}:{port}" if port else host for host, port in zip(hosts, ports, strict=False))
    return f"postgresql://{user}{where}/{parts.get('dbname') or ''}"


def judge_version(number: int) -> str:
    """Why this server version (libpq's number, 150004 for 15.4) will not do; "" if it will."""
    major = number // 10000
    if major >= OLDEST_MAJOR:
        return ""
    shown = f"{major}.{number % 10000}" if major >= 10 else f"{major}.{number // 100 % 100}"
    return f"it is PostgreSQL {shown}, and Potluck needs {OLDEST_MAJOR} or newer. Upgrade it."


def judge_rights(
    *, read_only: bool, encoding: str, schema: str | None, may_create: bool, user: str, database: str
) -> str:
    """Why we could not keep tables there; "" if we can. No superuser is needed."""
    if read_only:
        return "it is read-only (a standby, or default_transaction_read_only is on). Name the primary server."
    if encoding != "UTF8":
        return (
            f"its encoding is {encoding}, and Potluck writes UTF-8. Make a database with: "
            f"CREATE DATABASE {database} ENCODING 'UTF8' TEMPLATE template0"
        )
    if schema is None:
        return f"no schema of the search_path of {user} exists. Make one with: CREATE SCHEMA public"
    if not may_create:
        return (
            f"the user {user} may not create tables in the schema {schema}. As its owner run: "
            f'GRANT CREATE ON SCHEMA "{schema}" TO "{user}" '
            f'(or: ALTER DATABASE "{database}" OWNER TO "{user}")'
        )
    return ""


def _facts(connection: psycopg.Connection[Any]) -> dict[str, Any]:
    row = connection.execute(
        "select current_setting('transaction_read_only')::bool, current_setting('server_encoding'),"
        " current_schema(), has_schema_privilege(current_schema(), 'CREATE'), current_user, "
        "current_database()"
    ).fetchone()
    names = ("read_only", "encoding", "schema", "may_create", "user", "database")
    return dict(zip(names, row or (), strict=True))


# (what libpq or the server says, what to do about it); what the server itself says comes before the network's
# words, since a name with two addresses (::1 and 127.0.0.1) gives both.
_ADVICE = (
    ("password authentication failed", "the user or the password is wrong. Check both in the address."),
    (
        "no password supplied",
        "it wants a password. Put one into the address, into PGPASSWORD or into ~/.pgpass.",
    ),
    (
        "no pg_hba.conf entry",
        "it does not let this user connect from this machine. Add a line to its pg_hba.conf.",
    ),
    (
        "Peer authentication failed",
        "it takes local users by their own names only. Add a HOST to the address.",
    ),
    ("role ", "it has no such user. Make one with: createuser --pwprompt USER"),
    ("database ", "it has no such database. Make one with: createdb --owner USER DATABASE"),
    ("certificate verify failed", "its certificate is not trusted. Give sslrootcert=… in the address."),
    (
        "does not support SSL",
        "it does not speak TLS. Use sslmode=disable on a network you trust, or turn TLS on.",
    ),
    ("too many clients", "all its connections are taken. Raise max_connections, or stop other programs."),
    ("connection slots are reserved", "all its connections are taken. Raise max_connections."),
    ("starting up", "it is starting or recovering. Try again in a moment."),
    ("not yet accepting", "it is starting or recovering. Try again in a moment."),
    ("shutting down", "it is shutting down. Start it again."),
    ("received invalid response", "what answers there is not PostgreSQL. Check the port."),
    ("expected authentication request", "what answers there is not PostgreSQL. Check the port."),
    ("server closed the connection", "it hung up at once. Check that PostgreSQL listens on that port."),
    ("resolve host", "there is no host of that name. Check the spelling, and the network."),
    ("translate host name", "there is no host of that name. Check the spelling, and the network."),
    ("Connection refused", "nothing listens there. Check host and port, and that the server is running."),
    (
        "No such file or directory",
        "there is no such socket. Check that the server runs here, or give HOST and port.",
    ),
    ("Permission denied", "its socket is closed to you. Run as another user, or connect by TCP."),
    ("timeout expired", "it does not answer. Check host and port, and the firewall between."),
    ("timed out", "it does not answer. Check host and port, and the firewall between."),
    ("No route to host", "there is no way to that host. Check the network."),
    ("Network is unreachable", "there is no way to that host. Check the network."),
)


def advise(said: str) -> str:
    """libpq's words, with what to do in front of them if we know it."""
    for sign, advice in _ADVICE:
        if sign in said and (not sign.endswith(" ") or "does not exist" in said.split(sign, 1)[1]):
            return f"{advice} (It said: {said})"
    return said


def _without_secrets(text: str, parts: dict[str, Any]) -> str:
    for name in ("password", "sslpassword"):
        if parts.get(name):
            text = text.replace(str(parts[name]), "…")
    return text
