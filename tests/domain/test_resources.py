from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.domain.job import Resources
from potluck.domain.quantity import parse_size, say_duration, say_size
from potluck.domain.resources import Demand, describe, is_model, read
from potluck.errors import BadInput

GB = 10**9


@pytest.mark.parametrize(
    ("gpu", "demand", "said"),
    [
        ("", Demand(), "any machine"),
        ("0", Demand(), "any machine"),
        ("1", Demand(1, 1), "1 GPU"),
        ("2..4", Demand(2, 4), "2 to 4 GPUs"),
        ("1..", Demand(1, None), "1 or more GPUs"),
        ("..2", Demand(0, 2), "up to 2 GPUs"),
        ("0..", Demand(0, None), "any number of GPUs"),
        ("24GB..", Demand(1, 1, 24 * GB), "1 GPU of 24 GB or more"),
        ("24gb.. : 2", Demand(2, 2, 24 * GB), "2 GPUs of 24 GB or more"),
        ("2:24GB..", Demand(2, 2, 24 * GB), "2 GPUs of 24 GB or more"),
        ("6GB", Demand(1, 1, 6 * GB, 6 * GB, vram_slice=True), "6 GB of a GPU"),
        ("6GB:1", Demand(1, 1, 6 * GB, 6 * GB, vram_slice=True), "6 GB of a GPU"),
        ("6GB..10GB:2", Demand(2, 2, 6 * GB, 10 * GB, vram_slice=True), "6 GB to 10 GB on each of 2 GPUs"),
        ("A100", Demand(1, 1, models=("a100",)), "1 a100 GPU"),
        ("A100,H100:2", Demand(2, 2, models=("a100", "h100")), "2 a100 or h100 GPUs"),
        ("RTX 4090:20GB..", Demand(1, 1, 20 * GB, models=("rtx 4090",)), "1 rtx 4090 GPU of 20 GB or more"),
        ("A100:4GB", Demand(1, 1, 4 * GB, 4 * GB, ("a100",), vram_slice=True), "4 GB of an a100 GPU"),
    ],
)
def test_gpus_are_written_in_several_ways(gpu: str, demand: Demand, said: str) -> None:
    assert read(Resources(gpu=gpu)) == demand
    assert describe(demand) == said


def test_the_rest_is_read_too() -> None:
    asked = Resources(cpu="2..8", memory="8GB..", disk="1.5GiB", labels={"b": "2", "a": "1"}, os="Darwin", arch="amd64")

    demand = read(asked, image="python:3.12")

    assert demand == Demand(
        cpu=2,
        cpu_max=8,
        memory=8 * GB,
        disk=1_610_612_736,
        labels=(("a", "1"), ("b", "2")),
        os="macos",
        arch="x86_64",
        image=True,
    )
    assert describe(demand) == (
        "2 to 8 cores, 8 GB of memory, 1.6 GB of disk, macos x86_64, a container runtime, label a=1, label b=2"
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"gpu": "4090"}, "a model has letters"),
        ({"gpu": "24GB..:0"}, "write 0, or 1"),
        ({"gpu": "3..1"}, "write 1..3"),
        ({"gpu": ".."}, "needs an end"),
        ({"gpu": "..16GB"}, "how much GPU memory it needs at least"),
        ({"gpu": "a100:h100"}, "separate models by a comma"),
        ({"gpu": "gpu"}, "only how many"),
        ({"gpu": "1:2"}, "two counts"),
        ({"gpu": "6GB:8GB"}, "two sizes"),
        ({"gpu": "-1"}, "not the name of a GPU"),
        ({"gpu": "1.5"}, "not a whole number"),
        ({"gpu": "٣"}, "not a whole number"),
        ({"gpu": "24GB..12GB"}, "the range of memory is empty"),
        ({"gpu": "0GB.."}, "the range of memory is empty"),
        ({"gpu": "1XB"}, "not a size"),
        ({"gpu": "1::2"}, "nothing beside a colon"),
        ({"gpu": "1\n2"}, "one short line"),
        ({"gpu": "1" * 500}, "one short line"),
        ({"cpu": "many"}, "a number of cores"),
        ({"cpu": "-1"}, "a number of cores"),
        ({"cpu": "nan"}, "a number of cores"),
        ({"cpu": "..4"}, "a number of cores"),
        ({"cpu": "8..2"}, "write 2..8"),
        ({"cpu": "99999"}, "more than 4096 cores"),
        ({"memory": "much"}, "memory: `much` is not a size"),
        ({"memory": "8"}, "a unit seems to be missing, write it like 8GB"),
        ({"memory": "4GB..8GB"}, "one size; write 8GB"),
        ({"memory": "..8GB"}, "one size; write 8GB"),
        ({"memory": "99999TB"}, "more than any machine has"),
        ({"disk": "-1GB"}, "disk: `-1GB` is not a size"),
        ({"os": "beos"}, "one of linux, macos, windows"),
        ({"arch": "sparc"}, "one of arm64, x86_64"),
        ({"labels": {"": "x"}}, "words"),
        ({"labels": {"room": ""}}, "words"),
        ({"labels": {"room": "a\nb"}}, "words"),
        ({"labels": {str(n): "x" for n in range(50)}}, "50 labels"),
    ],
)
def test_what_cannot_be_asked_for_is_told_with_an_example(asked: dict[str, str], says: str) -> None:
    with pytest.raises(BadInput, match=says) as refused:
        read(Resources(**asked))  # type: ignore[arg-type]

    assert str(refused.value).startswith("resources: ")


@given(st.text(max_size=20), st.sampled_from(["gpu", "cpu", "memory", "disk", "os", "arch"]))
def test_no_text_makes_more_than_bad_input(text: str, name: str) -> None:
    try:
        demand = read(Resources(**{name: text}))  # type: ignore[arg-type]
    except BadInput:
        return
    assert describe(demand)
    assert demand.gpus_max is None or 0 <= demand.gpus_min <= demand.gpus_max
    assert demand.vram_max is None or 0 < demand.vram_min <= demand.vram_max
    assert 0 <= demand.cpu < 5000


@pytest.mark.parametrize(
    ("name", "model", "fits"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100", True),
        ("NVIDIA A100-SXM4-80GB", "a10", False),
        ("NVIDIA A10", "a10", True),
        ("NVIDIA GeForce RTX 4090", "rtx4090", True),
        ("NVIDIA GeForce RTX 4090", "4090", True),
        ("NVIDIA GeForce RTX 4090", "rtx 409", False),
        ("NVIDIA T400", "t4", False),
        ("Tesla T4", "t4", True),
        ("Apple M2", "nvidia", False),
    ],
)
def test_a_model_is_found_in_the_name_that_the_driver_gives(name: str, model: str, fits: bool) -> None:
    assert is_model(name, (model,)) is fits
    assert is_model(name, ())


def test_amounts_are_said_as_people_say_them() -> None:
    assert [say_size(n) for n in (0, 999, 1500, 24 * GB, 25_769_803_776, 999_999_999)] == [
        *["0 B", "999 B", "1.5 kB", "24 GB", "25.8 GB", "1 GB"],
    ]
    assert [say_duration(n) for n in (0, 40, 720, 7200, 3 * 86400)] == ["1 s", "40 s", "12 min", "2 h", "3 days"]
    assert parse_size("1.5 GB") == 1_500_000_000
