"""How does a job run on this machine without a hub: the same attempt, the same executor, the same variables?"""

from __future__ import annotations

import contextlib
import secrets as random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from potluck import settings
from potluck.client import project
from potluck.domain import resources
from potluck.domain.job import JobSpec
from potluck.domain.resources import Demand
from potluck.errors import BadInput, NotFound
from potluck.protocol import Blob, JobLease, JobProgress, JobReport, MachineNow
from potluck.worker.hardware import Machine
from potluck.worker.jobs import executors, reports
from potluck.worker.jobs.attempt import Attempt, Folders, Off, Shop
from potluck.worker.jobs.output import Output

OWNER = "local"
CHECKPOINTS = ".checkpoints"  # in the folder of results
FIGURES = ".points"


def run_local(
    spec: JobSpec,
    folder: Path,
    out: Path,
    *,
    secrets: dict[str, str],
    executor: str = "",
    say: Callable[[str], None],
    on_output: Callable[[bytes], None],
    stop: threading.Event,
) -> JobReport:
    """Run the project in `folder` and have its results in `out`. Returns when it has ended; `stop` ends it.

    `BadInput` if this machine does not have what the job asks for.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    key = f"local-{random.token_hex(8)}"
    root = settings.cache_dir() / "local" / key
    scratch = root / "scratch"
    folders = Folders(root, root / "work", out, out / CHECKPOINTS, root / "resume", scratch, out / FIGURES)
    lease = _lease(key, spec, Machine(out).now(), secrets)
    side = _Here(folder.resolve(), out)
    shop = Shop(executors.found(), "any", executor, settings.cache_dir() / "jobs", lambda text, bad: say(text))
    output = Output(root / "output.log", None, secrets=secrets.values(), show=on_output, said=say)
    attempt = Attempt(lease, folders=folders, shop=shop, side=side, output=output)
    ended = threading.Event()

    def end_when_asked() -> None:
        stop.wait()
        if not ended.is_set():
            attempt.end("stopped", spec.grace_s, outcome="cancelled")

    threading.Thread(target=end_when_asked, name="job-stop", daemon=True).start()
    try:
        report = attempt.run()
        output.close()
        return report
    finally:
        ended.set()
        reports.remove(root)
        with contextlib.suppress(OSError):  # those that nothing was written to
            folders.checkpoint.rmdir()
        with contextlib.suppress(OSError):
            folders.metrics.rmdir()


class _Here:
    """The side of an attempt whose project lies here and whom nobody watches but the person at the terminal."""

    def __init__(self, folder: Path, out: Path) -> None:
        self._folder = folder
        self._out = out

    def project(self, folder: Path, off: Callable[[], bool]) -> None:
        inside = self._out.is_relative_to(self._folder) and self._out != self._folder
        ignored = [f"/{self._out.relative_to(self._folder).as_posix()}/"] if inside else []
        tree = project.pack(self._folder, more_ignores=ignored)
        if off():
            raise Off
        project.copy(tree, self._folder, folder)

    def checkpoint(self, folder: Path, off: Callable[[], bool]) -> None:
        raise NotFound("a job without a hub begins anew each time")

    def tell(self, progress: JobProgress) -> None:
        return

    def confirm(self, off: Callable[[], bool]) -> None:
        return

    @contextlib.contextmanager
    def watched(self, folders: Folders) -> Iterator[None]:
        yield


def _lease(key: str, spec: JobSpec, machine: MachineNow, secrets: dict[str, str]) -> JobLease:
    """What a hub with this one machine would grant."""
    demand = resources.read(spec.resources, image=spec.image)
    if demand.memory > machine.memory_bytes or demand.cpu > machine.cpu_cores:
        raise BadInput(
            f"the job asks for {resources.describe(demand)}; this machine has {machine.cpu_cores} cores and "
            f"{machine.memory_bytes / 1e9:.0f} GB of memory: ask for less, or submit it to a hub (without --local)"
        )
    return JobLease(
        id=key,
        task_id=0,
        run_id="local",
        name=spec.name or "job",
        attempt=1,
        owner=OWNER,
        owner_name=OWNER,
        owns_worker=True,
        ttl_s=float("inf"),
        spec=spec,
        project=Blob("", 0),
        gpus=_gpus(demand, machine),
        vram_bytes=demand.vram_max or 0,
        cpu=demand.cpu,
        memory_bytes=demand.memory,
        disk_bytes=demand.disk,
        secrets=secrets,
    )


def _gpus(demand: Demand, machine: MachineNow) -> list[int]:
    fit = [
        gpu.index
        for gpu in machine.gpus
        if gpu.free_bytes >= demand.vram_min
        and (not demand.models or any(model in gpu.name.lower() for model in demand.models))
    ]
    if len(fit) < demand.gpus_min:
        raise BadInput(
            f"the job asks for {resources.describe(demand)}; this machine has {len(fit)} such GPUs free of "
            f"{len(machine.gpus)}: ask for less, or submit it to a hub (without --local)"
        )
    return fit if demand.gpus_max is None else fit[: demand.gpus_max]
