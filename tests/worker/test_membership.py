from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from fake_hub import FakeHub

from potluck.errors import BadInput, Conflict, NotAllowed
from potluck.protocol import Hardware
from potluck.settings import check_token, hash_token
from potluck.worker import hardware as machine
from potluck.worker.hardware import choose_device
from potluck.worker.membership import join, load, only_agent, save
from potluck.worker.spool import Entry, Spool

CUDA = Hardware(gpus=[{"kind": "cuda", "name": "A"}, {"kind": "cuda", "name": "B"}])
APPLE = Hardware(gpus=[{"kind": "mps", "name": "M4"}])


def test_the_hub_learns_the_hash_of_a_secret_made_here(edge: FakeHub, tmp_path: Path) -> None:
    credential = join(f"{edge.address}/j/GOODCODE", tmp_path / "home", name="laptop", device="cpu", share=0.5)

    (request,) = edge.joined
    assert check_token(credential.token) == "worker"
    assert request.token_sha256 == hash_token(credential.token)
    assert (request.name, request.device, request.share) == ("laptop", "cpu", 0.5)
    assert request.hardware.cpu_cores >= 1
    path = tmp_path / "home" / "credential.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load(tmp_path / "home") == credential


def test_joining_again_comes_back_as_the_same_worker(edge: FakeHub, tmp_path: Path) -> None:
    first = join(f"{edge.address}/j/GOODCODE", tmp_path)
    again = join(f"{edge.address}/j/USEDUP", tmp_path)

    assert again == first
    assert len(edge.joined) == 1


def test_a_revoked_machine_joins_anew(edge: FakeHub, tmp_path: Path) -> None:
    first = join(f"{edge.address}/j/GOODCODE", tmp_path)
    edge.tokens.clear()

    second = join(f"{edge.address}/j/GOODCODE", tmp_path)

    assert second.token != first.token
    assert load(tmp_path) == second


def test_a_wrong_code_leaves_nothing_behind(edge: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(NotAllowed, match="ask for a new one"):
        join(f"{edge.address}/j/WRONG", tmp_path)

    assert load(tmp_path) is None


def test_a_credential_that_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "credential.json").write_text("{")

    with pytest.raises(BadInput, match="delete it and join again"):
        load(tmp_path)


def test_a_credential_is_replaced_whole(edge: FakeHub, tmp_path: Path) -> None:
    credential = join(f"{edge.address}/j/GOODCODE", tmp_path)

    save(tmp_path, replace(credential, name="other"))

    assert load(tmp_path) == replace(credential, name="other")


def test_a_folder_has_one_agent_at_a_time(tmp_path: Path) -> None:
    with only_agent(tmp_path), pytest.raises(Conflict, match="two cannot share"), only_agent(tmp_path):
        pass

    with only_agent(tmp_path):
        pass


# --- hardware


@pytest.mark.parametrize(
    ("wanted", "machine", "device"),
    [
        ("auto", Hardware(), "cpu"),
        ("auto", CUDA, "cuda:0"),
        ("auto", APPLE, "mps"),
        ("cpu", CUDA, "cpu"),
        ("cuda", CUDA, "cuda:0"),
        ("CUDA:1", CUDA, "cuda:1"),
        ("mps", APPLE, "mps"),
    ],
)
def test_the_device_is_one_that_is_there(wanted: str, machine: Hardware, device: str) -> None:
    assert choose_device(wanted, machine) == device


@pytest.mark.parametrize(
    ("wanted", "machine"),
    [("cuda:0", Hardware()), ("cuda:2", CUDA), ("mps", CUDA), ("tpu", CUDA), ("cuda:x", CUDA), ("cpu:1", CUDA)],
)
def test_a_device_that_is_not_there_is_refused_with_advice(wanted: str, machine: Hardware) -> None:
    with pytest.raises(BadInput, match=r"auto"):
        choose_device(wanted, machine)


def test_detection_is_honest() -> None:
    found = machine.detect()

    assert found.cpu_cores >= 1
    assert found.memory_bytes > 10**8
    assert found.hostname
    assert all(gpu["kind"] in ("cuda", "mps") for gpu in found.gpus)


def test_a_container_quota_bounds_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/self/cgroup": "0::/docker/abc\n",
        "/sys/fs/cgroup/docker/abc/cpu.max": "150000 100000",
        "/sys/fs/cgroup/cpu.max": "max 100000",
        "/sys/fs/cgroup/docker/memory.max": "1073741824",
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))

    assert machine.usable_cores() == 2
    assert machine.usable_memory() == 1073741824


# --- the spool


def test_a_half_written_entry_is_cleared_and_whole_ones_come_in_order(tmp_path: Path) -> None:
    from potluck.protocol import Report

    spool = Spool(tmp_path / "spool")
    for number in range(3):
        (tmp_path / "update.safetensors").write_bytes(b"%d" % number)
        entry = Entry(f"L{number}", "w", "unit", "r", Report("done", samples=number))
        spool.put(entry, {"update": str(tmp_path / "update.safetensors")})
    half = tmp_path / "spool" / "00000000000000000001-half"
    half.mkdir()
    (half / "entry.part").write_text("{")

    found = spool.entries()

    assert [entry.lease_id for _, entry in found] == ["L0", "L1", "L2"]
    assert [(folder / entry.files["update"]).read_bytes() for folder, entry in found] == [b"0", b"1", b"2"]
    assert not half.exists()
