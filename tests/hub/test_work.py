"""Is every unit handed out once, handed in once, and never lost?"""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest

from hub_kit import Hub, check_accounts, check_positions, size
from potluck.errors import BadInput, BadUpdate, NotFound
from potluck.hub.commands import people, reports, runs, work
from potluck.hub.commands.desk import Caller
from potluck.protocol import Blob, HeartbeatRequest, Progress, Report


def test_a_unit_is_handed_out_in_and_merged(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house, samples=170)
    lease = hub.unit(ann, run)
    assert lease.unit is not None
    assert lease.unit.positions == [(0, 170)]

    answer = hub.report(ann, lease, hub.unit_report(lease))

    assert answer.accepted
    check_positions(hub, run, 170)
    assert "merge" in hub.settle(run)
    merge = hub.lease(house, "merge")
    assert merge is not None
    assert hub.report(house, merge, hub.merge_report(merge)).accepted
    fates = hub.view(run).fates
    assert (fates.applied, fates.pending, fates.handed_out) == (170, 0, 170)
    check_positions(hub, run, 170)
    check_accounts(hub, run)


def test_the_same_report_again_is_answered_the_same(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)
    report = hub.unit_report(lease)

    first, second = hub.report(ann, lease, report), hub.report(ann, lease, report)

    assert first.accepted
    assert second.accepted
    assert hub.view(run).fates.pending == 170


def test_another_update_for_the_same_lease_is_refused(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)
    hub.report(ann, lease, hub.unit_report(lease))

    answer = hub.report(ann, lease, hub.unit_report(lease, seed=2))

    assert not answer.accepted
    assert "before" in answer.reason


def test_the_same_report_twice_at_once_counts_once(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)
    report = hub.unit_report(lease)

    answers = hub.together(*(reports.report(hub.desk, ann, lease.id, report) for _ in range(4)))

    assert all(answer.accepted for answer in answers)
    assert hub.view(run).fates.pending == 170
    check_positions(hub, run, 1000)


def test_many_at_once_get_disjoint_units(hub: Hub, house: Caller) -> None:
    run = hub.start_run(house, samples=10_000)
    people_ = [hub.join(f"w{n}") for n in range(8)]
    request = work.LeaseRequest(["unit"], samples_per_s={run: 10})

    leases = hub.together(*(work.lease(hub.desk, who, request, 0) for who in people_ for _ in range(2)))

    assert sum(size(lease.unit.positions) for lease in leases if lease and lease.unit) == 16 * 170
    check_positions(hub, run, 10_000)


def test_a_worker_holds_at_most_two_units_of_a_run(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house, samples=10_000)

    leases = [hub.lease(ann, "unit", speed={run: 10}) for _ in range(3)]

    assert [lease is not None for lease in leases] == [True, True, False]


def test_what_a_unit_did_not_reach_goes_back_to_the_front(hub: Hub, house: Caller, ann: Caller, bob: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)

    hub.report(ann, lease, hub.unit_report(lease, done=[(10, 20), (60, 100)]))

    check_positions(hub, run, 1000)
    again = hub.unit(bob, run)
    assert again.unit is not None
    assert again.unit.positions == [(0, 10), (20, 60), (100, 220)]


def test_claiming_positions_that_the_lease_does_not_hold_is_refused(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)

    with pytest.raises(BadInput, match="does not hold"):
        hub.report(ann, lease, hub.unit_report(lease, done=[(100, 200)]))

    check_positions(hub, run, 1000)


def test_naming_a_range_twice_brings_no_double_credit(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)

    hub.report(ann, lease, hub.unit_report(lease, done=[(0, 100), (0, 100), (50, 150)]))

    assert hub.view(run).fates.pending == 150


def test_a_lease_of_somebody_else_is_not_mine(hub: Hub, house: Caller, ann: Caller, bob: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)

    for report in (hub.unit_report(lease), Report("returned"), Report("failed"), Report("failed", code="nan")):
        assert not hub.report(bob, lease, report).accepted
    beat = hub.run(work.heartbeat(hub.desk, bob, HeartbeatRequest([Progress(lease.id, samples=5)])))

    assert beat.drop == [lease.id]
    assert hub.one("SELECT samples FROM leases WHERE id = %(id)s", id=lease.id) == 0
    assert hub.report(ann, lease, hub.unit_report(lease)).accepted


def test_a_lease_that_never_was_is_an_answer_not_an_error(hub: Hub, ann: Caller) -> None:
    answer = hub.report(ann, str(uuid.uuid4()), Report("returned"))

    assert not answer.accepted
    with pytest.raises(NotFound):
        hub.report(ann, "nonsense", Report("returned"))


def test_a_nan_is_rejected_with_a_reason_and_its_positions_go_back(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)
    report = Report("failed", code="nan", reason="loss d_loss became NaN at step 12", samples=90)

    answer = hub.report(ann, lease, report)

    assert not answer.accepted
    assert "d_loss" in answer.reason
    assert hub.view(run).fates.rejected == 90
    check_positions(hub, run, 1000)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_rejects_the_update(hub: Hub, house: Caller, ann: Caller, loss: float) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)

    answer = hub.report(ann, lease, hub.unit_report(lease, metrics={"g": loss, "d": 1.0}))

    assert not answer.accepted
    assert "`g`" in answer.reason
    check_positions(hub, run, 1000)
    check_accounts(hub, run)


def test_three_strikes_and_a_worker_gets_no_more_units_of_the_run(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    for _ in range(3):
        hub.report(ann, hub.unit(ann, run), Report("failed", code="nan", reason="nan"))

    assert hub.lease(ann, "unit") is None


@pytest.mark.parametrize("spoil", ["missing", "truncated", "shape", "future", "idle"])
def test_an_update_that_does_not_fit_is_rejected_with_a_reason(
    hub: Hub, house: Caller, ann: Caller, spoil: str
) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)
    report = hub.unit_report(lease)
    match spoil:
        case "missing":
            report = replace(report, update=Blob("f" * 64, 10))
        case "truncated":
            report = replace(report, update=hub.put(b"\xff" * 30))
        case "shape":
            report = replace(report, codec="int8")
        case "future":
            report = replace(report, base_version=1)
        case "idle":
            report = replace(report, steps=0)

    answer = hub.report(ann, lease, report)

    assert not answer.accepted
    assert answer.reason.startswith("rejected: ")
    check_positions(hub, run, 1000)
    check_accounts(hub, run)


def test_silence_gives_the_unit_to_somebody_else_and_a_late_answer_is_refused(
    hub: Hub, house: Caller, ann: Caller, bob: Caller
) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)
    hub.run(work.heartbeat(hub.desk, ann, HeartbeatRequest([Progress(lease.id, samples=33)])))
    hub.let_lapse()

    assert hub.run(work.expire(hub.desk)) == 1

    assert hub.view(run).fates.lost == 33
    other = hub.unit(bob, run)
    assert other.unit is not None
    assert other.unit.positions == [(0, 170)]
    late = hub.report(ann, lease, hub.unit_report(lease))
    assert not late.accepted
    assert "too late" in late.reason
    beat = hub.run(work.heartbeat(hub.desk, ann, HeartbeatRequest([Progress(lease.id)])))
    assert beat.drop == [lease.id]
    check_positions(hub, run, 1000)


def test_a_heartbeat_renews_only_what_is_still_mine(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)
    hub.let_lapse()

    hub.run(work.heartbeat(hub.desk, ann, HeartbeatRequest([Progress(lease.id)])))

    assert hub.run(work.expire(hub.desk)) == 0
    hub.report(ann, lease, Report("returned"))
    beat = hub.run(work.heartbeat(hub.desk, ann, HeartbeatRequest([Progress(lease.id)])))
    assert beat.drop == [lease.id]
    assert hub.one("SELECT ended_at IS NOT NULL FROM leases WHERE id = %(id)s", id=lease.id)


def test_a_report_and_the_end_of_its_lease_at_once_leave_one_outcome(hub: Hub, house: Caller) -> None:
    run = hub.start_run(house, samples=50_000)
    for n in range(12):
        who = hub.join(f"w{n}")
        lease = hub.unit(who, run, 100)
        report = hub.unit_report(lease, seed=n)
        hub.let_lapse()

        hub.together(
            reports.report(hub.desk, who, lease.id, report),
            work.expire(hub.desk),
            work.heartbeat(hub.desk, who, HeartbeatRequest([Progress(lease.id)])),
            work.leave(hub.desk, who),
        )

        check_positions(hub, run, 50_000)
    check_accounts(hub, run)


def test_a_report_and_a_stop_at_once_leave_nothing_pending(hub: Hub, house: Caller) -> None:
    for n in range(10):
        run = hub.start_run(house)
        who = hub.join(f"w{n}")
        leases = [hub.unit(who, run, 100) for _ in range(2)]
        said = [hub.unit_report(lease) for lease in leases]
        hub.run(runs.move(hub.desk, run, "stop", actor="the test"))  # the second stop is the one that waits for nobody

        hub.together(
            *(reports.report(hub.desk, who, lease.id, report) for lease, report in zip(leases, said, strict=True)),
            runs.move(hub.desk, run, "stop", actor="the test"),
        )

        assert hub.view(run).fates.pending == 0
        check_positions(hub, run, 1000)


def test_leaving_frees_at_once(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    hub.unit(ann, run)

    hub.run(work.leave(hub.desk, ann))

    assert hub.view(run).fates.handed_out == 0
    check_positions(hub, run, 1000)
    (view,) = [w for w in hub.run(people.workers(hub.desk)) if w.id == ann.subject]
    assert view.state == "left"


def test_a_stopped_run_supersedes_what_comes_in(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    waiting, lease = hub.unit(ann, run), hub.unit(ann, run)
    hub.report(ann, waiting, hub.unit_report(waiting))
    hub.stop(run)

    answer = hub.report(ann, lease, hub.unit_report(lease))

    assert not answer.accepted
    assert "stopped" in answer.reason
    assert hub.view(run).fates.superseded == 170
    assert hub.lease(ann, "unit") is None
    check_positions(hub, run, 1000)
    check_accounts(hub, run)


def test_a_paused_run_gives_no_units_and_asks_for_what_is_done(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)
    hub.run(runs.move(hub.desk, run, "pause", actor="ann"))

    beat = hub.run(work.heartbeat(hub.desk, ann, HeartbeatRequest([Progress(lease.id)])))

    assert beat.hand_in == [lease.id]
    assert hub.lease(ann, "unit") is None
    hub.run(runs.move(hub.desk, run, "resume", actor="ann"))
    assert hub.lease(ann, "unit") is not None


def test_the_house_worker_trains_only_while_it_is_alone(hub: Hub, house: Caller, ann: Caller) -> None:
    hub.start_run(house)

    assert hub.lease(house, "unit") is None
    hub.run(work.leave(hub.desk, ann))
    assert hub.lease(house, "unit") is not None


def test_an_untrusted_worker_is_never_asked_to_merge(hub: Hub, house: Caller, ann: Caller) -> None:
    hub.create_run()

    assert hub.lease(ann, "init", "merge", "taste") is None
    assert hub.lease(house, "init") is not None


def test_a_merge_that_is_lost_waits_again_and_a_late_answer_changes_nothing(
    hub: Hub, house: Caller, ann: Caller
) -> None:
    run = hub.start_run(house, samples=170)
    unit = hub.unit(ann, run)
    hub.report(ann, unit, hub.unit_report(unit))
    hub.settle(run)
    first = hub.lease(house, "merge")
    assert first is not None
    hub.let_lapse(first.id)
    hub.run(work.expire(hub.desk))
    second = hub.lease(house, "merge")
    assert second is not None
    assert second.task_id == first.task_id

    late = hub.report(house, first, hub.merge_report(first))
    in_time = hub.report(house, second, hub.merge_report(second))
    again = hub.report(house, second, hub.merge_report(second))

    assert (late.accepted, in_time.accepted, again.accepted) == (False, True, True)
    assert hub.view(run).version == 1
    check_accounts(hub, run)


def test_a_merge_that_fails_again_and_again_fails_the_run(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house)
    unit = hub.unit(ann, run)
    hub.report(ann, unit, hub.unit_report(unit))
    hub.settle(run)
    for _ in range(work.MAX_ATTEMPTS):
        merge = hub.lease(house, "merge")
        assert merge is not None
        hub.report(house, merge, Report("failed", reason="out of memory"))

    hub.settle(run)

    view = hub.view(run)
    assert view.state == "failed"
    assert "out of memory" in view.reason
    assert view.fates.pending == 0
    check_positions(hub, run, 1000)


def test_a_merge_must_judge_exactly_what_it_was_given(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house, samples=170)
    unit = hub.unit(ann, run)
    hub.report(ann, unit, hub.unit_report(unit))
    hub.settle(run)
    merge = hub.lease(house, "merge")
    assert merge is not None
    good = hub.merge_report(merge)
    wrong_fate = replace(good, verdicts=[replace(good.verdicts[0], fate="lovely")])
    missing_bytes = replace(good, delta=Blob("e" * 64, 3))

    for bad in (replace(good, verdicts=[]), wrong_fate, missing_bytes, replace(good, verdicts=good.verdicts * 2)):
        with pytest.raises(BadUpdate):
            hub.report(house, merge, bad)

    assert not hub.report(house, merge, replace(good, version=2)).accepted
    assert hub.view(run).version == 0
    assert hub.report(house, merge, good).accepted


def test_superseded_and_rejected_updates_give_their_positions_back(hub: Hub, house: Caller, ann: Caller) -> None:
    run = hub.start_run(house, samples=340)
    for _ in range(2):
        lease = hub.unit(ann, run)
        hub.report(ann, lease, hub.unit_report(lease))
    hub.settle(run)
    merge = hub.lease(house, "merge")
    assert merge is not None

    hub.report(house, merge, hub.merge_report(merge, ["superseded", "rejected"]))

    check_positions(hub, run, 340)
    check_accounts(hub, run)
    fates = hub.view(run).fates
    assert (fates.superseded, fates.rejected, fates.applied) == (170, 170, 0)
    again = hub.unit(ann, run, 340)
    assert again.unit is not None
    assert again.unit.positions == [(0, 340)]


@pytest.mark.parametrize("field", ["steps", "samples", "bytes_up", "base_version", "seconds"])
def test_absurd_numbers_are_bad_input_and_nothing_is_lost(hub: Hub, house: Caller, ann: Caller, field: str) -> None:
    run = hub.start_run(house)
    lease = hub.unit(ann, run)
    value = float("nan") if field == "seconds" else 10**30

    try:
        hub.report(ann, lease, replace(hub.unit_report(lease), **{field: value}))
    except BadInput:
        assert hub.report(ann, lease, hub.unit_report(lease)).accepted

    check_positions(hub, run, 1000)
    view = hub.view(run)
    assert all(0 <= c.seconds < 1e9 for c in hub.run(runs.contributions(hub.desk, run)))
    assert view.fates.handed_out < 10**9
