"""How is a run started, steered and looked at?"""

from __future__ import annotations

import asyncio
import contextlib

from potluck.domain.names import clean_name
from potluck.domain.pool import PoolSettings
from potluck.errors import BadInput, Conflict, NotFound
from potluck.hub.commands import jobs
from potluck.hub.commands.desk import Caller, Desk, as_blob, as_json, as_type, iso, new_run_id, note
from potluck.hub.commands.rounds import cancel_all, merge_policy, version_of
from potluck.hub.store import Transaction
from potluck.protocol import (
    Contribution,
    Curve,
    Dataset,
    Event,
    Fates,
    Json,
    MergeSpec,
    RecipeRef,
    RunRequest,
    RunView,
    Taste,
    Version,
    Why,
)

MAX_POSITIONS = 1 << 60


async def create(desk: Desk, request: RunRequest, *, actor: str, key: str | None = None) -> RunView:
    """Start a run. The same idempotency key again is the same run."""
    key = f"run {key}" if key else None  # never the key of a job
    if request.mode != "pool":
        raise BadInput(f"this hub does not know the mode `{request.mode}`: it knows pool")
    settings = PoolSettings().changed(request.settings)
    dataset = request.dataset
    if dataset.train_samples < 1 or not dataset.shards:
        raise BadInput("the data set has no samples to train on")
    if sum(shard.samples for shard in dataset.shards) != dataset.samples or min(s.samples for s in dataset.shards) < 1:
        raise BadInput("the data set's shards do not add up to its samples")
    if request.samples is not None and not 1 <= request.samples <= MAX_POSITIONS:
        raise BadInput(f"samples is {request.samples}: it must be at least 1")
    if request.duration_s is not None and not 0 < request.duration_s <= 366 * 86400:
        raise BadInput(f"the run would last {request.duration_s:g} s: choose up to a year")
    wanted = [shard.blob.hash for shard in dataset.shards]
    if request.recipe.source is not None:
        wanted.append(request.recipe.source.hash)
    async with desk.ledger.transaction() as tx:
        if key and (old := await tx.row("run_by_key", key=key)):
            return await _view(tx, old["id"])
        known = {row["hash"] for row in await tx.rows("blobs_known", hashes=wanted)}
        if missing := [hash_[:12] for hash_ in wanted if hash_ not in known]:
            raise BadInput(f"upload these first: {', '.join(missing[:5])}")
        run_id = await new_run_id(tx, request.recipe.name, "run")
        added = await tx.run(
            "add_run",
            id=run_id,
            name=clean_name(request.name, run_id),
            recipe=as_json(request.recipe),
            dataset=as_json(dataset),
            settings=as_json(settings),
            seed=request.seed,
            target_samples=request.samples,
            duration_s=request.duration_s,
            created_by=actor,
            key=key,
        )
        if not added and (old := await tx.row("run_by_key", key=key)):
            return await _view(tx, old["id"])  # the same request, at the same moment
        await tx.run("add_supply", run_id=run_id, target=request.samples)
        first = MergeSpec(Version(-1, ""), None, [], 1, merge_policy(settings), 0, True)
        await tx.row("mint_task", run_id=run_id, kind="init", spec=as_json(first))
        text = f"{actor} started {run_id} on {dataset.name}: {dataset.train_samples:,} samples"
        await note(tx, "run.created", run_id, text, run_id=run_id, actor=actor)
        await tx.notify("work")
        view = await _view(tx, run_id)
    desk.news.tell("change")
    return view


async def find(tx: Transaction, ref: str) -> str:
    row = await tx.row("find_run", ref=ref)
    if row is None:
        raise NotFound(f"there is no run `{ref}`: `potluck ps` shows them")
    return str(row["id"])


async def show(desk: Desk, ref: str) -> RunView:
    async with desk.ledger.transaction() as tx:
        return await _view(tx, await find(tx, ref))


async def list_runs(desk: Desk, limit: int = 100) -> list[RunView]:
    async with desk.ledger.transaction() as tx:
        return [await _view(tx, row["id"]) for row in await tx.rows("run_ids", limit=limit)]


async def change(desk: Desk, ref: str, changes: dict[str, Json], *, actor: str) -> RunView:
    """New settings, live: the next unit and the next merge follow them."""
    async with desk.ledger.transaction() as tx:
        run_id = await find(tx, ref)
        run = await tx.row("lock_run", run_id=run_id)
        assert run is not None
        if "preset" in changes or "strategy" in changes:
            raise BadInput("preset and strategy cannot change while a run goes on: start another run")
        settings = as_type(run["settings"], PoolSettings).changed(changes)
        await tx.run("set_settings", run_id=run_id, settings=as_json(settings))
        text = f"{actor} set " + ", ".join(f"{key}={value}" for key, value in changes.items())
        await note(tx, "run.set", run_id, text, run_id=run_id, actor=actor)
        view = await _view(tx, run_id)
    desk.news.tell("rounds")
    desk.news.tell("change")
    return view


_MOVES = {  # verb: (from, to)
    "pause": ({"running"}, "paused"),
    "resume": ({"paused"}, "running"),
    "stop": ({"queued", "running", "paused", "finishing"}, "stopped"),
}


async def move(desk: Desk, ref: str, verb: str, *, actor: str) -> RunView:
    """Pause (workers hand in what they have), resume, or stop. Doing it twice is not an error.

    Stop merges what is handed in and tastes the result; a second stop, or one that nobody could carry out, is at once.
    """
    sources, target = _MOVES[verb]
    async with desk.ledger.transaction() as tx:
        run_id = await find(tx, ref)
        run = await tx.row("lock_run", run_id=run_id)
        assert run is not None
        if run["state"] == target:
            return await _view(tx, run_id)
        if run["state"] not in sources:
            raise Conflict(
                f"{run_id} is {run['state']}: only a run that is {' or '.join(sorted(sources))} can be {target}"
            )
        reason = "" if verb == "resume" else f"{target} by {actor}"
        if verb == "stop":
            trusted = await tx.row("trusted_worker_live")
            if run["state"] in ("running", "paused") and trusted is not None and trusted["live"]:
                target = "finishing"
            else:
                await cancel_all(tx, run_id, "the run was stopped")
        await tx.run("set_state", run_id=run_id, state=target, reason=reason)
        await note(tx, f"run.{target}", run_id, f"{actor}: {verb} {run_id}", run_id=run_id, actor=actor)
        await tx.notify("work")
        view = await _view(tx, run_id)
    desk.news.tell("rounds")
    desk.news.tell("change")
    return view


# --- looking --------------------------------------------------------------------------------------------------------


async def _view(tx: Transaction, run_id: str) -> RunView:
    run = await tx.row("run", run_id=run_id)
    fates_row = await tx.row("fates", run_id=run_id)
    lost = await tx.row("lost_samples", run_id=run_id)
    pace = await tx.row("pace", run_id=run_id)
    assert run is not None and fates_row is not None and lost is not None and pace is not None
    counts = {kind: int(fates_row[kind]) for kind in ("applied", "late", "superseded", "rejected")}
    counts["pending"] = int(fates_row["pending"]) + int(pace["leased_samples"])
    counts["lost"] = int(lost["lost"])
    dataset = as_type(run["dataset"], Dataset)
    useful = counts["applied"] + counts["late"]
    live = run["state"] in ("running", "finishing")
    elapsed = float(run["elapsed_s"] or 0)
    rate = float(pace["recent_samples"]) / float(pace["window_s"]) if pace["window_s"] else 0.0
    return RunView(
        id=run["id"],
        name=run["name"],
        mode=run["mode"],
        recipe=as_type(run["recipe"], RecipeRef),
        dataset=dataset,
        state=run["state"],
        reason=run["reason"],
        version=run["version"],
        created_at=run["created_at"].isoformat(),
        started_at=iso(run["started_at"]),
        ended_at=iso(run["ended_at"]),
        target_samples=run["target_samples"],
        duration_s=run["duration_s"],
        elapsed_s=elapsed,
        fates=Fates(handed_out=sum(counts.values()), **counts),
        epoch=useful / max(dataset.train_samples, 1),
        active_workers=int(pace["active"]),
        samples_per_s=rate if live else (useful / elapsed if elapsed else 0.0),
        losses=pace["losses"] or {},
        metrics=pace["metrics"] or {},
        first_metrics=pace["first_metrics"] or {},
        settings=run["settings"],
        bytes_up=int(fates_row["bytes_up"]),
        bytes_down=int(fates_row["bytes_down"]),
    )


async def contributions(desk: Desk, ref: str) -> list[Contribution]:
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("contributions", run_id=await find(tx, ref))
    kinds = ("applied", "late", "superseded", "rejected", "pending", "lost")
    found = []
    for row in rows:
        counts = {kind: int(row[kind]) for kind in kinds}
        seconds = float(row["seconds"])
        done = sum(counts.values()) - counts["lost"]
        found.append(
            Contribution(
                worker=row["name"],
                worker_id=row["id"],
                device=row["device"],
                share=row["share"],
                units=row["units"],
                fates=Fates(handed_out=sum(counts.values()), **counts),
                seconds=seconds,
                samples_per_s=done / seconds if seconds else 0.0,
                first=row["first"].isoformat(),
                last=row["last"].isoformat(),
                bytes_up=int(row["bytes_up"]),
                bytes_down=int(row["bytes_down"]),
            )
        )
    return found


async def tastes(desk: Desk, ref: str) -> list[Taste]:
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("tastes", run_id=await find(tx, ref))
    return [
        Taste(
            row["version"],
            row["created_at"].isoformat(),
            row["samples"],
            row["metrics"],
            as_blob(row["image"]),
        )
        for row in rows
    ]


async def curve(desk: Desk, ref: str) -> list[Curve]:
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("curve", run_id=await find(tx, ref))
    return [
        Curve(
            row["number"],
            row["created_at"].isoformat(),
            row["applied_samples"],
            row["losses"],
            row["updates"],
            row["active"],
            row["reason"],
        )
        for row in rows
    ]


async def events(
    desk: Desk, *, after: int = 0, ref: str | None = None, limit: int = 200, caller: Caller = jobs.NOBODY
) -> list[Event]:
    """What happened, of one run or job or of all. Of other people's jobs only that it did."""
    async with desk.ledger.transaction() as tx:
        run_id = await _find_any(tx, ref, caller) if ref else None
        if ref and run_id is None and (gang := await tx.row("gang_by_id", ref=ref)):
            run_id = str(gang["id"])
        if ref and run_id is None:
            raise NotFound(f"there is no run or job `{ref}`: `potluck ps` shows them")
        rows = await tx.rows(
            "events",
            after=after,
            run_id=run_id,
            limit=min(max(limit, 1), 1000),
            viewer=None if caller.role == "admin" else caller.subject,
        )
    return [Event(r["id"], r["at"].isoformat(), r["kind"], r["subject"], r["text"], r["actor"]) for r in rows]


async def versions(desk: Desk, ref: str, after: int, wait_s: float) -> list[Version]:
    """The way from version `after` to the newest; waits for a newer one. See `chain`."""
    async with desk.ledger.transaction() as tx:
        run_id = await find(tx, ref)
    clock = asyncio.get_running_loop().time
    end = clock() + min(max(wait_s, 0.0), 30.0)
    while True:
        ticket = desk.news.ticket(f"version:{run_id}")
        found = await chain(desk, run_id, after)
        left = end - clock()
        if found or left <= 0 or desk.news.closed:
            return found
        await desk.news.wait(ticket, left)  # news may be a false alarm: "something may have been missed"


async def chain(desk: Desk, run_id: str, after: int) -> list[Version]:
    """Deltas from `after` on, unless a snapshot and the deltas after it are fewer bytes."""
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("chain", run_id=run_id, after=after)
    found = [version_of(row, newest=row is rows[-1]) for row in rows]
    starts = [i for i, version in enumerate(found) if version.snapshot is not None]
    if after < 0 or not starts:
        return found
    newest = starts[-1]

    def deltas(part: list[Version]) -> int:
        return sum(version.delta.size_bytes for version in part if version.delta)

    snapshot = found[newest].snapshot
    assert snapshot is not None
    if snapshot.size_bytes + deltas(found[newest + 1 :]) < deltas(found):
        return found[newest:]
    return found


async def _find_any(tx: Transaction, ref: str, caller: Caller) -> str | None:
    """A run or a job: by its whole id first; else whichever is the newer of the two that the words fit."""
    found = []
    if row := await tx.row("find_run", ref=ref):
        found.append(str(row["id"]))
    with contextlib.suppress(NotFound):
        found.append(await jobs.find(tx, ref, caller))
    if len(found) == 2:
        newest = await tx.row("newest_of", ids=found, ref=ref)
        assert newest is not None
        return str(newest["id"])
    return found[0] if found else None


async def why(desk: Desk, ref: str, *, caller: Caller = jobs.NOBODY) -> Why:
    """One sentence about a run, job, worker or task, and what would help."""
    async with desk.ledger.transaction() as tx:
        run_id = await _find_any(tx, ref, caller)
        job = run_id is not None and await tx.row("job_by_id", ref=run_id) is not None
        if run_id is not None and not job:
            return await _why_run(tx, run_id)
        viewer = None if caller.role == "admin" else caller.subject
        rows = [] if job else await tx.rows("events", after=0, run_id=None, limit=1000, viewer=viewer)
        notes = [row for row in rows if row["subject"] == ref]
    if run_id is not None:
        return await jobs.why(desk, caller, run_id)
    if notes:
        return Why(ref, notes[-1]["text"])
    raise NotFound(f"there is no run, job, worker or task `{ref}`, or nothing ever happened to it")


async def _why_run(tx: Transaction, run_id: str) -> Why:
    view = await _view(tx, run_id)
    trusted = await tx.row("trusted_worker_live")
    round_ = await tx.row("round", run_id=run_id, version=view.version)
    assert trusted is not None and round_ is not None
    if view.state in ("done", "stopped", "failed", "paused"):
        advice = {"paused": f"potluck resume {run_id}", "failed": f"potluck events {run_id}"}.get(view.state, "")
        return Why(run_id, f"{run_id} is {view.state}: {view.reason}", advice)
    if not trusted["live"]:
        return Why(
            run_id,
            f"{run_id} waits for a trusted worker, who builds version 0 and merges: none is connected",
            "start the hub without --no-house-worker, or: potluck invite --trusted",
        )
    if view.state == "queued":
        return Why(run_id, f"{run_id} waits until the trusted worker has built version 0", "a few seconds")
    if not round_["active"]:
        crew = await tx.row("anybody_live")
        if crew is not None and crew["live"]:
            return Why(run_id, f"{run_id} is {view.state}: its workers are between two units, or wait for a merge")
        return Why(run_id, f"{run_id} has work, but no worker is connected", "potluck invite, then potluck join LINK")
    newest = await tx.rows("curve", run_id=run_id)
    last = f"; version {view.version}: {newest[-1]['reason']}" if newest else ""
    waiting = len(round_["pending"])
    return Why(run_id, f"{run_id} is {view.state}: {round_['active']} workers train, {waiting} updates wait{last}")
