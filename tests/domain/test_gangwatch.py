"""Is what the members of a gang say put together rightly, whatever they say and in whichever order it comes?"""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from potluck.domain.gangwatch import FIGURES, KEPT, LONGEST, MOST_SAID, PHASES, Ear, Watch, kind_of, shares_in, story

NAMES = {1: "lab-1", 2: "lab-2", 3: "lab-3"}


def figures(**values: float) -> dict[str, float]:
    return {f"gang/{name}": value for name, value in values.items()}


def watch_of(*points: tuple[int, int, dict[str, Any]]) -> Watch:
    watch = Watch()
    for member, step, values in points:
        watch.add(member, step, figures(**values))
    return watch


def test_what_is_not_about_the_gang_is_left_alone() -> None:
    watch = Watch()

    assert not watch.add(1, 0, {"loss": 1.0})
    assert watch.add(1, 0, {"loss": 1.0, "gang/share": 8.0})

    assert watch.lanes[1].looks[0].values == {"share": 8.0}
    assert watch.lanes[1].newest("share") == 8.0
    assert len(set(FIGURES)) == 21


def test_a_step_is_cut_into_its_phases_and_the_pace_has_a_name() -> None:
    fast = {"members": 2, "load_s": 0.01, "forward_s": 0.02, "backward_s": 0.03, "sum_s": 0.14, "step_s": 0.2}
    slow = {"members": 2, "load_s": 0.12, "forward_s": 0.03, "backward_s": 0.04, "sum_s": 0.01, "step_s": 0.2}
    watch = watch_of((1, 5, fast), (2, 5, slow))

    assert [(part.phase, round(part.part, 2)) for part in watch.lanes[2].parts if part.part] == [
        *(("load", 0.6), ("forward", 0.15), ("backward", 0.2), ("sum", 0.05))
    ]
    assert watch.pace(NAMES) == "`lab-2` sets the pace: 60 % of its step is the loader"
    assert list(watch.steps(NAMES, 3)) == ["the whole step", "lab-2", "lab-1"]


def test_a_gang_whose_network_limits_is_told_so() -> None:
    member = {"members": 2, "backward_s": 0.03, "sum_s": 0.1}

    assert "the network limits" in watch_of((1, 5, member), (2, 5, member)).pace(NAMES)
    assert watch_of((1, 5, {"members": 1, "forward_s": 1.0})).pace(NAMES) == "100 % of a step is the forward pass"
    assert Watch().pace(NAMES) == ""


def test_who_left_counts_no_more_in_the_sum_of_solo_speeds() -> None:
    watch = watch_of(
        *((m, 1, {"members": 3, "alone_per_s": 100.0 * m, "total_per_s": 590}) for m in (1, 2, 3)),
        *((m, 9, {"members": 2, "alone_per_s": 100.0 * m, "total_per_s": 290}) for m in (1, 2)),
    )

    together, alone = watch.throughput()

    assert watch.current == [1, 2]
    assert (watch.total_per_s, watch.alone_per_s) == (290, 300)
    assert together == [(1.0, 590), (9.0, 290)]
    assert alone == [(1.0, 600), (9.0, 300)]


def test_the_sum_of_solo_speeds_is_not_known_before_all_are() -> None:
    assert watch_of((1, 1, {"members": 2, "alone_per_s": 100.0}), (2, 1, {"members": 2})).alone_per_s == 0


def test_what_was_lost_behind_a_checkpoint_is_forgotten_for_all() -> None:
    watch = watch_of(*((m, step, {"members": 2}) for step in (1, 50, 99) for m in (1, 2)), (1, 40, {"members": 1}))

    assert [look.step for look in watch.lanes[2].looks] == [1]
    assert watch.current == [1]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 50), st.floats(0, 1e9)), max_size=200))
def test_lanes_are_by_step_whatever_comes(points: list[tuple[int, int, float]]) -> None:
    watch = watch_of(
        *((m, step, {"members": 3, "alone_per_s": v, "total_per_s": v, "load_s": v}) for m, step, v in points)
    )

    for lane in watch.lanes.values():
        steps = [look.step for look in lane.looks]
        assert steps == sorted(set(steps))
        assert len(steps) <= KEPT
        assert not lane.parts or abs(sum(part.part for part in lane.parts) - 1) < 1e-6
    for series in (*watch.throughput(), *watch.steps(NAMES, 6).values(), *watch.shares(NAMES, 6).values()):
        assert [x for x, _ in series] == sorted({x for x, _ in series})
    assert watch.pace(NAMES) == "" or watch.lanes
    assert set(watch.current) <= set(watch.lanes)


def test_only_whole_lines_of_the_gang_are_heard() -> None:
    ear = Ear()

    ear.hear("epoch 1\npotluck: lab-2 jo")
    ear.hear("ined; shares of 8: lab-1 4, lab-2 4\r\n10%\r50%\rpotluck: a word\nnot potluck: this\npotluck: \n")

    assert list(ear.heard) == ["lab-2 joined; shares of 8: lab-1 4, lab-2 4", "a word"]


@given(st.text(), st.lists(st.integers(1, 7), max_size=40))
def test_it_is_the_same_however_the_output_was_cut(text: str, cuts: list[int]) -> None:
    whole, pieces = Ear(), Ear()
    text = f"potluck: {text}\npotluck: {text}"

    whole.hear(text)
    rest = text
    for cut in cuts:
        pieces.hear(rest[:cut])
        rest = rest[cut:]
    pieces.hear(rest)

    assert whole.heard == pieces.heard


def test_output_without_end_is_not_kept() -> None:
    ear = Ear()

    for _ in range(100):
        ear.hear("x" * 10_000)
    for number in range(1_000):
        ear.hear(f"\npotluck: {number} " + "y" * 10_000)

    assert len(ear._rest) <= 2 * LONGEST
    assert len(ear.heard) <= MOST_SAID
    assert max(map(len, ear.heard)) <= LONGEST


def test_sentences_are_told_apart_and_have_their_step() -> None:
    watch = watch_of(
        *((m, step, {"members": 2, "share": 4}) for step in (0, 10, 20) for m in (1, 2)),
        *((m, step, {"members": 2, "share": 2 if m == 1 else 6}) for step in (30, 40) for m in (1, 2)),
    )
    again = "step 25 is taken again: lab-3 is gone"
    heard = {
        1: [
            "lab-1, lab-2 joined; shares of 8: lab-1 4, lab-2 4",
            again,
            "lab-1 is 3.0× slower than before: 40 → 20 ms a step; shares of 8: lab-1 2, lab-2 6",
        ],
        2: [again, "lab-2 took over the state of step 28", "use GroupNorm"],
    }

    told = story(watch, heard, NAMES)

    assert [(said.kind, said.step) for said in told] == [
        *(("joined", 0), ("retry", 25), ("healed", 28), ("note", 28), ("replan", 30))
    ]
    assert told[1].who == ("lab-1", "lab-2")


def test_every_kind_of_sentence_that_the_library_says_is_known() -> None:
    assert kind_of("lab-3 left; shares of 8: lab-1 8") == "left"
    assert kind_of("the gradient of lab-3 was not finite at step 4: all skip it") == "skip"
    assert kind_of("lab-3's weights drifted from the others': it takes theirs over") == "drift"
    assert kind_of("anything") == "note"
    assert shares_in("x; shares of 9: a b 4, c 5, d ²") == {"a b": 4, "c": 5}
    assert shares_in("x; shares of 9") == {}
    assert set(PHASES) >= {"load", "forward", "backward", "sum", "optimizer", "outside"}
