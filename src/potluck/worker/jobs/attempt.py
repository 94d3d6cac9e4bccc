"""What happens to one attempt of a job on this machine, from its lease to the end of its command?

    the project ─┐
    checkpoint  ─┼─► executor, image or environment ─► confirmed? ─► command ─► JobReport
    hub is told ─┘          everything up to here can be given up at any moment
                            a gang's member (gangs.py): confirmed, and it is known where the gang meets

It knows no hub: a `Side` fetches what it needs and hears how it goes (keeper.py for a hub's lease, local.py for
`potluck run --local`). What the command leaves in its folders is collected by whoever ran the attempt.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

from potluck.errors import DiskFull, PotluckError
from potluck.protocol import JobLease, JobProgress, JobReport, Json
from potluck.worker.jobs import environments, executors, gangs
from potluck.worker.jobs.box import Box, Ended, clock
from potluck.worker.jobs.builds import BuildStep, BuildStopped
from potluck.worker.jobs.environments import Environment
from potluck.worker.jobs.executors import Executor, Found, Running
from potluck.worker.jobs.gangs import Member
from potluck.worker.jobs.output import Output

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{7,62}")
_BUILD_LOOK_S = 0.1
_BUILD_GRACE_S = 2.0
_BUILD_BYTES = 4_000_000_000
"""Of memory: a stranger's build gets so much even if the job needs less, and no more."""
_LOOK_S = 0.5  # between two looks at whether the attempt still may run
_INSIDE_PATH = "/usr/local/bin:/usr/bin:/bin"
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class Off(Exception):
    """The attempt was called off before its command began."""


@dataclass(frozen=True)
class Folders:
    """Where one attempt lives."""

    root: Path
    work: Path
    output: Path
    checkpoint: Path
    resume: Path
    scratch: Path
    metrics: Path

    @classmethod
    def below(cls, root: Path) -> Folders:
        scratch = root / "scratch"
        return cls(
            root, root / "work", root / "output", root / "checkpoint", root / "resume", scratch, scratch / "metrics"
        )

    def make(self) -> None:
        for folder in (self.work, self.output, self.checkpoint, self.scratch, self.metrics):
            folder.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Shop:
    """What the machine and its owner give to every attempt."""

    found: Sequence[Found]  # executors
    runtime: str  # container | any: what foreign code needs
    prefer: str  # an executor that the owner named
    cache: Path  # of packages, models and environments; one folder for each person below it
    say: Callable[[str, bool], None]  # to the person at the machine


class Side(Protocol):
    """Whoever wants this attempt. All but `watched` may raise what the network raises, and give up when `off()`."""

    def project(self, folder: Path, off: Callable[[], bool]) -> None:
        """Put the project's files there."""

    def checkpoint(self, folder: Path, off: Callable[[], bool]) -> None:
        """Put the newest checkpoint there. Only asked if the lease has one."""

    def tell(self, progress: JobProgress) -> None:
        """How far it is. Never waits."""

    def confirm(self, off: Callable[[], bool]) -> None:
        """Wait until nothing stands in the way of the command: the lease is still ours, the GPU is free of the pool."""

    def watched(self, folders: Folders) -> AbstractContextManager[None]:
        """While the command runs: figures and checkpoints."""


@dataclass(frozen=True)
class _Ready:
    """Everything that the command needs."""

    executor: Executor
    environment: Environment | None  # None: the image's own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.environment is not None:
            self.environment.release()


def key_of(lease_id: str) -> str:
    """A name for folders, containers and control groups, whatever the hub calls its lease."""
    return lease_id if _KEY.fullmatch(lease_id) else hashlib.sha256(lease_id.encode()).hexdigest()[:32]


class Attempt:
    """One attempt. `run` takes as long as the job; the other methods may be called from any thread."""

    def __init__(
        self,
        lease: JobLease,
        *,
        folders: Folders,
        shop: Shop,
        side: Side,
        output: Output,
        member: Member | None = None,
    ) -> None:
        self.lease = lease
        self.folders = folders
        self.until: float | None = None  # by box.clock(): the lease may have lapsed then
        self.state = "preparing"
        # Each person's jobs share a cache. Nobody can leave something there for the jobs of others.
        self.cache = shop.cache / hashlib.sha256(lease.owner.encode()).hexdigest()[:16]
        self._shop = shop
        self._side = side
        self._output = output
        self._member = member  # of a gang
        self._lock = threading.Lock()
        self._off = threading.Event()
        self._ending: tuple[str, str, str] | None = None  # the outcome, reason and code that somebody decided on
        self._running: Running | None = None
        self._record: dict[str, Json] = {}
        self._executor = ""

    def end(self, reason: str, grace_s: float, *, outcome: str) -> None:
        """SIGTERM, `grace_s`, SIGKILL; before the command, at once. The first reason counts, the shortest grace too."""
        with self._lock:
            self._ending = self._ending or (outcome, reason, "")
            self._off.set()
            running = self._running
        if running is not None:
            running.end(grace_s, reason)

    def kill(self, reason: str, *, outcome: str = "returned", code: str = "") -> None:
        """Now."""
        with self._lock:
            self._ending = self._ending or (outcome, reason, code)
            self._off.set()
            running = self._running
        if running is not None:
            running.kill(reason)

    def run(self) -> JobReport:
        """From the lease to the end of the command."""
        try:
            with self._prepare() as ready:
                report = self._report(self._execute(ready))
        except (Off, BuildStopped):
            outcome, reason, code = self._ending or ("returned", "it was called off", "")
            report = JobReport(outcome, reason=reason, code=code)
        except DiskFull as error:
            self._shop.say(f"{self.lease.name} is given back: {error}", True)
            report = JobReport("returned", reason=f"this machine's disk is full: {error}", code="disk")
        except _Given as given:
            report = JobReport(given.outcome, reason=str(given), code=given.code)
        except (PotluckError, OSError) as error:
            report = JobReport("failed", reason=str(error), code=getattr(error, "code", ""))
        except Exception as error:  # noqa: BLE001  (a lease without an end would be renewed for ever)
            report = JobReport("returned", reason=f"Potluck broke: {type(error).__name__}: {error}")
        return replace(report, environment=self._record, executor=self._executor)

    # --- before the command

    def _prepare(self) -> _Ready:
        lease, spec, side = self.lease, self.lease.spec, self._side
        side.tell(JobProgress("preparing"))
        self.folders.make()
        if self._member is not None:
            self._member.prepare()
        (self.cache / "shared").mkdir(parents=True, exist_ok=True)
        os.utime(self.cache)  # for whoever clears away what was not used for long
        executor = self._choose()
        self._executor = executor.name
        with _reasons("project", "its files could not be fetched"):
            side.project(self.folders.work, self.off)
            if lease.resume_from is not None:
                side.checkpoint(self.folders.resume, self.off)
        ready = _Ready(executor, None if spec.image else self._build(executor))
        try:
            if spec.image:
                self._pull(executor)
            self._check()
            side.confirm(self.off)
            self._check()
            self._meet()
        except BaseException:
            ready.__exit__(None, None, None)
            raise
        return ready

    def _choose(self) -> Executor:
        lease, shop = self.lease, self._shop
        try:
            return executors.choose(
                image=lease.spec.image,
                foreign=not lease.owns_worker,
                runtime=shop.runtime,
                found=shop.found,
                prefer=shop.prefer,
            )
        except PotluckError as error:
            raise _Given("returned", str(error), "executor") from error

    def _pull(self, executor: Executor) -> None:
        image = self.lease.spec.image
        with _reasons("image", f"the image {image} could not be had"):
            digest = executor.pull(image, stop=self._off, say=self._tell)
        self._record = {"image": image, "digest": digest}

    def _build(self, executor: Executor) -> Environment:
        spec = self.lease.spec
        with _reasons("environment", "its environment could not be had"):
            made = environments.prepare(
                self.folders.work,
                requirements=spec.requirements,
                python=spec.python,
                cache=self.cache,
                run=Builder(self.lease, executor, self.folders, self._off).run,
                on_output=self._output.write,
                say=self._tell,
                stop=self._off,
            )
        self._record = made.record
        return made

    def _meet(self) -> None:
        """A gang's member begins when it can be told where the others are."""
        if self._member is None:
            return
        if not self._member.wait(0):
            self._tell("waiting for the gang to meet")
        while not self._member.wait(_BUILD_LOOK_S):
            self._check()
        trouble = self._member.trouble(clock())
        if trouble is not None:
            code, reason = trouble
            raise _Given("failed", reason, code)

    def _tell(self, text: str) -> None:
        self._output.say(text)
        self._side.tell(JobProgress("preparing", text, self._executor))

    @property
    def is_ending(self) -> bool:
        return self._ending is not None

    def off(self) -> bool:
        """Is there no sense in going on?"""
        if self._off.is_set():
            return True
        if self.until is not None and clock() > self.until:
            self.kill(_SILENT)
            return True
        return False

    def _check(self) -> None:
        if self.off():
            raise Off

    # --- the command

    def _execute(self, ready: _Ready) -> Ended:
        lease, spec, made = self.lease, self.lease.spec, ready.environment
        shared = self.cache / "shared"
        box = Box(
            id=key_of(lease.id),
            argv=command_of(spec.command, spec.procs, made.python if made else None),
            env=self._variables(ready, shared),
            work=self.folders.work,
            output=self.folders.output,
            checkpoint=self.folders.checkpoint,
            cache=shared,
            scratch=self.folders.scratch,
            resume=self.folders.resume if lease.resume_from is not None else None,
            python=made.prefix if made else None,
            read_only=list(made.read_only) if made else [environments.job_path(self.cache)],
            image=spec.image,
            gpus=list(lease.gpus),
            cpu=lease.cpu,
            memory_bytes=lease.memory_bytes,
            disk_bytes=lease.disk_bytes,
            network=spec.network,
            host_network=lease.gang is not None,
            timeout_s=spec.timeout_s,
            grace_s=spec.grace_s,
        )
        with self._side.watched(self.folders):
            running = self._start(ready.executor, box)
            while not running.started.wait(_LOOK_S):
                self.off()
            ended = running.wait(0)
            if ended is None or ended.exit_code is not None:
                self.state = "running"
                self._side.tell(JobProgress("running", executor=self._executor, environment=self._record))
            while (ended := running.wait(_LOOK_S if self._member is None else gangs.LOOK_S)) is None:
                self.off()  # ends it if the hub was silent for too long
                if self._member is not None and (trouble := self._member.trouble(clock())) is not None:
                    code, reason = trouble
                    self.kill(reason, outcome="failed", code=code)
        self.state = "ended"
        return ended

    def _start(self, executor: Executor, box: Box) -> Running:
        with self._lock:
            if self._off.is_set():
                raise Off
            try:
                self._running = executors.run(executor, box, on_output=self._output.write, deadline=lambda: self.until)
            except PotluckError as error:
                raise _Given("failed", str(error), "executor") from error
            return self._running

    def _variables(self, ready: _Ready, shared: Path) -> dict[str, str]:
        """The command's environment: what a job may rely on, then its own, then its secrets; ours cannot be changed."""
        lease, spec, folders = self.lease, self.lease.spec, self.folders
        given = {
            "PYTHONUNBUFFERED": "1",
            "HF_HOME": str(shared / "huggingface"),
            "TORCH_HOME": str(shared / "torch"),
            "UV_CACHE_DIR": str(shared / "uv"),
            "XDG_CACHE_HOME": str(shared),
            **proxies(os.environ),
            **({"OMP_NUM_THREADS": str(max(1, int(lease.cpu / max(1, spec.procs))))} if lease.cpu else {}),
            **spec.env,
            **{name: lease.secrets[name] for name in spec.secrets if name in lease.secrets},
        }
        if ready.environment is not None:
            path = _INSIDE_PATH if ready.executor.contains else os.environ.get("PATH", os.defpath)
            given |= ready.environment.variables({"PATH": path, **given})
        else:
            api = str(environments.job_path(self.cache))
            given["PYTHONPATH"] = os.pathsep.join(filter(None, [given.get("PYTHONPATH", ""), api]))
        ours = {
            "POTLUCK_RUN_ID": lease.run_id,
            "POTLUCK_ATTEMPT": str(lease.attempt),
            "POTLUCK_OUTPUT_DIR": str(folders.output),
            "POTLUCK_CHECKPOINT_DIR": str(folders.checkpoint),
            "POTLUCK_METRICS_DIR": str(folders.metrics),
        }
        if self._member is not None:
            ours |= self._member.variables()
        elif spec.gang is not None:
            ours |= gangs.alone(spec.gang)
        if lease.resume_from is not None:
            ours["POTLUCK_RESUME_FROM"] = str(folders.resume)
        if spec.timeout_s is not None:
            ours["POTLUCK_DEADLINE"] = f"{time.time() + spec.timeout_s:.0f}"
        return {**given, **ours}

    def _report(self, ended: Ended) -> JobReport:
        outcome, reason, code = "exited", ended.reason, ended.code
        if self._ending is not None and ended.code in ("ended", "fenced"):
            outcome, reason, code = self._ending
        elif ended.code == "fenced":
            outcome, reason, code = "returned", _SILENT, ""
        elif ended.code == "executor":
            outcome = "returned"
        elif ended.code in ("memory", "disk", "timeout", "pids") or ended.exit_code is None:
            outcome = "failed"
        return JobReport(
            outcome, exit_code=ended.exit_code, signal=ended.signal, reason=reason, code=code, usage=ended.usage
        )


_SILENT = "the hub was out of reach for longer than the job's patience, so another worker may have the job now"


class _Given(Exception):
    """An end that was decided on while preparing."""

    def __init__(self, outcome: str, reason: str, code: str) -> None:
        super().__init__(reason)
        self.outcome, self.code = outcome, code


@contextlib.contextmanager
def _reasons(code: str, what: str) -> Iterator[None]:
    try:
        yield
    except (DiskFull, BuildStopped):
        raise
    except PotluckError as error:
        raise _Given("failed", f"{what}: {error}", code) from error


def command_of(command: Sequence[str], procs: int, python: Path | None) -> list[str]:
    """The command; for several processes, below torchrun, which gives each its rank."""
    if procs <= 1:
        return list(command)
    run = [str(python or "python"), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={procs}"]
    run += ["--local-addr=127.0.0.1"]  # else they meet at this machine's name, which need not lead to it
    return [*run, "--no-python", *command]


def proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """How this machine reaches the world. A proxy with a password in its address is not for jobs."""
    spelled = [name for proxy in _PROXIES for name in (proxy, proxy.lower())]
    return {name: value for name in spelled if (value := environment.get(name, "")) and "@" not in value}


class Builder:
    """Runs the steps of a build so that nothing of them survives the agent, and strangers' code in the job's sandbox."""

    def __init__(self, lease: JobLease, executor: Executor, folders: Folders, stop: threading.Event) -> None:
        self._lease = lease
        self._executor = executor
        self._folders = folders
        self._stop = stop
        self._number = 0

    def run(self, step: BuildStep, log: Callable[[bytes], None]) -> int:
        """The step's exit code."""
        closed = step.foreign and not self._lease.owns_worker
        executor = self._executor if closed else executors.ALL["process"]
        running = executors.run(executor, self._box(step, closed=closed), on_output=log)
        while (ended := running.wait(_BUILD_LOOK_S)) is None:
            if self._stop.is_set():
                running.end(_BUILD_GRACE_S, "the build was stopped")
        return 127 if ended.exit_code is None else ended.exit_code

    def _box(self, step: BuildStep, *, closed: bool) -> Box:
        """The step starts in the project; of the five folders that a box may write, the build takes those it needs."""
        self._number += 1
        spare = self._folders.root / "build" / str(self._number)
        places = [path for path in step.writable if path != step.cwd] + [spare / name for name in ("a", "b", "c")]
        argv = step.argv
        return Box(
            id=f"{key_of(self._lease.id)[:48]}-b{self._number}",
            argv=argv,
            env=step.env,
            work=step.cwd,
            output=places[0],
            checkpoint=places[1],
            cache=places[2],
            scratch=spare,
            read_only=list(step.readable),
            cpu=self._lease.cpu if closed else 0.0,
            memory_bytes=max(self._lease.memory_bytes, _BUILD_BYTES) if closed else 0,
        )
