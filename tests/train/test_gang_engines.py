"""What a gang promises, for each engine: real processes on loopback, with faults that a plan puts at a step and a phase."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gang_kit import Cluster, Member, Nursery, furthest, on_one_machine, until

EXACT = 1e-12
TASK = {"length": 600, "batch": 64, "epochs": 2, "base_s": 0.002}
LONG = {"length": 600, "batch": 64, "epochs": 12, "base_s": 0.03}  # time to come and go

Open = Callable[..., Cluster]

SLOW = pytest.mark.slow
ONE = pytest.mark.parametrize("gang", ["plain", pytest.param("torchft", marks=SLOW)], indirect=True)
"""What does not depend on the engine: with the other one too, but not in `make test`."""


@pytest.fixture(params=["torchft", "plain"])
def gang(request: pytest.FixtureRequest, nursery: Nursery, tmp_path: Path) -> Iterator[Open]:
    if request.param == "torchft":
        pytest.importorskip("torchft")
    opened: list[Cluster] = []

    def open_one(task: dict[str, Any], **given: Any) -> Cluster:
        cluster = Cluster(nursery, tmp_path, request.param, task, **given)
        opened.append(cluster)
        return cluster.__enter__()

    yield open_one
    for cluster in opened:
        cluster.__exit__()


def assert_the_same_everywhere(cluster: Cluster, *members: Member, **single: Any) -> list[Any]:
    """Bit-equal on all members, and within rounding what one machine makes of it."""
    ends = [member.end() for member in members]
    cluster.assert_exactly_once()
    for end in ends[1:]:
        assert end["weights"] == ends[0]["weights"]
        assert end["steps"] == ends[0]["steps"]
    assert furthest(ends[0]["weights"], on_one_machine(cluster.task, **single)) < EXACT
    return ends


@pytest.mark.parametrize("shares", [(48, 16), *(pytest.param(pair, marks=SLOW) for pair in [(32, 32), (60, 4)])])
def test_the_gradient_is_that_of_one_machine_whatever_the_shares(gang: Open, shares: tuple[int, int]) -> None:
    cluster = gang({**TASK, "clip": 0.3, "weights": dict(zip("ab", shares, strict=True))}, least=2)

    a, b = cluster.start("a"), cluster.start("b")

    assert_the_same_everywhere(cluster, a, b)
    assert a.committed[0]["shares"] == {"a": shares[0], "b": shares[1]}


@pytest.mark.parametrize("phase", ["backward", *(pytest.param(p, marks=SLOW) for p in ["forward", "commit", "after"])])
def test_a_killed_member_costs_the_step_in_flight_and_nothing_else(gang: Open, phase: str) -> None:
    cluster = gang(TASK, least=2)

    a, b = cluster.start("a"), cluster.start("b")
    c = cluster.start("c", faults=[[6, phase, "kill"]])

    assert c.process.wait() == -signal.SIGKILL
    assert_the_same_everywhere(cluster, a, b)


@SLOW
def test_killed_members_come_back_and_new_ones_join_while_it_runs(gang: Open) -> None:
    cluster = gang({**LONG, "schedule": True}, least=1)
    a = cluster.start("a")
    until(lambda: a.reached(2), "a trains")

    b = cluster.start("b", faults=[[30, "backward", "kill"]])
    assert b.process.wait() == -signal.SIGKILL
    until(lambda: a.reached(max(entry["step"] for entry in b.committed) + 2), "a goes on without b")
    again, c = cluster.start("b"), cluster.start("c")
    until(lambda: again.reached(0) and c.reached(0), "both take part")
    assert_the_same_everywhere(cluster, a, again, c)

    assert any("joined" in text for text in [*a.events("joined"), *a.events("left")])
    assert again.committed[0]["step"] > 2 and c.events("healed")


@SLOW
def test_a_member_that_hangs_is_let_go_and_may_come_back(gang: Open) -> None:
    cluster = gang({**LONG, "epochs": 9}, least=1)
    a = cluster.start("a")
    b = cluster.start("b", faults=[[25, "forward", "stop"]])
    until(lambda: b.of("stopped"), "b stops")

    until(lambda: any(set(entry["shares"]) == {"a"} and entry["step"] >= 25 for entry in a.committed), "a goes on")
    b.signal(signal.SIGCONT)

    assert_the_same_everywhere(cluster, a, b)
    assert b.events("healed")


@ONE
def test_the_last_batch_of_an_epoch_is_shared_out_even_if_it_is_smaller_than_the_gang(gang: Open) -> None:
    cluster = gang({**TASK, "length": 193}, least=3)  # 3 · 64 + 1

    members = [cluster.start(name) for name in "abc"]

    assert_the_same_everywhere(cluster, *members)
    last = [entry for entry in members[0].committed if entry["start"] == 192]
    assert [sum(entry["shares"].values()) for entry in last] == [1, 1]
    assert all(len(member.committed) == 8 for member in members)


@ONE
def test_a_share_that_exceeds_a_members_memory_is_computed_in_parts(gang: Open) -> None:
    cluster = gang({**TASK, "schedule": True, "weights": {"a": 1, "b": 3}}, least=2)

    a, b = cluster.start("a"), cluster.start("b", at_once=7)

    assert_the_same_everywhere(cluster, a, b)
    assert b.committed[0]["shares"]["b"] == 48  # in 7 parts


@ONE
def test_a_gradient_that_is_not_a_number_is_skipped_by_all_and_its_member_named(gang: Open) -> None:
    cluster = gang(TASK, least=2)

    a, b = cluster.start("a"), cluster.start("b", faults=[[7, "forward", "nan"]])

    assert_the_same_everywhere(cluster, a, b, skip=lambda step: step == 7)
    for member in (a, b):
        assert [text for text in member.events("skip") if "of b was not finite at step 7" in text]
        assert [entry["step"] for entry in member.committed if entry["skipped"]] == [7]


@ONE
def test_running_statistics_are_the_same_everywhere_and_a_step_given_up_leaves_no_trace_in_them(gang: Open) -> None:
    cluster = gang({**TASK, "model": "norm"}, least=2)
    a, b = cluster.start("a"), cluster.start("b")
    cluster.start("c", faults=[[6, "backward", "kill"]])

    ends = [a.end(), b.end()]

    cluster.assert_exactly_once()
    assert ends[0]["weights"] == ends[1]["weights"]
    assert ends[0]["steps"] in [value for value in ends[0]["weights"] if isinstance(value, int)]  # num_batches_tracked
    assert any("GroupNorm" in text for text in a.events("advice"))


@SLOW
def test_weights_that_drift_are_noticed_named_and_replaced(gang: Open) -> None:
    cluster = gang({**TASK, "epochs": 8}, least=3)

    a, b = cluster.start("a"), cluster.start("b")
    c = cluster.start("c", faults=[[30, "after", "drift"]])
    ends = [member.end() for member in (a, b, c)]

    cluster.assert_exactly_once()
    assert ends[0]["weights"] == ends[1]["weights"] == ends[2]["weights"]
    assert [text.split("'")[0] for text in a.events("drift")] == ["c"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data_seed": 2}, "other samples"),
    ]
    + [
        pytest.param(change, told, marks=SLOW)
        for change, told in [
            ({"length": 599}, "the number of samples in the data set is 599 there and 600"),
            ({"model": "wide"}, "another `2.weight`: [25, 24] float64, and [24, 24] float64"),
            ({"batch": 60}, "the batch size is 60 there and 64"),
            ({"papers": {"torch": "2.9.0"}}, "torch is 2.9.0 there and 2."),
            ({"papers": {"code": {"train.py": "0"}}}, "its train.py is not the one the others have"),
            ({"compress": "fp16"}, "the compression of the gradients is fp16 there and none on the others"),
        ]
    ],
)
def test_a_member_that_does_not_fit_is_named_before_the_first_step(
    gang: Open, change: dict[str, Any], told: str
) -> None:
    cluster = gang(TASK, least=3)

    a, b, odd = cluster.start("a"), cluster.start("b"), cluster.start("odd", **change)

    for member in (a, b, odd):
        assert member.process.wait() == 1
        assert "odd does not fit" in member.log and told in member.log
        assert not member.committed


@SLOW
def test_a_newcomer_that_does_not_fit_is_sent_away_and_the_gang_goes_on(gang: Open) -> None:
    cluster = gang({**LONG, "epochs": 8}, least=2)
    a, b = cluster.start("a"), cluster.start("b")
    until(lambda: a.reached(3), "the gang trains")

    odd = cluster.start("odd", data_seed=2)

    assert odd.process.wait() == 1 and "odd does not fit" in odd.log
    assert_the_same_everywhere(cluster, a, b)


@SLOW
def test_the_meeting_may_die_and_be_started_elsewhere(gang: Open) -> None:
    cluster = gang({**LONG, "epochs": 8}, least=2)
    a, b = cluster.start("a"), cluster.start("b")
    until(lambda: a.reached(10), "the gang trains")

    cluster.close_meeting()
    cluster.open_meeting()

    assert_the_same_everywhere(cluster, a, b)


@ONE
def test_all_may_die_and_go_on_at_the_exact_sample(gang: Open, tmp_path: Path) -> None:
    path = str(tmp_path / "gang.safetensors")
    task = {**LONG, "save_every": 5, "save": path, "resume": path, "schedule": True, "epochs": 3, "base_s": 0.015}
    cluster = gang(task, least=2)
    first = [cluster.start(name) for name in "ab"]
    until(lambda: all(member.reached(11) for member in first), "11 steps are done")
    for member in first:
        member.kill()
        member.process.wait()
    saved = len(cluster.ledger())
    cluster.members.clear()

    second = [cluster.start(name) for name in "bc"]
    ends = [member.end() for member in second]

    begun = second[0].committed[0]["step"]
    assert saved - 6 <= begun <= saved and begun % 5 == 0
    assert ends[0]["weights"] == ends[1]["weights"]
    assert furthest(ends[0]["weights"], on_one_machine(cluster.task)) < EXACT


@SLOW
def test_a_slow_member_gets_less_and_one_that_becomes_slow_gets_even_less(gang: Open) -> None:
    task = {"length": 960, "batch": 96, "epochs": 8, "delay_s": 0.0004}
    cluster = gang(task, least=2, policy="dynamic")

    a = cluster.start("a")
    b = cluster.start("b", delay_s=0.0012, slow_from=40, slow_delay_s=0.006)
    assert_the_same_everywhere(cluster, a, b)

    by_step = {entry["step"]: entry["shares"] for entry in a.committed}
    assert by_step[0] == {"a": 48, "b": 48} or by_step[0] == {"b": 48, "a": 48}
    assert by_step[38]["a"] > 1.6 * by_step[38]["b"]
    assert by_step[78]["b"] < 0.6 * by_step[38]["b"]
    assert all("ms a step" in text for member in (a, b) for text in member.events("replan"))


@ONE
def test_members_need_not_begin_with_the_same_weights(gang: Open) -> None:
    cluster = gang(TASK, least=2)

    a, b = cluster.start("a", seed=3), cluster.start("b", seed=4)

    assert a.end()["weights"] == b.end()["weights"]
    assert json.dumps(a.end()["figures"]) == json.dumps(b.end()["figures"])


@SLOW
@ONE
@pytest.mark.parametrize("way", ["powersgd", "fp16"])
def test_compressed_gradients_are_the_same_for_all_and_a_newcomer_learns_how_they_travel(gang: Open, way: str) -> None:
    cluster = gang({**LONG, "epochs": 8, "base_s": 0.05, "compress": way}, least=1)
    a = cluster.start("a")
    b = cluster.start("b", faults=[[12, "backward", "kill"]])
    until(lambda: b.reached(3), "b trains along")  # from here on c has some seconds to come, before a is at its end

    c = cluster.start("c")
    ends = [a.end(), c.end()]

    assert b.process.poll() is not None
    cluster.assert_exactly_once()
    assert ends[0]["weights"] == ends[1]["weights"] and c.committed[0]["step"] > 3
    assert 1e-9 < furthest(ends[0]["weights"], on_one_machine(cluster.task)) < 0.5


@SLOW
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_killed_stopped_or_joined_at_whatever_moment_nothing_is_lost_or_done_twice(
    gang: Open, seed: int
) -> None:
    rng = random.Random(seed)
    cluster = gang({"length": 480, "batch": 48, "epochs": 24, "base_s": 0.01, "clip": 0.5}, least=1, most=6)
    living = [cluster.start(name) for name in "abc"]
    until(lambda: all(member.reached(0) for member in living), "all take part")

    for number in range(8):
        until(lambda: rng.random() < 0.1 or living[0].of("end"), "a random moment")  # polled: some tenths of a second
        if living[0].of("end"):
            break
        victim = rng.choice(living[1:])
        if rng.random() < 0.3:
            victim.signal(signal.SIGSTOP)
            stopped_at = max((entry["step"] for entry in living[0].committed), default=0)
            until(lambda at=stopped_at: living[0].reached(at + 3) or living[0].of("end"), "the others go on")
            victim.signal(signal.SIGCONT)
        else:
            victim.kill()
            living.remove(victim)
            living.append(cluster.start(f"new-{number}"))
            until(lambda: living[-1].reached(0) or living[0].of("end"), "the new one takes part")

    ends = [member.end() for member in living if member.committed]
    cluster.assert_exactly_once()
    assert all(end["weights"] == ends[0]["weights"] for end in ends)
    assert furthest(ends[0]["weights"], on_one_machine(cluster.task)) < 1e-11
