"""A training child without torch: speaks the child protocol, checks the chains that it is told, and misbehaves on request.

How it behaves comes with the recipe's settings: steps, step_s, and at most one of die_at, hang_at, nan_at, fail.
What it was told goes to the file FAKE_CHILD_LOG, one JSON line each. Exits with 3 if a chain has a gap.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from potluck.protocol import (
    DoInit,
    DoMerge,
    DoTaste,
    DoUnit,
    Drop,
    Failed,
    Finished,
    HandIn,
    Layout,
    Ready,
    Rebase,
    Rebased,
    Report,
    Started,
    Stepping,
    ToChild,
    Verdict,
)

inbox: queue.SimpleQueue = queue.SimpleQueue()
have: dict[str, int] = {}
units: list[DoUnit] = []


def emit(event) -> None:
    os.write(int(os.environ["POTLUCK_EVENTS_FD"]), msgspec.json.encode(event) + b"\n")


def note(**fields) -> None:
    with open(os.environ["FAKE_CHILD_LOG"], "a") as log:
        log.write(json.dumps({"pid": os.getpid(), **fields}) + "\n")


def read() -> None:
    for line in sys.stdin.buffer:
        inbox.put(msgspec.json.decode(line, type=ToChild))
    os._exit(0)


def follow(run: str, weights) -> None:
    for file in weights:
        assert Path(file.path).is_file(), f"{file.path} is not there"
        if file.version <= have.get(run, -1):
            continue
        if file.kind == "delta" and file.version != have.get(run, -1) + 1:
            print(f"a gap: {have.get(run)} → {file.version}", file=sys.stderr, flush=True)
            note(gap=[have.get(run), file.version])
            os._exit(3)
        have[run] = file.version


def finish(lease_id: str, out: str, report: Report, names: dict[str, str]) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for field, name in names.items():
        (folder / name).write_bytes(os.urandom(16) + lease_id.encode() * 50)
        files[field] = str(folder / name)
    emit(Finished(lease_id=lease_id, report=report, files=files))


def take(message, unit=None):
    """Act on an instruction; the state of the unit at work may change."""
    note(
        told=type(message).__name__,
        lease=message.lease_id,
        versions=[w.version for w in getattr(message, "weights", [])],
    )
    match message:
        case DoUnit():
            follow(message.run_id, message.weights)
            units.append(message)
        case Rebase():
            run = unit["job"].run_id if unit else next(iter(have))
            follow(run, message.weights)
            if unit and unit["window"]:
                unit["base"], unit["window"] = have[run], 0
                emit(Rebased(lease_id=unit["job"].lease_id, version=have[run]))
        case HandIn():
            if unit and unit["job"].lease_id == message.lease_id:
                unit["hand_in"] = True
        case Drop():
            units[:] = [u for u in units if u.lease_id != message.lease_id]
            if unit and unit["job"].lease_id == message.lease_id:
                unit["dropped"] = True
        case DoInit():
            layout = Layout(params=[("net.w", [4])])
            report = Report("done", version=0, weights_sha256="0" * 64, layout=layout)
            finish(
                message.lease_id,
                message.out,
                report,
                {"snapshot": "snapshot.safetensors", "state": "state.safetensors"},
            )
        case DoMerge():
            follow(message.run_id, message.weights)
            base = message.spec.base.number
            verdicts = [Verdict(i.task_id, "applied", "") for i in message.spec.inputs]
            report = Report(
                "done", version=base + 1, weights_sha256="1" * 64, base_version=base, codec="int8", verdicts=verdicts
            )
            finish(message.lease_id, message.out, report, {"delta": "delta.safetensors", "state": "state.safetensors"})
        case DoTaste():
            follow(message.run_id, message.weights)
            finish(message.lease_id, message.out, Report("done", metrics={"distance": 1.0}), {"image": "samples.png"})


def work(job: DoUnit, overlap: bool) -> None:
    settings = job.recipe.settings
    steps, step_s = settings.get("steps", 10), settings.get("step_s", 0.01)
    if settings.get("fail"):
        emit(Failed(lease_id=job.lease_id, reason="the recipe's step failed", code="failed"))
        return
    box = steps * step_s / job.share
    now = time.monotonic()
    unit = {"job": job, "base": have[job.run_id], "window": now + job.spec.overlap_s if overlap else 0}
    note(started=job.lease_id, overlap=overlap)
    emit(Started(lease_id=job.lease_id, box_s=box, overlap=overlap))
    lo = job.spec.positions[0][0]
    for step in range(1, steps + 1):
        if settings.get("die_at") == step:
            print("RuntimeError: something terrible", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL if settings.get("by") == "kill" else signal.SIGTERM)
        while settings.get("hang_at") == step:
            time.sleep(1)
        if settings.get("nan_at") == step:
            emit(Failed(lease_id=job.lease_id, reason=f"loss became NaN at step {step}", code="nan"))
            return
        time.sleep(step_s / job.share)
        while not inbox.empty():
            take(inbox.get(), unit)
        if unit.get("dropped"):
            return
        if unit["window"] and time.monotonic() > unit["window"]:
            unit["window"], unit["base"] = 0, have[job.run_id]
            emit(Rebased(lease_id=job.lease_id, version=unit["base"]))
        emit(
            Stepping(
                lease_id=job.lease_id,
                steps=step,
                samples=step * 8,
                samples_per_s=8 / step_s,
                fraction=step / steps,
                loss={"loss": 1 / step},
            )
        )
        if unit.get("hand_in"):
            break
    report = Report(
        "done",
        codec="int8",
        base_version=unit["base"],
        steps=step,
        samples=step * 8,
        done=[(lo, lo + step * 8)],
        seconds=step * step_s,
        metrics={"loss": 1 / step},
    )
    finish(job.lease_id, job.out, report, {"update": "update.safetensors"})


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    threading.Thread(target=read, daemon=True).start()
    note(environment=dict(os.environ))
    if os.environ.get("FAKE_CHILD_BROKEN"):
        print("ModuleNotFoundError: No module named 'torch'", file=sys.stderr, flush=True)
        os._exit(1)
    emit(Ready(torch="none", device="cpu"))
    overlap = False
    while True:
        if not units:
            overlap = False
            take(inbox.get())
            continue
        job = units.pop(0)
        work(job, overlap and job.spec.overlap_s > 0)
        overlap = True


main()
