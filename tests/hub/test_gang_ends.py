"""Does a gang go on when members are killed, fail, hang or leave, and does it end as it should?"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator

import pytest

from crew_kit import Crew, check_gangs, emptied, hub_of_module
from hub_kit import Hub, check_jobs
from potluck.errors import Conflict
from potluck.hub import upkeep
from potluck.hub.commands import attempts, gang_requests, gang_upkeep, jobs, placing
from potluck.hub.commands.desk import Caller


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
    return Crew(hub, "lab-1", "lab-2", "lab-3", known=True)


def started(crew: Crew, who: Caller, **changes: object) -> str:
    """A gang whose members all run."""
    gang = crew.submit(who, **changes)
    crew.rounds()
    for name, hand in crew.hands.items():
        for lease in hand.leases.values():
            if lease.gang is not None and lease.gang.gang == gang:
                crew.run(name, lease.id)
    return gang


def by_number(crew: Crew) -> list[str]:
    """The workers, in the order of their members."""

    def number(name: str) -> int:
        gang = crew.of(name).lease.gang
        assert gang is not None
        return gang.member

    return sorted(crew.at_work(), key=number)


# --- the good end ---------------------------------------------------------------------------------------------------


def test_a_gang_runs_with_its_first_member_and_succeeds_with_its_last(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=3, most=3)
    crew.rounds()
    assert crew.view(mia, gang).state == "queued"

    crew.run("lab-2")
    assert crew.view(mia, gang).state == "running"
    for name in crew.at_work():
        crew.end(name)
    crew.rounds()

    view = crew.view(mia, gang)
    assert (view.state, view.exit_code) == ("succeeded", 0)
    assert view.started_at is not None and view.ended_at is not None
    assert "member 1 succeeded" in view.reason
    check_jobs(hub)
    check_gangs(hub)


def test_members_that_still_wait_are_not_needed_when_one_has_succeeded(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=2, most=5)
    assert crew.states(mia, gang) == ["running"] * 3 + ["queued"] * 2

    crew.end("lab-1")
    crew.rounds()

    view = crew.view(mia, gang)
    assert view.state == "running"
    assert [member.reason for member in view.members if member.state == "cancelled"] == ["the gang has finished"] * 2
    crew.end("lab-2")
    crew.end("lab-3", exit_code=1)
    crew.rounds()
    assert crew.view(mia, gang).state == "succeeded"
    check_gangs(hub)


def test_upkeep_hears_of_an_ending_without_being_told(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=3, most=3)

    async def story() -> str:
        upkeep_ = [asyncio.ensure_future(upkeep.run_forever(hub.desk)), asyncio.ensure_future(upkeep.hear(hub.desk))]
        for name in crew.at_work():
            hand = crew.of(name)
            await attempts.end(hub.desk, hand.caller, hand.lease.id, _exited(0))
        try:
            async with asyncio.timeout(20):
                view = await gang_requests.wait(hub.desk, mia, gang, "running", 20)
                return view.state
        finally:
            for each in upkeep_:
                each.cancel()

    assert hub.run(story()) == "succeeded"


def _exited(code: int) -> attempts.JobReport:
    return attempts.JobReport("exited", code)


# --- members come and go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"outcome": "exited", "exit_code": None, "signal": "SIGKILL"},
        {"outcome": "failed", "exit_code": None, "code": "hung", "reason": "in compute for 31 s"},
    ],
)
def test_a_killed_member_comes_back_to_the_others(hub: Hub, crew: Crew, mia: Caller, how: dict[str, object]) -> None:
    gang = started(crew, mia, least=2, most=3, retry_on="lost", retries=3)
    before = {name: hand.lease.id for name, hand in crew.hands.items()}

    crew.end("lab-2", **how)
    crew.rounds()

    assert crew.view(mia, gang).state == "running"
    assert crew.at_work() == ["lab-1", "lab-2", "lab-3"]
    assert crew.of("lab-1").lease.id == before["lab-1"]
    assert crew.of("lab-2").lease.id != before["lab-2"]
    assert crew.of("lab-2").lease.attempt == 2
    assert crew.of("lab-2").meeting.address == crew.of("lab-1").meeting.address
    check_jobs(hub)
    check_gangs(hub)


def test_a_member_whose_machine_dies_comes_back_on_another(hub: Hub, crew: Crew, mia: Caller) -> None:
    started(crew, mia, least=2, most=3)
    crew.join("lab-4")

    crew.die("lab-3")
    crew.rounds()

    assert crew.at_work() == ["lab-1", "lab-2", "lab-4"]
    check_jobs(hub)
    check_gangs(hub)


def test_a_member_that_fails_by_itself_rests_before_it_comes_back(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=2, most=3)

    crew.end("lab-3", exit_code=1)
    crew.rounds()

    assert crew.at_work() == ["lab-1", "lab-2"]
    assert sorted(crew.states(mia, gang)) == ["queued", "running", "running"]
    hub.sql("UPDATE jobs SET held_back = now() - interval '1 second' WHERE held_back IS NOT NULL")
    crew.rounds()
    assert crew.at_work() == ["lab-1", "lab-2", "lab-3"]


def test_a_program_that_fails_on_every_machine_is_not_tried_on_every_machine_again(
    hub: Hub, crew: Crew, mia: Caller
) -> None:
    gang = started(crew, mia, least=2, most=3)
    names = by_number(crew)

    for name, code in zip(names, (3, 1, 1), strict=True):
        crew.end(name, exit_code=code)
    crew.rounds()

    view = crew.view(mia, gang)
    assert (view.state, view.exit_code) == ("failed", 3)
    assert f"member 1 on {names[0]}: exit code 3" in view.reason
    assert hub.one("SELECT count(*) FROM attempts") == 3
    check_jobs(hub)
    check_gangs(hub)


def test_members_that_could_not_be_started_are_told_with_their_reason(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = crew.submit(mia, least=3, most=3)
    crew.rounds()

    for name in crew.at_work():
        crew.end(name, outcome="failed", exit_code=None, code="environment", reason="no such package: torhc")
    crew.rounds()

    view = crew.view(mia, gang)
    assert (view.state, view.exit_code) == ("failed", None)
    assert "torhc" in view.reason


def test_when_all_are_gone_they_come_together_again(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=3, most=3)

    for name in ("lab-1", "lab-2", "lab-3"):
        crew.die(name)
    crew.tend()
    view = crew.view(mia, gang)
    assert (view.state, view.engine, view.host) == ("queued", "", "")

    crew.back("lab-1")
    crew.back("lab-2")
    crew.rounds()
    assert crew.at_work() == [], "three are needed"
    crew.back("lab-3")
    crew.rounds()

    assert crew.at_work() == ["lab-1", "lab-2", "lab-3"]
    assert {hand.meeting.turn for hand in crew.hands.values()} == {crew.of("lab-1").meeting.turn}
    check_jobs(hub)
    check_gangs(hub)


def test_a_gang_that_can_never_be_enough_again_has_failed(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=3, most=3, retries=0, retry_on="any")

    crew.end("lab-2", exit_code=None, signal="SIGSEGV")
    crew.rounds()

    view = crew.view(mia, gang)
    assert view.state == "failed"
    assert "2 members left, and it needs 3" in view.reason
    assert crew.at_work() == [], "the others are not left waiting"
    check_jobs(hub)
    check_gangs(hub)


def test_a_worker_that_is_sent_away_costs_the_gang_one_member_and_no_retry(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=2, most=3)

    hub.run(attempts.take_back(hub.desk, crew.of("lab-1").caller.subject, "its worker left"))
    crew.silent.add("lab-1")
    crew.of("lab-1").leases.clear()
    hub.hang_up(crew.of("lab-1").caller, 1)
    crew.rounds()

    assert crew.view(mia, gang).state == "running"
    assert crew.at_work() == ["lab-2", "lab-3"]
    assert {row["retries_left"] for row in hub.sql("SELECT retries_left FROM jobs")} == {10}


def test_ends_tending_placing_and_stopping_at_the_same_moment_do_not_wait_for_each_other(
    hub: Hub, crew: Crew, mia: Caller
) -> None:
    """Each of them locks members, the gang and what its owner used: in one order, or PostgreSQL ends one of them."""
    gangs = [started(crew, mia, least=3, most=3, cpu="1"), started(crew, mia, least=3, most=3, cpu="1")]
    killed = attempts.JobReport("exited", signal="SIGKILL")
    ends = [attempts.end(hub.desk, hand.caller, lease, killed) for hand in crew.hands.values() for lease in hand.leases]

    hub.together(
        *ends[::2],
        gang_upkeep.tend(hub.desk),
        placing.run_pass(hub.desk),
        *ends[1::2],
        gang_requests.stop(hub.desk, mia, gangs[0]),
        placing.run_pass(hub.desk),
        gang_upkeep.tend(hub.desk),
    )

    for hand in crew.hands.values():
        hand.leases.clear()
        hand.meetings.clear()
    crew.rounds()
    assert crew.view(mia, gangs[0]).state == "cancelled"
    assert crew.states(mia, gangs[1]) == ["placed"] * 3
    check_jobs(hub)
    check_gangs(hub)


# --- torchrun scripts -----------------------------------------------------------------------------------------------


def test_members_of_a_torchrun_script_go_and_come_back_together(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=3, most=3, compat=True)

    crew.end("lab-2", exit_code=None, signal="SIGKILL")
    crew.tend()
    assert crew.states(mia, gang) == ["queued"] * 3
    crew.rounds()

    assert crew.at_work() == ["lab-1", "lab-2", "lab-3"]
    assert {hand.lease.attempt for hand in crew.hands.values()} == {2}
    assert [answer.drop for answer in crew.of("lab-1").heard if answer.drop], "the old process is killed there"
    assert sorted(row["retries_left"] for row in hub.sql("SELECT retries_left FROM jobs")) == [9, 10, 10]
    check_jobs(hub)
    check_gangs(hub)


def test_a_torchrun_script_that_fails_everywhere_has_failed(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=3, most=3, compat=True)

    crew.end("lab-2", exit_code=1)
    crew.tend()
    assert sorted(crew.states(mia, gang)) == ["queued", "running", "running"], "the others are given a moment"
    crew.end("lab-1", exit_code=1)
    crew.end("lab-3", exit_code=1)
    crew.rounds()

    assert crew.view(mia, gang).state == "failed"
    assert hub.one("SELECT count(*) FROM attempts") == 3


def test_a_torchrun_script_whose_others_hang_is_ended_after_a_moment(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=3, most=3, compat=True)
    crew.end("lab-2", exit_code=1)
    crew.tend()

    hub.sql("UPDATE gangs SET hurt_at = hurt_at - interval '4 seconds'")
    crew.tend()

    assert crew.states(mia, gang) == ["queued"] * 3
    crew.rounds()
    assert crew.at_work() == ["lab-1", "lab-2", "lab-3"]


# --- stopping -------------------------------------------------------------------------------------------------------


def test_a_stopped_gang_stops_all_its_members(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=2, most=4)

    view = hub.run(gang_requests.stop(hub.desk, mia, gang))

    assert (view.state, view.reason) == ("cancelled", "stopped by mia")
    assert {member.state for member in view.members} == {"cancelled"}
    assert hub.one("SELECT finished FROM gangs") is False, "three are being ended"
    crew.rounds()
    assert hub.one("SELECT finished FROM gangs") is True
    assert crew.view(mia, gang).reason == "stopped by mia"
    assert hub.run(gang_requests.stop(hub.desk, mia, gang)).state == "cancelled"
    check_jobs(hub)
    check_gangs(hub)


def test_a_gang_that_waits_is_stopped_at_once(hub: Hub, mia: Caller) -> None:
    crew = Crew(hub, "lab-1", known=True)
    gang = crew.submit(mia, least=2, most=2)

    hub.run(gang_requests.stop(hub.desk, mia, gang))

    assert hub.one("SELECT finished FROM gangs") is True
    check_jobs(hub)
    check_gangs(hub)


def test_a_hub_that_dies_while_it_stops_a_gang_goes_on_with_it(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=2, most=4)
    hub.sql("UPDATE gangs SET cancelled_by = 'mia', due = true")
    hub.sql("UPDATE runs SET state = 'cancelled', reason = 'stopped by mia', ended_at = now() WHERE mode = 'gang'")

    hub.restart()
    crew.rounds()

    assert {member.state for member in crew.view(mia, gang).members} == {"cancelled"}
    check_gangs(hub)


def test_who_has_to_leave_takes_the_gang_along(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=2, most=4)

    hub.run(jobs.stop_all_of(hub.desk, mia.subject, actor="the admin"))
    crew.rounds()

    assert crew.view(mia, gang).state == "cancelled"
    check_jobs(hub)
    check_gangs(hub)


def test_one_member_may_be_stopped_and_wanted_again_while_the_others_train(hub: Hub, crew: Crew, mia: Caller) -> None:
    gang = started(crew, mia, least=2, most=3)
    member = crew.of("lab-3").lease.run_id

    hub.run(jobs.stop(hub.desk, mia, member))
    crew.rounds()
    assert crew.at_work() == ["lab-1", "lab-2"]
    assert crew.view(mia, gang).state == "running"

    hub.run(jobs.retry(hub.desk, mia, member))
    crew.rounds()
    assert crew.at_work() == ["lab-1", "lab-2", "lab-3"]
    check_gangs(hub)


def test_a_member_of_a_gang_that_has_ended_is_not_tried_again(hub: Hub, crew: Crew, mia: Caller) -> None:
    started(crew, mia, least=3, most=3)
    member = crew.of("lab-1").lease.run_id
    for name in crew.at_work():
        crew.end(name)
    crew.rounds()

    with pytest.raises(Conflict, match="submit the gang again"):
        hub.run(jobs.retry(hub.desk, mia, member))


# --- whatever happens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 3, 4))])
def test_whatever_happens_no_gang_is_lost_and_no_machine_has_two(hub: Hub, mia: Caller, seed: int) -> None:
    dice = random.Random(seed)
    crew = Crew(hub, "lab-1", "lab-2", "lab-3", "lab-4", known=True)
    gangs = [crew.submit(mia, least=2, most=4, cpu="2"), crew.submit(mia, least=2, most=2, cpu="2", compat=seed > 0)]
    for _ in range(20):
        happen(crew, mia, gangs, dice)
        crew.tend()
        check_jobs(hub)
        check_gangs(hub)
    for name in list(crew.silent):
        crew.back(name)
    for gang in gangs:
        if crew.view(mia, gang).state in ("queued", "running"):
            hub.run(gang_requests.stop(hub.desk, mia, gang))
    crew.rounds()
    assert hub.one("SELECT count(*) FROM gangs WHERE NOT finished") == 0
    check_jobs(hub)
    check_gangs(hub)


def happen(crew: Crew, mia: Caller, gangs: list[str], dice: random.Random) -> None:
    name = dice.choice(list(crew.hands))
    hand = crew.of(name)
    what = dice.choice(["round", "round", "round", "end", "kill", "die", "back", "fail", "stop"])
    if what == "round":
        crew.round()
    elif what == "back" and name in crew.silent:
        crew.back(name)
    elif what == "die" and name not in crew.silent:
        crew.die(name)
    elif what == "stop" and dice.random() < 0.2:
        job = f"m1-{dice.choice(gangs)}"
        with contextlib.suppress(Conflict):
            crew.hub.run(jobs.stop(crew.hub.desk, mia, job))
    elif hand.leases and name not in crew.silent:
        crew.ask(name)  # what the hub took back meanwhile is dropped
        if not hand.leases:
            return
        lease = dice.choice(list(hand.leases))
        if what == "kill":
            crew.end(name, lease, exit_code=None, signal="SIGKILL")
        elif what == "fail" or (what == "end" and dice.random() < 0.3):
            crew.end(name, lease, exit_code=int(what == "fail"))
