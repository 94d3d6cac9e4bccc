"""The real process, over real pipes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from child_kit import Bench, ChildProcess, make_bench, make_dataset
from PIL import Image

from potluck.protocol import (
    Blob,
    DoInit,
    DoMerge,
    DoTaste,
    Drop,
    Failed,
    Finished,
    HandIn,
    MergeInput,
    MergePolicy,
    MergeSpec,
    Ready,
    Rebase,
    Rebased,
    RecipeRef,
    Started,
    Stepping,
    TasteSpec,
    Version,
    WeightFile,
)
from potluck.train.weights import apply_chain, load_snapshot

LONG = [(0, 10**6)]


@pytest.fixture(scope="module")
def child() -> Iterator[ChildProcess]:
    child = ChildProcess()
    child.wait_for(Ready)
    yield child
    assert child.close() == 0


def started_on(child: ChildProcess, bench: Bench, lease: str, **spec: Any) -> None:
    child.tell(
        bench.unit(lease, weights=[bench.snapshot(0)], tick_s=3600, **{"box_s": 3600.0, "positions": LONG} | spec)
    )
    child.wait_for(Started, lease)


def run_of(bench: Bench, name: str) -> Bench:
    """Another run for the same child."""
    return replace(bench, folder=bench.folder / name)


def test_units_merge_and_taste_end_to_end(child: ChildProcess, tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    policy = MergePolicy(outer="average", ema_decay=0.5, codec="int8")
    child.tell(
        DoInit(
            lease_id="i",
            recipe=bench.ref,
            recipe_path=bench.recipe_path,
            dataset=bench.dataset,
            shard_paths=["", ""],
            seed=7,
            policy=policy,
            out=str(tmp_path / "init"),
        )
    )
    init = child.wait_for(Finished, "i")
    snapshot = WeightFile("snapshot", 0, "", init.files["snapshot"], init.report.weights_sha256)
    assert init.report.layout == bench.layout
    assert load_snapshot(snapshot.path, bench.layout).sha256() == snapshot.weights_sha256

    inputs, paths = [], []
    for task, lease in enumerate(("a", "b")):
        unit = bench.unit(lease, weights=[snapshot], positions=[(40 * task, 40 * task + 40)], codec="int8")
        child.tell(unit)
        done = child.wait_for(Finished, lease).report
        assert done.done == [(40 * task, 40 * task + 40)]
        inputs.append(MergeInput(task, Blob("", 0), done.codec, done.base_version, done.samples, done.steps))
        paths.append(str(tmp_path / lease / "update.safetensors"))
    version = Version(0, snapshot.weights_sha256)
    spec = MergeSpec(version, None, inputs, active=2, policy=policy, applied_samples=0, snapshot=True)
    child.tell(
        DoMerge(
            lease_id="m",
            run_id="merging",
            recipe=bench.ref,
            recipe_path=bench.recipe_path,
            layout=bench.layout,
            spec=spec,
            weights=[snapshot],
            state_path=init.files["state"],
            update_paths=paths,
            out=str(tmp_path / "merge"),
        )
    )
    merged = child.wait_for(Finished, "m")
    assert [verdict.fate for verdict in merged.report.verdicts] == ["applied", "applied"]
    delta = WeightFile("delta", 1, "int8", merged.files["delta"], merged.report.weights_sha256)
    weights = apply_chain(None, [snapshot, delta], bench.layout)
    assert torch.equal(load_snapshot(merged.files["snapshot"], bench.layout).params, weights.params)

    child.tell(
        DoTaste(
            lease_id="t",
            run_id="tasting",
            recipe=bench.ref,
            recipe_path=bench.recipe_path,
            dataset=bench.dataset,
            shard_paths=bench.paths,
            layout=bench.layout,
            seed=7,
            spec=TasteSpec(Version(1, merged.report.weights_sha256), None, count=4, seed=1),
            weights=[snapshot, delta],
            state_path=merged.files["state"],
            device="cpu",
            out=str(tmp_path / "taste"),
        )
    )
    tasted = child.wait_for(Finished, "t")
    assert tasted.report.metrics["accuracy"] > 0.8
    assert tasted.files == {}


def test_a_gan_is_tasted_by_pictures_and_distance(child: ChildProcess, tmp_path: Path) -> None:
    dataset, paths = make_dataset(tmp_path, shape=(3, 32, 32), labels=0)
    ref = RecipeRef("dcgan", {"size": "32", "width": "4", "latent": 8})
    init = DoInit(
        lease_id="i2",
        recipe=ref,
        recipe_path="",
        dataset=dataset,
        shard_paths=paths,
        seed=1,
        policy=MergePolicy(),
        out=str(tmp_path / "i"),
    )
    child.tell(init)
    made = child.wait_for(Finished, "i2")
    sha = made.report.weights_sha256
    child.tell(
        DoTaste(
            lease_id="t2",
            run_id="gan",
            recipe=ref,
            recipe_path="",
            dataset=dataset,
            shard_paths=paths,
            layout=made.report.layout,
            seed=1,
            spec=TasteSpec(Version(0, sha), None, count=9, seed=1),
            weights=[WeightFile("snapshot", 0, "", made.files["snapshot"], sha)],
            state_path=made.files["state"],
            device="cpu",
            out=str(tmp_path / "t"),
        )
    )
    tasted = child.wait_for(Finished, "t2")

    assert tasted.report.metrics["distance"] > 10
    assert 0 < tasted.report.metrics["contrast"] < 1
    with Image.open(tasted.files["image"]) as picture:
        assert picture.width == picture.height
        assert picture.mode == "RGB"


def test_the_child_steps_on_while_an_update_travels_and_takes_the_newer_version(
    child: ChildProcess, tmp_path: Path
) -> None:
    bench = make_bench(tmp_path)
    started_on(child, bench, "a1")
    child.wait_for(Stepping, "a1")
    child.tell(bench.unit("b1", tick_s=3600, box_s=3600.0, overlap_s=600.0, positions=LONG), HandIn(lease_id="a1"))
    assert child.wait_for(Finished, "a1").report.samples > 0
    assert child.wait_for(Started, "b1").overlap

    new = bench.shifted(0.25)
    child.tell(Rebase(lease_id="b1", weights=[bench.snapshot(1, new)]))

    assert child.wait_for(Rebased, "b1").version == 1
    child.tell(HandIn(lease_id="b1"))
    assert child.wait_for(Finished, "b1").report.base_version == 1


def test_a_dropped_lease_is_not_heard_of_again(child: ChildProcess, tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    bench.ref.settings["lr"] = 0.01
    started_on(child, bench, "a2", codec="fp32")
    child.tell(Drop(lease_id="a2"), bench.unit("b2", weights=[bench.snapshot(2)], positions=[(0, 8)]))

    finished = child.wait_for(Finished)

    assert finished.lease_id == "b2"


def test_a_nan_and_a_broken_recipe_are_told_and_survived(child: ChildProcess, tmp_path: Path) -> None:
    sick = make_bench(tmp_path / "nan", nan_at=2)
    unit = sick.unit("n", weights=[sick.snapshot(0)])
    child.tell(type(unit)(**{name: getattr(unit, name) for name in unit.__struct_fields__} | {"run_id": "sick"}))
    assert child.wait_for(Failed, "n").code == "nan"

    child.write(b'{"do": "dance", "lease_id": "x"}\nnot json\n')
    lost = DoInit(
        lease_id="l",
        recipe=RecipeRef("dcgam"),
        recipe_path="",
        dataset=sick.dataset,
        shard_paths=["", ""],
        seed=0,
        policy=MergePolicy(),
        out=str(tmp_path),
    )
    child.tell(lost)

    failed = child.wait_for(Failed, "l")

    assert failed.code == "bad_recipe"
    assert "did you mean `dcgan`" in failed.reason


def test_a_recipe_that_cannot_step_fails_at_init(child: ChildProcess, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, broken=True)
    child.tell(
        DoInit(
            lease_id="b",
            recipe=bench.ref,
            recipe_path=bench.recipe_path,
            dataset=bench.dataset,
            shard_paths=["", ""],
            seed=0,
            policy=MergePolicy(),
            out=str(tmp_path),
        )
    )

    failed = child.wait_for(Failed, "b")

    assert failed.code == "bad_recipe"
    assert "tiny.py, line" in failed.reason


@pytest.mark.parametrize("end", ["eof", "sigterm"])
def test_the_child_leaves_quietly_in_the_middle_of_a_unit(tmp_path: Path, end: str) -> None:
    child = ChildProcess()
    child.wait_for(Ready)
    started_on(child, make_bench(tmp_path), "u")
    if end == "sigterm":
        child.process.send_signal(signal.SIGTERM)
        assert child.process.wait(timeout=30) == 0

    assert child.close() == 0
    assert child.errors == b""
