"""Is a secret anywhere but in the hands of the worker that runs its job? Looked for in everything the hub keeps and says."""

from __future__ import annotations

import base64
import io
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psycopg
import pytest

from hub_kit import Hub
from keeping_kit import placed_job
from potluck.errors import BadInput, Conflict
from potluck.hub.commands import jobs, runs, secrets
from potluck.hub.store.secrets import SecretBox
from potluck.protocol import SecretValue, SecretView

PLAIN = "hf_tOpSeCrEt-0123456789-ÄÖÜ"


def dump(dsn: str) -> bytes:
    """Every row of every table: as text, and the bytea columns as bytes too."""
    out = io.BytesIO()
    with psycopg.connect(dsn) as connection:
        names = connection.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
        for (table,) in names.fetchall():
            with connection.cursor().copy(f'COPY "{table}" TO STDOUT') as copy:  # type: ignore[arg-type]
                for block in copy:
                    out.write(bytes(block))
        for (sealed,) in connection.execute("SELECT sealed FROM secrets").fetchall():
            out.write(bytes(sealed))
    return out.getvalue()


def spellings(text: str) -> list[bytes]:
    raw = text.encode()
    return [raw, raw.hex().encode(), base64.b64encode(raw), text.encode("utf-16-le"), raw[:12]]


def test_no_table_holds_the_value_in_any_spelling(embedded_hub: Hub) -> None:
    owner, worker = embedded_hub.join("olga", role="member"), embedded_hub.join("ann")
    embedded_hub.run(secrets.put(embedded_hub.desk, owner, "HF_TOKEN", SecretValue("an older value")))
    embedded_hub.run(secrets.put(embedded_hub.desk, owner, "HF_TOKEN", SecretValue(PLAIN)))
    placed = placed_job(embedded_hub, owner, worker)
    embedded_hub.sql(
        "UPDATE jobs SET spec = jsonb_set(spec, '{secrets}', '[\"HF_TOKEN\"]') WHERE run_id = %(r)s", r=placed.run_id
    )

    everything = dump(embedded_hub.dsn)

    assert b"HF_TOKEN" in everything, "the dump holds what it should"
    for found in (*spellings(PLAIN), *spellings("an older value")):
        assert found not in everything
    key = embedded_hub.desk.keys.path.read_bytes().strip()
    assert key not in everything
    assert bytes.fromhex(key.decode()) not in everything


def test_no_answer_to_a_person_holds_the_value(embedded_hub: Hub) -> None:
    owner, worker = embedded_hub.join("olga", role="member"), embedded_hub.join("ann")
    answer = embedded_hub.run(secrets.put(embedded_hub.desk, owner, "HF_TOKEN", SecretValue(PLAIN)))
    placed = placed_job(embedded_hub, owner, worker)

    said = [
        answer,
        embedded_hub.run(secrets.mine(embedded_hub.desk, owner)),
        embedded_hub.run(jobs.show(embedded_hub.desk, owner, placed.run_id)),
        embedded_hub.run(runs.events(embedded_hub.desk)),
        repr(SecretValue(PLAIN)),
    ]

    assert PLAIN not in msgspec.json.encode(said).decode()
    assert set(SecretView.__dataclass_fields__) == {"name", "changed_at"}


def test_a_refused_value_is_not_repeated(embedded_hub: Hub) -> None:
    owner = embedded_hub.join("olga", role="member")

    for name, value in (("A", PLAIN + "\0"), ("A", PLAIN * 5000), ("not a name", PLAIN)):
        with pytest.raises(BadInput) as raised:
            embedded_hub.run(secrets.put(embedded_hub.desk, owner, name, SecretValue(value)))
        assert PLAIN not in str(raised.value)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_key_is_only_for_the_hub(embedded_hub: Hub) -> None:
    owner = embedded_hub.join("olga", role="member")
    path = embedded_hub.desk.keys.path
    old = os.umask(0)
    try:
        embedded_hub.run(secrets.put(embedded_hub.desk, owner, "TOKEN", SecretValue(PLAIN)))
    finally:
        os.umask(old)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.parent == embedded_hub.blobs.root.parent
    assert os.listdir(path.parent).count(path.name) == 1
    assert not [name for name in os.listdir(path.parent) if name.startswith(f".{path.name}")]
    path.chmod(0o644)  # a careless copy
    embedded_hub.desk.keys.seal("a", "B", "c")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_box_opens_only_what_it_sealed_for_the_same_owner_and_name(tmp_path: Path) -> None:
    box = SecretBox(tmp_path / "key")
    sealed = box.seal("m-olga", "TOKEN", PLAIN)

    assert box.open("m-olga", "TOKEN", sealed) == PLAIN
    assert SecretBox(tmp_path / "key").open("m-olga", "TOKEN", sealed) == PLAIN
    assert box.seal("m-olga", "TOKEN", PLAIN) != sealed, "a nonce is used once"
    flipped = sealed[:-1] + bytes([sealed[-1] ^ 1])
    other = SecretBox(tmp_path / "other")
    other.seal("x", "X", "x")
    for owner, name, content, opener in [
        ("m-mia", "TOKEN", sealed, box),
        ("m-olga", "OTHER", sealed, box),
        ("m-olgaT", "OKEN", sealed, box),
        ("m-olga", "TOKEN", flipped, box),
        ("m-olga", "TOKEN", sealed[:20], box),
        ("m-olga", "TOKEN", b"", box),
        ("m-olga", "TOKEN", sealed, other),
    ]:
        with pytest.raises(Conflict) as raised:
            opener.open(owner, name, content)
        assert PLAIN not in str(raised.value)


def test_two_hub_copies_that_start_at_once_agree_on_a_key(tmp_path: Path) -> None:
    boxes = [SecretBox(tmp_path / "key") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        sealed = list(pool.map(lambda box: box.seal("o", "N", PLAIN), boxes))

    assert {SecretBox(tmp_path / "key").open("o", "N", each) for each in sealed} == {PLAIN}
