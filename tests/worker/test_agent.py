from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from agent_kit import told, until
from fake_hub import FakeHub

from potluck.errors import Conflict
from potluck.protocol import Lease, MergeInput, MergePolicy, MergeSpec, TasteSpec
from potluck.worker.agent import Agent, AgentSettings
from potluck.worker.membership import only_agent


def outcomes(edge: FakeHub) -> dict[str, str]:
    return {lease_id: report.outcome for lease_id, report in edge.reports}


def test_units_are_leased_ahead_trained_and_reported(edge: FakeHub, start: Any, child_log: Path) -> None:
    edge.merge_on_report = True
    edge.endless = {"steps": 15, "step_s": 0.02, "overlap_s": 0.2}

    agent = start()
    until(lambda: len(edge.reports) >= 8)
    agent.agent.stop()

    assert agent.wait() == 0
    assert {r.outcome for _, r in edge.reports} <= {"done", "returned"}
    done = [r for _, r in edge.reports if r.outcome == "done"]
    assert len(done) >= 8
    assert max(r.base_version for r in done) >= 5
    assert all(edge.blobs.has(r.update.hash) and r.bytes_up > 0 and r.samples for r in done if r.update)
    heard = told(child_log)
    assert not [line for line in heard if "gap" in line]
    assert [line for line in heard if line.get("told") == "Rebase"]
    assert len({line["pid"] for line in heard}) == 1
    assert not edge.live
    assert edge.left == ["w1"]
    assert any(request.samples_per_s for request in edge.requests)


def test_the_next_unit_waits_in_the_child_before_the_present_one_ends(
    edge: FakeHub, start: Any, child_log: Path
) -> None:
    first, second = edge.unit(steps=60, step_s=0.02, box_s=2.0), edge.unit(steps=5)
    edge.give(first, second)

    start()
    until(lambda: edge.outcome(second))

    order = [
        (line.get("told") or "Started", line.get("lease") or line.get("started"))
        for line in told(child_log)
        if "pid" in line
    ]
    begun = [entry for entry in order if entry[1] in (first.id, second.id)]
    assert begun == [("DoUnit", first.id), ("Started", first.id), ("DoUnit", second.id), ("Started", second.id)]
    assert (
        next(line for line in told(child_log) if line.get("started") == second.id)["overlap"] is False
    )  # overlap_s is 0


def test_a_killed_child_is_reported_with_the_reason_and_started_again(
    edge: FakeHub, start: Any, child_log: Path
) -> None:
    bad, good = edge.unit(die_at=3, by="kill"), edge.unit(steps=3)
    edge.give(bad)

    start()
    until(lambda: edge.outcome(bad))
    edge.give(good)
    until(lambda: edge.outcome(good))

    report = edge.outcome(bad)
    assert report is not None
    assert (report.outcome, report.code) == ("failed", "died")
    assert "SIGKILL" in report.reason
    assert "memory" in report.reason
    assert "something terrible" in report.reason
    assert outcomes(edge)[good.id] == "done"
    assert len({line["pid"] for line in told(child_log)}) == 2


def test_a_unit_with_nan_is_reported_with_its_code_and_training_goes_on(edge: FakeHub, start: Any) -> None:
    bad, good = edge.unit(nan_at=2), edge.unit(steps=2)
    edge.give(bad, good)

    agent = start()
    until(lambda: edge.outcome(good) and edge.outcome(bad))

    report = edge.outcome(bad)
    assert report is not None
    assert (report.outcome, report.code) == ("failed", "nan")
    assert agent.screen.has("NaN at step 2")


def test_a_run_that_always_fails_is_left_to_others(edge: FakeHub, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potluck.worker.state.STRIKES", 2)
    edge.endless = {"run": "rotten", "fail": True}

    agent = start()
    until(lambda: agent.screen.has("leaves that run to others"))
    edge.endless = None
    until(lambda: edge.requests[-1].except_runs == ["rotten"])
    good = edge.unit("fresh", steps=2)
    edge.give(good)

    until(lambda: edge.outcome(good), timeout_s=60)
    assert outcomes(edge)[good.id] == "done"


def test_a_machine_without_torch_gives_the_work_to_others(
    edge: FakeHub, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHILD_BROKEN", "1")
    unit = edge.unit()
    edge.give(unit)

    agent = start()
    until(lambda: edge.outcome(unit))

    assert outcomes(edge)[unit.id] == "failed"
    assert agent.screen.has("No module named 'torch'"), agent.screen.said


def test_finished_work_survives_a_hub_that_is_away_during_the_upload(
    edge: FakeHub, start: Any, tmp_path: Path, child_log: Path
) -> None:
    unit = edge.unit(steps=20, step_s=0.02)
    edge.give(unit)
    edge.ttl_s = 30

    agent = start()
    until(lambda: any("started" in line for line in told(child_log)))
    edge.stop()
    until(lambda: list((tmp_path / "home/spool").glob("*/entry.json")))
    until(lambda: agent.screen.has("trying again"))
    edge.start()

    until(lambda: edge.outcome(unit))
    assert outcomes(edge)[unit.id] == "done"
    until(lambda: not list((tmp_path / "home/spool").iterdir()))
    assert agent.screen.has("the hub is back")


def test_an_upload_cut_in_the_middle_goes_on(edge: FakeHub, start: Any) -> None:
    edge.cut["/uploads"] = 2
    unit = edge.unit(steps=2)
    edge.give(unit)

    start()
    until(lambda: edge.outcome(unit))

    report = edge.outcome(unit)
    assert report is not None
    assert report.outcome == "done"
    assert report.update is not None
    assert edge.blobs.has(report.update.hash)


def test_ctrl_c_hands_in_the_partial_unit_returns_the_next_and_leaves(edge: FakeHub, start_process: Any) -> None:
    working = edge.unit(steps=400, step_s=0.02, box_s=100.0)
    edge.give(working)
    process = start_process()
    until(lambda: any(p.steps > 3 for beat in edge.beats for p in beat.leases))

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)

    assert process.returncode == 0, output
    report = edge.outcome(working)
    assert report is not None
    assert report.outcome == "done"
    assert 3 <= report.steps < 400
    assert edge.left == ["w1"]


def test_ctrl_c_returns_a_unit_that_was_leased_ahead(edge: FakeHub, start_process: Any, child_log: Path) -> None:
    working, ahead = edge.unit(steps=100, step_s=0.05), edge.unit(steps=100)
    edge.give(working, ahead)
    process = start_process()
    until(lambda: any(line.get("told") == "DoUnit" and line["lease"] == ahead.id for line in told(child_log)))

    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)

    assert process.returncode == 0, output
    assert outcomes(edge) == {working.id: "done", ahead.id: "returned"}
    assert not [line for line in told(child_log) if line.get("started") == ahead.id]


def test_ctrl_c_twice_leaves_at_once_and_leaves_no_process_behind(
    edge: FakeHub, start_process: Any, child_log: Path
) -> None:
    edge.give(edge.unit(hang_at=1))
    process = start_process()
    until(lambda: any("started" in line for line in told(child_log)))
    child = next(line["pid"] for line in told(child_log))

    process.send_signal(signal.SIGINT)
    until(lambda: "leaving" in {beat.state for beat in edge.beats})
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)

    assert process.returncode == 130
    until(lambda: not is_alive(child))


def test_an_idle_worker_leaves_at_the_first_ctrl_c(edge: FakeHub, start_process: Any) -> None:
    process = start_process()
    until(lambda: edge.requests)

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)

    assert process.returncode == 0
    assert edge.left == ["w1"]


def test_a_child_that_does_not_hand_in_is_given_up_and_its_unit_returned(
    edge: FakeHub, start: Any, child_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.worker.state.HAND_IN_S", 0.5)
    unit = edge.unit(hang_at=1)
    edge.give(unit)
    agent = start()
    until(lambda: any("started" in line for line in told(child_log)))

    agent.agent.stop()

    assert agent.wait() == 0
    assert outcomes(edge) == {unit.id: "returned"}
    assert not is_alive(next(line["pid"] for line in told(child_log)))


def test_a_silent_child_is_ended(edge: FakeHub, start: Any, child_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potluck.worker.pulse.SILENT_S", 0.8)
    silent, good = edge.unit(hang_at=3), edge.unit(steps=2)
    edge.give(silent)

    start()
    until(lambda: edge.outcome(silent))
    edge.give(good)
    until(lambda: edge.outcome(good))

    report = edge.outcome(silent)
    assert report is not None
    assert report.code == "silent"
    assert outcomes(edge)[good.id] == "done"


def test_a_killed_agent_takes_its_child_along_and_the_next_hands_in_the_spool(
    edge: FakeHub, start_process: Any, child_log: Path, tmp_path: Path
) -> None:
    finished, begun = edge.unit(steps=3), edge.unit(steps=500, step_s=0.02)
    edge.fail["/uploads"] = [503] * 1000
    edge.give(finished, begun)
    process = start_process()
    until(lambda: list((tmp_path / "home/spool").glob("*/entry.json")))
    until(lambda: any(line.get("started") == begun.id for line in told(child_log)))
    child = next(line["pid"] for line in told(child_log))

    process.kill()
    process.communicate()
    until(lambda: not is_alive(child))
    edge.fail.clear()
    edge.live = {finished.id: finished}
    start_process()

    until(lambda: edge.outcome(finished))
    assert outcomes(edge)[finished.id] == "done"
    until(lambda: not list((tmp_path / "home/spool").iterdir()))


def test_a_lease_that_lapsed_is_dropped_and_work_goes_on(edge: FakeHub, start: Any, child_log: Path) -> None:
    """As after a SIGSTOP: the hub has moved on."""
    lost, good = edge.unit(steps=500, step_s=0.02), edge.unit(steps=2)
    edge.give(lost)
    agent = start()
    until(lambda: any(line.get("started") == lost.id for line in told(child_log)))

    edge.live.clear()
    until(lambda: any(line.get("told") == "Drop" for line in told(child_log)))
    edge.give(good)

    until(lambda: edge.outcome(good))
    assert outcomes(edge) == {good.id: "done"}
    assert agent.screen.has("not ours any more")


def test_a_report_that_comes_too_late_is_said_and_work_goes_on(edge: FakeHub, start: Any) -> None:
    late, good = edge.unit(steps=5, step_s=0.02), edge.unit(steps=2)
    edge.ttl_s = 60
    edge.give(late)
    agent = start()
    until(lambda: edge.leased)
    edge.live.clear()

    until(lambda: agent.screen.has("too late") or agent.screen.has("not ours any more"))
    edge.give(good)
    until(lambda: edge.outcome(good))


def test_the_hub_may_ask_for_a_unit_before_its_time(edge: FakeHub, start: Any, child_log: Path) -> None:
    unit = edge.unit(steps=500, step_s=0.02)
    edge.give(unit)
    start()
    until(lambda: any(line.get("started") == unit.id for line in told(child_log)))

    edge.hand_in.add(unit.id)

    report = until(lambda: edge.outcome(unit))
    assert report.outcome == "done"
    assert report.steps < 500


def test_a_revoked_worker_stops_with_the_reason(edge: FakeHub, start: Any, child_log: Path) -> None:
    edge.give(edge.unit(steps=500, step_s=0.02))
    agent = start()
    until(lambda: any("started" in line for line in told(child_log)))

    edge.tokens.clear()

    assert agent.wait() == 1
    assert agent.screen.has("this credential was revoked")
    assert not is_alive(next(line["pid"] for line in told(child_log)))


def test_a_hub_that_is_too_new_ends_the_agent(edge: FakeHub, start: Any) -> None:
    edge.fail["/heartbeat"] = [426] * 5

    agent = start()

    assert agent.wait() == 7


def test_once_does_one_unit_and_leaves(edge: FakeHub, start: Any) -> None:
    edge.endless = {"steps": 20, "step_s": 0.02}

    agent = start(once=True)

    assert agent.wait() == 0
    assert [r.outcome for _, r in edge.reports] == ["done"]
    assert len(edge.leased) == 1


def test_for_a_while_ends_like_ctrl_c(edge: FakeHub, start: Any) -> None:
    edge.endless = {"steps": 1000, "step_s": 0.02}

    agent = start(for_s=2.0)

    assert agent.wait() == 0
    assert "done" in outcomes(edge).values()
    assert not edge.live


def test_a_full_disk_gives_the_unit_back(
    edge: FakeHub, start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "cache").write_text("a file where a folder should be")  # any error of the disk's
    unit = edge.unit()
    edge.give(unit)

    start()

    report = until(lambda: edge.outcome(unit))
    assert report.outcome == "returned"
    assert "disk" in report.reason


def test_a_trusted_worker_also_builds_merges_and_tastes(edge: FakeHub, start: Any) -> None:
    unit = edge.unit("run1")
    base = edge.versions["run1"][0]
    common = {
        "run_id": "run1",
        "ttl_s": 5.0,
        "recipe": unit.recipe,
        "dataset": unit.dataset,
        "layout": unit.layout,
        "seed": 1,
    }
    update, state = edge.blobs.add_bytes(b"update" * 100), edge.blobs.add_bytes(b"state" * 100)
    inputs = [MergeInput(9, update, "int8", 0, 80, 10)]
    merge = MergeSpec(base, state, inputs, 1, MergePolicy(), 0, False)
    edge.give(
        Lease(id="00000000-0000-4000-8000-00000000000a", task_id=100, kind="init", **common),
        Lease(id="00000000-0000-4000-8000-00000000000b", task_id=101, kind="merge", merge=merge, **common),
        Lease(
            id="00000000-0000-4000-8000-00000000000c",
            task_id=102,
            kind="taste",
            taste=TasteSpec(base, state, 4, 1),
            **common,
        ),
    )

    start(trusted=True)
    until(lambda: len(edge.reports) == 3)

    reports = {lease_id[-1]: report for lease_id, report in edge.reports}
    assert reports["a"].snapshot
    assert reports["a"].layout
    assert reports["b"].version == 1
    assert reports["b"].delta
    assert reports["b"].state
    assert reports["c"].image
    assert reports["c"].metrics == {"distance": 1.0}


def test_a_child_gets_no_secrets_and_the_right_number_of_threads(
    edge: FakeHub, start: Any, child_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("POTLUCK_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    unit = edge.unit(steps=1)
    edge.give(unit)

    start(threads=1)
    until(lambda: edge.outcome(unit))

    environment = told(child_log)[0]["environment"]
    assert "secret" not in environment.values()
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert not any("plw_" in value for value in environment.values())


def test_two_agents_cannot_share_a_folder(edge: FakeHub, tmp_path: Path) -> None:
    settings = AgentSettings(edge.address, edge.worker(), tmp_path / "home", screen=False)

    with only_agent(tmp_path / "home"), pytest.raises(Conflict, match=f"process {os.getpid()}") as refused:
        Agent(settings).run()

    assert refused.value.exit_code == 5


def test_versions_are_followed_through_crashes_and_other_runs(edge: FakeHub, start: Any, child_log: Path) -> None:
    edge.merge_on_report = True
    plan = [
        edge.unit(run, steps=4, overlap_s=0.2, **({"die_at": 2} if i in (3, 9) else {}))
        for i, run in enumerate("abacabbcabcadeabde")
    ]
    edge.give(*plan)

    start()
    until(lambda: all(edge.outcome(unit) for unit in plan), timeout_s=90)

    assert not [line for line in told(child_log) if "gap" in line]
    assert {r.outcome for _, r in edge.reports} <= {"done", "failed", "returned"}
    assert sum(r.outcome == "failed" for _, r in edge.reports) == 2


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
