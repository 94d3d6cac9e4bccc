"""What becomes of what is handed in: a unit's update, a merge, a taste, or nothing?"""

from __future__ import annotations

import uuid
from typing import Any

from potluck.domain.pool import judge_losses
from potluck.domain.tensorfile import check_update
from potluck.errors import BadInput, BadUpdate
from potluck.hub.commands.desk import Caller, Desk, as_json, as_type, note
from potluck.hub.commands.forms import amount, as_uuid, count
from potluck.hub.commands.work import MAX_ATTEMPTS
from potluck.hub.store import Transaction
from potluck.hub.store.positions import joined, span, to_multirange
from potluck.protocol import Blob, Json, Layout, MergeSpec, Report, ReportAnswer, TasteSpec

FATES = ("applied", "late", "superseded", "rejected")
_HEADER_BYTES = 1 << 20


async def report(desk: Desk, caller: Caller, lease_id: str, report: Report) -> ReportAnswer:
    """Take an outcome once. Refusals are answers, with the reason for the person at the machine."""
    id_ = as_uuid(lease_id)
    async with desk.ledger.transaction() as tx:
        facts = await tx.row("lease_facts", lease_id=id_)
    if facts is None:
        return ReportAnswer(
            False, "this hub never gave this lease, or forgot it in a crash: its samples are free again"
        )
    if facts["worker_id"] != caller.subject:
        return ReportAnswer(False, "this lease belongs to another worker")
    if facts["kind"] == "command":
        raise BadInput("this is the lease of a job: report its end to /leases/{id}/end")
    if report.outcome == "done":
        if facts["kind"] == "unit":
            answer = await _take_unit(desk, caller, id_, facts, report)
        elif facts["kind"] == "taste":
            answer = await _take_taste(desk, caller, id_, report)
        else:
            answer = await _take_version(desk, facts, id_, report)
    elif report.outcome == "failed" and report.code == "nan" and facts["kind"] == "unit":
        answer = await _take_unit(desk, caller, id_, facts, report)
    elif report.outcome in ("failed", "returned"):
        answer = await _give_back(desk, caller, id_, report)
    else:
        raise BadInput(f"outcome is `{report.outcome}`: it must be done, failed or returned")
    desk.news.tell("rounds")
    desk.news.tell("change")
    return answer


async def _take_unit(
    desk: Desk, caller: Caller, lease_id: uuid.UUID, facts: dict[str, Any], report: Report
) -> ReportAnswer:
    fate, reason = "pending", ""
    if report.outcome == "failed":
        fate, reason = "rejected", report.reason[:500]
    elif why := judge_losses(report.metrics):
        fate, reason = "rejected", why
    elif report.update is None:
        raise BadUpdate("a unit that is done must name its update")
    elif not facts["ended"]:
        try:
            _check_file(desk, report.update, as_type(facts["layout"], Layout), report.codec)
            _check_numbers(report, facts["version"])
        except BadUpdate as error:
            fate, reason = "rejected", str(error)
    update = report.update or Blob("", 0)
    done = joined(report.done) if report.outcome == "done" else []
    row = await desk.ledger.once(
        "report_unit",
        lease_id=lease_id,
        worker_id=caller.subject,
        done=to_multirange(done),
        steps=count(report.steps),
        samples=span(done) if done else count(report.samples),
        blob_hash=update.hash,
        size_bytes=update.size_bytes,
        codec=report.codec[:16],
        base_version=report.base_version,
        losses=as_json(_finite(report.metrics)),
        seconds=amount(report.seconds),
        bytes_up=count(report.bytes_up),
        bytes_down=count(report.bytes_down),
        fate=fate,
        fate_reason=reason,
    )
    assert row is not None
    # Only now wait for the disk: the rows that others want (a part of the positions went back) are free again.
    await desk.ledger.flush()
    verdict = row["verdict"]
    # A statement of its own: what a report at the same moment wrote is only seen by a new snapshot.
    earlier = await desk.ledger.once("earlier_report", task_id=row["task_id"]) if verdict == "done" else None
    if verdict == "ok" and fate == "rejected":
        async with desk.ledger.transaction() as tx:
            text = f"unit {row['task_id']} of {caller.name} was rejected: {reason}"
            await note(tx, "unit.rejected", str(row["task_id"]), text, run_id=row["run_id"], actor=caller.name)
    match verdict:
        case "ok" if fate == "rejected":
            return ReportAnswer(False, f"rejected: {reason}")
        case "ok":
            return ReportAnswer(True, "accepted, waits for its merge")
        case "done" if earlier and earlier["refused"]:
            return ReportAnswer(False, f"rejected: {earlier['fate_reason']}")
        case "done":
            same = earlier is not None and earlier["blob_hash"] == update.hash
            return ReportAnswer(same, "accepted before" if same else "this unit was handed in before, otherwise")
        case "run_over":
            return ReportAnswer(False, "superseded: the run is over")
        case "overreach":
            raise BadInput("the report claims positions that its lease does not hold")
        case _:
            return ReportAnswer(False, f"too late: the lease was {verdict} ({row['reason'] or 'it lapsed'})")


def _check_file(desk: Desk, blob: Blob, layout: Layout, codec: str) -> None:
    """Names, dtypes, shapes and sizes, from the header alone; the values are the merge's business."""
    path = desk.blobs.path(blob.hash)
    if not path.exists():
        raise BadUpdate("its bytes never arrived: upload the blob before the report")
    with path.open("rb") as file:
        check_update(file.read(_HEADER_BYTES + 8), path.stat().st_size, layout, codec)


def _check_numbers(report: Report, version: int) -> None:
    if not 0 <= report.base_version <= version:
        raise BadUpdate(f"it starts from version {report.base_version}, but the run is at {version}")
    if report.steps < 1 or not report.done:
        raise BadUpdate("it says that nothing was trained")


async def _give_back(desk: Desk, caller: Caller, lease_id: uuid.UUID, report: Report) -> ReportAnswer:
    async with desk.ledger.transaction(relaxed=True) as tx:
        row = await tx.row(
            "give_back",
            lease_id=lease_id,
            worker_id=caller.subject,
            only_if_late=False,
            outcome=report.outcome,
            reason=report.reason[:500],
            max_attempts=MAX_ATTEMPTS,
        )
        assert row is not None
        if row["was_live"] and report.outcome == "failed":
            text = f"{row['kind']} {row['task_id']} failed on {caller.name}: {report.reason[:300]}"
            await note(
                tx,
                row["kind"] + ".failed",
                str(row["task_id"]),
                text,
                run_id=row["run_id"],
                actor=caller.name,
            )
        await tx.notify("work")
    return ReportAnswer(bool(row["was_live"]), "given back" if row["was_live"] else "it was over already")


async def _take_version(desk: Desk, facts: dict[str, Any], lease_id: uuid.UUID, report: Report) -> ReportAnswer:
    """Version 0, or one merge: fates and the version commit together or not at all."""
    blobs = [blob for blob in (report.delta, report.snapshot, report.state) if blob is not None]
    async with desk.ledger.transaction() as tx:
        run = await tx.row("lock_run", run_id=facts["run_id"])  # before the lease, as whoever stops the run does
        held = await tx.row("lock_lease", lease_id=lease_id)
        assert run is not None
        if held is None or held["ended_at"] is not None:
            same = held is not None and held["outcome"] == "done"
            return ReportAnswer(same, "published before" if same else "too late: the lease was given to somebody else")
        if run["state"] in ("stopped", "failed", "done"):
            await tx.run("end_lease", lease_id=lease_id, outcome="cancelled", reason="the run is over")
            await tx.run("close_task", task_id=held["task_id"], state="cancelled", reason="the run is over")
            return ReportAnswer(False, "superseded: the run is over")
        if report.version != run["version"] + 1:
            return ReportAnswer(False, f"version {report.version} cannot follow version {run['version']}")
        known = {row["hash"] for row in await tx.rows("blobs_known", hashes=[blob.hash for blob in blobs])}
        missing = [blob.hash[:12] for blob in blobs if blob.hash not in known]
        if missing:
            raise BadUpdate(f"the bytes of {', '.join(missing)} never arrived: upload before the report")
        if held["kind"] == "init":
            await _publish_first(tx, run, report)
        else:
            await _publish_merge(tx, run, held, report)
        await tx.run("end_lease", lease_id=lease_id, outcome="done", reason="")
        await tx.run("close_task", task_id=held["task_id"], state="done", reason="")
        await tx.notify(f"version:{run['id']}")
        await tx.notify("work")  # units that waited for a merge, or for version 0
    return ReportAnswer(True, f"version {report.version} is published")


async def _publish_first(tx: Transaction, run: dict[str, Any], report: Report) -> None:
    if report.layout is None or report.snapshot is None:
        raise BadUpdate("version 0 needs a layout and a snapshot")
    await tx.run("begin_run", run_id=run["id"], layout=as_json(report.layout))
    await _add_version(
        tx,
        run["id"],
        report,
        applied_samples=0,
        updates=0,
        active=0,
        losses={},
        reason="the beginning",
        task_id=0,
    )
    text = f"{run['id']} begins: {report.layout.param_count:,} parameters"
    await note(tx, "run.started", run["id"], text, run_id=run["id"])


async def _publish_merge(tx: Transaction, run: dict[str, Any], held: dict[str, Any], report: Report) -> None:
    spec = as_type(held["spec"], MergeSpec)
    reason = held["spec"].get("reason", "")
    merged = {row["task_id"]: row for row in await tx.rows("merged_updates", task_id=held["task_id"], run_id=run["id"])}
    verdicts = {verdict.task_id: verdict for verdict in report.verdicts}
    if set(verdicts) != set(merged) or len(report.verdicts) != len(merged):
        raise BadUpdate("the merge did not judge exactly the updates that it was given")
    if unknown := {verdict.fate for verdict in report.verdicts} - set(FATES):
        raise BadUpdate(f"the merge gave a fate `{unknown.pop()[:20]}`: there are {', '.join(FATES)}")
    applied = 0
    for task_id, verdict in verdicts.items():
        await tx.run(
            "settle_update",
            task_id=task_id,
            run_id=run["id"],
            fate=verdict.fate,
            reason=verdict.reason[:500],
            version=report.version,
            weight=verdict.weight,
            norm=verdict.norm,
            cosine=verdict.cosine,
        )
        if verdict.fate in ("applied", "late"):
            applied += merged[task_id]["samples"]
        else:
            text = f"unit {task_id} was {verdict.fate} in the merge: {verdict.reason}"
            await note(tx, "unit." + verdict.fate, str(task_id), text, run_id=run["id"])
    losses = _mean_losses([merged[t] for t, v in verdicts.items() if v.fate in ("applied", "late")])
    await tx.run("advance_run", run_id=run["id"], version=report.version)
    await _add_version(
        tx,
        run["id"],
        report,
        applied_samples=spec.applied_samples + applied,
        updates=len(verdicts),
        active=spec.active,
        losses=losses,
        reason=reason,
        task_id=held["task_id"],
    )


async def _add_version(tx: Transaction, run_id: str, report: Report, *, losses: Json, **facts: Any) -> None:
    def blob(value: Blob | None) -> str | None:
        return None if value is None else as_json(value)

    await tx.run(
        "add_version",
        run_id=run_id,
        number=report.version,
        weights_sha256=report.weights_sha256,
        codec=report.codec,
        delta=blob(report.delta),
        snapshot=blob(report.snapshot),
        state=blob(report.state),
        losses=as_json(losses),
        metrics=as_json(_finite(report.metrics)),
        **facts,
    )


def _mean_losses(rows: list[dict[str, Any]]) -> dict[str, float]:
    total = sum(row["samples"] for row in rows)
    names = sorted({name for row in rows for name in row["losses"]})
    return {name: sum(row["losses"].get(name, 0.0) * row["samples"] for row in rows) / total for name in names if total}


async def _take_taste(desk: Desk, caller: Caller, lease_id: uuid.UUID, report: Report) -> ReportAnswer:
    async with desk.ledger.transaction() as tx:
        held = await tx.row("lock_lease", lease_id=lease_id)
        if held is None or held["ended_at"] is not None:
            return ReportAnswer(False, "too late: the lease was given to somebody else")
        spec = as_type(held["spec"], TasteSpec)
        version = await tx.row("version", run_id=held["run_id"], number=spec.version.number)
        await tx.run(
            "add_taste",
            run_id=held["run_id"],
            version=spec.version.number,
            samples=version["applied_samples"] if version else 0,
            image=as_json(report.image) if report.image else None,
            metrics=as_json(_finite(report.metrics)),
        )
        await tx.run("end_lease", lease_id=lease_id, outcome="done", reason="")
        await tx.run("close_task", task_id=held["task_id"], state="done", reason="")
        await tx.notify("taste:" + held["run_id"])
    return ReportAnswer(True, f"version {spec.version.number} was tasted")


def _finite(values: dict[str, float]) -> dict[str, float]:
    """Without NaN and infinities, which JSON does not have."""
    return {name[:60]: float(v) for name, v in list(values.items())[:100] if v == v and abs(v) != float("inf")}
