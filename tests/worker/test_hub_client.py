from __future__ import annotations

import datetime
import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub

from potluck.blobs import BlobStore
from potluck.client import Hub, check_address, parse_link
from potluck.errors import BadInput, HubUnreachable, NotAHub, NotAllowed, NotFound, NotKnown, VersionMismatch
from potluck.protocol import Blob, HeartbeatRequest, LeaseRequest, Progress, Report


@pytest.fixture
def hub(edge: FakeHub) -> Iterator[Hub]:
    with Hub(edge.address, edge.worker(), timeout_s=10) as hub:
        yield hub


def test_a_lease_comes_typed_and_its_report_is_answered(edge: FakeHub, hub: Hub) -> None:
    unit = edge.unit(steps=3)
    edge.give(unit)

    lease = hub.lease(LeaseRequest(["unit"]), wait_s=5)
    assert lease == unit
    answer = hub.report(unit.id, Report("returned", reason="no time"))
    again = hub.report(unit.id, Report("returned", reason="no time"))

    assert answer.accepted
    assert again == answer
    assert hub.lease(LeaseRequest(["unit"]), wait_s=0) is None
    assert hub.report("../../evil?x=1", Report("returned")).accepted is False


def test_heartbeats_say_what_to_drop(hub: Hub) -> None:
    assert hub.heartbeat(HeartbeatRequest([Progress("gone")])).drop == ["gone"]


def test_versions_wait_for_a_newer_one(edge: FakeHub, hub: Hub) -> None:
    edge.publish("run")
    assert [v.number for v in hub.versions("run", -1)] == [0]

    threading.Timer(0.2, edge.publish, ["run"]).start()

    assert [v.number for v in hub.versions("run", 0, wait_s=10)] == [1]


@pytest.mark.parametrize(
    ("status", "kind"), [(401, NotKnown), (403, NotAllowed), (404, NotFound), (422, BadInput), (426, VersionMismatch)]
)
def test_what_the_hub_refuses_is_our_error(edge: FakeHub, hub: Hub, status: int, kind: type[Exception]) -> None:
    edge.fail["/hub"] = [status]

    with pytest.raises(kind, match="made to fail") as raised:
        hub.info()

    assert type(raised.value) is kind


def test_something_else_that_answers_is_not_a_hub(edge: FakeHub, hub: Hub) -> None:
    edge.bare = True

    with pytest.raises(NotAHub, match="is not a Potluck hub"):
        hub.info()


def test_nobody_there_is_said_in_a_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"

    with Hub(address) as hub, pytest.raises(HubUnreachable, match="nothing listens at"):
        hub.info()
    with Hub("https://no-such-machine.invalid:1") as hub, pytest.raises(HubUnreachable, match="no machine called"):
        hub.info()


def test_a_hub_that_does_not_answer_in_time_is_said() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"

        with Hub(address, timeout_s=0.2) as hub, pytest.raises(HubUnreachable, match="no answer"):
            hub.info()


def test_a_server_that_speaks_no_http_is_not_a_hub() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def greet() -> None:
            line, _ = other.accept()
            line.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
            line.recv(1000)
            line.close()

        threading.Thread(target=greet, daemon=True).start()
        address = f"http://127.0.0.1:{other.getsockname()[1]}"

        with Hub(address, timeout_s=5) as hub, pytest.raises(NotAHub):
            hub.info()


# --- addresses and links


def test_plain_http_to_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POTLUCK_INSECURE", raising=False)
    with pytest.raises(NotAllowed, match="POTLUCK_INSECURE=1"):
        Hub("http://192.168.1.5:8470")

    monkeypatch.setenv("POTLUCK_INSECURE", "1")
    assert check_address("http://192.168.1.5:8470/") == "http://192.168.1.5:8470"


@pytest.mark.parametrize("address", ["", "hub:8470", "ftp://hub", "https://", "https://hub/api", "https://hub:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(BadInput):
        check_address(address)


def test_a_link_is_taken_apart() -> None:
    pin = "ab" * 32

    assert parse_link(f" https://hub.example:8470/j/CODE-1#fp={pin.upper()} ") == (
        "https://hub.example:8470",
        "CODE-1",
        pin,
    )
    assert parse_link("http://127.0.0.1:8470/j/CODE") == ("http://127.0.0.1:8470", "CODE", "")


@pytest.mark.parametrize(
    "link",
    ["", "CODE", "https://hub/", "https://hub/j/", "https://hub/j/A/B", "https://hub/x/CODE", "https://hub/j/C#fp=abc"],
)
def test_a_link_that_is_not_whole_is_refused(link: str) -> None:
    with pytest.raises(BadInput, match="link"):
        parse_link(link)


# --- certificates


def certificate(folder: Path, name: str) -> tuple[tuple[Path, Path], str]:
    """A self-signed certificate for a name that is not this machine's; its files and its fingerprint."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths, hashlib.sha256(made.public_bytes(serialization.Encoding.DER)).hexdigest()


def test_a_pinned_certificate_is_the_only_one_accepted(tmp_path: Path) -> None:
    files, pin = certificate(tmp_path, "elsewhere")
    _, other = certificate(tmp_path, "another")
    edge = FakeHub(tmp_path, tls=files).start()
    try:
        token = edge.worker()

        with Hub(edge.address, token, pin, timeout_s=10) as hub:
            assert hub.info().name == "testhub"
            assert hub.upload(b"bytes").size_bytes == 5
        with Hub(edge.address, token, other, timeout_s=10) as hub, pytest.raises(NotAHub, match="another certificate"):
            hub.info()
        with Hub(edge.address, token, timeout_s=10) as hub, pytest.raises(HubUnreachable, match="whole join link"):
            hub.info()
        with Hub(edge.address.replace("https", "http"), token, timeout_s=10) as hub, pytest.raises(HubUnreachable):
            hub.info()
        assert {path for _, path in edge.calls} == {"/hub", "/uploads", edge.calls[-1][1]}
    finally:
        edge.stop()


def test_https_to_a_hub_without_tls_is_said(edge: FakeHub) -> None:
    with (
        Hub(edge.address.replace("http", "https"), timeout_s=10) as hub,
        pytest.raises(NotAHub, match="does not speak TLS"),
    ):
        hub.info()


# --- blobs


def test_an_upload_goes_on_where_it_was_cut_and_is_skipped_when_known(
    edge: FakeHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.client.blobs.PIECE_BYTES", 40_000)
    content = os.urandom(150_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    edge.cut["/uploads"] = 3

    blob = hub.upload(path)
    sent = hub.bytes_up
    hub.upload(content)

    assert edge.blobs.read(blob.hash) == content
    assert hub.bytes_up - sent < 1000
    assert sent < 200_000


def test_an_upload_gives_up_with_the_reason(edge: FakeHub, hub: Hub) -> None:
    edge.stop()

    with pytest.raises(HubUnreachable, match="nothing listens"):
        hub.upload(b"bytes", patience_s=0)


def test_empty_bytes_can_be_uploaded(edge: FakeHub, hub: Hub) -> None:
    assert edge.blobs.read(hub.upload(b"").hash) == b""


def test_a_download_goes_on_where_it_was_cut(edge: FakeHub, hub: Hub, tmp_path: Path) -> None:
    content = os.urandom(1_000_000)
    blob = edge.blobs.add_bytes(content)
    edge.cut["/blobs"] = 1

    path = hub.download(blob, tmp_path / "copy")

    assert path.read_bytes() == content
    assert hub.bytes_down < 1_300_000
    assert not (tmp_path / "copy.part").exists()


def test_a_fetch_starts_again_if_an_older_part_was_wrong(edge: FakeHub, hub: Hub, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "cache")
    content = os.urandom(10_000)
    blob = edge.blobs.add_bytes(content)
    store.append(blob.hash, 0, b"rubbish from elsewhere")

    assert hub.fetch(blob, store).read_bytes() == content
    edge.stop()
    assert hub.fetch(blob, store).read_bytes() == content  # from here on without the hub


def test_bytes_that_are_not_what_was_promised_are_refused(edge: FakeHub, hub: Hub, tmp_path: Path) -> None:
    blob = edge.blobs.add_bytes(b"good bytes")
    edge.blobs.path(blob.hash).write_bytes(b"evil bytes")

    with pytest.raises(BadInput, match="hash"):
        hub.download(blob, tmp_path / "copy")
    with pytest.raises(BadInput, match="hash"):
        hub.fetch(blob, BlobStore(tmp_path / "cache"))
    edge.blobs.path(blob.hash).write_bytes(b"far more bytes than were promised")
    with pytest.raises(NotAHub, match="more than"):
        hub.download(blob, tmp_path / "other", patience_s=0)

    assert not (tmp_path / "copy").exists()
    assert not (tmp_path / "other").exists()


def test_two_threads_may_fetch_the_same_blob(edge: FakeHub, hub: Hub, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "cache")
    content = os.urandom(3_000_000)
    blob = edge.blobs.add_bytes(content)
    threads = [threading.Thread(target=hub.fetch, args=(blob, store)) for _ in range(4)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert store.read(blob.hash) == content
    assert sum(path.startswith("/blobs") for _, path in edge.calls) == 1


def test_a_blob_that_the_hub_does_not_have_is_not_found(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises((NotFound, HubUnreachable)):
        hub.fetch(Blob("0" * 64, 10), BlobStore(tmp_path / "cache"), patience_s=0)


def test_the_client_and_the_agent_are_light() -> None:
    heavy = ("torch", "numpy", "rich", "pynvml", "fastapi", "structlog")
    script = f"import sys, potluck.client, potluck.worker.agent, potluck.worker.membership; print([m for m in {heavy} if m in sys.modules])"

    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    assert out.strip() == "[]"
