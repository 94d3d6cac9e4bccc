"""How is a job submitted, seen, stopped and tried again, and who may?"""

from __future__ import annotations

import asyncio

import pytest

from hub_kit import Hub, check_jobs, machine
from potluck.domain.job import JobSpec, Resources
from potluck.errors import BadInput, Conflict, NotAllowed, NotFound
from potluck.hub import upkeep
from potluck.hub.commands import attempts, board, jobs, machines, placing, runs, secrets
from potluck.hub.commands.desk import Caller
from potluck.protocol import Blob, GitState, JobRequest, QueueMove, Quota, SecretValue

ADMIN = Caller("admin", "admin-1", "admin")


@pytest.fixture
def hub(embedded_hub: Hub) -> Hub:
    return embedded_hub


@pytest.fixture
def mia(hub: Hub) -> Caller:
    return hub.member("mia")


@pytest.fixture
def noa(hub: Hub) -> Caller:
    return hub.member("noa")


@pytest.fixture
def box(hub: Hub) -> Caller:
    caller = hub.join("box")
    hub.orders(caller)
    return caller


# --- submitting -----------------------------------------------------------------------------------------------------


def test_a_job_waits_in_the_line(hub: Hub, mia: Caller) -> None:
    job = hub.submit_job(mia, name="digits", cpu="2", priority=3)

    view = hub.job(mia, job)
    assert job.startswith("digits-")
    assert (view.state, view.owner, view.priority, view.mine) == ("queued", "mia", 3, True)
    assert "2 cores" in view.needs
    assert view.spec is not None
    assert view.spec.command == ["python", "train.py"]
    check_jobs(hub)


def test_the_same_key_is_the_same_job_but_another_persons_key_is_another(hub: Hub, mia: Caller, noa: Caller) -> None:
    first, second = hub.submit_job(mia, key="k"), hub.submit_job(mia, key="k")

    assert first == second
    assert hub.submit_job(noa, key="k") != first


def test_two_requests_with_one_key_at_one_moment_are_one_job(hub: Hub, mia: Caller) -> None:
    request = hub.job_request()

    both = hub.together(*(jobs.submit(hub.desk, mia, request, key="k") for _ in range(4)))

    assert len({view.id for view in both}) == 1


def test_what_could_never_run_is_refused_at_submit(hub: Hub, mia: Caller, box: Caller) -> None:
    for changes, match in [
        ({"gpu": "8"}, "GPU"),
        ({"cpu": "64"}, "core"),
        ({"cpu": "many"}, "cpu"),
        ({"command": []}, "command"),
        ({"env": {"A\x00B": "c"}}, "env"),
        ({"secrets": ["TOKEN"]}, "TOKEN"),
        ({"retry_on": "never"}, "retry_on"),
    ]:
        with pytest.raises(BadInput, match=match):
            hub.submit_job(mia, **changes)
    assert hub.one("SELECT count(*) FROM jobs") == 0


def test_a_hub_without_any_machine_takes_every_job(hub: Hub, mia: Caller) -> None:
    job = hub.submit_job(mia, gpu="8", cpu="64")

    assert hub.job(mia, job).state == "queued"


def test_a_project_must_be_here_before_its_job(hub: Hub, mia: Caller) -> None:
    with pytest.raises(BadInput, match="upload"):
        hub.run(jobs.submit(hub.desk, mia, JobRequest(JobSpec(["true"]), Blob("0" * 64, 3))))


def test_where_the_code_came_from_is_kept_without_credentials(hub: Hub, mia: Caller) -> None:
    git = GitState("a" * 40, "main\x1b[2J", True, None, "https://user:token@example.org/x.git")
    request = hub.job_request()

    view = hub.run(jobs.submit(hub.desk, mia, JobRequest(request.spec, request.project, git)))

    assert view.git is not None
    assert view.git.remote == "https://example.org/x.git"
    assert "\x1b" not in view.git.branch


def test_a_dry_run_says_where_the_job_would_go_and_stores_nothing(hub: Hub, mia: Caller, box: Caller) -> None:
    there = hub.run(jobs.outlook(hub.desk, mia, hub.job_request()))
    hub.orders(box, now=machine(cpu=8, gpus_gb=(24,)), agent="agent-1")
    hub.submit_job(noa := hub.member("noa"), gpu="1")
    hub.place()
    not_now = hub.run(jobs.outlook(hub.desk, noa, hub.job_request(gpu="1")))

    assert there.would_run_on == "box"
    assert not_now.would_run_on == ""
    assert not_now.reason
    assert hub.one("SELECT count(*) FROM jobs") == 1


# --- finding and seeing ---------------------------------------------------------------------------------------------


def test_a_job_is_found_by_id_name_front_and_last_and_ones_own_come_first(hub: Hub, mia: Caller, noa: Caller) -> None:
    mine = hub.submit_job(mia, name="digits")
    theirs = hub.submit_job(noa, name="digits")

    assert hub.job(mia, mine).id == mine
    assert hub.job(mia, "digits").id == mine
    assert hub.job(noa, "digits").id == theirs
    assert hub.job(mia, "last").id == mine
    assert hub.job(mia, theirs[:-1]).id == theirs
    with pytest.raises(BadInput, match="more letters"):
        hub.job(mia, "digi")
    with pytest.raises(NotFound, match="potluck ps"):
        hub.job(mia, "nothing")


def test_others_see_that_a_job_is_there_and_nothing_of_what_is_in_it(hub: Hub, mia: Caller, noa: Caller) -> None:
    job = hub.submit_job(mia)
    hub.run(jobs.stop(hub.desk, mia, job))

    for who in (noa, Caller("viewer", "v-1", "vera"), Caller("worker", "w-1", "box")):
        seen = hub.job(who, job)
        listed = hub.run(jobs.list_jobs(hub.desk, who))
        for view in (seen, *listed):
            assert (view.id, view.state, view.mine) == (job, "cancelled", False)
            assert (view.spec, view.project, view.git, view.attempts, view.reason) == (None, None, None, [], "")
    assert hub.job(ADMIN, job).spec is not None


def test_events_of_a_job_tell_others_only_that_it_moved(hub: Hub, mia: Caller, noa: Caller, box: Caller) -> None:
    job = hub.submit_job(mia)
    hub.place()
    (lease,) = hub.orders(box).leases
    hub.end_job(box, lease.id, outcome="failed", exit_code=1, reason="the password was hunter2")

    mine = hub.run(runs.events(hub.desk, ref=job, caller=mia))
    theirs = hub.run(runs.events(hub.desk, caller=noa))
    strangers = hub.run(runs.events(hub.desk))

    assert [event.kind for event in mine] == ["job.queued", "job.placed", "job.failed"]
    assert "hunter2" in mine[-1].text
    assert "hunter2" not in str(theirs)
    assert "hunter2" not in str(strangers)
    assert any(event.kind == "job.failed" and job in event.text for event in theirs)


def test_lists_show_the_newest_first_and_the_open_ones_alone_on_demand(hub: Hub, mia: Caller) -> None:
    first, second = hub.submit_job(mia), hub.submit_job(mia)
    hub.run(jobs.stop(hub.desk, mia, first))

    assert [view.id for view in hub.run(jobs.list_jobs(hub.desk, mia))] == [second, first]
    assert [view.id for view in hub.run(jobs.list_jobs(hub.desk, mia, state="open"))] == [second]
    assert len(hub.run(jobs.list_jobs(hub.desk, mia, limit=1))) == 1
    with pytest.raises(BadInput):
        hub.run(jobs.list_jobs(hub.desk, mia, state="banana"))


def test_pool_runs_and_jobs_do_not_meet(hub: Hub, mia: Caller) -> None:
    run = hub.create_run(name="digits")
    job = hub.submit_job(mia, name="digits")

    assert [view.id for view in hub.run(runs.list_runs(hub.desk))] == [run]
    assert [brief.id for brief in hub.run(board.briefs(hub.desk))] == [run]
    assert hub.view("digits").id == hub.view("last").id == run
    assert hub.job(mia, "digits").id == hub.job(mia, "last").id == job
    with pytest.raises(NotFound):
        hub.view(job)
    with pytest.raises(NotFound):
        hub.job(mia, run)
    hub.run(upkeep.run_once(hub.desk))
    assert hub.job(mia, job).state == "queued"


def test_whoever_waits_for_a_job_hears_of_its_next_state(hub: Hub, mia: Caller) -> None:
    job = hub.submit_job(mia)

    async def story() -> str:
        waiting = asyncio.ensure_future(jobs.wait(hub.desk, mia, job, "queued", 30))
        await asyncio.sleep(0.05)
        await jobs.stop(hub.desk, mia, job)
        async with asyncio.timeout(20):
            return (await waiting).state

    assert hub.run(story()) == "cancelled"
    assert hub.run(jobs.wait(hub.desk, mia, job, "queued", 30)).state == "cancelled"
    assert hub.run(jobs.wait(hub.desk, mia, job, "cancelled", 0)).state == "cancelled"
    with pytest.raises(BadInput):
        hub.run(jobs.wait(hub.desk, mia, job, "banana", 0))


# --- stopping and trying again --------------------------------------------------------------------------------------


def test_a_job_that_waits_is_cancelled_at_once_and_stays_so(hub: Hub, mia: Caller, box: Caller) -> None:
    job = hub.submit_job(mia)

    assert hub.run(jobs.stop(hub.desk, mia, job)).state == "cancelled"

    assert hub.run(jobs.stop(hub.desk, mia, job)).state == "cancelled"
    assert hub.place() == 0
    assert "mia" in hub.job(mia, job).reason
    check_jobs(hub)


@pytest.mark.parametrize("outcome", ["exited", "cancelled", "failed", "returned", "silence"])
def test_a_job_that_was_stopped_stays_so_whatever_its_worker_says(
    hub: Hub, mia: Caller, box: Caller, outcome: str
) -> None:
    job = hub.submit_job(mia, cpu="4", retry_on="any")
    hub.place()
    (lease,) = hub.orders(box).leases
    assert hub.run(jobs.stop(hub.desk, mia, job)).state == "cancelled"
    hub.submit_job(mia, cpu="4")
    assert hub.place() == 0, "its place is taken until it has ended"
    with pytest.raises(Conflict, match="still being ended"):
        hub.run(jobs.retry(hub.desk, mia, job))
    check_jobs(hub)

    if outcome == "silence":
        hub.let_lapse()
        hub.run(attempts.expire(hub.desk))
    else:
        assert hub.end_job(box, lease.id, outcome=outcome).accepted

    view = hub.job(mia, job)
    assert view.state == "cancelled"
    assert "stopped by mia" in view.reason
    assert hub.place() == 1
    check_jobs(hub)


def test_an_ended_job_may_be_tried_again_with_all_its_retries(hub: Hub, mia: Caller, box: Caller) -> None:
    job = hub.submit_job(mia, retries=1)
    for _ in range(2):
        hub.place()
        (lease,) = hub.orders(box).leases
        for agent in ("agent-2", "agent-1"):  # its agent was restarted, twice
            hub.hang_up(box, 0)
            hub.orders(box, agent=agent)
    assert hub.job(mia, job).state == "lost"

    view = hub.run(jobs.retry(hub.desk, mia, job))

    assert (view.state, view.retries_left, view.ended_at) == ("queued", 1, None)
    with pytest.raises(Conflict, match="queued"):
        hub.run(jobs.retry(hub.desk, mia, job))
    hub.place()
    (lease,) = hub.orders(box).leases
    assert lease.attempt == 3
    hub.end_job(box, lease.id)
    assert hub.job(mia, job).state == "succeeded"
    with pytest.raises(Conflict, match="has ended already"):
        hub.run(jobs.stop(hub.desk, mia, job))
    check_jobs(hub)


def test_only_the_owner_and_admins_steer_a_job(hub: Hub, mia: Caller, noa: Caller) -> None:
    job = hub.submit_job(mia)

    for verb in (jobs.stop, jobs.retry):
        with pytest.raises(NotAllowed, match="somebody else"):
            hub.run(verb(hub.desk, noa, job))
    assert hub.run(jobs.stop(hub.desk, ADMIN, job)).state == "cancelled"
    assert hub.run(jobs.retry(hub.desk, ADMIN, job)).state == "queued"


def test_a_retry_asks_for_its_secrets_again(hub: Hub, mia: Caller) -> None:
    hub.run(secrets.put(hub.desk, mia, "TOKEN", SecretValue("x")))
    job = hub.submit_job(mia, secrets=["TOKEN"])
    hub.run(jobs.stop(hub.desk, mia, job))
    hub.run(secrets.remove(hub.desk, mia, "TOKEN"))

    with pytest.raises(BadInput, match="TOKEN"):
        hub.run(jobs.retry(hub.desk, mia, job))


# --- why, the line, quotas ------------------------------------------------------------------------------------------


def test_why_says_in_one_sentence_where_a_job_stands(hub: Hub, mia: Caller, noa: Caller) -> None:
    job = hub.submit_job(mia, name="digits", gpu="1")

    def why(who: Caller = mia) -> str:
        found = hub.run(runs.why(hub.desk, job, caller=who))
        return f"{found.text} {found.advice}"

    assert "waits" in why()
    box = hub.join("box")
    hub.orders(box)
    assert "box" in why(), "the nearest machine is named"
    hub.orders(box, now=machine(gpus_gb=(24,)))
    hub.place()
    assert "box" in why()
    (lease,) = hub.orders(box, now=machine(gpus_gb=(24,))).leases
    assert lease.gpus == [0]
    hub.end_job(box, lease.id, 7)
    assert "exit code 7" in why()
    assert "exit code 7" not in why(noa)
    assert "failed" in why(noa)


def test_the_line_is_shown_in_its_order_with_reasons(hub: Hub, mia: Caller, box: Caller) -> None:
    low, high = hub.submit_job(mia, cpu="4"), hub.submit_job(mia, cpu="4", priority=9)
    hub.submit_job(mia, cpu="4", priority=50)
    hub.place()

    line = hub.run(placing.queue(hub.desk))

    assert [(each.position, each.job) for each in line] == [(1, high), (2, low)]
    assert all(each.reason for each in line)


def test_an_admin_moves_jobs_in_the_line(hub: Hub, mia: Caller, noa: Caller) -> None:
    a, b, c, d = (hub.submit_job(mia) for _ in range(4))

    def line() -> list[str]:
        return [each.job for each in hub.run(placing.queue(hub.desk))]

    assert line() == [a, b, c, d]
    assert [each.job for each in hub.run(jobs.move(hub.desk, ADMIN, QueueMove(d)))] == [d, a, b, c]
    hub.run(jobs.move(hub.desk, ADMIN, QueueMove(c, before=a)))
    assert line() == [d, c, a, b]
    hub.run(jobs.move(hub.desk, ADMIN, QueueMove(d, before=b)))
    assert line() == [c, a, d, b]
    with pytest.raises(BadInput):
        hub.run(jobs.move(hub.desk, ADMIN, QueueMove(a, before=a)))
    hub.run(jobs.stop(hub.desk, mia, b))
    with pytest.raises(NotFound, match="does not wait"):
        hub.run(jobs.move(hub.desk, ADMIN, QueueMove(a, before=b)))


def test_a_quota_holds_jobs_back_and_says_so(hub: Hub, mia: Caller, noa: Caller, box: Caller) -> None:
    assert hub.run(machines.set_quota(hub.desk, ADMIN, Quota("mia", running=1))) == [Quota("mia", 1)]
    first, second, third = hub.submit_job(mia), hub.submit_job(mia), hub.submit_job(noa)

    assert hub.place() == 2

    states = {job: hub.job(ADMIN, job).state for job in (first, second, third)}
    assert states == {first: "placed", second: "queued", third: "placed"}
    assert "mia" in hub.run(runs.why(hub.desk, second, caller=mia)).text
    assert hub.run(machines.set_quota(hub.desk, ADMIN, Quota("mia"))) == []
    assert hub.place() == 1


def test_hours_of_the_last_week_count_against_a_quota(hub: Hub, mia: Caller, box: Caller) -> None:
    hub.run(machines.set_quota(hub.desk, ADMIN, Quota("mia", cpu_hours=2)))
    hub.submit_job(mia, cpu="2")
    hub.place()
    (lease,) = hub.orders(box).leases
    hub.sql("UPDATE attempts SET placed_at = now() - interval '90 minutes'")
    hub.end_job(box, lease.id)
    hub.submit_job(mia)

    assert hub.place() == 0

    hub.sql("UPDATE attempts SET placed_at = placed_at - interval '8 days', ended_at = ended_at - interval '8 days'")
    assert hub.place() == 1


def test_quotas_name_real_people(hub: Hub, mia: Caller) -> None:
    with pytest.raises(NotFound, match="nobody-here"):
        hub.run(machines.set_quota(hub.desk, ADMIN, Quota("nobody-here", 1)))
    with pytest.raises(BadInput):
        hub.run(machines.set_quota(hub.desk, ADMIN, Quota("mia", -1)))
    hub.member("mia")
    with pytest.raises(BadInput, match="several"):
        hub.run(machines.set_quota(hub.desk, ADMIN, Quota("mia", 1)))


def test_labels_of_the_hub_win_over_those_of_the_owner(hub: Hub, mia: Caller, box: Caller) -> None:
    hub.orders(box, labels={"room": "1", "fast": "no"})
    view = hub.run(machines.label(hub.desk, ADMIN, "box", {"fast": "yes"}))
    assert view.labels == {"room": "1", "fast": "yes"}

    hub.submit_job(mia, resources=Resources(labels={"fast": "yes"}))

    assert hub.place() == 1
    with pytest.raises(NotFound):
        hub.run(machines.label(hub.desk, ADMIN, "nobody", {}))
    with pytest.raises(NotFound):
        hub.run(machines.own(hub.desk, mia, "not the secret"))


def test_one_person_cannot_fill_the_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    mia, noa = hub.member("mia"), hub.member("noa")
    monkeypatch.setattr(jobs, "MOST_OPEN", 2)
    first, _ = hub.submit_job(mia), hub.submit_job(mia)

    with pytest.raises(Conflict, match="2 jobs that are not over"):
        hub.submit_job(mia)

    hub.submit_job(noa)
    hub.run(jobs.stop(hub.desk, mia, first))
    hub.submit_job(mia)


def test_a_jobs_key_is_never_a_runs(hub: Hub) -> None:
    mia = hub.member("mia")
    job = hub.submit_job(mia, key="k")

    run = hub.run(runs.create(hub.desk, hub.request(), actor="mia", key=f"job {mia.subject} k"))

    assert run.id != job
    assert run.mode == "pool"
