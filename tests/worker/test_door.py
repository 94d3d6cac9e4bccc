"""Do workers find out whether they can reach each other, and does the door let nobody in whom the hub did not send?"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from agent_kit import until
from fake_hub import FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.protocol import Door, Knock, Rules
from potluck.worker import addresses, door
from potluck.worker.door import Porter, reach
from potluck.worker.jobs.house import House

HERE = "127.0.0.1"


@pytest.fixture
def porter() -> Iterator[Porter]:
    porter = Porter()
    yield porter
    porter.close()


def knock_at(porter: Porter, *at: str, **changes: Any) -> Knock:
    return Knock("w2", replace(porter.door, addresses=list(at) or [HERE], **changes))


@contextlib.contextmanager
def somebody(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A program that is no door, and says what it likes. Its port."""
    with socket.create_server((HERE, 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    guest, _ = server.accept()
                    with guest, contextlib.suppress(OSError):
                        guest.settimeout(10)
                        talk(guest)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


# --- knocking


def test_a_worker_that_is_there_is_reached_and_the_way_is_measured(porter: Porter) -> None:
    found = reach(knock_at(porter))

    assert (found.worker, found.address, found.reason) == ("w2", HERE, "")
    assert found.rtt_s > 0
    assert found.bytes_per_s > 0


def test_the_first_address_that_works_is_taken(porter: Porter) -> None:
    found = reach(knock_at(porter, "no-address", "127.0.0.2:x", HERE, "127.0.0.3"))

    assert found.address == HERE


def test_a_worker_is_reached_over_ipv6_too(porter: Porter) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"IPv6 is switched off here: {error}")

    assert reach(knock_at(porter, "::1")).address == "::1"


def test_the_same_address_of_another_worker_is_not_it(porter: Porter) -> None:
    other = Porter()
    asked = Knock("w2", Door(porter.port, other.door.key, [HERE]))

    found = reach(asked)

    other.close()
    assert found.address == ""
    assert found.reason == f"{HERE} is somebody else's"


def test_each_address_that_does_not_work_is_named_with_its_reason(porter: Porter) -> None:
    closed = Porter()
    asked = knock_at(closed, HERE, "not-an-address")
    closed.close()

    found = reach(asked)

    assert found.address == ""
    assert found.reason.startswith(f"{HERE} refuses the connection; not-an-address cannot be tried")


def test_a_worker_that_gives_no_address_is_said_to_give_none(porter: Porter) -> None:
    asked = Knock("w2", replace(porter.door, addresses=[]))

    assert "no address" in reach(asked).reason


def test_a_program_that_says_something_else_is_no_worker(porter: Porter) -> None:
    with somebody(lambda guest: guest.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100)) as port:
        found = reach(knock_at(porter, port=port))

    assert found.reason == f"{HERE} is somebody else's"


def test_who_only_repeats_what_it_hears_cannot_pass_for_a_worker(porter: Porter) -> None:
    def parrot(guest: socket.socket) -> None:
        guest.sendall(guest.recv(1000))

    with somebody(parrot) as port:
        found = reach(knock_at(porter, port=port))

    assert found.reason == f"{HERE} is somebody else's"


def test_a_way_on_which_only_small_pieces_come_through_is_no_way(
    porter: Porter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "ANSWER_S", 0.5)

    def tunnel(guest: socket.socket) -> None:
        """Into the worker, but nothing any more once something larger than a hundred bytes was sent."""
        with socket.create_connection((HERE, porter.port)) as way:
            way.settimeout(10)
            is_stuck = False
            while piece := guest.recv(65536):
                is_stuck |= len(piece) > 100  # its rest may come in small pieces
                if not is_stuck:
                    way.sendall(piece)
                    guest.sendall(way.recv(100) if len(piece) != door._PROOF else b"")

    with somebody(tunnel) as port:
        found = reach(knock_at(porter, port=port))

    assert found.address == ""
    assert "MTU" in found.reason


# --- the door


def test_the_door_says_nothing_to_whoever_cannot_prove_that_the_hub_sent_them(porter: Porter) -> None:
    for words in (b"", b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" + b"x" * 100, os.urandom(48)):
        with socket.create_connection((HERE, porter.port)) as line:
            line.settimeout(10)
            line.sendall(words)
            if not words:
                line.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert line.recv(100) == b""


def test_what_was_overheard_once_opens_no_door(porter: Porter) -> None:
    heard = b""

    def eavesdropper(guest: socket.socket) -> None:
        nonlocal heard
        with socket.create_connection((HERE, porter.port)) as way:
            way.settimeout(10)
            first = guest.recv(1000)
            way.sendall(first)
            guest.sendall(way.recv(1000))
            heard = first + guest.recv(door._PROOF)

    with somebody(eavesdropper) as port:
        reach(knock_at(porter, port=port))
    assert len(heard) == door._NONCE + 2 * door._PROOF
    with socket.create_connection((HERE, porter.port)) as line:
        line.settimeout(10)
        line.sendall(heard + b"?")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := line.recv(1000):
                answer += piece

    assert len(answer) <= door._NONCE + door._PROOF  # its own nonce and proof: nothing was given back


def test_guests_who_say_nothing_keep_nobody_out_for_long(porter: Porter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "ANSWER_S", 0.3)
    silent = [socket.create_connection((HERE, porter.port)) for _ in range(2 * door._GUESTS)]

    found = until(lambda: (one := reach(knock_at(porter))).address and one)

    assert found.address == HERE
    for line in silent:
        line.close()


def test_the_key_is_in_no_printed_door(porter: Porter) -> None:
    assert porter.door.key not in repr(porter.door)


# --- the porter


def test_all_that_are_asked_for_are_knocked_at_and_kept_until_they_were_told() -> None:
    news = threading.Event()
    mine, others = Porter(news.set), [Porter() for _ in range(6)]
    asked = [Knock(f"w{n}", replace(other.door, addresses=[HERE])) for n, other in enumerate(others)]

    assert mine.knock(asked)
    assert not mine.knock(asked)  # they are being asked
    until(lambda: not mine.is_out)

    assert news.is_set()
    found = mine.found()
    assert {one.worker: one.address for one in found} == {f"w{n}": HERE for n in range(6)}
    assert not mine.knock(asked[:1])  # it is known, and only not said yet
    mine.told(found[1:])
    assert mine.found() == found[:1]
    mine.told(found)
    assert mine.knock(asked[:1])
    for porter in (mine, *others):
        porter.close()


# --- addresses


def test_an_own_address_comes_first_and_the_one_that_only_this_machine_has_last() -> None:
    interfaces = {
        "lo": ["127.0.0.1", "127.0.1.1", "::1"],
        "docker0": ["172.17.0.1"],
        "wlan0": ["2001:db8::7", "fe80::1", "10.1.2.3"],
        "eth0": ["192.168.1.7", "169.254.3.4"],
        "tailscale0": ["100.100.1.2"],
    }

    found = addresses.ranked(interfaces, preferred=["192.168.1.7"])

    assert found == ["192.168.1.7", "10.1.2.3", "100.100.1.2", "2001:db8::7", "172.17.0.1", "127.0.0.1"]


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=8), st.lists(st.ip_addresses().map(str), max_size=20), max_size=6))
def test_whatever_the_interfaces_are_there_are_few_addresses_each_once_and_none_of_debians(
    interfaces: dict[str, list[str]],
) -> None:
    found = addresses.ranked(interfaces, preferred=[])

    assert found[-1] == addresses.LOOPBACK
    assert len(found) == len(set(found)) <= addresses.MOST + 1
    assert not any(one.startswith("127.") or one == "::1" for one in found[:-1])


def test_this_machine_has_an_address_whose_interface_is_known() -> None:
    found = addresses.here()

    assert found[-1] == HERE
    assert all(addresses.interface_of(address) for address in found)
    assert addresses.interface_of("203.0.113.77") == ""


def test_a_free_port_can_be_had_twice() -> None:
    port = addresses.free_port(HERE)

    socket.create_server((HERE, port)).close()
    assert port < 32_768  # Linux hands out those above by itself


# --- an agent


def test_an_agent_knocks_where_the_hub_says_and_can_be_reached_itself(
    edge: FakeHub, start: Any, porter: Porter
) -> None:
    gone = Porter()
    dead = Knock("w3", replace(gone.door, addresses=[HERE]))
    gone.close()

    start(house=House(executor="process"))
    until(lambda: edge.orders)
    edge.ask_to_knock(knock_at(porter), dead)
    until(lambda: len(edge.reached) == 2, "its findings")
    theirs = edge.orders[-1].door

    found = {one.worker: one for one in edge.reached}
    assert (found["w2"].address, found["w3"].address) == (HERE, "")
    assert "refuses" in found["w3"].reason
    assert theirs is not None and theirs.addresses[-1] == HERE
    assert reach(Knock("w1", theirs)).address


def test_an_agent_that_takes_no_jobs_has_no_door(edge: FakeHub, start: Any) -> None:
    start(house=House(Rules(accept="pool")))
    request = until(lambda: edge.orders and edge.orders[-1])

    assert request.door is None


def test_the_door_is_closed_when_the_agent_has_left(edge: FakeHub, start: Any) -> None:
    agent = start(house=House(executor="process"))
    theirs = until(lambda: edge.orders and edge.orders[-1].door)

    agent.agent.stop()
    agent.wait()

    assert reach(Knock("w1", replace(theirs, addresses=[HERE]))).address == ""
