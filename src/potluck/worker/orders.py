"""What does the child have to be told for a task, and by which files does it reach a version?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from potluck.domain.order import shards_held_out, shards_needed
from potluck.protocol import (
    Blob,
    DoInit,
    DoMerge,
    DoTaste,
    DoUnit,
    Lease,
    MergePolicy,
    ToChild,
    Version,
    WeightFile,
)

TASTE_BYTES = 64_000_000
"""So much of the training samples is fetched to compare a taste with, beside the held-out ones."""


@dataclass(frozen=True)
class Parts:
    """Everything of a task that had to be fetched, as files on this machine."""

    recipe_path: str = ""
    shard_paths: list[str] = field(default_factory=list)
    weights: list[WeightFile] = field(default_factory=list)
    state_path: str = ""
    update_paths: list[str] = field(default_factory=list)
    out: str = ""


def order(lease: Lease, parts: Parts, *, tick_s: float, device: str, share: float) -> ToChild:
    """The instruction that starts this task in the child."""
    if lease.kind == "unit" and lease.unit is not None and lease.layout is not None:
        return DoUnit(
            lease_id=lease.id,
            run_id=lease.run_id,
            recipe=lease.recipe,
            recipe_path=parts.recipe_path,
            dataset=lease.dataset,
            shard_paths=parts.shard_paths,
            layout=lease.layout,
            seed=lease.seed,
            spec=lease.unit,
            tick_s=tick_s,
            weights=parts.weights,
            device=device,
            share=share,
            out=parts.out,
        )
    if lease.kind == "merge" and lease.merge is not None and lease.layout is not None:
        return DoMerge(
            lease_id=lease.id,
            run_id=lease.run_id,
            recipe=lease.recipe,
            recipe_path=parts.recipe_path,
            layout=lease.layout,
            spec=lease.merge,
            weights=parts.weights,
            state_path=parts.state_path,
            update_paths=parts.update_paths,
            out=parts.out,
        )
    if lease.kind == "taste" and lease.taste is not None and lease.layout is not None:
        return DoTaste(
            lease_id=lease.id,
            run_id=lease.run_id,
            recipe=lease.recipe,
            recipe_path=parts.recipe_path,
            dataset=lease.dataset,
            shard_paths=parts.shard_paths,
            layout=lease.layout,
            seed=lease.seed,
            spec=lease.taste,
            weights=parts.weights,
            state_path=parts.state_path,
            device=device,
            out=parts.out,
        )
    return DoInit(
        lease_id=lease.id,
        recipe=lease.recipe,
        recipe_path=parts.recipe_path,
        dataset=lease.dataset,
        shard_paths=parts.shard_paths,
        seed=lease.seed,
        policy=lease.merge.policy if lease.merge else MergePolicy(),
        out=parts.out,
    )


def why_not(lease: Lease) -> str:
    """Why this worker cannot do what the hub offers; "" if it can."""
    known = {
        "init": True,
        "unit": lease.unit is not None and lease.layout is not None,
        "merge": lease.merge is not None and lease.layout is not None,
        "taste": lease.taste is not None and lease.layout is not None,
    }
    if lease.kind not in known:
        return f"this worker knows no task of kind `{lease.kind[:20]}`: it may be older than the hub"
    return "" if known[lease.kind] else f"the hub's {lease.kind} has no description"


def shards_wanted(lease: Lease) -> list[int]:
    """The shards that the child will read: those of its positions; for a trial or a taste, a fixed few."""
    shards = lease.dataset.shards
    if lease.kind == "unit" and lease.unit is not None:
        return shards_needed(lease.unit.positions, lease.dataset, lease.seed)
    if lease.kind == "init":
        return [0][: len(shards)]
    if lease.kind == "taste" and lease.taste is not None and lease.taste.evaluate:
        room = accumulate(shard.blob.size_bytes for shard in shards)
        first = [index for index, size in enumerate(room) if size <= TASTE_BYTES or index == 0]
        return sorted({*first, *shards_held_out(lease.dataset)})
    return []


def tick_s(next_tick_s: float, box_s: float, since_grant_s: float) -> float:
    """Seconds to the next common hand-in time, `since_grant_s` after the hub said that it is in `next_tick_s`."""
    left = next_tick_s - since_grant_s
    return left % box_s if left < 0 < box_s else max(left, 0.0)


# --- the way from version to version


def way(versions: Sequence[Version], have: int | None, *, to: int | None = None) -> list[tuple[str, Version]] | None:
    """The files to apply, in order, from version `have` (None: nothing) to `to` (None: the newest).

    [] if there is nothing to do, None if these versions do not lead there.
    """
    wanted = [v for v in sorted(versions, key=lambda v: v.number) if to is None or v.number <= to]
    if have is not None and (to is not None and have == to):
        return []
    at, steps = have, list[tuple[str, Version]]()
    for version in wanted:
        if at is not None and version.number <= at:
            continue
        if at is not None and version.number == at + 1 and version.delta is not None:
            steps.append(("delta", version))
        elif version.snapshot is not None:
            steps = [("snapshot", version)]
        else:
            continue
        at = version.number
    if at is None or (to is not None and at != to):
        return None
    return steps


def blob_of(step: tuple[str, Version]) -> Blob:
    kind, version = step
    blob = version.delta if kind == "delta" else version.snapshot
    assert blob is not None
    return blob


def usable(chain: Iterable[WeightFile], have: int | None) -> list[WeightFile] | None:
    """What is left of `chain` for a child at version `have`; None if it does not start there."""
    left: list[WeightFile] = []
    at = have
    for file in chain:
        if at is not None and file.version <= at:
            continue
        if file.kind == "snapshot":
            left = [file]
        elif at is not None and file.version == at + 1:
            left.append(file)
        else:
            return None
        at = file.version
    return None if at is None else left


def extended(chain: list[WeightFile], news: Iterable[WeightFile], have: int | None) -> list[WeightFile]:
    """`chain` with those of the `news` that go on where it ends."""
    at = chain[-1].version if chain else have
    longer = list(chain)
    for file in news:
        if at is None or file.version <= at:
            continue
        if file.kind == "snapshot":
            longer = [file]
        elif file.version == at + 1:
            longer.append(file)
        else:
            break
        at = file.version
    return longer
