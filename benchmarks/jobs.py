"""How fast does a job start, how fast is a placement pass, and what does a hub with a thousand workers still answer?

python benchmarks/jobs.py [--json] [--quick] [--only start,pass,claims,sustained]

submit_to_start_p95_s   a real hub and one idle worker: from `submit` until the job's own process says that it runs
                        (p50 beside it); one job after the other, the project is known to the hub and new to nobody
placement_pass_s        one pass of domain/placement.py over 10,000 waiting jobs and 1,000 machines (worst of three
                        kinds of line: benchmarks/placement.py)
claim_p99_s             1,000 simulated workers, each with its request open for 10 s, jobs submitted at a steady rate:
                        from the moment of the placement in the ledger until the worker has the lease in its hands
placements_per_s        the same workers and a line of some thousand jobs: placed, delivered and reported, per second,
                        all of it over HTTP with the workers on the same two cores
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import msgspec

from fleet import Fleet, Wire, decode
from machine import facts
from placement import placement_pass
from potluck.client import project
from potluck.domain.job import ENDED, JobSpec, Resources
from potluck.protocol import InviteRequest, JobRequest
from potluck.testing import LocalCluster

WORKERS = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a third of the jobs; noisier")
    parser.add_argument("--only", default="start,pass,claims,sustained")
    options = parser.parse_args()
    scale = 1 / 3 if options.quick else 1.0
    found: dict[str, float] = {}
    for part in options.only.split(","):
        with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
            figures = PARTS[part](Path(folder), scale)
        print(f"# {part}: {figures}", file=sys.stderr, flush=True)
        found |= figures
    if options.json:
        print(json.dumps(found | facts()))
    else:
        for key, value in found.items():
            print(f"{key:28}{value:12,.4g}")
        for key, text in facts().items():
            print(f"{key:28}{text}")
    return 0


def start(folder: Path, scale: float) -> dict[str, float]:
    """Submit to started, one job after the other."""
    plain = ("--runtime", "any", "--yes", "--executor", "process")
    took = []
    with LocalCluster(folder / "c", house_worker=False) as cluster:
        cluster.add_worker("ann", arguments=plain)
        cluster.until(lambda: any(w.state == "idle" for w in cluster.hub.workers()), timeout_s=60, what="the worker")
        place = folder / "project"
        place.mkdir()
        for number in range(20):
            (place / f"part{number}.py").write_text(f"value = {number}\n" * 50)
        tree = cluster.hub.upload_tree(place, project.pack(place))
        spec = JobSpec(["/bin/sh", "-c", "date +%s.%N"], resources=Resources(cpu="0.1"))
        for number in range(round(60 * scale) + 3):
            begun = time.time()
            job = cluster.hub.submit(JobRequest(spec, tree)).id
            view = cluster.hub.job(job)
            while view.state not in ENDED:
                view = cluster.hub.wait_job(job, view.state, 10)
            if view.state != "succeeded":
                raise SystemExit(f"{job} {view.state}: {view.reason}")
            if number >= 3:  # the first ones warm caches up
                took.append(float(cluster.output(job)) - begun)
        lines = log_lines(cluster, round(200 * scale))
    return {
        "submit_to_start_p95_s": quantile(took, 0.95),
        "submit_to_start_p50_s": statistics.median(took),
        "log_line_p95_s": quantile(lines, 0.95),
    }


def log_lines(cluster: LocalCluster, count: int) -> list[float]:
    """How old each line is when a reader has it."""
    script = f"for i in $(seq {count}); do date +%s.%N; sleep 0.05; done"
    job = cluster.submit(JobSpec(["/bin/sh", "-c", script], resources=Resources(cpu="0.1")))
    ages: list[float] = []
    offset, rest = 0, ""
    while len(ages) < count:
        piece = cluster.hub.log(job, offset=offset, wait_s=10)
        now, offset = time.time(), piece.next_offset
        *lines, rest = (rest + piece.text).split("\n")
        ages += [now - float(line) for line in lines if line]
        if piece.over:
            break
    return ages


def one_pass(folder: Path, scale: float) -> dict[str, float]:
    return placement_pass()


def claims(folder: Path, scale: float) -> dict[str, float]:
    with LocalCluster(folder / "c", house_worker=False) as cluster:
        return asyncio.run(_claims(cluster, folder, count=round(300 * scale), per_s=10))


async def _claims(cluster: LocalCluster, folder: Path, *, count: int, per_s: float) -> dict[str, float]:
    fleet, wire, body = await _prepared(cluster, folder)
    fleet.start()
    await asyncio.sleep(1.5 * fleet.wait_s)  # the part of the measurement in which everybody asks for the first time
    begun, polls = time.time(), fleet.polls
    submitted: dict[str, float] = {}
    for number in range(count):
        await asyncio.sleep(max(0.0, begun + number / per_s - time.time()))
        sent = time.time()
        submitted[await _submit(wire, body)] = sent
    await _until(lambda: fleet.ended >= count, 120)
    seconds = time.time() - begun
    claim, whole = [], []
    for job, sent in submitted.items():
        view = decode((await wire.ask("GET", f"/jobs/{job}"))[1])
        placed = datetime.fromisoformat(view["attempts"][0]["placed_at"]).timestamp()
        claim.append(fleet.got[job] - placed)
        whole.append(fleet.got[job] - sent)
    await fleet.stop()
    return {
        "claim_p99_s": quantile(claim, 0.99),
        "claim_p50_s": statistics.median(claim),
        "submit_to_lease_p99_s": quantile(whole, 0.99),
        "workers": WORKERS,
        "orders_per_s": (fleet.polls - polls) / seconds,
        "hub_rss_mb": _hub_rss(cluster),
    }


def sustained(folder: Path, scale: float) -> dict[str, float]:
    with LocalCluster(folder / "c", house_worker=False) as cluster:
        return asyncio.run(_sustained(cluster, folder, count=round(3000 * scale)))


async def _sustained(cluster: LocalCluster, folder: Path, *, count: int) -> dict[str, float]:
    fleet, wire, body = await _prepared(cluster, folder)
    begun = time.time()
    for _ in range(count):
        await _submit(wire, body)
    submits_per_s = count / (time.time() - begun)
    fleet.start()
    await _until(lambda: fleet.ended >= count // 5, 300)
    first, begun = fleet.ended, time.time()
    await _until(lambda: fleet.ended >= count * 9 // 10, 300)
    rate = (fleet.ended - first) / (time.time() - begun)
    await fleet.stop()
    return {"placements_per_s": rate, "submits_per_s": submits_per_s}


async def _prepared(cluster: LocalCluster, folder: Path) -> tuple[Fleet, Wire, bytes]:
    place = folder / "project"
    place.mkdir()
    (place / "train.py").write_text("print('hello')\n")
    tree = cluster.hub.upload_tree(place, project.pack(place))
    spec = JobSpec(["python", "train.py"], resources=Resources(cpu="1", memory="1GB"))
    code = cluster.hub.invite(InviteRequest("worker", uses=WORKERS)).code
    fleet = Fleet(cluster.hub.address, code, WORKERS)
    await fleet.join()
    token = cluster.admin_environment["POTLUCK_TOKEN"]
    return fleet, Wire(cluster.hub.address, token), msgspec.json.encode(JobRequest(spec, tree))


async def _submit(wire: Wire, body: bytes) -> str:
    status, answer = await wire.ask("POST", "/jobs", body)
    if status != 201:
        raise SystemExit(f"submit: {status} {answer[:300]!r}")
    return str(decode(answer)["id"])


async def _until(is_so, timeout_s: float) -> None:  # type: ignore[no-untyped-def]
    end = time.time() + timeout_s
    while not is_so():
        if time.time() > end:
            raise SystemExit("the jobs do not come to their end")
        await asyncio.sleep(0.05)


def _hub_rss(cluster: LocalCluster) -> float:
    import psutil

    return psutil.Process(cluster.processes["hub"].popen.pid).memory_info().rss / 1e6


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


PARTS = {"start": start, "pass": one_pass, "claims": claims, "sustained": sustained}

if __name__ == "__main__":
    sys.exit(main())
