"""How much of the machines' own speed does the pool deliver, and at how many bytes?

    python benchmarks/pool.py [--json] [--quick] [--only equal,mixed,bytes,ceiling] [--strategy local,gradient]

Every ratio is taken in one run: the machines train alone (`--local`, all of them at the same time, as they will in the
pool), then together through a hub, then alone again; the ratio is the pool's speed over the mean of the two. The pool's
speed counts only samples that are applied to the model, between two published versions. Hub, PostgreSQL and the house
worker run on the same cores and are not taken out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np

from machine import facts
from potluck.protocol import Curve, InviteRequest
from potluck.testing import LocalCluster
from wire import Relay

PREDECESSOR_BYTES = 79_278  # per sample each way, its tensors alone; its wire carries twice that
PREDECESSOR_CEILING = 60.0  # samples/s of two workers with almost no compute
UNIT_SAMPLES = 4096
HERE = Path(__file__).parent
KEYS = ("equal_ratio", "mixed_ratio", "bytes_up_per_sample", "bytes_down_per_sample", "ceiling_samples_per_s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a third of the time; noisier")
    parser.add_argument("--only", default="equal,mixed,bytes,ceiling")
    parser.add_argument("--strategy", default="local,gradient")
    options = parser.parse_args()
    scale = 1 / 3 if options.quick else 1.0
    found: dict[str, float] = {}
    for strategy in options.strategy.split(","):
        suffix = "" if strategy == "local" else f"_{strategy}"
        for part in options.only.split(","):
            with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
                figures = PARTS[part](Path(folder), strategy, scale)
            found |= {key + suffix: value for key, value in figures.items()}
            print(f"# {strategy} {part}: {figures}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(found | facts()))
    else:
        _table(found)
    return 0


def _table(found: dict[str, float]) -> None:
    goals = {
        "equal_ratio": "≥ 0.90",
        "mixed_ratio": "≥ 0.90",
        "bytes_up_per_sample": f"≤ {PREDECESSOR_BYTES / 50:,.0f}",
        "bytes_down_per_sample": f"≤ {PREDECESSOR_BYTES / 25:,.0f}",
        "ceiling_samples_per_s": f"≥ {50 * PREDECESSOR_CEILING:,.0f}",
    }
    print(f"{'':30}{'local':>14}{'goal':>12}{'gradient':>14}")
    for key in KEYS:
        row = [found.get(key), found.get(key + "_gradient")]
        shown = [f"{v:,.3f}" if v is not None and v < 10 else f"{v:,.0f}" if v is not None else "—" for v in row]
        print(f"{key:30}{shown[0]:>14}{goals[key]:>12}{shown[1]:>14}")
    print("\n" + "\n".join(f"{key}: {value}" for key, value in facts().items()))


# --- the parts ------------------------------------------------------------------------------------------------------


def equal(folder: Path, strategy: str, scale: float) -> dict[str, float]:
    """Two single-thread workers on DCGAN-64."""
    return {"equal_ratio": _ratio(folder, [1.0, 1.0], strategy, scale)}


def mixed(folder: Path, strategy: str, scale: float) -> dict[str, float]:
    """Workers at full, half and quarter CPU on DCGAN-64."""
    return {"mixed_ratio": _ratio(folder, [1.0, 0.5, 0.25], strategy, scale)}


def bytes_(folder: Path, strategy: str, scale: float) -> dict[str, float]:
    """DCGAN-64's tensors in units of 4,096 samples (gradient: the predecessor's 320), counted on the socket."""
    data = _pictures(folder, 2 * UNIT_SAMPLES, size=8, channels=1)
    per_unit = UNIT_SAMPLES if strategy == "local" else 320
    settings = [f"unit_samples={per_unit}", "unit_s=4", "taste_every_s=0", f"strategy={strategy}"]
    settings += ["codec=fp32"] if strategy == "gradient" else []
    with LocalCluster(folder / "cluster") as cluster, Relay(cluster.port) as relay:
        for name in ("one", "two"):
            _join_by(cluster, name, relay.port)
        run = cluster.train(str(HERE / "recipes.py") + ":Carrier", str(data), "--for", "1h", *_sets(settings))
        first = _wait_version(cluster, run, 2)
        up, down = relay.up, relay.down
        last = _wait_version(cluster, run, 2 + max(4, int((10 if strategy == "local" else 6) * scale)))
        up, down = relay.up - up, relay.down - down
        samples = last.samples - first.samples
        cluster.hub.stop(run)
    return {"bytes_up_per_sample": up / samples, "bytes_down_per_sample": down / samples}


def ceiling(folder: Path, strategy: str, scale: float) -> dict[str, float]:
    """Two workers whose steps cost next to nothing."""
    data = _pictures(folder, 20_000, size=8, channels=1)
    settings = ["unit_s=3", "taste_every_s=0", f"strategy={strategy}"]
    settings += ["unit_samples=320", "codec=fp32", "unit_s=0.05"] if strategy == "gradient" else []
    with LocalCluster(folder / "cluster") as cluster:
        for name in ("one", "two"):
            cluster.add_worker(name)
        run = cluster.train(str(HERE / "recipes.py") + ":Blink", str(data), "--for", "1h", *_sets(settings))
        speed = _pool_speed(cluster, run, warm_versions=2, seconds=30 * scale)
        cluster.hub.stop(run)
    return {"ceiling_samples_per_s": speed}


PARTS = {"equal": equal, "mixed": mixed, "bytes": bytes_, "ceiling": ceiling}


def _ratio(folder: Path, shares: list[float], strategy: str, scale: float) -> float:
    data = _pictures(folder, 1024, size=64, channels=3)
    recipe = ["size=64", "width=64", "batch_size=32"]
    alone_s = max(20.0, 45 * scale)
    before = _local_speed(folder / "before", data, shares, recipe, alone_s)
    settings = [*recipe, "taste_every_s=0", f"strategy={strategy}"]
    settings += ["unit_s=20"] if strategy == "local" else ["unit_samples=320", "codec=fp32", "unit_s=20"]
    with LocalCluster(folder / "cluster") as cluster:
        for number, share in enumerate(shares):
            cluster.add_worker(f"worker-{number}", share=share)
        run = cluster.train("dcgan", str(data), "--for", "1h", *_sets(settings))
        pooled = _pool_speed(cluster, run, warm_versions=2, seconds=max(60.0, 160 * scale))
        cluster.hub.stop(run)
    after = _local_speed(folder / "after", data, shares, recipe, alone_s)
    print(f"# alone {before:.1f} and {after:.1f}, together {pooled:.1f} samples/s", file=sys.stderr, flush=True)
    return pooled / ((before + after) / 2)


def _local_speed(folder: Path, data: Path, shares: list[float], recipe: list[str], seconds: float) -> float:
    """The sum of what each machine does alone, all at once."""
    folder.mkdir(parents=True)
    children = []
    for number, share in enumerate(shares):
        command = [sys.executable, "-m", "potluck.cli", "train", "dcgan", "--data", str(data), "--local", "--json"]
        command += ["--for", f"{seconds}s", "--share", f"{share:.0%}", "--out", str(folder / str(number))]
        command += _sets([*recipe, "taste_every_s=0"])
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "POTLUCK_THREADS": "1",
            "POTLUCK_HOME": str(folder / "home"),
        }
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, stdin=subprocess.DEVNULL))
    total = 0.0
    for child in children:
        answer, _ = child.communicate()
        total += json.loads(answer)["samples_per_s"]
    return total


def _pool_speed(cluster: LocalCluster, run: str, *, warm_versions: int, seconds: float) -> float:
    """Applied samples per second between two published versions at least `seconds` apart."""
    first = _wait_version(cluster, run, warm_versions)
    begin = datetime.fromisoformat(first.at)
    while True:
        last = cluster.hub.curve(run)[-1]
        span = (datetime.fromisoformat(last.at) - begin).total_seconds()
        if span >= seconds:
            return (last.samples - first.samples) / span
        time.sleep(0.5)


def _wait_version(cluster: LocalCluster, run: str, number: int) -> Curve:
    cluster.until(lambda: cluster.view(run).version >= number, timeout_s=900, what=f"version {number}")
    return cluster.hub.curve(run)[number - 1]


def _join_by(cluster: LocalCluster, name: str, port: int) -> None:
    """Join through the relay instead of directly."""
    link = cluster.hub.invite(InviteRequest("worker", uses=1)).url
    direct = cluster.hub.address.rpartition(":")[2]
    home = cluster.folder / "workers" / name
    cluster.spawn(
        name, ["join", link.replace(f":{direct}/", f":{port}/"), "--name", name, "--home", str(home), "--no-screen"]
    )


def _pictures(folder: Path, count: int, *, size: int, channels: int) -> Path:
    """Random pictures: speed and bytes do not depend on what is on them."""
    path = folder / f"pictures-{size}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        rng = np.random.default_rng(0)
        np.savez(path, x=rng.integers(0, 256, (count, channels, size, size), dtype=np.uint8))
    return path


def _sets(settings: list[str]) -> list[str]:
    return [f"--set={each}" for each in settings]


if __name__ == "__main__":
    raise SystemExit(main())
