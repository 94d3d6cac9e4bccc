"""Does a gang get all its machines at once, and only machines that reached each other?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from crew_kit import Crew, check_gangs, emptied, hub_of_module
from hub_kit import Hub, check_jobs
from potluck.domain.job import JobSpec
from potluck.errors import BadInput, Conflict, NotAllowed, NotFound
from potluck.hub.commands import facts as facts_
from potluck.hub.commands import gang_requests, jobs, placing, reaches
from potluck.hub.commands.desk import Caller
from potluck.protocol import Door, JobRequest, Reached


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
def crew(hub: Hub) -> Crew:
    return Crew(hub, "lab-1", "lab-2", "lab-3")


# --- knocks ---------------------------------------------------------------------------------------------------------


def test_workers_that_join_are_tried_out_in_both_directions(hub: Hub, crew: Crew) -> None:
    crew.rounds()

    names = ("lab-1", "lab-2", "lab-3")
    assert sorted(set(crew.knocked)) == [(a, b) for a in names for b in names if a != b]
    assert len(crew.knocked) == 6, "no pair is tried twice"
    found = {(link.source, link.target): link.address for link in hub.run(reaches.links(hub.desk))}
    assert found["lab-1", "lab-2"] == "10.0.0.2"
    assert len(found) == 6


def test_a_worker_without_a_door_is_left_alone(hub: Hub, crew: Crew) -> None:
    crew.join("shy", door=False)

    crew.rounds()

    assert not [pair for pair in crew.knocked if "shy" in pair]


def test_a_waiting_worker_hears_at_once_that_it_shall_knock(hub: Hub, crew: Crew) -> None:
    crew.rounds()
    one, two = crew.of("lab-1"), crew.of("lab-2")

    async def story() -> list[str]:
        waiting = asyncio.ensure_future(hub.ask_orders(one.caller, door=one.door, wait_s=30))
        await asyncio.sleep(0.05)
        hub.sql("UPDATE reaches SET at = NULL")
        await reaches.want(hub.desk, [(one.caller.subject, two.caller.subject)])
        async with asyncio.timeout(20):
            return [knock.worker for knock in (await waiting).knock]

    assert hub.run(story()) == [two.caller.subject]


def test_what_was_found_of_a_door_says_nothing_of_the_next_one(hub: Hub, crew: Crew, mia: Caller) -> None:
    crew.rounds()
    assert ways(hub, crew, "lab-1", "lab-2") == "10.0.0.2"

    hub.hang_up(crew.of("lab-2").caller, 0)
    crew.back("lab-2")
    crew.ask("lab-2")

    assert ways(hub, crew, "lab-1", "lab-2") is None
    crew.rounds()
    assert ways(hub, crew, "lab-1", "lab-2") == "10.0.0.2", "it was asked for again"


def test_an_address_that_the_target_never_said_is_not_believed(hub: Hub, crew: Crew) -> None:
    one, two = crew.of("lab-1"), crew.of("lab-2").caller
    assert crew.ask("lab-1").knock

    for address in ("10.9.9.9", "127.0.1.1", "somewhere", ""):
        hub.orders(one.caller, door=one.door, reached=[Reached(two.subject, address, 0.1, 1.0)])

        assert not ways(hub, crew, "lab-1", "lab-2"), address


def test_nobody_can_say_what_was_not_asked(hub: Hub, crew: Crew) -> None:
    crew.rounds()
    hub.sql("DELETE FROM reaches")

    crew.of("lab-1").reached = [Reached(crew.of("lab-2").caller.subject, "10.0.0.2", 0.1, 1.0)]
    crew.ask("lab-1")

    assert hub.sql("SELECT * FROM reaches") == []


def test_findings_grow_old_and_failures_sooner(hub: Hub, crew: Crew) -> None:
    crew.cut.add(("lab-1", "lab-3"))
    crew.rounds()
    assert ways(hub, crew, "lab-1", "lab-3") == ""

    hub.sql("UPDATE reaches SET at = at - interval '90 seconds'")

    assert ways(hub, crew, "lab-1", "lab-3") is None
    assert ways(hub, crew, "lab-1", "lab-2") == "10.0.0.2"
    hub.sql("UPDATE reaches SET at = at - interval '9 minutes'")
    assert ways(hub, crew, "lab-1", "lab-2") is None


@pytest.mark.parametrize(
    "door",
    [
        Door(0, "long-enough", ["10.0.0.1"]),
        Door(70000, "long-enough", ["10.0.0.1"]),
        Door(7000, "short", ["10.0.0.1"]),
        Door(7000, "with a \x00 in it", ["10.0.0.1"]),
        Door(7000, "long-enough", ["127.0.1.1", "0.0.0.0", "fe80::1", "here"]),
    ],
)
def test_a_door_that_nobody_could_find_is_none(door: Door) -> None:
    assert reaches.clean_door(door) is None


def test_addresses_of_a_door_are_written_in_their_usual_form() -> None:
    door = reaches.clean_door(
        Door(7000, "long-enough", ["FD00:0::1", "10.0.0.1", "10.0.0.1", "127.0.1.1", "127.0.0.1"])
    )

    assert door is not None
    assert door.addresses == ["fd00::1", "10.0.0.1", "127.0.0.1"]


def ways(hub: Hub, crew: Crew, source: str, target: str) -> str | None:
    async def read() -> list[dict[str, str]]:
        async with hub.desk.ledger.transaction() as tx:
            return await tx.rows("ways")

    found = {(row["source"], row["target"]): row["address"] for row in hub.run(read())}
    return found.get((crew.of(source).caller.subject, crew.of(target).caller.subject))


# --- forming --------------------------------------------------------------------------------------------------------


def test_all_members_are_leased_together_on_machines_that_reached_each_other(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=2, most=3, name="digits")

    crew.rounds()

    assert crew.at_work() == ["lab-1", "lab-2", "lab-3"]
    placed = hub.sql("SELECT DISTINCT placed_at FROM attempts")
    assert len(placed) == 1, "in one transaction"
    view = crew.view(mia, gang)
    assert [member.state for member in view.members] == ["placed"] * 3
    assert sorted(member.address for member in view.members) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert view.engine == "torchft"
    check_jobs(hub)
    check_gangs(hub)


def test_a_lease_tells_a_member_its_place(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=3, most=3, name="digits", batch=512)

    crew.rounds()

    lease = crew.of("lab-2").lease
    assert lease.gang is not None
    assert (lease.gang.gang, lease.gang.gang_name) == (gang, "digits")
    assert lease.gang.name == "lab-2"
    assert lease.gang.address == "10.0.0.2"
    assert lease.gang.engine == "torchft"
    assert lease.name == f"digits·{lease.gang.member}"
    assert lease.spec.gang is not None
    assert lease.spec.gang.batch == 512
    assert sorted(hand.lease.gang.member for hand in crew.hands.values() if hand.lease.gang) == [1, 2, 3]


def test_too_few_machines_are_none(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=4, most=4)

    crew.rounds()

    assert crew.at_work() == []
    view = crew.view(mia, gang)
    assert view.state == "queued"
    assert view.reason
    check_gangs(hub)


def test_machines_that_do_not_reach_each_other_are_no_gang_and_the_pair_is_named(hub: Hub, mia: Caller) -> None:
    crew = Crew(hub, "lab-1", "lab-2")
    crew.cut.add(("lab-1", "lab-2"))
    gang = crew.submit(mia, least=2, most=2)

    crew.rounds()

    assert crew.at_work() == []
    reason = crew.view(mia, gang).reason
    assert "lab-1" in reason and "lab-2" in reason, reason


def test_machines_that_reach_each_other_are_found_among_those_that_do_not(hub: Hub, mia: Caller) -> None:
    crew = Crew(hub, "lab-1", "lab-2", "lab-3", cut={("lab-1", "lab-2"), ("lab-3", "lab-1")})
    crew.submit(mia, least=2, most=2)

    crew.rounds()

    assert crew.at_work() == ["lab-2", "lab-3"]


def test_a_member_that_comes_later_joins_the_others(hub: Hub, mia: Caller) -> None:
    crew = Crew(hub, "lab-1", "lab-2")
    gang = crew.submit(mia, least=2, most=3)
    crew.rounds()
    assert crew.states(mia, gang) == ["placed", "placed", "queued"]

    crew.join("lab-3")
    crew.rounds()

    assert crew.states(mia, gang) == ["placed"] * 3
    assert crew.of("lab-3").meeting.address == crew.of("lab-1").meeting.address
    check_gangs(hub)


def test_a_member_that_was_stopped_while_the_pass_thought_leaves_the_others_unplaced(
    hub: Hub, crew: Crew, mia: Caller
) -> None:
    gang = crew.submit(mia, least=3, most=3)
    for _ in range(3):
        for name in crew.hands:
            crew.ask(name)

    async def story() -> int:
        async with hub.desk.ledger.transaction() as tx:
            facts, plan = await placing._decide(await facts_.gather(tx))
            assert len(plan.placed) == 3
            hub.sql("UPDATE runs SET state = 'cancelled', ended_at = now() WHERE id = %(id)s", id=f"m2-{gang}")
            return len(await placing._write(tx, facts, plan))

    assert hub.run(story()) == 0
    assert hub.sql("SELECT * FROM attempts") == []


# --- engines --------------------------------------------------------------------------------------------------------


def test_the_engine_is_torchft_only_if_all_have_it(hub: Hub, mia: Caller) -> None:
    crew = Crew(hub, "lab-1")
    crew.join("lab-2", engines=("plain",))
    gang = crew.submit(mia, least=2, most=2)

    crew.rounds()

    assert crew.view(mia, gang).engine == "plain"
    assert crew.of("lab-1").lease.gang is not None
    assert crew.of("lab-1").lease.gang.engine == "plain"


def test_an_engine_that_is_asked_for_must_be_there(hub: Hub, mia: Caller) -> None:
    crew = Crew(hub, "lab-1")
    crew.join("lab-2", engines=("plain",))
    crew.submit(mia, least=2, most=2, engine="torchft")

    crew.rounds()

    assert crew.at_work() == []


def test_a_machine_without_torch_is_taken_only_if_the_job_brings_it(hub: Hub, mia: Caller) -> None:
    crew = Crew(hub, "lab-1", "lab-2", engines=())
    gang = crew.submit(mia, least=2, most=2)
    crew.rounds()
    assert crew.at_work() == []
    hub.run(gang_requests.stop(hub.desk, mia, gang))

    brings = crew.submit(mia, least=2, most=2, requirements="requirements.txt")
    crew.rounds()

    assert crew.at_work() == ["lab-1", "lab-2"]
    assert crew.view(mia, brings).engine == "plain"


def test_a_torchrun_script_has_no_engine(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=2, most=2, compat=True)

    crew.rounds()

    assert crew.view(mia, gang).engine == "compat"
    lease = next(hand.lease for hand in crew.hands.values() if hand.leases)
    assert lease.gang is not None
    assert lease.gang.engine == ""


# --- people ---------------------------------------------------------------------------------------------------------


def test_the_same_key_is_the_same_gang(hub: Hub, crew: Crew, mia: Caller) -> None:
    first = crew.submit(mia, key="once", least=2, most=2)

    assert crew.submit(mia, key="once", least=2, most=2) == first

    assert hub.one("SELECT count(*) FROM jobs") == 2


def test_a_gang_is_found_by_id_name_front_and_last_and_jobs_never_are(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=2, most=2, name="digits")
    job = hub.submit_job(mia, name="single")

    for ref in (gang, "digits", gang[:9], "last"):
        assert crew.view(mia, ref).id == gang
    for ref in (job, "single", "nothing"):
        with pytest.raises(NotFound, match="gang ls"):
            crew.view(mia, ref)
    for ref in (gang, "digits"):
        with pytest.raises(NotFound):
            hub.job(mia, ref)
    assert hub.job(mia, "last").id == job
    member = hub.job(mia, "digits·1")
    assert (member.gang, member.member) == (gang, 1)


def test_strangers_see_that_a_gang_is_there_and_nothing_of_it(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=2, most=2)
    crew.rounds()
    bob = hub.member("bob")

    view = crew.view(bob, gang)

    assert (view.state, view.mine, view.reason, view.spec) == ("queued", False, "", None)
    assert {member.reason for member in view.members} == {""}
    assert {member.address for member in view.members} == {""}
    with pytest.raises(NotAllowed):
        hub.run(gang_requests.stop(hub.desk, bob, gang))


def test_a_gang_is_not_submitted_as_a_job_nor_a_job_as_a_gang(hub: Hub, crew: Crew, mia: Caller) -> None:
    request = crew.request(least=2, most=2)
    with pytest.raises(BadInput, match="/gangs"):
        hub.run(jobs.submit(hub.desk, mia, JobRequest(request.spec, request.project)))

    lone = JobSpec(["python"])
    with pytest.raises(BadInput, match="how many machines"):
        hub.run(gang_requests.submit(hub.desk, mia, type(request)(lone, request.project)))
    with pytest.raises(BadInput, match="4"):
        crew.submit(mia, least=5, most=4)


def test_members_may_come_back_ten_times_unless_it_is_said_otherwise(hub: Hub, crew: Crew, mia: Caller) -> None:
    usual, told = crew.submit(mia, least=2, most=2), crew.submit(mia, least=2, most=2, retries=3)

    assert {row["retries_left"] for row in hub.sql("SELECT * FROM jobs WHERE gang = %(g)s", g=usual)} == {10}
    assert {row["retries_left"] for row in hub.sql("SELECT * FROM jobs WHERE gang = %(g)s", g=told)} == {3}


def test_gangs_are_listed_the_newest_first(hub: Hub, crew: Crew, mia: Caller) -> None:
    first, second = crew.submit(mia, least=2, most=2), crew.submit(mia, least=2, most=2)
    hub.run(gang_requests.stop(hub.desk, mia, second))

    every = hub.run(gang_requests.list_gangs(hub.desk, mia))
    open_ = hub.run(gang_requests.list_gangs(hub.desk, mia, state="open"))

    assert [view.id for view in every] == [second, first]
    assert [view.id for view in open_] == [first]


def test_figures_of_members_are_the_newest_that_they_logged(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=3, most=3)
    crew.rounds()
    lease = crew.of("lab-1").lease
    assert lease.gang is not None
    for seq, share in ((1, 10), (2, 48)):
        hub.sql(
            "INSERT INTO points (run_id, attempt, seq, step, at, values) VALUES (%(r)s, 1, %(s)s, %(s)s, 0, %(v)s::jsonb)",
            r=lease.run_id,
            s=seq,
            v=f'{{"gang/rank": 0, "gang/share": {share}, "gang/samples_per_s": 99.5}}',
        )
    hub.sql(
        "INSERT INTO points (run_id, attempt, seq, step, at, values) VALUES (%(r)s, 1, 3, 3, 0, '{\"mine\": 1}')",
        r=lease.run_id,
    )

    member = crew.view(mia, gang).members[lease.gang.member - 1]

    assert (member.rank, member.share, member.samples_per_s, member.alone_per_s) == (0, 48, 99.5, 0.0)


def test_whoever_waits_hears_when_the_gang_is_stopped(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=2, most=2)

    async def story() -> str:
        waiting = asyncio.ensure_future(gang_requests.wait(hub.desk, mia, gang, "queued", 30))
        await asyncio.sleep(0.05)
        await gang_requests.stop(hub.desk, mia, gang)
        async with asyncio.timeout(20):
            return (await waiting).state

    assert hub.run(story()) == "cancelled"
    with pytest.raises(BadInput, match="no state"):
        hub.run(gang_requests.wait(hub.desk, mia, gang, "asleep", 0))


def test_a_gang_that_has_ended_is_not_stopped(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=2, most=2)
    crew.rounds()
    for name in crew.at_work():
        crew.end(name)
    crew.rounds()

    with pytest.raises(Conflict, match="has succeeded"):
        hub.run(gang_requests.stop(hub.desk, mia, gang))
