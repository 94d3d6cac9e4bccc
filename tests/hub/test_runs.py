"""Is a run what was asked for, does it move as it is told, end by itself, and say why?"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from hub_kit import Hub, check_accounts, check_positions
from potluck.errors import BadInput, Conflict, NotFound, UnknownSetting
from potluck.hub import upkeep
from potluck.hub.commands import reports, rounds, runs, work
from potluck.hub.commands.desk import Caller
from potluck.protocol import Blob, HeartbeatRequest, Lease, Progress, RecipeRef, Report, Shard


def merge_once(hub: Hub, house: Caller, run: str) -> None:
    hub.age_updates(3600)
    hub.settle(run)
    lease = hub.lease(house, "merge")
    assert lease is not None
    assert hub.report(house, lease, hub.merge_report(lease)).accepted


def hand_in(hub: Hub, who: Caller, run: str, samples: int = 170) -> Lease:
    lease = hub.unit(who, run, samples)
    assert hub.report(who, lease, hub.unit_report(lease, base=hub.view(run).version)).accepted
    return lease


def taste(hub: Hub, house: Caller, run: str, distance: float) -> None:
    hub.settle(run)
    lease = hub.lease(house, "taste")
    assert lease is not None
    assert hub.report(house, lease, Report("done", metrics={"distance": distance})).accepted


# --- starting


def test_the_same_key_is_the_same_run(hub: Hub) -> None:
    request = hub.request()

    first = hub.run(runs.create(hub.desk, request, actor="m", key="k"))
    again = hub.run(runs.create(hub.desk, request, actor="m", key="k"))
    other = hub.run(runs.create(hub.desk, request, actor="m", key="l"))

    assert first.id == again.id != other.id


def test_the_same_key_at_the_same_moment_is_the_same_run(hub: Hub) -> None:
    request = hub.request()

    views = hub.together(*(runs.create(hub.desk, request, actor="m", key="k") for _ in range(4)))

    assert len({view.id for view in views}) == 1
    assert hub.one("SELECT count(*) FROM tasks") == 1


@pytest.mark.parametrize(
    "spoil", ["mode", "empty", "held out", "sum", "shard", "samples", "for", "recipe", "setting", "seed"]
)
def test_a_run_that_cannot_be_is_refused_and_leaves_nothing(hub: Hub, spoil: str) -> None:
    request = hub.request()
    dataset = request.dataset
    match spoil:
        case "mode":
            request = replace(request, mode="gang")
        case "empty":
            request = replace(request, dataset=replace(dataset, samples=0, shards=[]))
        case "held out":
            request = replace(request, dataset=replace(dataset, held_out=1000))
        case "sum":
            request = replace(request, dataset=replace(dataset, samples=999))
        case "shard":
            request = replace(request, dataset=replace(dataset, shards=[Shard(Blob("d" * 64, 5), 1000)]))
        case "samples":
            request = replace(request, samples=0)
        case "for":
            request = replace(request, duration_s=float("nan"))
        case "recipe":
            request = replace(request, recipe=RecipeRef("Mine", source=Blob("c" * 64, 5), filename="mine.py"))
        case "setting":
            request = replace(request, settings={"unit": 3})
        case "seed":
            request = replace(request, seed=1 << 80)

    with pytest.raises(BadInput):
        hub.run(runs.create(hub.desk, request, actor="m"))

    assert hub.one("SELECT count(*) FROM runs") == 0
    assert hub.one("SELECT count(*) FROM tasks") == 0


def test_an_unknown_setting_names_the_nearest(hub: Hub, house: Caller) -> None:
    run = hub.start_run(house)

    with pytest.raises(UnknownSetting, match="did you mean `unit_s`"):
        hub.run(runs.change(hub.desk, run, {"unit": 3}, actor="m"))
    with pytest.raises(BadInput, match="start another run"):
        hub.run(runs.change(hub.desk, run, {"strategy": "gradient"}, actor="m"))

    assert hub.run(runs.change(hub.desk, run, {"unit_s": "20"}, actor="m")).settings["unit_s"] == 20


def test_a_run_is_found_by_id_name_front_and_last(hub: Hub) -> None:
    run = hub.create_run(name="my faces")

    assert [hub.view(ref).id for ref in (run, "my faces", run[:7], "last")] == [run] * 4
    for ref in ("dc", "nothing", ""):
        with pytest.raises(NotFound):
            hub.view(ref)


# --- living


def test_a_run_ends_by_itself_when_every_sample_is_in_the_model(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house, samples=340)
    taste(hub, house, run, 9.0)
    for _ in range(2):
        hand_in(hub, ann, run)
        merge_once(hub, house, run)
    hub.settle(run)
    assert hub.view(run).state == "finishing"

    taste(hub, house, run, 3.0)
    hub.settle(run)

    view = hub.view(run)
    assert (view.state, view.reason, view.version) == ("done", "every sample is trained", 2)
    assert view.fates.applied == 340
    assert (view.first_metrics, view.metrics) == ({"distance": 9.0}, {"distance": 3.0})
    assert [t.version for t in hub.run(runs.tastes(hub.desk, run))] == [0, 2]
    assert [(c.version, c.samples) for c in hub.run(runs.curve(hub.desk, run))] == [(1, 170), (2, 340)]
    check_accounts(hub, run)


def test_a_run_ends_when_its_time_is_over_and_takes_what_is_handed_in(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house, samples=None, duration_s=60)
    lease = hub.unit(ann, run)
    hub.sql("UPDATE runs SET started_at = started_at - interval '61 s'")
    hub.settle(run)
    assert hub.view(run).state == "finishing"
    assert hub.lease(ann, "unit") is None
    beat = hub.run(work.heartbeat(hub.desk, ann, HeartbeatRequest([Progress(lease.id)])))
    assert beat.hand_in == [lease.id]

    hub.report(ann, lease, hub.unit_report(lease, done=[(0, 40)]))
    merge_once(hub, house, run)
    taste(hub, house, run, 1.0)
    hub.settle(run)

    view = hub.view(run)
    assert (view.state, view.reason) == ("done", "the time is over")
    assert view.fates.applied == 40


def test_paused_time_does_not_count(hub: Hub, house: Caller) -> None:
    run = hub.start_run(house, samples=None, duration_s=60)
    hub.run(runs.move(hub.desk, run, "pause", actor="m"))
    hub.sql("UPDATE runs SET started_at = started_at - interval '1 hour', paused_at = paused_at - interval '1 hour'")

    assert hub.view(run).elapsed_s < 30
    hub.run(runs.move(hub.desk, run, "resume", actor="m"))
    assert hub.view(run).elapsed_s < 30
    hub.settle(run)
    assert hub.view(run).state == "running"


def test_moving_twice_is_no_error_and_out_of_turn_is_a_conflict(hub: Hub, house: Caller) -> None:
    run = hub.start_run(house)
    for verb, state in (("pause", "paused"), ("pause", "paused"), ("resume", "running"), ("resume", "running")):
        assert hub.run(runs.move(hub.desk, run, verb, actor="m")).state == state
    hub.stop(run)

    assert hub.view(run).state == "stopped"
    assert hub.run(runs.move(hub.desk, run, "stop", actor="m")).state == "stopped"
    for verb in ("pause", "resume"):
        with pytest.raises(Conflict):
            hub.run(runs.move(hub.desk, run, verb, actor="m"))


def test_a_paused_run_merges_what_it_has(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    hand_in(hub, ann, run)
    hub.run(runs.move(hub.desk, run, "pause", actor="m"))

    merge_once(hub, house, run)

    assert hub.view(run).fates.applied == 170
    assert hub.view(run).state == "paused"


def test_a_run_without_version_0_fails_with_the_reason(hub: Hub, house: Caller) -> None:
    run = hub.create_run()
    for _ in range(work.MAX_ATTEMPTS):
        lease = hub.lease(house, "init")
        assert lease is not None
        hub.report(house, lease, Report("failed", reason="no recipe `dcgan`"))

    hub.settle(run)

    view = hub.view(run)
    assert view.state == "failed"
    assert "no recipe `dcgan`" in view.reason
    assert hub.lease(house, "init") is None


def test_a_taste_that_fails_is_left_out_and_the_run_goes_on(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house, samples=170)
    hub.settle(run)
    for _ in range(work.MAX_ATTEMPTS):
        lease = hub.lease(house, "taste")
        assert lease is not None
        hub.report(house, lease, Report("failed", reason="no font"))
    hand_in(hub, ann, run)
    merge_once(hub, house, run)

    hub.settle(run)
    taste(hub, house, run, 1.0)
    hub.settle(run)

    assert hub.view(run).state == "done"


def test_settling_from_two_hubs_at_once_orders_one_merge(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    hand_in(hub, ann, run)

    hub.together(*(rounds.settle(hub.desk, run) for _ in range(6)))

    assert hub.one("SELECT count(*) FROM tasks WHERE kind = 'merge'") == 1


def test_a_new_hub_gives_silent_workers_time_to_come_back(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)
    hub.let_lapse()

    hub.restart()

    assert hub.run(work.expire(hub.desk)) == 0
    assert hub.report(ann, lease, hub.unit_report(lease)).accepted
    check_positions(hub, run, 1000)


def test_upkeep_does_everything_that_is_due(hub: Hub, house: Caller, ann: Caller, bob: Caller) -> None:
    run = hub.start_run(house)
    hub.unit(bob, run)
    hub.let_lapse()
    hand_in(hub, ann, run)

    assert hub.run(upkeep.run_once(hub.desk)) <= 1.0

    assert hub.one("SELECT count(*) FROM leases WHERE outcome = 'lost'") == 1
    assert hub.lease(house, "merge") is not None


# --- looking


def test_the_way_to_the_newest_version(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house, settings={"snapshot_every": "2"})
    for _ in range(3):
        hand_in(hub, ann, run)
        merge_once(hub, house, run)

    async def numbers(after: int) -> list[int]:
        return [v.number for v in await runs.versions(hub.desk, run, after, 0)]

    assert hub.run(numbers(-1))[-1] == 3
    assert hub.run(runs.versions(hub.desk, run, -1, 0))[0].snapshot is not None
    assert hub.run(numbers(0)) == [1, 2, 3]
    assert hub.run(numbers(2)) == [3]
    assert hub.run(numbers(3)) == []
    assert hub.run(numbers(99)) == []


def test_who_waits_for_a_version_is_woken_by_it(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    hand_in(hub, ann, run)
    hub.age_updates(3600)
    hub.settle(run)
    lease = hub.lease(house, "merge")
    assert lease is not None
    report = hub.merge_report(lease)

    async def watch() -> list[int]:
        ears = asyncio.ensure_future(upkeep.hear(hub.desk))
        ticket = hub.desk.news.ticket(f"version:{run}")
        waiting = asyncio.ensure_future(runs.versions(hub.desk, run, 0, 25))
        while not hub.sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%%'"
        ):
            await asyncio.sleep(0.02)
        await reports.report(hub.desk, house, lease.id, report)
        await hub.desk.news.wait(ticket, 25)
        found = await waiting
        ears.cancel()
        return [version.number for version in found]

    assert hub.run(watch()) == [1]


def test_why_says_what_is_missing(hub: Hub, ann: Caller) -> None:
    run = hub.create_run()

    why = hub.run(runs.why(hub.desk, run))

    assert "trusted worker" in why.text
    assert why.advice
    house = hub.join("house", trusted=True)
    assert "version 0" in hub.run(runs.why(hub.desk, run)).text
    lease = hub.lease(house, "init")
    assert lease is not None
    hub.report(house, lease, hub.init_report())
    unit = hub.unit(ann, run)
    hub.report(ann, unit, Report("failed", reason="the GPU fell out"))
    assert "the GPU fell out" in hub.run(runs.why(hub.desk, str(unit.task_id))).text
    with pytest.raises(NotFound):
        hub.run(runs.why(hub.desk, "nobody"))


def test_events_tell_the_story_in_order(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house, samples=170)
    hand_in(hub, ann, run)

    story = hub.run(runs.events(hub.desk, ref=run))

    assert [event.kind for event in story[:2]] == ["run.created", "run.started"]
    assert hub.run(runs.events(hub.desk, after=story[-1].id, ref=run)) == []
    assert [event.id for event in story] == sorted(event.id for event in story)
