"""Units, ticks, overlap and carry, with the clock in the test's hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from child_kit import CLOCK, Bench, make_bench
from hypothesis import given
from hypothesis import strategies as st

from potluck.protocol import ChildEvent, Drop, Failed, Finished, HandIn, Rebase, Rebased, Started, Stepping
from potluck.train.codec import codec, read_update
from potluck.train.data import ShardReader, to_float
from potluck.train.pool import Contributor, box_for
from potluck.train.recipe import load_recipe
from potluck.train.weights import scatter


class Room:
    """A contributor and what it said."""

    def __init__(self) -> None:
        self.said: list[ChildEvent] = []
        self.contributor = Contributor(self.said.append, CLOCK)

    def tell(self, *instructions: Any) -> None:
        for instruction in instructions:
            self.contributor.take(instruction, CLOCK.now)

    def work(self, until: type[ChildEvent], *, at_most: int = 500) -> Any:
        """Work, letting the clock run over rests, until such an event comes."""
        seen = len(self.said)
        for _ in range(at_most):
            next_at = self.contributor.next_at
            assert next_at is not None, f"nothing to do, and no {until.__name__} in {self.said[seen:]}"
            CLOCK.now = max(CLOCK.now, next_at) if next_at != float("-inf") else CLOCK.now
            self.contributor.work()
            for event in self.said[seen:]:
                if isinstance(event, until):
                    return event
        raise AssertionError(f"no {until.__name__} in {self.said[seen:]}")

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.contributor.work()


@pytest.fixture
def room() -> Room:
    CLOCK.now = 100.0
    return Room()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path)


def update_of(bench: Bench, event: Finished) -> torch.Tensor:
    update = read_update(event.files["update"], bench.layout, event.report.codec)
    return codec(event.report.codec).decode(update.tensors, bench.layout)


# --- ticks


@given(
    start=st.floats(0, 1e6),
    tick=st.floats(-1e4, 1e6),
    box_s=st.floats(0.05, 3600),
)
def test_a_box_ends_on_a_tick_and_is_neither_short_nor_long(start: float, tick: float, box_s: float) -> None:
    box = box_for(start, tick, box_s)

    assert box_s / 2 <= box <= 1.5 * box_s
    off = (start + box - tick) / box_s
    assert abs(off - round(off)) < 1e-3


@pytest.mark.parametrize(("tick_s", "steps"), [(10, 10), (7, 7), (5, 5), (4, 14), (1, 11), (23, 13)])
def test_a_unit_hands_in_on_the_tick_nearest_to_its_box(room: Room, bench: Bench, tick_s: float, steps: int) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)], tick_s=tick_s))

    finished = room.work(Finished)

    assert finished.report.steps == steps
    assert finished.report.done == [(0, 4 * steps)]
    assert finished.report.seconds == steps
    assert CLOCK.now == 100 + steps


def test_ticks_count_from_the_arrival_of_the_instruction(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)], tick_s=10))
    room.steps(4)
    room.tell(bench.unit("b", tick_s=7))  # said at 103: the tick is at 110 too

    first, second = room.work(Finished), room.work(Finished)

    assert (first.report.steps, second.report.steps) == (10, 10)


def test_all_positions_are_done_even_if_the_last_batch_is_small(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)], positions=[(3, 9), (20, 21)]))

    finished = room.work(Finished)

    assert finished.report.done == [(3, 9), (20, 21)]
    assert (finished.report.samples, finished.report.steps) == (7, 2)


def test_a_single_left_over_sample_goes_back_if_the_recipe_has_batch_norm(room: Room, tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "norm", norm=True)
    room.tell(bench.unit("a", weights=[bench.snapshot(0)], positions=[(0, 9)]))

    finished = room.work(Finished)

    assert finished.report.done == [(0, 8)]


def test_a_lone_sample_of_a_recipe_with_batch_norm_is_returned(room: Room, tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "norm", norm=True)
    room.tell(bench.unit("a", weights=[bench.snapshot(0)], positions=[(0, 1)]))

    assert room.work(Finished).report.outcome == "returned"


# --- hand in, drop, share


def test_a_unit_that_is_called_in_is_handed_in_with_what_is_done(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]))
    room.steps(4)  # the first begins it
    room.tell(HandIn(lease_id="a"))

    finished = room.work(Finished)

    assert (finished.report.outcome, finished.report.steps) == ("done", 3)


def test_a_unit_that_is_called_in_before_its_first_step_does_one(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]))
    room.steps(1)
    room.tell(HandIn(lease_id="a"))

    assert room.work(Finished).report.steps == 1


def test_a_unit_that_is_called_in_before_it_began_is_returned(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]), bench.unit("b"))
    room.steps(2)
    room.tell(HandIn(lease_id="b"))

    returned = room.said[-1]

    assert isinstance(returned, Finished)
    assert (returned.lease_id, returned.report.outcome) == ("b", "returned")
    room.work(Finished)
    assert room.contributor.next_at is None


def test_a_dropped_unit_leaves_no_trace_in_the_next_one(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]), bench.unit("b"))
    room.steps(5)
    room.tell(Drop(lease_id="a"))
    room.contributor.work()

    assert isinstance(room.said[-1], Started)
    assert torch.equal(room.contributor.local("run").params, bench.start.params)
    assert room.work(Finished).lease_id == "b"


@pytest.mark.parametrize(("share", "steps"), [(1.0, 20), (0.5, 10), (0.25, 5)])
def test_a_share_of_the_time_makes_a_share_of_the_steps(room: Room, bench: Bench, share: float, steps: int) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)], tick_s=20, box_s=20, share=share))

    finished = room.work(Finished)

    assert abs(finished.report.steps - steps) <= 1


def test_a_resting_child_hands_in_when_it_is_called(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)], share=0.1))
    room.steps(2)
    room.tell(HandIn(lease_id="a"))
    room.contributor.work()

    assert isinstance(room.said[-1], Finished)
    assert CLOCK.now == 101


def test_progress_is_told_about_twice_a_second(room: Room, tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "quick", step_s=0.05)
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]))

    finished = room.work(Finished)

    told = [event for event in room.said if isinstance(event, Stepping)]
    assert finished.report.steps == 200
    assert 15 <= len(told) <= 20
    assert told[0].samples_per_s == pytest.approx(80)
    assert all(a.fraction < b.fraction <= 1 for a, b in pairwise(told))


# --- updates


def test_an_update_is_the_way_from_the_base(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]))

    finished = room.work(Finished)

    local = room.contributor.local("run").params
    assert torch.equal(update_of(bench, finished), local - bench.start.params)
    assert finished.report.base_version == 0
    assert finished.report.metrics["loss"] > 0


def test_what_a_codec_loses_is_in_the_next_update(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)], codec="bf16"))
    first = room.work(Finished)
    way = room.contributor.local("run").params - bench.start.params
    room.tell(bench.unit("b", codec="bf16"))
    second = room.work(Finished)
    way += room.contributor.local("run").params - bench.start.params

    sent = update_of(bench, first) + update_of(bench, second)

    assert (sent - way).abs().max() <= 0.005 * way.abs().max()


def test_the_gradient_strategy_sends_the_mean_gradient_and_moves_nothing(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)], positions=[(0, 14)], strategy="gradient"))

    finished = room.work(Finished)

    recipe = load_recipe(bench.ref, bench.recipe_path, bench.dataset)
    net = recipe.models()["net"]
    scatter(bench.start, {"net": net}, bench.layout)
    (batch,) = ShardReader(bench.paths, bench.dataset, 1).batches([(0, 14)], 14)
    assert batch.y is not None
    torch.nn.functional.cross_entropy(net(to_float(batch.x, "cpu")), batch.y).backward()
    mean = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])
    assert torch.allclose(update_of(bench, finished), mean, atol=1e-6)
    assert torch.equal(room.contributor.local("run").params, bench.start.params)


# --- overlap and carry


def overlapped(room: Room, bench: Bench, **spec: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Into the overlap of unit b, two steps long: θ at the upload of unit a, and θ now."""
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]), bench.unit("b", tick_s=20, overlap_s=3.0, **spec))
    room.work(Finished)
    at_upload = room.contributor.local("run").params
    assert room.said[-1] == Started(lease_id="b", box_s=10, overlap=True)
    room.steps(2)
    return at_upload, room.contributor.local("run").params


def test_a_rebase_keeps_the_steps_since_the_upload_to_the_last_bit(room: Room, bench: Bench) -> None:
    at_upload, now = overlapped(room, bench)
    new = bench.shifted(0.125)
    room.tell(Rebase(lease_id="b", weights=[bench.snapshot(1, new)]))

    assert room.said[-1] == Rebased(lease_id="b", version=1)
    assert torch.equal(room.contributor.local("run").params, new.params + (now - at_upload))
    finished = room.work(Finished)
    assert finished.report.base_version == 1
    assert torch.equal(update_of(bench, finished), room.contributor.local("run").params - new.params)


def test_without_a_rebase_the_unit_goes_back_to_its_old_base_with_its_own_steps(room: Room, bench: Bench) -> None:
    overlapped(room, bench)
    room.steps(1)
    at_upload = bench.start.params + update_of(bench, next(e for e in room.said if isinstance(e, Finished)))
    now = room.contributor.local("run").params

    rebased = room.work(Rebased)

    assert rebased.version == 0
    assert CLOCK.now == 114  # the window closed at 113, and the step after it is done too
    finished = room.work(Finished)
    assert (finished.report.base_version, finished.report.steps) == (0, 10)
    assert not torch.equal(now, at_upload)


def test_the_window_closes_onto_the_old_base(room: Room, bench: Bench) -> None:
    at_upload, now = overlapped(room, bench)
    CLOCK.now = 113.5  # as if the machine had slept
    room.tell(HandIn(lease_id="b"))

    finished = room.work(Finished)

    assert torch.equal(update_of(bench, finished), (bench.start.params + (now - at_upload)) - bench.start.params)


def test_a_rebase_after_the_window_is_for_the_next_unit(room: Room, bench: Bench) -> None:
    overlapped(room, bench)
    room.work(Rebased)
    before = room.contributor.local("run").params
    new = bench.shifted(0.125)

    room.tell(Rebase(lease_id="b", weights=[bench.snapshot(1, new)]))

    assert torch.equal(room.contributor.local("run").params, before)
    assert room.work(Finished).report.base_version == 0
    room.tell(bench.unit("c"))
    room.contributor.work()
    assert room.said[-1] == Started(lease_id="c", box_s=10, overlap=False)
    assert torch.equal(room.contributor.local("run").params, new.params)


def test_without_an_overlap_the_next_unit_starts_from_what_is_held(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]), bench.unit("b", overlap_s=0.0))
    room.work(Finished)

    started = room.said[-1]
    assert isinstance(started, Started)
    assert not started.overlap
    assert torch.equal(room.contributor.local("run").params, bench.start.params)


def test_a_unit_that_ends_within_the_window_stands_on_its_base_first(room: Room, bench: Bench) -> None:
    overlapped(room, bench)
    room.tell(HandIn(lease_id="b"))

    finished = room.work(Finished)

    assert [type(e) for e in room.said[-2:]] == [Rebased, Finished]
    assert torch.equal(update_of(bench, finished), room.contributor.local("run").params - bench.start.params)


def test_news_that_came_with_the_next_unit_are_under_it_when_the_window_closes(room: Room, bench: Bench) -> None:
    new = bench.shifted(0.125)
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]))
    room.steps(2)
    room.tell(bench.unit("b", weights=[bench.snapshot(1, new)], tick_s=20))
    first = room.work(Finished)

    rebased = room.work(Rebased)

    assert first.report.base_version == 0
    assert rebased.version == 1


# --- what goes wrong


def test_a_nan_fails_the_unit_and_the_next_one_starts_clean(room: Room, tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "nan", nan_at=3)
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]))

    failed = room.work(Failed)

    assert failed.code == "nan"
    assert "`loss` became nan at step 4" in failed.reason
    room.tell(bench.unit("b", positions=[(0, 8)]))
    room.contributor.work()
    assert torch.equal(room.contributor.local("run").params, bench.start.params)
    assert room.work(Finished).report.metrics["loss"] < 10


def test_a_broken_step_is_told_with_its_line(room: Room, tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "broken", broken=True)
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]))

    failed = room.work(Failed)

    assert "this recipe is broken" in failed.reason
    assert 'raise RuntimeError("this recipe is broken")' in failed.reason


def test_weights_with_another_hash_are_refused_and_asked_for_again(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a", weights=[replace(bench.snapshot(0), weights_sha256="0" * 64)]))

    failed = room.said[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "weights"
    room.tell(bench.unit("a", weights=[bench.snapshot(0)]))
    assert room.work(Finished).report.outcome == "done"


def test_a_unit_without_any_weights_says_so(room: Room, bench: Bench) -> None:
    room.tell(bench.unit("a"))

    failed = room.said[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, "snapshot" in failed.reason) == ("weights", True)


def test_a_recipe_that_does_not_load_fails_its_unit_only(room: Room, bench: Bench) -> None:
    lost = replace_unit = bench.unit("a", weights=[bench.snapshot(0)])
    room.tell(
        type(lost)(**{**{f: getattr(replace_unit, f) for f in lost.__struct_fields__}, "recipe_path": "/nowhere"})
    )

    failed = room.said[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "bad_recipe"
    room.tell(bench.unit("b", weights=[bench.snapshot(0)]))
    assert room.work(Finished).lease_id == "b"
