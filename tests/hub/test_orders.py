"""Does a worker hear at once what it shall do, and does the hub hear when it is gone?"""

from __future__ import annotations

import asyncio

import pytest

from hub_kit import Hub, check_jobs, machine
from potluck.domain.job import Resources
from potluck.errors import BadInput, Conflict, Fenced, NotKnown
from potluck.hub import upkeep
from potluck.hub.commands import attempts, jobs, machines, people, placing, secrets, work
from potluck.hub.commands.desk import Caller
from potluck.protocol import (
    Blob,
    CheckpointReport,
    JobLease,
    JobProgress,
    JobReport,
    OrdersAnswer,
    Report,
    Rules,
    SecretValue,
    Usage,
)


@pytest.fixture
def hub(embedded_hub: Hub) -> Hub:
    return embedded_hub


@pytest.fixture
def mia(hub: Hub) -> Caller:
    return hub.member("mia")


@pytest.fixture
def box(hub: Hub) -> Caller:
    """A worker that has asked for orders."""
    caller = hub.join("box")
    hub.orders(caller)
    return caller


def given(hub: Hub, worker: Caller, mia: Caller, agent: str = "agent-1", **changes: object) -> JobLease:
    """A lease that has arrived at the worker."""
    hub.submit_job(mia, **changes)
    assert hub.place() == 1
    (lease,) = hub.orders(worker, agent=agent).leases
    return lease


# --- delivery -------------------------------------------------------------------------------------------------------


def test_a_lease_says_all_that_the_worker_needs(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia, cpu="2", memory="3GB", name="digits", patience_s=90.0, env={"A": "b"})

    assert lease.name == "digits"
    assert lease.attempt == 1
    assert lease.owner == mia.subject
    assert lease.owner_name == "mia"
    assert not lease.owns_worker
    assert lease.ttl_s == 90
    assert (lease.cpu, lease.memory_bytes, lease.gpus) == (2.0, 3 * 10**9, [])
    assert lease.spec.env == {"A": "b"}
    assert hub.job(mia, lease.run_id).state == "placed"
    assert hub.job(mia, lease.run_id).worker == "box"


def test_a_waiting_worker_hears_of_its_job_at_once(hub: Hub, mia: Caller, box: Caller) -> None:
    async def story() -> OrdersAnswer:
        upkeep_ = asyncio.ensure_future(upkeep.run_forever(hub.desk))
        waiting = asyncio.ensure_future(hub.ask_orders(box, wait_s=30))
        await asyncio.sleep(0)
        await jobs.submit(hub.desk, mia, request)
        try:
            async with asyncio.timeout(20):  # far less than the thirty seconds that it would wait
                return await waiting
        finally:
            upkeep_.cancel()

    request = hub.job_request()

    answer = hub.run(story())

    assert len(answer.leases) == 1


def test_a_lease_whose_answer_was_lost_is_given_again(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)

    assert [again.id for again in hub.orders(box).leases] == [lease.id]
    assert hub.orders(box, lease.id).leases == []


def test_an_agent_that_was_restarted_has_lost_its_jobs(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia, retries=1)
    hub.hang_up(box, 0)

    assert hub.orders(box, agent="agent-2").leases == []

    view = hub.job(mia, lease.run_id)
    assert (view.state, view.retries_left) == ("queued", 0)
    assert "restarted" in view.attempts[0].reason
    assert view.attempts[0].state == "lost"
    check_jobs(hub)


def test_an_agent_that_was_restarted_may_still_report_what_had_ended(hub: Hub, mia: Caller, box: Caller) -> None:
    """Its spool names the lease, so it is not lost."""
    lease = given(hub, box, mia)
    hub.hang_up(box, 0)

    assert hub.orders(box, lease.id, agent="agent-2") == OrdersAnswer()

    assert hub.end_job(box, lease.id).accepted
    assert hub.job(mia, lease.run_id).state == "succeeded"


def test_a_second_agent_with_the_same_credential_waits_until_the_first_is_gone(
    hub: Hub, mia: Caller, box: Caller
) -> None:
    lease = given(hub, box, mia)

    with pytest.raises(Conflict, match="another agent works as box"):
        hub.orders(box, agent="agent-2")

    assert hub.orders(box, lease.id).drop == []  # the first has lost nothing
    assert hub.job(mia, lease.run_id).state == "placed"
    hub.end_job(box, lease.id)
    hub.sql("UPDATE workers SET ordered_at = now() - interval '31 seconds' WHERE name = 'box'")
    assert hub.orders(box, agent="agent-2") == OrdersAnswer()  # a machine that lost its power says no good-bye


def test_a_lease_is_given_to_one_agent_only_whoever_waits(hub: Hub, mia: Caller, box: Caller) -> None:
    """Two that were let in one after the other, because the first had said good-bye, and both waited."""

    async def waiting(count: int) -> None:
        topic = f"orders:{box.subject}"
        while len(hub.desk.news._waiting.get(topic, ())) < count:
            await asyncio.sleep(0.01)  # a poll: the test's own time limit bounds it

    async def story() -> list[OrdersAnswer]:
        first = asyncio.ensure_future(hub.ask_orders(box, agent="agent-1", wait_s=2))
        await waiting(1)
        await work.leave(hub.desk, box)
        second = asyncio.ensure_future(hub.ask_orders(box, agent="agent-2", wait_s=2))
        await waiting(2)
        await placing.run_pass(hub.desk)
        return list(await asyncio.gather(first, second))

    hub.submit_job(mia)
    answers = hub.run(story())

    assert sum(len(answer.leases) for answer in answers) == 1


def test_what_is_no_live_lease_of_the_worker_is_dropped(hub: Hub, mia: Caller, box: Caller) -> None:
    other = hub.join("other")
    lease = given(hub, box, mia)

    assert hub.orders(other, lease.id, "nonsense").drop == [lease.id, "nonsense"]
    assert hub.orders(box, lease.id).drop == []
    hub.end_job(box, lease.id)
    assert hub.orders(box, lease.id).drop == [lease.id]


def test_a_stopped_job_is_ended_with_a_short_grace_and_said_once_in_a_while(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia, grace_s=600.0)
    hub.run(jobs.stop(hub.desk, mia, lease.run_id))

    (end,) = hub.orders(box, lease.id, wait_s=30).end
    assert (end.lease_id, end.grace_s) == (lease.id, 10.0)
    assert "mia" in end.reason

    async def again() -> bool:
        """The worker is ending it: it is not answered at once again, or it would ask without a pause."""
        asked = asyncio.ensure_future(hub.ask_orders(box, lease.id, wait_s=30))
        done, _ = await asyncio.wait({asked}, timeout=0.5)
        asked.cancel()
        return bool(done)

    assert not hub.run(again())
    assert hub.orders(box, lease.id).end == [end]


def test_a_worker_that_never_says_that_a_stopped_job_ended_is_not_waited_for(
    hub: Hub, mia: Caller, box: Caller
) -> None:
    lease = given(hub, box, mia)
    hub.run(attempts.progress(hub.desk, box, lease.id, JobProgress("running")))
    hub.run(jobs.stop(hub.desk, mia, lease.run_id))
    assert hub.run(attempts.expire(hub.desk)) == 0
    with pytest.raises(Conflict, match="still being ended"):
        hub.run(jobs.retry(hub.desk, mia, lease.run_id))

    hub.sql("UPDATE runs SET ended_at = now() - interval '16 minutes' WHERE id = %(id)s", id=lease.run_id)
    hub.orders(box, lease.id)  # it renews all the same
    assert hub.run(attempts.expire(hub.desk)) == 1

    check_jobs(hub)
    assert hub.orders(box, lease.id).drop == [lease.id]
    view = hub.job(mia, lease.run_id)
    assert (view.state, view.attempts[0].state) == ("cancelled", "lost")
    assert "did not say" in view.attempts[0].reason
    assert hub.run(jobs.retry(hub.desk, mia, lease.run_id)).state == "queued"


def test_a_job_that_is_stopped_before_it_arrives_has_nothing_to_end(hub: Hub, mia: Caller, box: Caller) -> None:
    job = hub.submit_job(mia)
    hub.place()

    view = hub.run(jobs.stop(hub.desk, mia, job))

    assert view.state == "cancelled"
    assert view.attempts[0].state == "cancelled"
    assert hub.orders(box) == OrdersAnswer()
    check_jobs(hub)


def test_a_drained_worker_is_told_and_gets_nothing_new(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)
    admin = Caller("admin", "admin-1", "admin")
    assert hub.run(machines.drain(hub.desk, admin, "box", draining=True, reason="a lesson")).draining
    job = hub.submit_job(mia)

    assert hub.place() == 0
    assert hub.orders(box, lease.id).draining
    assert hub.end_job(box, lease.id).accepted
    hub.run(machines.drain(hub.desk, admin, "box", draining=False))
    assert hub.place() == 1
    assert hub.job(mia, job).state == "placed"


def test_a_revoked_worker_is_refused_and_its_job_waits_again(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia, retries=0)

    async def story() -> None:
        waiting = asyncio.ensure_future(hub.ask_orders(box, lease.id, wait_s=30))
        await asyncio.sleep(0.05)
        await people.revoke_worker(hub.desk, "box", actor="admin")
        with pytest.raises(NotKnown):
            await waiting

    hub.run(story())

    view = hub.job(mia, lease.run_id)
    assert (view.state, view.retries_left) == ("queued", 0), "it is not the job's fault"
    check_jobs(hub)


def test_a_worker_that_leaves_gives_its_jobs_back(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia, retries=0)

    hub.run(work.leave(hub.desk, box))

    assert hub.job(mia, lease.run_id).state == "queued"
    hub.orders(box)  # a request that was on its way
    assert hub.place() == 0
    hub.orders(box, agent="agent-2")
    assert hub.place() == 1


# --- signs of life --------------------------------------------------------------------------------------------------


def test_asking_renews_what_is_held_and_nothing_else(hub: Hub, mia: Caller, box: Caller) -> None:
    held, other = given(hub, box, mia, patience_s=60.0), hub.join("other")
    hub.orders(other)

    def deadline() -> float:
        sql = "SELECT EXTRACT(EPOCH FROM deadline - now())::float8 FROM leases WHERE id = %(id)s"
        return float(hub.one(sql, id=held.id))

    hub.sql("UPDATE leases SET deadline = now() + interval '5 seconds'")
    hub.orders(other, held.id)
    assert deadline() < 6
    hub.orders(box, held.id)
    assert 50 < deadline() <= 60


def test_a_worker_that_hangs_up_is_marked_and_its_job_is_lost_after_ten_seconds(
    hub: Hub, mia: Caller, box: Caller
) -> None:
    lease = given(hub, box, mia)

    async def story() -> None:
        cut = asyncio.Event()

        async def gone() -> None:
            await cut.wait()

        waiting = asyncio.ensure_future(hub.ask_orders(box, lease.id, wait_s=30, gone=gone))
        await asyncio.sleep(0.05)
        cut.set()
        assert await waiting == OrdersAnswer()

    hub.run(story())
    assert hub.one("SELECT hung_up_at IS NOT NULL FROM workers WHERE name = 'box'")
    hub.run(attempts.expire(hub.desk))
    assert hub.job(mia, lease.run_id).state == "placed", "it has ten seconds to come back"

    hub.hang_up(box)
    assert hub.run(attempts.expire(hub.desk)) == 1
    assert "connection" in hub.job(mia, lease.run_id).attempts[0].reason
    check_jobs(hub)


def test_a_worker_that_hung_up_and_asks_again_has_lost_nothing(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)
    hub.hang_up(box)

    hub.orders(box, lease.id)

    assert hub.run(attempts.expire(hub.desk)) == 0
    assert hub.end_job(box, lease.id).accepted


def test_a_hang_up_that_is_noticed_late_does_not_mark_a_worker_that_has_asked_again(hub: Hub, box: Caller) -> None:
    async def story() -> None:
        cut = asyncio.Event()

        async def gone() -> None:
            await cut.wait()

        old = asyncio.ensure_future(hub.ask_orders(box, wait_s=30, gone=gone))
        await asyncio.sleep(0.05)
        await hub.ask_orders(box)
        cut.set()
        await old

    hub.run(story())

    assert hub.one("SELECT hung_up_at IS NULL FROM workers WHERE name = 'box'")


def test_a_hub_that_goes_down_says_nothing_of_the_agents(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)

    async def story() -> None:
        async def gone() -> None:
            while not hub.desk.news.closed:
                await asyncio.sleep(0.01)

        waiting = asyncio.ensure_future(hub.ask_orders(box, lease.id, wait_s=30, gone=gone))
        await asyncio.sleep(0.05)
        hub.desk.news.close()
        await waiting

    hub.run(story())
    assert hub.one("SELECT hung_up_at IS NULL FROM workers WHERE name = 'box'")

    hub.hang_up(box)
    hub.let_lapse()
    hub.restart()
    assert hub.run(attempts.expire(hub.desk)) == 0, "nobody could ask while it was away"


def test_silence_within_the_patience_costs_nothing_and_beyond_it_one_retry(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia, retries=1)
    assert hub.run(attempts.expire(hub.desk)) == 0

    hub.let_lapse(lease.id)
    hub.run(attempts.expire(hub.desk))

    view = hub.job(mia, lease.run_id)
    assert (view.state, view.retries_left) == ("queued", 0)
    assert "no sign of life for 120 s" in view.reason
    answer = hub.end_job(box, lease.id)
    assert not answer.accepted
    assert "too late" in answer.reason


def test_a_job_that_never_reached_its_worker_keeps_its_retries(hub: Hub, mia: Caller, box: Caller) -> None:
    job = hub.submit_job(mia, retries=0)
    hub.place()
    hub.let_lapse()

    hub.run(attempts.expire(hub.desk))

    assert hub.job(mia, job).state == "queued"


def test_pool_upkeep_leaves_jobs_alone(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)
    hub.let_lapse(lease.id)

    assert hub.run(work.expire(hub.desk)) == 0
    with pytest.raises(BadInput, match="job"):
        hub.report(box, lease.id, Report("done"))
    assert hub.job(mia, lease.run_id).state == "placed"


# --- progress and the end -------------------------------------------------------------------------------------------


def test_an_attempt_goes_on_and_never_back(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)

    for state in ("preparing", "running", "preparing"):
        said = JobProgress(state, "so it is", "process", {state: "1"})
        hub.run(attempts.progress(hub.desk, box, lease.id, said))

    view = hub.job(mia, lease.run_id)
    assert view.state == view.attempts[0].state == "running"
    assert view.started_at is not None
    assert view.attempts[0].environment == {"preparing": "1", "running": "1"}


def test_progress_of_a_lease_that_is_over_is_fenced(hub: Hub, mia: Caller, box: Caller) -> None:
    lease, other = given(hub, box, mia), hub.join("other")

    with pytest.raises(Fenced):
        hub.run(attempts.progress(hub.desk, other, lease.id, JobProgress("running")))
    hub.end_job(box, lease.id)
    with pytest.raises(Fenced):
        hub.run(attempts.progress(hub.desk, box, lease.id, JobProgress("running")))
    tree = hub.project()
    with pytest.raises(Fenced):
        hub.run(attempts.checkpoint(hub.desk, box, lease.id, CheckpointReport(tree, 1, 1)))
    with pytest.raises(BadInput, match="banana"):
        hub.run(attempts.progress(hub.desk, box, lease.id, JobProgress("banana")))


@pytest.mark.parametrize(
    ("report", "state", "reason"),
    [
        (JobReport("exited", exit_code=0), "succeeded", "exit code 0"),
        (JobReport("exited", exit_code=3), "failed", "exit code 3"),
        (JobReport("exited", signal="SIGSEGV"), "failed", "SIGSEGV"),
        (JobReport("failed", exit_code=137, reason="killed by the memory limit"), "failed", "memory limit"),
    ],
)
def test_the_end_of_an_attempt_is_the_end_of_the_job(
    hub: Hub, mia: Caller, box: Caller, report: JobReport, state: str, reason: str
) -> None:
    lease = given(hub, box, mia)

    answer = hub.run(attempts.end(hub.desk, box, lease.id, report))
    again = hub.run(attempts.end(hub.desk, box, lease.id, report))

    assert answer.accepted
    assert again.accepted
    view = hub.job(mia, lease.run_id)
    assert view.state == state
    assert reason in view.reason
    assert view.exit_code == report.exit_code
    assert view.ended_at is not None
    assert hub.orders(box) == OrdersAnswer()
    check_jobs(hub)


def test_a_failed_job_is_tried_again_only_if_its_owner_wants_that(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia, retries=2, retry_on="any")

    hub.end_job(box, lease.id, 1)
    assert hub.job(mia, lease.run_id).state == "queued"
    for left in (0, 0):
        hub.place()
        (lease,) = hub.orders(box).leases
        hub.end_job(box, lease.id, 1)
        assert hub.job(mia, lease.run_id).retries_left == left

    assert hub.job(mia, lease.run_id).state == "failed"
    assert lease.attempt == 3


def test_a_job_that_is_given_back_goes_elsewhere(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia, retries=0)

    hub.end_job(box, lease.id, outcome="returned", exit_code=None, reason="my owner said no")
    assert hub.place() == 0

    other = hub.join("other")
    hub.orders(other)
    assert hub.place() == 1
    (again,) = hub.orders(other).leases
    assert again.run_id == lease.run_id
    assert hub.job(mia, lease.run_id).retries_left == 0


def test_a_job_that_everybody_gives_back_fails_at_last(hub: Hub, mia: Caller, box: Caller) -> None:
    job = hub.submit_job(mia)

    for _ in range(21):
        hub.sql("UPDATE jobs SET avoid = '{}'")
        hub.place()
        (lease,) = hub.orders(box).leases
        hub.end_job(box, lease.id, outcome="returned", exit_code=None, reason="no such executor")

    view = hub.job(mia, job)
    assert view.state == "failed"
    assert "no such executor" in view.reason


def test_the_next_attempt_goes_on_from_the_newest_checkpoint(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)
    tree = hub.project(weights=b"123")
    assert lease.resume_from is None
    hub.run(attempts.checkpoint(hub.desk, box, lease.id, CheckpointReport(tree, 1, 3)))

    hub.let_lapse()
    hub.run(attempts.expire(hub.desk))
    hub.place()
    (again,) = hub.orders(box).leases

    assert again.attempt == 2
    assert again.resume_from == tree
    assert hub.job(mia, lease.run_id).attempts[0].checkpoint == tree


def test_outputs_that_never_arrived_do_not_keep_a_job_from_ending(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)

    answer = hub.end_job(box, lease.id, outputs=Blob("0" * 64, 5))

    assert answer.accepted
    view = hub.job(mia, lease.run_id)
    assert view.state == "succeeded"
    assert view.attempts[0].outputs is None
    assert "outputs are lost" in view.attempts[0].reason


def test_a_report_is_refused_when_it_makes_no_sense(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)

    with pytest.raises(BadInput, match="banana"):
        hub.end_job(box, lease.id, outcome="banana")
    with pytest.raises(BadInput, match="exit code"):
        hub.end_job(box, lease.id, exit_code=None)
    assert not hub.end_job(hub.join("other"), lease.id).accepted
    assert not hub.end_job(box, "00000000-0000-4000-8000-000000000000").accepted


def test_numbers_beyond_reason_are_cut(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)
    usage = Usage(float("nan"), -1.0, 10**40)

    hub.end_job(
        box, lease.id, 10**30, usage=usage, log_bytes=10**40, signal="\x1b[31m" + "x" * 500, reason="a\0b" * 999
    )

    view = hub.job(mia, lease.run_id)
    assert view.state == "failed"
    assert view.attempts[0].usage.wall_s == 0
    assert "\x1b" not in view.attempts[0].signal


# --- secrets and rules ----------------------------------------------------------------------------------------------


def test_secrets_go_along_with_the_lease_and_nowhere_else(hub: Hub, mia: Caller, box: Caller) -> None:
    hub.run(secrets.put(hub.desk, mia, "TOKEN", SecretValue("s3cr3t")))

    lease = given(hub, box, mia, secrets=["TOKEN"])

    assert lease.secrets == {"TOKEN": "s3cr3t"}
    assert "s3cr3t" not in repr(lease)
    assert "s3cr3t" not in repr(hub.job(mia, lease.run_id))


def test_a_secret_that_was_removed_meanwhile_fails_the_job_with_its_name(hub: Hub, mia: Caller, box: Caller) -> None:
    hub.run(secrets.put(hub.desk, mia, "TOKEN", SecretValue("s3cr3t")))
    job = hub.submit_job(mia, secrets=["TOKEN"])
    hub.place()
    hub.run(secrets.remove(hub.desk, mia, "TOKEN"))

    assert hub.orders(box).leases == []

    view = hub.job(mia, job)
    assert view.state == "failed"
    assert "TOKEN" in view.reason


def test_whose_the_machine_is_decides_who_may_use_it(hub: Hub, mia: Caller, box: Caller) -> None:
    noa = hub.member("noa")
    mine = Rules(whose="me", runtime="any")
    hub.orders(box, rules=mine)
    hub.submit_job(mia)
    assert hub.place() == 0

    caller, token = hub.join_with_token("laptop")
    view = hub.run(machines.own(hub.desk, noa, token))
    assert view.owner == "noa"
    hub.orders(caller, rules=mine)
    job = hub.submit_job(noa)
    assert hub.place() == 1
    (lease,) = hub.orders(caller, rules=mine).leases
    assert lease.run_id == job
    assert lease.owns_worker


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"agent": ""}, "agent"),
        ({"agent": "a\x1bb"}, "agent"),
        ({"rules": Rules(accept="everything")}, "accept"),
        ({"rules": Rules(max_tasks=10**9)}, "max_tasks"),
        ({"labels": {"room\n": "2"}}, "label"),
        ({"labels": {str(n): "" for n in range(65)}}, "labels"),
    ],
)
def test_a_worker_that_says_nonsense_is_told_so(hub: Hub, box: Caller, changes: dict[str, object], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        hub.orders(box, **changes)  # type: ignore[arg-type]


def test_what_a_worker_says_of_itself_is_seen_and_an_idle_request_writes_one_row(hub: Hub, box: Caller) -> None:
    hub.orders(box, labels={"room": "2"}, now=machine(cpu=8, gpus_gb=(24,)))

    (view,) = [each for each in hub.run(people.workers(hub.desk)) if each.name == "box"]

    assert view.labels == {"room": "2"}
    assert view.machine["cpu_cores"] == 8
    assert view.executors == ["process"]
    assert view.state == "idle"


def test_a_thousand_workers_wait_at_once_and_each_hears_its_own_news(hub: Hub, mia: Caller) -> None:
    hub.sql("INSERT INTO workers (id, name) SELECT 'w-' || n, 'w' || n FROM generate_series(1, 1000) n")
    crowd = [Caller("worker", f"w-{n}", f"w{n}") for n in range(1, 1001)]
    request = hub.job_request(resources=Resources(labels={"seat": "w-777"}))

    async def story() -> dict[str, OrdersAnswer]:
        waiting = {}
        for start in range(0, 1000, 100):
            for each in crowd[start : start + 100]:
                asked = hub.ask_orders(each, wait_s=30, labels={"seat": each.subject})
                waiting[each.subject] = asyncio.ensure_future(asked)
            while hub.one("SELECT count(*) FROM workers WHERE ordered_at IS NOT NULL") < start + 100:
                await asyncio.sleep(0.01)
        await jobs.submit(hub.desk, mia, request)
        assert (await placing.run_pass(hub.desk)).placed == 1
        await asyncio.wait(waiting.values(), return_when=asyncio.FIRST_COMPLETED)
        answers = {id_: each.result() for id_, each in waiting.items() if each.done()}
        for each in waiting.values():
            each.cancel()
        return answers

    answers = hub.run(story())

    assert list(answers) == ["w-777"]
    assert len(answers["w-777"].leases) == 1


def test_resources_that_no_job_asked_for_are_not_reserved(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia, resources=Resources())

    assert (lease.memory_bytes, lease.disk_bytes, lease.vram_bytes) == (0, 0, 0)


def test_nothing_is_read_or_kept_for_a_worker_without_the_lease(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)
    spy = hub.join("spy")
    loot = hub.project(loot=b"bytes that a sweep should take")
    strange = "00000000-0000-4000-8000-000000000000"

    for id_ in (lease.id, strange):
        with pytest.raises(Fenced):
            hub.run(attempts.checkpoint(hub.desk, spy, id_, CheckpointReport(loot, 1, 1)))
        assert not hub.end_job(spy, id_, outputs=loot).accepted
    hub.end_job(box, lease.id)
    assert not hub.end_job(box, lease.id, code=1, outputs=loot).accepted  # it was its own, and is over

    assert not hub.one("SELECT kept FROM blobs WHERE hash = %(h)s", h=loot.hash)


@pytest.mark.parametrize("note", ["a\0b", "\ud800", "x" * 300_000])
def test_an_end_does_not_fail_on_notes_that_the_ledger_cannot_hold(
    hub: Hub, mia: Caller, box: Caller, note: str
) -> None:
    lease = given(hub, box, mia)

    assert hub.end_job(box, lease.id, environment={"packages": [note]}).accepted

    view = hub.job(mia, lease.run_id)
    assert view.state == "succeeded"
    assert "left out" in str(view.attempts[0].environment["note"])


def test_notes_do_not_grow_without_end(hub: Hub, mia: Caller, box: Caller) -> None:
    lease = given(hub, box, mia)

    for n in range(10):
        said = JobProgress("running", environment={f"note {n}": "x" * 200_000})
        hub.run(attempts.progress(hub.desk, box, lease.id, said))

    assert len(hub.job(mia, lease.run_id).attempts[0].environment) == 5
