"""What does upkeep settle in a run: merges, tastes, the end?

`settle` looks at one run under its row lock and does whatever is due. It is safe to call at any time, from any hub copy,
as often as one likes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from potluck.domain.pool import Pending, PoolSettings, Round, close_round, outer_step
from potluck.hub.commands.desk import Desk, as_blob, as_json, as_type, note
from potluck.hub.store import Transaction
from potluck.protocol import Blob, Json, MergeInput, MergePolicy, MergeSpec, TasteSpec, Version


@dataclass(frozen=True, slots=True)
class Settled:
    """What was done, for the log, and when to look again."""

    text: str = ""
    wake_s: float = 1.0


async def settle(desk: Desk, run_id: str) -> Settled:
    async with desk.ledger.transaction() as tx:
        run = await tx.row("try_lock_run", run_id=run_id)
        if run is None or run["state"] not in ("queued", "running", "paused", "finishing"):
            return Settled()
        failed = await tx.rows("failed_tasks", run_id=run_id)
        broken = [task for task in failed if task["kind"] in ("init", "merge")]
        if broken:
            return await _fail(tx, run, broken[0])
        if run["state"] == "queued":
            return Settled()
        settled = await _settle_live(tx, run, failed)
    if settled.text:
        desk.news.tell("change")
    return settled


async def _settle_live(tx: Transaction, run: dict[str, Any], failed: list[dict[str, Any]]) -> Settled:
    settings = as_type(run["settings"], PoolSettings)
    open_kinds = {task["kind"] for task in await tx.rows("open_tasks", run_id=run["id"])}
    facts = await tx.row("round", run_id=run["id"], version=run["version"])
    assert facts is not None
    time_over = run["duration_s"] is not None and run["elapsed_s"] >= run["duration_s"]
    idle = not facts["leased"] and not facts["pending"] and "merge" not in open_kinds
    if run["state"] == "running" and (time_over or (run["dry"] and idle)):
        reason = "the time is over" if time_over else "every sample is trained"
        await tx.run("set_state", run_id=run["id"], state="finishing", reason=reason)
        run = {**run, "state": "finishing", "reason": reason}
    ending = not facts["leased"] and (run["dry"] or run["state"] in ("finishing", "paused"))

    wake = 1.0
    if "merge" not in open_kinds:
        pending = [Pending(p["task_id"], p["worker_id"], p["waited_s"]) for p in facts["pending"]]
        # At the end everybody hands in at once: the last merge waits for all of them, not for a quorum.
        patient = replace(settings, quorum=1.0) if run["state"] == "finishing" else settings
        decision = close_round(Round(pending, facts["active"], facts["offsets"], ending), patient)
        wake = min(1.0, max(decision.wake_s, 0.02))
        if decision.merge:
            await _mint_merge(tx, run, settings, facts, decision.merge, decision.reason)
            return Settled(f"merge of {len(decision.merge)}: {decision.reason}", wake)
        if ending and run["state"] == "finishing" and not pending:
            return await _finish(tx, run, settings, open_kinds, failed)
    if run["state"] == "running" and "taste" not in open_kinds and await _taste_is_due(tx, run, settings, failed):
        await _mint_taste(tx, run, settings)
        return Settled(f"taste of version {run['version']}", wake)
    return Settled("", wake)


async def _mint_merge(
    tx: Transaction,
    run: dict[str, Any],
    settings: PoolSettings,
    facts: dict[str, Any],
    tasks: tuple[int, ...],
    reason: str,
) -> None:
    base = await tx.row("version", run_id=run["id"], number=run["version"])
    assert base is not None
    chosen = set(tasks)
    spec = MergeSpec(
        base=version_of(base),
        state=as_blob(base["state"]),
        inputs=[
            MergeInput(
                task_id=p["task_id"],
                blob=Blob(p["blob_hash"], p["size_bytes"]),
                codec=p["codec"],
                base_version=p["base_version"],
                samples=p["samples"],
                steps=p["steps"],
            )
            for p in facts["pending"]
            if p["task_id"] in chosen
        ],
        active=max(facts["active"], 1),
        policy=merge_policy(settings),
        applied_samples=base["applied_samples"],
        snapshot=(run["version"] + 1) % settings.snapshot_every == 0,
    )
    document: dict[str, Json] = {**msgspec.to_builtins(spec), "reason": reason}
    row = await tx.row("mint_task", run_id=run["id"], kind="merge", spec=as_json(document))
    assert row is not None
    await tx.run("assign_updates", task_id=row["id"], updates=list(tasks))
    await tx.notify("work")


def merge_policy(settings: PoolSettings) -> MergePolicy:
    outer, lr, momentum = outer_step(settings)
    return MergePolicy(
        outer=outer,
        outer_lr=lr,
        momentum=momentum,
        s_max=settings.s_max,
        ema_decay=settings.ema_decay,
        codec=settings.codec,
    )


async def _taste_is_due(
    tx: Transaction, run: dict[str, Any], settings: PoolSettings, failed: list[dict[str, Any]]
) -> bool:
    newest = await tx.row("newest_taste", run_id=run["id"])
    if newest is None:
        return not any(task["kind"] == "taste" for task in failed)
    if newest["version"] >= run["version"] or _taste_failed(run, failed):
        return False
    return bool(settings.taste_every_s and newest["age_s"] >= settings.taste_every_s)


def _taste_failed(run: dict[str, Any], failed: list[dict[str, Any]]) -> bool:
    return any(t["kind"] == "taste" and t["spec"]["version"]["number"] == run["version"] for t in failed)


async def _mint_taste(tx: Transaction, run: dict[str, Any], settings: PoolSettings) -> None:
    row = await tx.row("version", run_id=run["id"], number=run["version"])
    assert row is not None
    spec = TasteSpec(version_of(row), as_blob(row["state"]), settings.taste_count, run["seed"])
    await tx.run("mint_task", run_id=run["id"], kind="taste", spec=as_json(spec))
    await tx.notify("work")


async def _finish(
    tx: Transaction,
    run: dict[str, Any],
    settings: PoolSettings,
    open_kinds: set[str],
    failed: list[dict[str, Any]],
) -> Settled:
    """The last update is merged: taste the result, then close the run."""
    if "taste" in open_kinds:
        return Settled("", 0.5)
    newest = await tx.row("newest_taste", run_id=run["id"])
    if (newest is None or newest["version"] < run["version"]) and not _taste_failed(run, failed):
        await _mint_taste(tx, run, settings)
        return Settled(f"last taste, of version {run['version']}")
    state = "stopped" if run["reason"].startswith("stopped") else "done"
    await tx.run("set_state", run_id=run["id"], state=state, reason=run["reason"])
    text = f"{run['id']} is {state} at version {run['version']}: {run['reason']}"
    await note(tx, f"run.{state}", run["id"], text, run_id=run["id"])
    await tx.notify("work")
    return Settled(text)


async def _fail(tx: Transaction, run: dict[str, Any], task: dict[str, Any]) -> Settled:
    what = "version 0 could not be built" if task["kind"] == "init" else f"merge {task['id']} failed again and again"
    reason = f"{what}: {task['reason']}"
    await cancel_all(tx, run["id"], reason)
    await tx.run("set_state", run_id=run["id"], state="failed", reason=reason)
    await note(tx, "run.failed", run["id"], f"{run['id']} failed: {reason}", run_id=run["id"])
    await tx.notify("work")
    return Settled(reason)


async def cancel_all(tx: Transaction, run_id: str, reason: str) -> None:
    """End whatever is under way in a run, whose row is locked; every position that is not in the model is free again."""
    await tx.run("cancel_open_tasks", run_id=run_id, reason=reason)
    await tx.run("supersede_pending", run_id=run_id, reason=reason)


def version_of(row: dict[str, Any], *, newest: bool = False) -> Version:
    return Version(
        number=row["number"],
        weights_sha256=row["weights_sha256"],
        codec=row["codec"],
        delta=as_blob(row["delta"]),
        snapshot=as_blob(row["snapshot"]),
        state=as_blob(row["state"]) if newest else None,
    )
