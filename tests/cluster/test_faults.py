"""The pool as its users meet it: real processes, real PostgreSQL, real HTTP."""

from __future__ import annotations

from pathlib import Path

from conftest import TINY
from potluck.testing import FaultPlan, LocalCluster, Samples, Version

SETTINGS = ("--set=unit_s=2", "--set=taste_every_s=0")


def run_to_the_end(cluster: LocalCluster, pictures: Path, samples: int, plan: FaultPlan) -> str:
    run = cluster.train(TINY, str(pictures), "--samples", str(samples), *SETTINGS)
    faults = cluster.play(run, plan)

    cluster.until(lambda: cluster.view(run).state in ("done", "failed"), timeout_s=200, what="the end of the run")

    faults.join(60)
    assert not faults.is_alive()
    return run


def assert_every_sample_once(cluster: LocalCluster, run: str, samples: int) -> None:
    view = cluster.view(run)
    assert view.state == "done", view.reason
    assert view.fates.applied + view.fates.late == samples
    assert view.fates.pending == 0
    parts = [row.fates for row in cluster.hub.contributions(run)]
    for fate in ("applied", "late", "superseded", "rejected", "lost", "handed_out"):
        assert sum(getattr(part, fate) for part in parts) == getattr(view.fates, fate), fate
    assert [point.version for point in cluster.hub.curve(run)] == list(range(1, view.version + 1))


def test_two_workers_train_a_recipe_of_their_own_to_its_last_sample(cluster: LocalCluster, pictures: Path) -> None:
    cluster.add_worker("ann")
    cluster.add_worker("bob", share=0.5)

    run = run_to_the_end(cluster, pictures, 12_000, FaultPlan())

    assert_every_sample_once(cluster, run, 12_000)
    losses = [point.losses["loss"] for point in cluster.hub.curve(run)]
    assert losses[-1] < 0.7 * losses[0]
    assert {row.worker for row in cluster.hub.contributions(run)} == {"ann", "bob"}


def test_a_child_an_agent_and_a_frozen_worker_cost_nobody_a_sample(cluster: LocalCluster, pictures: Path) -> None:
    for name in ("ann", "bob", "cem"):
        cluster.add_worker(name)
    plan = (
        FaultPlan()
        .kill_child("ann", at=Version(2))
        .kill("bob", at=Version(3))
        .freeze("cem", at=Version(4), seconds=18)  # longer than its lease
        .add_worker("dee", at=Version(4))
    )

    run = run_to_the_end(cluster, pictures, 90_000, plan)

    assert_every_sample_once(cluster, run, 90_000)
    assert cluster.fates(run).lost > 0


def test_the_house_worker_the_hub_and_postgres_may_die(cluster: LocalCluster, pictures: Path) -> None:
    for name in ("ann", "bob"):
        cluster.add_worker(name)
    plan = (
        FaultPlan()
        .kill_child("house", at=Version(2))
        .kill_hub(at=Samples(8_000), seconds=3)
        .kill_postgres(at=Samples(16_000))
    )

    run = run_to_the_end(cluster, pictures, 60_000, plan)

    assert_every_sample_once(cluster, run, 60_000)
