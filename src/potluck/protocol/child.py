"""What do an agent and its training child say to one another? One JSON line an instruction, one an event."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from potluck.protocol.pool import (
    Dataset,
    Layout,
    MergePolicy,
    MergeSpec,
    RecipeRef,
    Report,
    TasteSpec,
    UnitSpec,
)


@dataclass(frozen=True)
class WeightFile:
    """A step of the way to a version: a snapshot replaces, a delta adds. Hash of the weights after it."""

    kind: str  # snapshot | delta
    version: int
    codec: str
    path: str
    weights_sha256: str


class Instruction(msgspec.Struct, frozen=True, tag_field="do", kw_only=True):
    """From the agent to the child. The child works through them in order; `Rebase` and `HandIn` act on the unit at work."""

    lease_id: str


class DoInit(Instruction, frozen=True, tag="init", kw_only=True):
    """Build version 0. Writes snapshot.safetensors and state.safetensors into `out`."""

    recipe: RecipeRef
    recipe_path: str  # of the source file, or ""
    dataset: Dataset
    shard_paths: list[str]  # one a shard, "" for those not needed
    seed: int
    policy: MergePolicy
    out: str


class DoUnit(Instruction, frozen=True, tag="unit", kw_only=True):
    run_id: str
    recipe: RecipeRef
    recipe_path: str
    dataset: Dataset
    shard_paths: list[str]
    layout: Layout
    seed: int
    spec: UnitSpec
    tick_s: float  # seconds from this line's arrival to the next tick
    weights: list[WeightFile]  # from what the child has to the newest; empty: start from what it has
    device: str
    share: float
    out: str  # folder for update.safetensors


class Rebase(Instruction, frozen=True, tag="rebase", kw_only=True):
    """A newer version is here: θ ← θ_new + (θ_now − θ_at_upload), if the unit is still in its overlap window."""

    weights: list[WeightFile]


class HandIn(Instruction, frozen=True, tag="hand_in", kw_only=True):
    """Stop after this step and hand in what is done."""


class Drop(Instruction, frozen=True, tag="drop", kw_only=True):
    """The lease is gone: forget this unit, keep the weights."""


class DoMerge(Instruction, frozen=True, tag="merge", kw_only=True):
    """Writes delta.safetensors, state.safetensors and, if asked, snapshot.safetensors into `out`."""

    run_id: str
    recipe: RecipeRef
    recipe_path: str
    layout: Layout
    spec: MergeSpec
    weights: list[WeightFile]
    state_path: str
    update_paths: list[str]  # in the order of spec.inputs
    out: str


class DoTaste(Instruction, frozen=True, tag="taste", kw_only=True):
    """Writes samples.png into `out`."""

    run_id: str
    recipe: RecipeRef
    recipe_path: str
    dataset: Dataset
    shard_paths: list[str]
    layout: Layout
    seed: int
    spec: TasteSpec
    weights: list[WeightFile]
    state_path: str
    device: str
    out: str


ToChild = DoInit | DoUnit | Rebase | HandIn | Drop | DoMerge | DoTaste


class ChildEvent(msgspec.Struct, frozen=True, tag_field="event", kw_only=True):
    """From the child to the agent."""


class Ready(ChildEvent, frozen=True, tag="ready", kw_only=True):
    torch: str
    device: str


class Started(ChildEvent, frozen=True, tag="started", kw_only=True):
    """The unit has begun to step; `box_s` is the time box that the child chose to end on a tick."""

    lease_id: str
    box_s: float
    overlap: bool  # still on the old weights, a Rebase is welcome


class Stepping(ChildEvent, frozen=True, tag="progress", kw_only=True):
    lease_id: str
    steps: int
    samples: int
    samples_per_s: float
    fraction: float  # of the time box or the positions, whichever is further
    loss: dict[str, float]


class Rebased(ChildEvent, frozen=True, tag="rebased", kw_only=True):
    """Which version the unit at work now stands on. Also sent when the window closed without a newer one."""

    lease_id: str
    version: int


class Finished(ChildEvent, frozen=True, tag="finished", kw_only=True):
    """A task's outcome; `report` lacks the blobs, which the agent fills in from `files` (field name → path)."""

    lease_id: str
    report: Report
    files: dict[str, str]


class Failed(ChildEvent, frozen=True, tag="failed", kw_only=True):
    lease_id: str
    reason: str
    code: str = "failed"


FromChild = Ready | Started | Stepping | Rebased | Finished | Failed
