"""How does a job run on this machine without a hub: the same attempt, the same executor, the same variables?

It works below the cache, never in the owner's folders: the project is copied there, and what the job leaves is copied out
when it has ended. So nothing of the owner's can be changed by it, and the results belong to whoever called.
"""

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
from potluck.errors import BadInput, NotFound, PotluckError
from potluck.protocol import Blob, JobLease, JobProgress, JobReport, MachineNow
from potluck.worker.hardware import Machine
from potluck.worker.jobs import executors, outputs, reports
from potluck.worker.jobs.attempt import Attempt, Folders, Off, Shop
from potluck.worker.jobs.locks import try_lock
from potluck.worker.jobs.output import Output

OWNER = "local"
CHECKPOINTS = ".checkpoints"  # in the folder of results
_LOOK_S = 0.2
_NO_LIMIT = 1 << 62  # it is the owner's own disk


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
    shop = Shop(executors.found(), "any", executor, settings.cache_dir() / "jobs", lambda text, bad: say(text))
    with _room(settings.cache_dir() / "local") as root:
        folders = Folders.below(root)
        lease = _lease(root.name, spec, Machine(out).now(), secrets)
        output = Output(root / "output.log", None, secrets=secrets.values(), show=on_output, said=say)
        attempt = Attempt(lease, folders=folders, shop=shop, side=_Here(folder.resolve(), out), output=output)
        with _ending(attempt, spec.grace_s, stop):
            report = attempt.run()
        output.close()
        _bring_home(folders, out, report, say)
    return report


@contextlib.contextmanager
def _room(place: Path) -> Iterator[Path]:
    """A folder of our own below `place`, removed at the end. What runs that were killed have left there goes, too."""
    place.mkdir(parents=True, exist_ok=True)
    place.chmod(0o700)
    root = place / f"local-{random.token_hex(8)}"
    lock = try_lock(_lock_of(root))  # before the folder is there: no other run may take it for a dead one's
    assert lock is not None
    try:
        for left in (path for path in place.iterdir() if path.is_dir()):
            _clear(left)
        yield root
    finally:
        reports.remove(root)
        lock.close()
        _lock_of(root).unlink(missing_ok=True)


def _clear(left: Path) -> None:
    lock = try_lock(_lock_of(left))
    if lock is not None:
        executors.sweep({left.name: left})
        reports.remove(left)
        lock.close()
        _lock_of(left).unlink(missing_ok=True)


def _lock_of(root: Path) -> Path:
    return root.with_name(f"{root.name}.lock")


@contextlib.contextmanager
def _ending(attempt: Attempt, grace_s: float, stop: threading.Event) -> Iterator[None]:
    """While it runs, `stop` ends it."""
    over = threading.Event()

    def end_when_asked() -> None:
        while not over.is_set():
            if stop.wait(_LOOK_S):
                attempt.end("stopped", grace_s, outcome="cancelled")
                return

    watcher = threading.Thread(target=end_when_asked, name="job-stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _bring_home(folders: Folders, out: Path, report: JobReport, say: Callable[[str], None]) -> None:
    """Copy what the job left to where its owner wants it: their own plain files, whoever the job ran as.

    A checkpoint comes along only after a run that did not succeed: then somebody may want to go on from it.
    """
    try:
        _copy(folders.output, out, say)
        if report.exit_code != 0 and _copy(folders.checkpoint, out / CHECKPOINTS, say):
            say(f"its checkpoint is in {out / CHECKPOINTS}")
    except (PotluckError, OSError) as error:
        kept = folders.root.parent.parent / "unclaimed" / folders.root.name
        kept.mkdir(parents=True)
        for place in (folders.output, folders.checkpoint):
            place.rename(kept / place.name)
        raise PotluckError(f"the results could not be brought to {out}: {error}. They are in {kept}") from error


def _copy(folder: Path, to: Path, say: Callable[[str], None]) -> int:
    tree = outputs.collect(folder, limit_bytes=_NO_LIMIT, limit_files=_NO_LIMIT)
    for note in tree.skipped:
        say(f"left out: {note}")
    if tree.files:
        project.copy(tree, folder, to)
    return len(tree.files)


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
