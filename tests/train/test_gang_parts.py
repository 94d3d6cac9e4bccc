"""The parts of a gang on their own: order, meeting, papers, healing, figures, statistics."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from potluck.domain.order import permutation as slow_permutation
from potluck.errors import BadInput, PotluckError
from potluck.train.gang import healing, papers, place, reduce, report
from potluck.train.gang.engine import Card
from potluck.train.gang.loader import permutation, plan
from potluck.train.gang.meeting import GATHER_S, TARRY_S, Line, Meeting, Seat, decide
from potluck.train.gang.norms import Norms
from potluck.train.gang.place import Place
from potluck.train.gang.report import Figures, Row

# --- order and plans -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 4097])
def test_the_fast_order_is_the_slow_one(count: int) -> None:
    for key in ((0, 2, 0), (5, 2, 1), (2**40 + 3, 2, 77)):
        assert permutation(count, *key).tolist() == slow_permutation(count, *key)


def test_a_plan_cuts_a_share_into_parts_of_nearly_equal_size() -> None:
    made = plan(0, 100, [10, 23, 7], 1, at_once=8)

    assert made.parts == (8, 8, 7)
    assert made.ranges == [(110, 118), (118, 126), (126, 133)]
    assert plan(0, 100, [10, 0, 7], 1, at_once=8).ranges == [(100, 101)]


# --- the place -----------------------------------------------------------------------------------------------------


def test_without_the_variable_a_process_is_alone() -> None:
    assert place.read({}).is_alone


def test_the_variable_is_read_and_what_is_wrong_in_it_named(tmp_path: Path) -> None:
    where = tmp_path / "where"
    given = {
        "member": "lab-1",
        "address": "10.0.0.7",
        "store": "10.0.0.1:3",
        "least": 2,
        "most": 8,
        "where": str(where),
    }

    found = place.read({"POTLUCK_GANG": json.dumps(given | {"of a newer hub": 1})})

    assert (found.member, found.least, found.most, found.store) == ("lab-1", 2, 8, "10.0.0.1:3")
    assert found.now() == found
    where.write_text("{half")
    assert found.now() == found
    where.write_text('{"store": "10.0.0.2:4"}')
    assert found.now().store == "10.0.0.2:4"
    for wrong, says in (
        ("{", "not what a Potluck agent writes"),
        ("[]", "not what a Potluck agent writes"),
        ('{"policy": "fair"}', "policy `fair`"),
        ('{"engine": "mpi"}', "engine `mpi`"),
        ('{"least": 3, "most": 2}', "3 to 2 members"),
        ('{"address": "127.0.1.1"}', "which no other machine can reach"),
        ('{"least": "many"}', "not what a Potluck agent writes"),
    ):
        with pytest.raises(BadInput, match=says):
            place.read({"POTLUCK_GANG": wrong})


# --- the meeting ---------------------------------------------------------------------------------------------------


def seat(name: str, waited_s: float | None = 0.0, *, alive: bool = True) -> Seat:
    return Seat(name, alive, waited_s)


@pytest.mark.parametrize(
    ("seats", "previous", "least", "expected", "says"),
    [
        ([seat("a"), seat("b")], "ab", 1, "ab", "all of the last step"),
        ([seat("a"), seat("b"), seat("new")], "ab", 1, "ab new", "all of the last step"),
        ([seat("a"), seat("b"), seat("busy", None)], "ab", 1, "ab", "all of the last step"),
        ([seat("a")], "ab", 2, "", "1 of at least 2"),
        ([seat("a"), seat("b", alive=False)], "ab", 1, "a", "all that are alive"),
        ([seat("a", TARRY_S), seat("b", None)], "ab", 1, "", "no majority"),
        ([seat("a"), seat("b"), seat("c", None)], "abc", 1, "", "waiting for 1"),
        ([seat("a", TARRY_S), seat("b"), seat("c", None)], "abc", 1, "ab", "tarried"),
        ([seat("a")], "", 1, "", "just starting"),
        ([seat("a", GATHER_S), seat("b")], "", 1, "ab", "all that are alive"),
        ([], "", 1, "", "0 of at least 1"),
    ],
)
def test_the_meeting_decides_who_takes_part(
    seats: list[Seat], previous: str, least: int, expected: str, says: str
) -> None:
    chosen, reason = decide(seats, frozenset(previous), least=least)

    assert "".join(chosen) == expected.replace(" ", "")
    assert says in reason


def test_a_meeting_tells_all_the_same_and_counts_a_generation_for_each_change() -> None:
    meeting = Meeting("127.0.0.1", least=2)
    at = f"127.0.0.1:{meeting.port}"
    lines = {name: Line(at, name, timeout_s=5) for name in "ab"}

    def together(*names: str, broken: bool = False) -> list[dict[str, Any]]:
        answers: dict[str, dict[str, Any]] = {}

        def ask(name: str) -> None:
            answers[name] = lines[name].meet(4, {"of": name}, broken=broken, timeout_s=20)

        threads = [threading.Thread(target=ask, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [answers[name] for name in names]

    try:
        first = together("a", "b")
        again = together("a", "b")
        broken = together("a", "b", broken=True)
        lines["b"].close()
        lines["c"] = Line(at, "c", timeout_s=5)
        other = together("a", "c")
    finally:
        for line in lines.values():
            line.close()
        meeting.close()

    assert sorted(card["of"] for card in first[0]["cards"]) == ["a", "b"]
    assert {answer["me"] for answer in first} == {0, 1} and first[0]["steps"] == [4, 4]
    assert "cards" not in again[0] and again[0]["generation"] == first[0]["generation"]
    generations = [answers[0]["generation"] for answers in (first, broken, other)]
    assert len(set(generations)) == 3 and all(a["generation"] == b["generation"] for a, b in (first, broken, other))
    assert [card["of"] for card in other[0]["cards"]] == ["a", "c"]


def test_a_meeting_is_not_disturbed_by_what_is_no_member() -> None:
    import socket

    meeting = Meeting("127.0.0.1")
    for noise in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b'{"session": 1}\n',
        b'{"session": 1, "name": "x", "meet": "y"}\n',
    ):
        with socket.create_connection(("127.0.0.1", meeting.port), timeout=5) as connection:
            connection.sendall(noise)
            assert connection.recv(10) == b""  # it hangs up
    line = Line(f"127.0.0.1:{meeting.port}", "a", timeout_s=5)

    answer = line.meet(0, {}, broken=False, timeout_s=20)

    assert answer["steps"] == [0]
    line.close()
    meeting.close()


# --- papers --------------------------------------------------------------------------------------------------------


def card(name: str, step: int = 0, **changes: Any) -> Card:
    about = {
        "torch": "2.13.0",
        "batch": 64,
        "length": 100,
        "items": "x",
        "code": {"train.py": "1"},
        "model": {"w": "[2]"},
    }
    return Card(name, step, {**about, **changes})


def test_members_with_the_same_papers_fit() -> None:
    assert papers.unfit([card("a"), card("b"), card("c")]) == {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"torch": "2.9.0"}, "torch is 2.9.0 there and 2.13.0 on the others"),
        ({"length": 99}, "the number of samples in the data set is 99 there and 100"),
        ({"items": "y"}, "its data set has other samples than the others', though as many"),
        ({"code": {"train.py": "2"}}, "its train.py is not the one the others have"),
        ({"code": {"train.py": "1", "more.py": "3"}}, "its more.py is not"),
        ({"model": {"w": "[3]"}}, "another `w`: [3], and [2] on the others"),
        ({"model": {}}, "another `w`: missing, and [2] on the others"),
    ],
)
def test_the_odd_one_is_named_and_in_what(change: dict[str, Any], says: str) -> None:
    found = papers.unfit([card("a", **change), card("b"), card("c")])

    assert list(found) == ["a"] and says in found["a"] and found["a"].startswith("a does not fit")


def test_a_gang_that_has_run_is_right_however_many_newcomers_differ() -> None:
    found = papers.unfit([card("new", length=9), card("newer", length=9), card("old", step=7)])

    assert set(found) == {"new", "newer"}


def test_random_augmentation_makes_no_difference_and_what_cannot_be_read_twice_is_not_compared() -> None:
    calls = iter(range(1000))

    def augmented(indices: list[int]) -> list[Any]:
        return [(torch.rand(3) + i, {"y": i, "z": [None, "t"]}) for i in indices]

    before = torch.get_rng_state()
    assert papers.sampled(50, augmented) == papers.sampled(50, augmented) != ""
    assert papers.sampled(50, lambda indices: [next(calls) for _ in indices]) == ""
    assert bool((torch.get_rng_state() == before).all())


# --- healing -------------------------------------------------------------------------------------------------------


def test_a_state_goes_through_a_file_without_pickle_and_comes_back_equal(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tree = {"o": optimizer.state_dict(), "n": [1, 2.5, None, True, "x", (3,)], "i": {4: torch.empty(0)}}

    healing.save(tmp_path / "s", tree)
    back = healing.load(tmp_path / "s")

    assert back["n"] == tree["n"] and back["o"]["param_groups"] == tree["o"]["param_groups"]
    assert back["i"][4].numel() == 0
    for index, values in tree["o"]["state"].items():
        for key, value in values.items():
            assert torch.equal(back["o"]["state"][index][key], value)


def test_what_only_pickle_could_keep_is_named() -> None:
    with pytest.raises(BadInput, match="/kept/scheduler/f is a function, which cannot be kept without pickle"):
        healing.check({"kept": {"scheduler": {"f": lambda: None}}})
    with pytest.raises(BadInput, match="has a key"):
        healing.check({"kept": {(1, 2): 3}})


def test_a_file_of_something_else_is_no_state(tmp_path: Path) -> None:
    from potluck.train import tensorio

    tensorio.save(tmp_path / "x", {"w": torch.ones(2)})

    with pytest.raises(BadInput, match="is not the state of a gang"):
        healing.load(tmp_path / "x")


def test_a_giver_gives_only_to_those_who_know_its_secret_and_only_the_step_they_ask(tmp_path: Path) -> None:
    saved: list[int] = []

    def save(path: Path) -> None:
        saved.append(1)
        healing.save(path, {"n": len(saved)})

    giver = healing.Giver("127.0.0.1", save)
    try:
        taken: list[Any] = []
        giver.offer(7)
        giver.offer(8)
        healing.take(giver.url, 8, silence_s=10, use=lambda path: taken.append(healing.load(path)["n"]))
        with pytest.raises(PotluckError, match="did not arrive"):
            healing.take(giver.url[:-1], 8, silence_s=10, use=lambda path: None)
        with pytest.raises(PotluckError, match="did not arrive"):
            healing.take(giver.url + "/..", 8, silence_s=10, use=lambda path: None)
    finally:
        giver.close()

    assert taken == [2] and not giver.folder.exists()


def test_a_giver_that_cannot_give_says_so_at_once() -> None:
    def save(path: Path) -> None:
        raise OSError("the disk is full")

    giver = healing.Giver("127.0.0.1", save)
    try:
        with pytest.raises(OSError, match="disk"):
            giver.offer(3)
        with pytest.raises(PotluckError, match="did not arrive"):
            healing.take(giver.url, 3, silence_s=30, use=lambda path: None)
    finally:
        giver.close()


# --- what travels with the gradient --------------------------------------------------------------------------------


def test_rows_of_all_members_are_read_from_one_sum() -> None:
    figures = [Figures(), Figures()]
    figures[0].add("loss", 2.0, 30)
    figures[1].add("loss", 5.0, 10)
    figures[1].add("other", 1.0, 10)
    rows = [Row(count=30, ready_s=0.5, weights=7), Row(count=10, is_bad=1)]
    used = [torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 0.0]).double()]

    total = sum(
        report.write(
            row, rank=i, size=2, used=used[i], norms=torch.tensor([2.0]).double(), figures=figures[i].places_and_sums()
        )
        for i, row in enumerate(rows)
    )
    assert isinstance(total, torch.Tensor)
    seen = report.read(total, size=2, parameters=2)

    assert list(seen.rows) == rows and seen.count == 40
    assert seen.used.tolist() == [1, 0] and seen.norms.tolist() == [4]
    assert figures[0].means(seen.figures) == {"loss": 2.75}
    assert figures[1].means(seen.figures) == {"loss": 2.75, "other": 1.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [reduce.ROOM, 2])
def test_figures_travel_with_the_last_bucket_without_loss(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, room: int
) -> None:
    monkeypatch.setattr(reduce, "ROOM", room)
    model = nn.Linear(3, 2).to(dtype)
    reducer = reduce.Reducer(model, lambda: None)
    sums: list[torch.Tensor] = []
    reducer.open(sums.append)
    reducer.part(1.0, is_last=True)
    figures = torch.tensor([1 / 3, 4294967295.0, 1.7e-9, -0.0, 3e38, 0.1]).double()
    figures[0], figures[5] = 1 / 3, 0.1  # with all bits of float64

    reducer.launch_rest()
    summed = reducer.launch_last(figures.clone())

    assert len(sums) == (1 if room > 6 and dtype is not torch.bfloat16 else 2)
    assert torch.equal(summed(), figures)


def test_odd_ones_are_found_by_majority_and_else_by_the_first() -> None:
    assert report.odd_ones([1, 1, 1]) == []
    assert report.odd_ones([2, 1, 1]) == [0]
    assert report.odd_ones([1, 2]) == [1]


def test_a_fingerprint_sees_one_bit() -> None:
    tensors = [torch.arange(10.0), torch.ones(3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)]
    before = report.fingerprint_of(tensors)
    assert report.fingerprint_of([t.clone() for t in tensors]) == before != 0

    tensors[0].view(torch.int32)[3] ^= 1

    assert report.fingerprint_of(tensors) != before


# --- BatchNorm -----------------------------------------------------------------------------------------------------


def test_running_statistics_of_unequal_shares_become_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5, dtype=torch.float64) * 3 + 2
    whole = nn.BatchNorm1d(5, momentum=1.0).double()
    whole(x)
    members = [nn.BatchNorm1d(5, momentum=1.0).double() for _ in range(2)]
    norms = [Norms(nn.Sequential(member)) for member in members]
    parts = x[:48], x[48:]
    for member, norm, part in zip(members, norms, parts, strict=True):
        norm.remember()
        member(part)

    sums = norms[0].share(48) + norms[1].share(16)
    for norm in norms:
        norm.settle(sums, 64)

    for member in members:
        assert torch.allclose(member.running_mean, whole.running_mean, atol=1e-12)
        assert torch.allclose(member.running_var, whole.running_var, rtol=0.03)  # each counts n - 1, not n
        assert int(member.num_batches_tracked) == 1
    assert torch.equal(members[0].running_var, members[1].running_var)


def test_a_step_given_up_leaves_no_trace_in_the_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    norms = Norms(model)
    before = [tensor.clone() for tensor in norms.tensors()]
    norms.remember()
    model(torch.randn(8, 3))
    assert not torch.equal(before[0], norms.tensors()[0])

    norms.forget()

    assert all(torch.equal(a, b) for a, b in zip(before, norms.tensors(), strict=True))


def test_a_gang_of_one_needs_no_place() -> None:
    assert Place().is_alone and Place().now() == Place()
