"""May only those call a route whom it names? Every route of the hub × every role, by real requests over a socket.

The routes and their roles come from the app itself, so that a new route is tested the moment it exists.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import psycopg
import pytest

from hub_kit import SETTINGS, Hub, open_hub, sha256
from ledger_fixture import fresh_database
from potluck.hub import upkeep
from potluck.hub.app import make_app
from potluck.hub.commands import people
from potluck.hub.commands.desk import Caller, Desk
from potluck.hub.limits import MAX_BODY_BYTES
from potluck.hub.store import Ledger
from potluck.protocol import PROTOCOL, PROTOCOL_HEADER, JoinRequest, Lease, Report
from serving import serving

ROLES = ("nobody", "viewer", "worker", "member", "admin", "revoked")
OPEN = {
    "GET /livez",
    "GET /readyz",
    "GET /j/{code}",
    "POST /api/v1/join",
    "POST /j/{code}/enter",
    "GET /sign-in",
    "POST /sign-in",
    "GET /api/v1/schemas/potluck.yaml.json",
    "GET /assets/{name}",
    "GET /api/v1/openapi.json",
    "HEAD /api/v1/openapi.json",
}
"""Everything that a stranger may ask for."""
CREDENTIAL_INSIDE = {"POST /sign-in"}
"""The credential is in the form: without one, 401 is the right answer for everybody."""


@dataclass(frozen=True)
class Service:
    """The hub on a port, with one credential of every role."""

    app: Any
    hub: Hub
    http: httpx2.Client
    tokens: dict[str, str]
    run_id: str
    victim_id: str  # a run that the walk through the routes may pause and stop
    house: Caller
    ann: Caller

    def ask(self, method: str, path: str, role: str = "admin", **request: Any) -> httpx2.Response:
        headers = {**request.pop("headers", {})}
        if self.tokens[role]:
            headers["Authorization"] = f"Bearer {self.tokens[role]}"
        return self.http.request(method, path, headers=headers, **request)


@pytest.fixture(scope="module")
def service(embedded_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with contextlib.ExitStack() as stack:
        dsn = stack.enter_context(fresh_database(embedded_dsn))
        folder: Path = tmp_path_factory.mktemp("blobs")
        hub = stack.enter_context(open_hub(dsn, folder))
        tokens = {"nobody": ""}
        for role in ("viewer", "member"):
            tokens[role] = hub.join_with_token(role, role=role)[1]
        ann, tokens["worker"] = hub.join_with_token("ann")
        tokens["admin"] = secrets.token_urlsafe(32)
        hub.run(people.put_admin(hub.desk, tokens["admin"]))
        revoked, tokens["revoked"] = hub.join_with_token("eve")
        hub.run(people.revoke_worker(hub.desk, revoked.subject, actor="the test"))
        house = hub.join("house", trusted=True)
        desk = Desk(Ledger(dsn), hub.blobs)
        app = make_app(desk, lambda: upkeep.hear(desk))
        address = stack.enter_context(serving(app))
        http = stack.enter_context(httpx2.Client(base_url=address, timeout=30))
        run_id, victim_id = (hub.start_run(house, samples=10_000) for _ in range(2))
        yield Service(app, hub, http, tokens, run_id, victim_id, house, ann)


def routes(app: Any) -> list[tuple[str, str, list[str] | None]]:
    """(method, path, roles) of every route, however deeply it is included. Roles are None where nobody decided."""
    found = []
    for route in _flat(app.routes):
        extra = getattr(route, "openapi_extra", None) or {}
        for method in sorted(getattr(route, "methods", None) or {"GET"}):
            found.append((method, route.path, extra.get("x-roles")))
    return found


def _flat(routes_: Any) -> Iterator[Any]:
    """FastAPI keeps an included router as one route, which knows its own; a mounted app has `routes`."""
    for route in routes_:
        if hasattr(route, "effective_candidates"):
            yield from _flat(route.effective_candidates())
        elif getattr(route, "routes", None):
            yield from _flat(route.routes)
        else:
            yield route


def filled(service: Service, path: str) -> str:
    """The path with ids that fit: the run is real, the rest are well-formed strangers."""
    values = {"run": service.victim_id, "lease_id": "00000000-0000-4000-8000-000000000000", "hash_": "0" * 64}
    values |= {"upload_id": "0" * 64 + "-10", "code": "aaaa-bbbb-cccc-dddd"}
    return re.sub(r"\{(\w+)(:\w+)?\}", lambda m: values.get(m[1], "nothing"), path)


def status_of(service: Service, method: str, path: str, role: str, **request: Any) -> int:
    """The status alone: an endless stream is not read to its end."""
    headers = {"Authorization": f"Bearer {service.tokens[role]}"} if service.tokens[role] else {}
    with service.http.stream(method, path, headers=headers, **request) as response:
        return response.status_code


# --- roles ----------------------------------------------------------------------------------------------------------


def test_every_route_says_who_may_call_it(service: Service) -> None:
    undecided = {f"{m} {p}" for m, p, roles in routes(service.app) if roles is None}

    assert undecided == {"GET /api/v1/openapi.json", "HEAD /api/v1/openapi.json"}  # FastAPI's own


def test_only_the_expected_routes_are_open(service: Service) -> None:
    open_ = {f"{m} {p}" for m, p, roles in routes(service.app) if roles is None or "nobody" in roles}

    assert open_ == OPEN


def test_the_walk_finds_the_whole_api(service: Service) -> None:
    paths = service.app.openapi()["paths"]
    listed = {(m.upper(), p) for p, ms in paths.items() for m in ms}

    assert listed <= {(m, p) for m, p, _ in routes(service.app)}
    assert len(listed) > 25


@pytest.mark.parametrize("role", ROLES)
def test_each_route_lets_in_exactly_the_roles_it_names(service: Service, role: str) -> None:
    wrong = []
    for method, path, allowed in routes(service.app):
        if allowed is None:
            continue
        status = status_of(service, method, filled(service, path), role)
        if "nobody" in allowed or (role in allowed and role != "revoked"):
            refusals = (403,) if f"{method} {path}" in CREDENTIAL_INSIDE else (401, 403)
            fits = status not in refusals and status < 500
        elif role in ("nobody", "revoked"):
            # a page may send a stranger to the way in instead of refusing
            fits = status == 401 or (status in (302, 303, 307) and not path.startswith("/api/"))
        else:
            fits = status == 403
        if not fits:
            wrong.append(f"{role} {method} {path}: {status}")

    assert wrong == []


def test_a_wrong_secret_and_a_wrong_scheme_are_nobody(service: Service) -> None:
    for value in ("Bearer wrong", "Basic " + service.tokens["admin"], "Bearer \xff\xfe", "bearer"):
        response = service.http.get("/api/v1/hub", headers={"Authorization": value.encode("latin-1")})
        assert response.status_code == 401, value
        assert response.headers["content-type"] == "application/problem+json"


def test_the_page_cookie_only_ever_looks(service: Service) -> None:
    cookie = {"Cookie": f"potluck_session={service.tokens['admin']}"}

    assert service.http.get("/api/v1/hub", headers=cookie).status_code == 200
    assert service.http.post("/api/v1/invites", json={}, headers=cookie).status_code == 401
    assert service.http.delete("/api/v1/workers/nobody", headers=cookie).status_code == 401
    assert service.http.post(f"/api/v1/runs/{service.run_id}/stop", headers=cookie).status_code == 401


def test_a_revoked_link_shuts_out_everybody_who_came_by_it(service: Service) -> None:
    made = service.ask("POST", "/api/v1/invites", json={"uses": 2}).json()
    token = secrets.token_urlsafe(32)
    join = {"code": made["code"], "name": "carl", "token_sha256": sha256(token)}
    assert service.http.post("/api/v1/join", json=join).status_code == 200
    bearer = {"Authorization": f"Bearer {token}"}
    assert service.http.get("/api/v1/hub", headers=bearer).status_code == 200

    assert service.ask("DELETE", f"/api/v1/invites/{made['id']}").status_code == 204

    assert service.http.get("/api/v1/hub", headers=bearer).status_code == 401
    again = service.http.post("/api/v1/join", json={**join, "token_sha256": sha256("other")})
    assert again.status_code == 403
    assert "revoked" in again.json()["detail"]


# --- other people's things ------------------------------------------------------------------------------------------


def test_a_worker_cannot_report_or_renew_the_lease_of_another(service: Service) -> None:
    bob = service.hub.join_with_token("bob")[1]
    service.tokens["bob"] = bob
    body = {"kinds": ["unit"], "samples_per_s": {service.run_id: 10}}
    lease = msgspec.json.decode(service.ask("POST", "/api/v1/leases", "worker", json=body).content, type=Lease)

    for outcome in ("done", "returned", "failed"):
        answer = service.ask("POST", f"/api/v1/leases/{lease.id}/report", "bob", json={"outcome": outcome})
        assert answer.status_code == 200
        assert answer.json() == {"accepted": False, "reason": "this lease belongs to another worker"}
    beat = service.ask("POST", "/api/v1/heartbeat", "bob", json={"leases": [{"lease_id": lease.id, "samples": 9}]})

    assert beat.json()["drop"] == [lease.id]
    assert service.hub.one("SELECT samples FROM leases WHERE id = %(id)s", id=lease.id) == 0
    back = service.ask("POST", f"/api/v1/leases/{lease.id}/report", "worker", json={"outcome": "returned"})
    assert back.json()["accepted"]


def test_an_untrusted_worker_cannot_publish_weights(service: Service) -> None:
    """Nor with the id of a merge's lease."""
    unit = service.hub.unit(service.ann, service.run_id)
    service.hub.report(service.ann, unit, service.hub.unit_report(unit))
    service.hub.age_updates(3600)
    service.hub.settle(service.run_id)
    merge = service.hub.lease(service.house, "merge")
    assert merge is not None
    report = msgspec.to_builtins(service.hub.merge_report(merge))

    answer = service.ask("POST", f"/api/v1/leases/{merge.id}/report", "worker", json=report)

    assert not answer.json()["accepted"]
    version = service.hub.view(service.run_id).version
    assert service.hub.report(service.house, merge, msgspec.convert(report, Report)).accepted
    assert service.hub.view(service.run_id).version == version + 1


# --- secrets at rest ------------------------------------------------------------------------------------------------


def test_no_secret_is_in_the_ledger_in_clear(service: Service) -> None:
    made = service.ask("POST", "/api/v1/invites", json={"uses": 3}).json()
    join = JoinRequest(made["code"], "dora", sha256("dora's own secret"))
    assert service.http.post("/api/v1/join", json=msgspec.to_builtins(join)).status_code == 200
    assert service.http.get("/api/v1/hub", headers={"Authorization": "Bearer dora's own secret"}).status_code == 200

    dump = _dump(service.hub.dsn)

    assert sha256("dora's own secret") in dump, "the dump holds what it should"
    for secret in (*filter(None, service.tokens.values()), made["code"], "dora's own secret"):
        assert not re.search(rf"(?<![\w-]){re.escape(secret)}(?![\w-])", dump)


def test_lists_of_links_and_workers_show_no_secret(service: Service) -> None:
    made = service.ask("POST", "/api/v1/invites", json={}).json()

    shown = service.ask("GET", "/api/v1/invites").text + service.ask("GET", "/api/v1/workers").text

    assert made["id"] in shown
    assert made["code"] not in shown
    assert sha256(made["code"]) not in shown
    assert sha256(service.tokens["worker"]) not in shown


def _dump(dsn: str) -> str:
    """Every row of every table, as text."""
    out = io.StringIO()
    with psycopg.connect(dsn) as connection:
        tables = connection.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        ).fetchall()
        for (table,) in tables:
            with connection.cursor().copy(f'COPY "{table}" TO STDOUT') as copy:  # type: ignore[arg-type]
                for block in copy:
                    out.write(bytes(block).decode())
    return out.getvalue()


# --- bad requests ---------------------------------------------------------------------------------------------------

ODD_IDS = [
    "%00",
    "..%2f..%2fetc%2fpasswd",
    "%F0%9F%92%A9",
    "a" * 3000,
    "';DROP TABLE runs;--",
    "%25s%25(x)s",
    "-1",
    "9" * 40,
    "0" * 64,
    "0" * 64 + "-" + "9" * 30,
    "0" * 64 + "-²",
    "last",
    "%ff%fe",
]
ODD_BODIES: list[bytes] = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"{",
    b'"text"',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"kinds": 3, "outcome": [], "blob": {}, "leases": [[]]}',
    b'{"kinds": ["unit"], "samples_per_s": {"x": 1e999}, "share": NaN}',
    b'{"leases": [{"lease_id": "\\u0000", "samples": 99999999999999999999999}]}',
    b'{"outcome": "done", "steps": 1e400, "done": [[5, 3], [-1, 9]]}',
    b'{"code": "\\u0000", "name": "\\u0000", "token_sha256": "\\u0000"}',
    b'{"role": "admin", "uses": -1, "ttl_s": NaN}',
    b'{"role": "worker", "uses": 99999999999999999999, "ttl_s": 1e308, "name": "\\ud800"}',
    b'{"blob": {"hash": "../../etc/passwd", "size_bytes": -1}}',
    b'{"blob": {"hash": "' + b"0" * 64 + b'", "size_bytes": 1e30}}',
    b'{"unit_s": "nan", "codec": null, "outer_lr": Infinity}',
    b'{"taste_count": Infinity}',
]


def test_no_id_makes_the_hub_stumble(service: Service) -> None:
    """Whatever stands in a path, as the one who may do the most: an answer below 500, and never a page of a traceback."""
    stumbles = []
    for method, path, allowed in routes(service.app):
        if "{" not in path or allowed is None or method == "HEAD":
            continue
        role = "worker" if "admin" not in allowed else "admin"
        for odd in ODD_IDS:
            if odd == "last" and method in ("POST", "PATCH"):
                continue  # the newest run by name: it exists, and stopping it is what was asked for
            status = status_of(service, method, re.sub(r"\{[^}]+\}", odd, path), role)
            if status >= 500:
                stumbles.append(f"{method} {path} {odd[:20]}: {status}")

    assert stumbles == []


def test_no_body_makes_the_hub_stumble(service: Service) -> None:
    stumbles = []
    for method, path, allowed in routes(service.app):
        if method not in ("POST", "PATCH", "PUT", "DELETE") or allowed is None or path.endswith(("/stop", "/leave")):
            continue
        role = "worker" if "admin" not in allowed else "admin"
        for body in ODD_BODIES:
            answer = service.ask(
                method, filled(service, path), role, content=body, headers={"Content-Type": "application/json"}
            )
            if answer.status_code >= 500:
                stumbles.append(f"{method} {path} {body[:60]!r}: {answer.status_code}")
            elif answer.status_code >= 400 and path.startswith("/api/"):
                problem = answer.json()
                assert problem["status"] == answer.status_code
                assert problem["detail"] and problem["code"]

    assert stumbles == []
    assert service.hub.view(service.victim_id).settings["unit_s"] == float(SETTINGS["unit_s"])


def test_odd_queries_and_headers_are_bad_input(service: Service) -> None:
    base = f"/api/v1/runs/{service.run_id}/versions"
    for query in ("after=x", "after=-2", f"after={'9' * 40}", "wait=inf", "wait=nan", "wait=99999", "wait=-1"):
        status = service.ask("GET", f"{base}?{query}").status_code
        assert status in (200, 422), query
    for query in ("after=-5", f"after={'9' * 30}", "after=x"):
        assert service.ask("GET", f"/api/v1/events?{query}").status_code in (200, 422)
    for limit in (0, -1, 10**30):
        assert service.ask("GET", f"/api/v1/runs?limit={limit}").status_code == 422
    key = service.ask("POST", "/api/v1/runs", json={}, headers={"Idempotency-Key": "k" * 500})
    assert key.status_code == 422


def test_a_giant_body_is_refused_before_it_is_read(service: Service) -> None:
    with socket.create_connection((service.http.base_url.host, service.http.base_url.port), 10) as raw:
        raw.sendall(
            b"POST /api/v1/join HTTP/1.1\r\nHost: hub\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1)
        )
        answer = raw.recv(65536)

    assert answer.startswith(b"HTTP/1.1 413")


def test_a_giant_body_without_a_length_is_cut_off(service: Service) -> None:
    def drip() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // (1 << 20) + 4):
            yield b" " * (1 << 20)

    try:
        answer = service.http.post("/api/v1/join", content=drip())
    except httpx2.HTTPError:
        return  # cut off while sending: as good
    assert answer.status_code in (400, 413)


def test_a_piece_may_not_be_longer_than_eight_megabytes(service: Service) -> None:
    content = os.urandom(64) * ((9 << 20) // 64)
    import hashlib

    digest = hashlib.sha256(content).hexdigest()

    answer = service.ask("PATCH", f"/api/v1/uploads/{digest}-{len(content)}?offset=0", content=content)

    assert answer.status_code == 422
    assert not service.hub.blobs.has(digest)


@pytest.mark.parametrize("theirs", [PROTOCOL + 1, 0, 10**6])
def test_another_protocol_is_told_who_has_to_move(service: Service, theirs: int) -> None:
    answer = service.ask("GET", "/api/v1/hub", headers={PROTOCOL_HEADER: str(theirs)})

    assert answer.status_code == 426
    assert answer.json()["code"] == "version_mismatch"
    assert "upgrade" in answer.json()["detail"]


def test_a_nonsense_protocol_header_is_no_protocol(service: Service) -> None:
    for value in ("x", "", "-1", "1.5", "9" * 5000):
        status = service.ask("GET", "/api/v1/hub", headers={PROTOCOL_HEADER: value}).status_code
        assert status in (200, 400, 426, 431), value[:10]


def test_every_answer_forbids_sniffing_and_framing(service: Service) -> None:
    for path in ("/livez", "/api/v1/hub", "/nothing/here", "/api/v1/blobs/" + "0" * 64):
        answer = service.ask("GET", path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers[PROTOCOL_HEADER] == str(PROTOCOL)
