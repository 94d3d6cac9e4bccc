"""Does one pass write exactly what was decided, once, and only what still holds?"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hub_kit import Hub, check_jobs, machine
from potluck.blobs import BlobStore
from potluck.domain import fairness
from potluck.hub import upkeep
from potluck.hub.commands import facts as facts_
from potluck.hub.commands import jobs, machines, people, placing
from potluck.hub.commands.desk import Caller, Desk
from potluck.hub.store import Ledger
from potluck.protocol import Rules

ADMIN = Caller("admin", "admin-1", "admin")


@pytest.fixture
def hub(embedded_hub: Hub) -> Hub:
    return embedded_hub


@pytest.fixture
def mia(hub: Hub) -> Caller:
    return hub.member("mia")


@pytest.fixture
def box(hub: Hub) -> Caller:
    caller = hub.join("box")
    hub.orders(caller)
    return caller


def test_a_pass_without_jobs_or_without_machines_does_nothing(hub: Hub, mia: Caller) -> None:
    assert hub.place() == 0
    hub.submit_job(mia)
    assert hub.place() == 0
    assert hub.one("SELECT count(*) FROM leases") == 0


def test_a_machine_is_filled_and_never_overfilled(hub: Hub, mia: Caller, box: Caller) -> None:
    ids = [hub.submit_job(mia, cpu="1.5") for _ in range(4)]

    assert hub.place() == 2
    assert hub.place() == 0

    states = [hub.job(mia, id_).state for id_ in ids]
    assert states == ["placed", "placed", "queued", "queued"]
    check_jobs(hub)


def test_a_place_is_free_as_soon_as_the_attempt_has_ended(hub: Hub, mia: Caller, box: Caller) -> None:
    for _ in range(3):
        hub.submit_job(mia, cpu="4")
    for _ in range(3):
        assert hub.place() == 1
        (lease,) = hub.orders(box).leases
        assert hub.end_job(box, lease.id).accepted
    assert hub.place() == 0


def test_gpus_are_given_by_their_index(hub: Hub, mia: Caller) -> None:
    box = hub.join("box")
    now = machine(cpu=16, memory_gb=64, gpus_gb=(24, 24))
    hub.orders(box, now=now)
    for _ in range(3):
        hub.submit_job(mia, gpu="24GB..")

    assert hub.place() == 2

    leases = hub.orders(box, now=now).leases
    assert sorted(lease.gpus[0] for lease in leases) == [0, 1]
    (view,) = hub.run(people.workers(hub.desk))
    assert sorted(job.rpartition(" on ")[2] for job in view.jobs) == ["gpu 0", "gpu 1"]


def test_a_worker_that_is_silent_hung_up_or_only_for_the_pool_gets_nothing(hub: Hub, mia: Caller, box: Caller) -> None:
    hub.submit_job(mia)
    hub.sql("UPDATE workers SET ordered_at = now() - interval '46 seconds'")
    assert hub.place() == 0
    hub.orders(box)
    hub.hang_up(box, 0)
    assert hub.place() == 0
    hub.orders(box, rules=Rules("pool", "hub", "any"))
    assert hub.place() == 0
    hub.orders(box)
    assert hub.place() == 1


@pytest.mark.parametrize("what", ["stopped", "revoked", "drained", "left"])
def test_what_changed_since_the_reading_is_seen_before_anything_is_written(
    hub: Hub, mia: Caller, box: Caller, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = hub.submit_job(mia)
    decide = placing._decide

    async def slowly(raw: facts_.Raw) -> Any:
        """Between the reading and the writing, somebody is quicker."""
        found = await decide(raw)
        match what:
            case "stopped":
                await jobs.stop(hub.desk, mia, job)
            case "revoked":
                await people.revoke_worker(hub.desk, "box", actor="admin")
            case "drained":
                await machines.drain(hub.desk, ADMIN, "box", draining=True)
            case "left":
                hub.sql("UPDATE workers SET state = 'left'")
        return found

    monkeypatch.setattr(placing, "_decide", slowly)

    assert hub.place() == 0

    assert hub.job(mia, job).state == ("cancelled" if what == "stopped" else "queued")
    assert hub.one("SELECT count(*) FROM leases") == 0


def test_of_two_hub_copies_one_places(hub: Hub, mia: Caller, box: Caller, tmp_path: Path) -> None:
    for _ in range(4):
        hub.submit_job(mia)
    other = Desk(Ledger(hub.dsn, pool_size=4), BlobStore(tmp_path / "blobs"))

    async def both() -> list[placing.Pass]:
        await other.ledger.open()
        try:
            return list(await asyncio.gather(*(placing.run_pass(desk) for desk in (hub.desk, other, hub.desk, other))))
        finally:
            await other.ledger.close()

    done = hub.run(both())

    assert sum(each.placed for each in done) == 4
    check_jobs(hub)


def test_many_jobs_are_placed_by_a_handful_of_statements(hub: Hub, mia: Caller) -> None:
    """However many there are, a pass asks the ledger as often."""
    hub.sql("INSERT INTO workers (id, name) SELECT 'w-' || n, 'w' || n FROM generate_series(1, 300) n")
    crowd = [Caller("worker", f"w-{n}", f"w{n}") for n in range(1, 301)]
    request = hub.job_request()
    for start in range(0, 300, 50):  # the pool of a test has four connections
        hub.together(*(hub.ask_orders(each) for each in crowd[start : start + 50]))
    for _ in range(10):
        hub.together(*(jobs.submit(hub.desk, mia, request) for _ in range(50)))
    asked: list[str] = []

    async def counted() -> int:
        from potluck.hub.store.ledger import Transaction

        rows, run = Transaction.rows, Transaction.run

        async def noted(self: Transaction, statement: str, /, **values: Any) -> Any:
            asked.append(statement)
            return await rows(self, statement, **values)

        async def run_noted(self: Transaction, statement: str, /, **values: Any) -> int:
            asked.append(statement)
            return await run(self, statement, **values)

        Transaction.rows, Transaction.run = noted, run_noted  # type: ignore[method-assign]
        try:
            return (await placing.run_pass(hub.desk)).placed
        finally:
            Transaction.rows, Transaction.run = rows, run  # type: ignore[method-assign]

    assert hub.run(counted()) == 500
    assert len(asked) < 25, asked
    check_jobs(hub)


def test_whoever_used_less_goes_first_and_use_is_counted_to_the_second(hub: Hub, mia: Caller, box: Caller) -> None:
    noa = hub.member("noa")
    first = hub.submit_job(mia, cpu="4")
    hub.place()
    (lease,) = hub.orders(box).leases
    fee = hub.one("SELECT amount FROM usages WHERE owner = %(o)s", o=mia.subject)
    assert fee == pytest.approx(4 * fairness.ENTRY_S)
    hub.sql("UPDATE attempts SET placed_at = now() - interval '1000 seconds'")
    hub.end_job(box, lease.id)
    used = hub.one("SELECT amount FROM usages WHERE owner = %(o)s", o=mia.subject)
    assert used == pytest.approx(fee + 4 * 1000, rel=0.01)

    second, third = hub.submit_job(mia, cpu="4"), hub.submit_job(noa, cpu="4")
    hub.place()

    assert hub.job(ADMIN, third).state == "placed", "noa asked later, but has used nothing"
    assert hub.job(ADMIN, second).state == "queued"
    assert hub.job(ADMIN, first).state == "succeeded"


def test_use_fades_by_half_in_a_half_life(hub: Hub, mia: Caller, box: Caller) -> None:
    hub.sql(
        "INSERT INTO usages (owner, amount, at) VALUES (%(o)s, 1000000, now() - make_interval(secs => %(s)s))",
        o=mia.subject,
        s=fairness.HALF_LIFE_S,
    )
    hub.submit_job(mia, cpu="1")
    hub.place()

    left = hub.one("SELECT amount FROM usages WHERE owner = %(o)s", o=mia.subject)
    assert left == pytest.approx(500_000 + fairness.ENTRY_S, rel=0.001)


def test_what_runs_counts_from_its_first_second(hub: Hub, mia: Caller, box: Caller) -> None:
    hub.submit_job(mia, cpu="4")
    hub.place()
    hub.sql("UPDATE attempts SET placed_at = now() - interval '1 hour'")

    async def usage() -> dict[str, float]:
        async with hub.desk.ledger.transaction() as tx:
            return facts_.build(await facts_.gather(tx)).usage

    assert hub.run(usage())[mia.subject] == pytest.approx(4 * (3600 + fairness.ENTRY_S), rel=0.01)


def test_a_forecast_is_used_again_until_something_changes(hub: Hub, mia: Caller, box: Caller) -> None:
    hub.submit_job(mia)
    first = hub.run(placing.forecast(hub.desk))

    assert hub.run(placing.forecast(hub.desk)) is first
    hub.submit_job(mia)
    first.took_s = 0.0
    assert len(hub.run(placing.forecast(hub.desk)).facts.waiting) == 2


def test_a_worker_that_waits_at_one_hub_copy_hears_of_a_placement_by_another(
    hub: Hub, mia: Caller, box: Caller, tmp_path: Path
) -> None:
    other = Desk(Ledger(hub.dsn, pool_size=4), BlobStore(tmp_path / "blobs"))
    request = hub.job_request()

    async def story() -> int:
        await other.ledger.open()
        ears = asyncio.ensure_future(upkeep.hear(hub.desk))
        try:
            await hub.desk.news.wait(hub.desk.news.ticket(""), 20)  # it listens now
            waiting = asyncio.ensure_future(hub.ask_orders(box, wait_s=30))
            await asyncio.sleep(0.1)
            await jobs.submit(hub.desk, mia, request)
            assert (await placing.run_pass(other)).placed == 1
            async with asyncio.timeout(20):
                return len((await waiting).leases)
        finally:
            ears.cancel()
            await other.ledger.close()

    assert hub.run(story()) == 1
