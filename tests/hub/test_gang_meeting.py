"""Do the members of a gang meet at one place, and at another one when its machine is gone?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from crew_kit import Crew, check_gangs, emptied, hub_of_module
from hub_kit import Hub
from potluck.hub import upkeep
from potluck.hub.commands.desk import Caller
from potluck.protocol import Meeting, OrdersAnswer


@pytest.fixture(scope="module")
def one_hub(embedded_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub_of_module(embedded_dsn, tmp_path_factory.mktemp("blobs")) as hub:
        yield hub


@pytest.fixture
def hub(one_hub: Hub) -> Hub:
    return emptied(one_hub)


@pytest.fixture
def mia(hub: Hub) -> Caller:
    return hub.member("mia")


@pytest.fixture
def crew(hub: Hub, mia: Caller) -> Crew:
    """Three members that have met; `crew.gang` would be `last`."""
    crew = Crew(hub, "lab-1", "lab-2", "lab-3", known=True)
    crew.submit(mia, least=2, most=3)
    crew.rounds()
    return crew


def host(crew: Crew) -> str:
    (name,) = [name for name, hand in crew.hands.items() if hand.leases and hand.meeting.host]
    return name


def others(crew: Crew) -> list[str]:
    return [name for name, hand in crew.hands.items() if hand.leases and not hand.meeting.host]


def number(crew: Crew, name: str) -> int:
    gang = crew.of(name).lease.gang
    assert gang is not None
    return gang.member


def test_the_first_member_keeps_the_place_and_all_know_it(hub: Hub, crew: Crew, mia: Caller) -> None:
    keeper = host(crew)

    assert number(crew, keeper) == 1
    assert crew.view(mia, "last").host == keeper
    address = f"http://{crew.of(keeper).address}:9001"
    assert {(hand.meeting.turn, hand.meeting.address) for hand in crew.hands.values()} == {(1, address)}
    check_gangs(hub)


def test_who_knows_the_place_is_told_no_more(hub: Hub, crew: Crew) -> None:
    for name in crew.hands:
        assert crew.ask(name) == OrdersAnswer()


def test_who_did_not_hear_is_told_again(hub: Hub, crew: Crew) -> None:
    name = others(crew)[0]
    hand = crew.of(name)
    known = hand.meeting
    del hand.meetings[hand.lease.id]

    answer = crew.ask(name)

    assert [(order.address, order.host) for order in answer.meet] == [(known.address, False)]


def test_when_the_hosts_member_ends_another_keeps_the_place(hub: Hub, crew: Crew, mia: Caller) -> None:
    first, rest = host(crew), others(crew)

    crew.end(first, exit_code=1)
    crew.silent.add(first)
    crew.rounds()

    second = host(crew)
    assert second == min(rest, key=lambda name: number(crew, name))
    assert {crew.of(name).meeting.address for name in rest} == {f"http://{crew.of(second).address}:9002"}
    assert crew.view(mia, "last").host == second
    check_gangs(hub)


@pytest.mark.parametrize(("column", "seconds"), [("hung_up_at", 4), ("ordered_at", 16)])
def test_when_the_hosts_agent_is_gone_another_keeps_the_place(hub: Hub, crew: Crew, column: str, seconds: int) -> None:
    first, rest = host(crew), others(crew)

    crew.silent.add(first)
    age(hub, crew.of(first).caller, column, seconds)
    for _ in range(4):
        for name in rest:
            crew.ask(name)
        crew.tend()

    assert [crew.of(name).meeting.host for name in sorted(rest, key=lambda name: number(crew, name))] == [True, False]
    assert {crew.of(name).meeting.turn for name in rest} == {2}


def test_a_host_that_was_away_for_a_moment_stays_the_host(hub: Hub, crew: Crew) -> None:
    first = host(crew)

    age(hub, crew.of(first).caller, "hung_up_at", 2)
    crew.tend()
    crew.rounds()

    assert host(crew) == first
    assert crew.of(first).meeting.turn == 1


def test_a_host_that_was_replaced_hears_that_it_shall_stop(hub: Hub, crew: Crew) -> None:
    first = host(crew)
    age(hub, crew.of(first).caller, "hung_up_at", 4)
    crew.tend()

    crew.rounds()

    assert not crew.of(first).meeting.host
    assert host(crew) != first


def test_after_the_hub_was_away_no_silence_counts(hub: Hub, crew: Crew) -> None:
    first = host(crew)
    age(hub, crew.of(first).caller, "ordered_at", 40)

    async def a_moment() -> None:
        tending = asyncio.ensure_future(upkeep._tend_forever(hub.desk))
        for _ in range(20):
            await asyncio.sleep(0.01)
            hub.desk.news.tell("gangs")
        tending.cancel()

    hub.run(a_moment())

    assert hub.one("SELECT turn FROM gangs") == 1


def test_a_host_that_never_says_where_is_passed_over(hub: Hub, mia: Caller) -> None:
    crew = Crew(hub, "lab-1", "lab-2", "lab-3", known=True)
    for hand in crew.hands.values():
        hand.opens = False
    crew.submit(mia, least=3, most=3)
    crew.rounds()
    first = hub.one("SELECT worker_id FROM leases JOIN gangs ON gangs.host = leases.id")
    for hand in crew.hands.values():
        hand.opens = hand.caller.subject != first

    hub.sql("UPDATE gangs SET host_since = host_since - interval '21 seconds'")
    crew.rounds()

    assert number(crew, host(crew)) == 2
    assert len({hand.meeting.address for hand in crew.hands.values()}) == 1


def test_only_the_host_says_where_and_only_on_its_own_machine(hub: Hub, crew: Crew) -> None:
    hand = crew.of(host(crew))
    known = hand.meeting
    lies: list[dict[str, object]] = [
        {"address": "http://10.66.6.6:9001"},
        {"address": "http://evil.example:80"},
        {"address": f"http://{hand.address}:99999"},
        {"turn": 7},
        {"turn": 0},
        {"lease_id": "nonsense"},
    ]

    for lie in lies:
        true = {"lease_id": hand.lease.id, "turn": 1, "host": True, "address": known.address.replace(":9001", ":9999")}
        tell(hub, crew, host(crew), Meeting(**{**true, **lie}))  # type: ignore[arg-type]

        assert hub.one("SELECT address FROM gangs") == known.address, lie


def test_a_member_that_is_not_the_host_cannot_say_where(hub: Hub, crew: Crew) -> None:
    name = others(crew)[0]
    hand = crew.of(name)
    before = hub.one("SELECT address FROM gangs")

    tell(hub, crew, name, Meeting(hand.lease.id, 1, f"http://{hand.address}:9001", host=True))

    assert hub.one("SELECT address FROM gangs") == before


def test_a_place_that_was_opened_anew_by_its_host_is_told_to_all(hub: Hub, crew: Crew) -> None:
    name = host(crew)
    hand = crew.of(name)
    place = hand.meeting.address.replace(":9001", ":9555")
    hand.meetings[hand.lease.id] = Meeting(hand.lease.id, 1, place, host=True)

    crew.rounds()

    assert {each.meeting.address for each in crew.hands.values()} == {place}


def test_a_waiting_worker_hears_at_once_where_it_shall_meet(hub: Hub, crew: Crew) -> None:
    first, name = host(crew), others(crew)[0]
    keeper, hand = crew.of(first), crew.of(name)
    place = keeper.meeting.address.replace(":9001", ":9777")

    async def story() -> OrdersAnswer:
        facts = {"door": hand.door, "meetings": list(hand.meetings.values())}
        waiting = asyncio.ensure_future(hub.ask_orders(hand.caller, *hand.leases, wait_s=30, **facts))
        await asyncio.sleep(0.05)
        moved = [Meeting(keeper.lease.id, 1, place, host=True)]
        await hub.ask_orders(keeper.caller, *keeper.leases, door=keeper.door, meetings=moved)
        async with asyncio.timeout(20):
            return await waiting

    assert [order.address for order in hub.run(story()).meet] == [place]


def test_the_first_member_of_a_torchrun_script_keeps_the_place_whatever_happens(hub: Hub, mia: Caller) -> None:
    crew = Crew(hub, "lab-1", "lab-2", known=True)
    crew.submit(mia, least=2, most=2, compat=True)
    crew.rounds()
    first = host(crew)
    assert number(crew, first) == 1
    assert crew.of(first).meeting.address == f"{crew.of(first).address}:9001"

    age(hub, crew.of(first).caller, "hung_up_at", 4)
    crew.tend()

    assert hub.one("SELECT turn FROM gangs") == 1


def age(hub: Hub, worker: Caller, column: str, seconds: float) -> None:
    hub.sql(
        f"UPDATE workers SET {column} = now() - make_interval(secs => %(s)s) WHERE id = %(w)s",
        s=seconds,
        w=worker.subject,
    )


def tell(hub: Hub, crew: Crew, name: str, meeting: Meeting) -> None:
    hand = crew.of(name)
    hub.orders(hand.caller, *hand.leases, door=hand.door, meetings=[meeting])
