"""How do we try Potluck as it really runs: a hub, PostgreSQL and workers, each a process of its own, killed for real?

    with LocalCluster(folder) as cluster:
        cluster.add_worker("ann", share=0.5)
        run = cluster.train("dcgan", data, samples=2000)
        cluster.play(run, FaultPlan().kill("ann", at=Version(2)).freeze("bob", at=Version(3), seconds=20))
        cluster.until(lambda: cluster.hub.run(run).state == "done", timeout_s=120)

Waiting is always for a condition. Only processes that the cluster started are ever signalled, by their ids.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from potluck.client import Hub, project
from potluck.domain.job import ENDED, JobSpec
from potluck.errors import PotluckError, TimedOut
from potluck.protocol import Blob, Fates, GangRequest, GangView, InviteRequest, JobRequest, JobView, RunView


@dataclass(frozen=True)
class Version:
    """When the run has reached this version."""

    number: int


@dataclass(frozen=True)
class Samples:
    """When the run has applied so many samples."""

    count: int


@dataclass(frozen=True)
class Fault:
    action: str  # kill | freeze | kill_child | kill_hub | kill_postgres | add_worker
    target: str
    at: Version | Samples
    seconds: float = 0.0


@dataclass(frozen=True)
class FaultPlan:
    """What goes wrong, and when. Plans are values: every method returns a longer one."""

    faults: tuple[Fault, ...] = ()

    def _and(self, action: str, target: str, at: Version | Samples, seconds: float = 0.0) -> FaultPlan:
        return FaultPlan((*self.faults, Fault(action, target, at, seconds)))

    def kill(self, worker: str, *, at: Version | Samples) -> FaultPlan:
        """SIGKILL for the worker's agent (its child dies with it)."""
        return self._and("kill", worker, at)

    def kill_child(self, worker: str, *, at: Version | Samples) -> FaultPlan:
        """SIGKILL for the training child only; its agent lives."""
        return self._and("kill_child", worker, at)

    def freeze(self, worker: str, *, at: Version | Samples, seconds: float) -> FaultPlan:
        """SIGSTOP for the agent and its children, SIGCONT after `seconds`."""
        return self._and("freeze", worker, at, seconds)

    def kill_hub(self, *, at: Version | Samples, seconds: float = 0.0) -> FaultPlan:
        """SIGKILL for the hub; it is started again after `seconds`."""
        return self._and("kill_hub", "hub", at, seconds)

    def kill_postgres(self, *, at: Version | Samples) -> FaultPlan:
        """SIGKILL for the embedded PostgreSQL's first process."""
        return self._and("kill_postgres", "hub", at)

    def add_worker(self, worker: str, *, at: Version | Samples) -> FaultPlan:
        return self._and("add_worker", worker, at)


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    log: Path
    arguments: list[str] = field(default_factory=list)


class LocalCluster:
    """One hub and its workers on this machine, below one folder. Everything is stopped at the end."""

    def __init__(
        self,
        folder: Path,
        *,
        database: str = "",
        house_worker: bool = True,
        port: int = 0,
        bind: str = "127.0.0.1",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.data_dir = folder / "hub"
        self.processes: dict[str, _Process] = {}
        self._host = ["host", "--data-dir", str(self.data_dir), "--bind", bind]
        self._host += ["--database", database] if database else []
        self._host += [] if house_worker else ["--no-house-worker"]
        self.port = port
        self.environment = {
            **os.environ,
            "POTLUCK_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "POTLUCK_THREADS": "1",
            "NO_COLOR": "1",
            **(environment or {}),
        }
        self._hub: Hub | None = None
        self._token = ""

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start_hub()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    # --- hub ----------------------------------------------------------------------------------------------------

    @property
    def hub(self) -> Hub:
        """A client with the admin's credential."""
        assert self._hub is not None, "the cluster is not started"
        return self._hub

    def start_hub(self) -> None:
        """Start it, or start it again on the same port, and wait until it is ready."""
        note = self.data_dir / "hub.json"
        if not self.port and note.exists():
            self.port = int(json.loads(note.read_text())["address"].rpartition(":")[2])
        note.unlink(missing_ok=True)
        self.spawn("hub", [*self._host, "--port", str(self.port)])
        self.until(note.exists, timeout_s=90, what="the hub's hub.json")
        facts = json.loads(note.read_text())
        self.port = int(facts["address"].rpartition(":")[2])
        self._token = facts["admin_token"]
        self._hub = Hub(facts["address"], facts["admin_token"], facts["fingerprint"])

    @property
    def admin_environment(self) -> dict[str, str]:
        """For a `potluck` command of the admin's."""
        return {**self.environment, "POTLUCK_HUB": self.hub.address, "POTLUCK_TOKEN": self._token}

    def kill_hub(self) -> None:
        """SIGKILL, and nothing else: PostgreSQL and the house worker live on."""
        self._signal("hub", signal.SIGKILL)

    def kill_postgres(self) -> None:
        """SIGKILL for the postmaster of this cluster's own data folder."""
        pids = list((self.data_dir).rglob("postmaster.pid"))
        place = self.data_dir / "ledger" / "place.json"
        if not pids and place.exists():
            home = json.loads(place.read_text()).get("home", "")
            pids = list(Path(home).rglob("postmaster.pid")) if home else []
        os.kill(int(pids[0].read_text().splitlines()[0]), signal.SIGKILL)

    # --- workers ------------------------------------------------------------------------------------------------

    def add_worker(
        self, name: str, *, share: float = 1.0, arguments: tuple[str, ...] = (), inside: tuple[str, ...] = ()
    ) -> None:
        """Join a worker by a fresh link, as a person would. `inside`: the command that runs it (`ip netns exec …`)."""
        link = self.hub.invite(InviteRequest("worker", uses=1)).url
        home = self.folder / "workers" / name
        self.spawn(
            name,
            ["join", link, "--name", name, "--home", str(home), "--share", f"{share:.0%}", "--no-screen", *arguments],
            inside=inside,
        )

    def come_back(self, name: str, *arguments: str) -> None:
        """Start a worker that was here before again, in its old folder."""
        self.spawn(name, ["join", "--home", str(self.folder / "workers" / name), "--no-screen", *arguments])

    def interrupt(self, name: str) -> None:
        """Ctrl-C."""
        self._signal(name, signal.SIGINT)

    def kill(self, name: str) -> None:
        self._signal(name, signal.SIGKILL)

    def freeze(self, name: str) -> None:
        for pid in self._family(name):
            os.kill(pid, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        for pid in self._family(name):
            os.kill(pid, signal.SIGCONT)

    def kill_child(self, name: str) -> None:
        """SIGKILL for the training children of a worker (or of `house`)."""
        for child in self._children(name):
            child.kill()

    def exit_code(self, name: str) -> int | None:
        return self.processes[name].popen.poll()

    def log(self, name: str) -> str:
        return self.processes[name].log.read_text(errors="replace")

    def house_pid(self) -> int:
        """The house worker's agent, whichever hub started it."""
        home = str(self.data_dir / "house")
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if home in line and "join" in line:
                return process.pid
        raise PotluckError("no house worker runs")

    def _children(self, name: str) -> list[psutil.Process]:
        pid = self.house_pid() if name == "house" else self.processes[name].popen.pid
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).children(recursive=True)
        return []

    def _family(self, name: str) -> list[int]:
        pid = self.house_pid() if name == "house" else self.processes[name].popen.pid
        return [pid, *(child.pid for child in self._children(name))]

    def _signal(self, name: str, number: int) -> None:
        process = self.processes[name].popen
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait(10)

    # --- runs ---------------------------------------------------------------------------------------------------

    def run_cli(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """A `potluck` command against this hub."""
        return subprocess.run(
            [sys.executable, "-m", "potluck.cli", *arguments],
            env=self.admin_environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )

    def train(self, recipe: str, data: str, *arguments: str) -> str:
        """Start a run and return its id."""
        done = self.run_cli("train", recipe, "--data", data, "--detach", "--json", *arguments)
        if done.returncode:
            raise PotluckError(f"potluck train: exit {done.returncode}: {done.stderr[-2000:]}")
        return str(json.loads(done.stdout)["id"])

    def view(self, run: str) -> RunView:
        return self.hub.run(run)

    def fates(self, run: str) -> Fates:
        return self.hub.run(run).fates

    # --- jobs ---------------------------------------------------------------------------------------------------

    def submit(self, spec: JobSpec, files: dict[str, str] | None = None) -> str:
        """Submit a job with these files (path: text) as its project; its id."""
        return self.hub.submit(JobRequest(spec, self._project(files or {}))).id

    def _project(self, files: dict[str, str]) -> Blob:
        folder = self.folder / "projects" / f"{len(list(self.folder.glob('projects/*')))}"
        folder.mkdir(parents=True)
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        return self.hub.upload_tree(folder, project.pack(folder))

    def job(self, ref: str) -> JobView:
        return self.hub.job(ref)

    def job_ends(self, ref: str, *, timeout_s: float = 120) -> JobView:
        """The job, once it has ended."""
        self.until(lambda: self.job(ref).state in ENDED, timeout_s=timeout_s, what=f"the end of {ref}")
        return self.job(ref)

    def job_is(self, ref: str, state: str, *, timeout_s: float = 60) -> JobView:
        """The job, once it is in `state`."""
        self.until(lambda: self.job(ref).state == state, timeout_s=timeout_s, what=f"{ref} to be {state}")
        return self.job(ref)

    def output(self, ref: str, *, attempt: int = 0) -> str:
        """Everything that an attempt has written so far (0: the newest)."""
        text, offset = "", 0
        while (piece := self.hub.log(ref, attempt=attempt, offset=offset)).next_offset > offset:
            text, offset = text + piece.text, piece.next_offset
        return text

    # --- gangs --------------------------------------------------------------------------------------------------

    def gang(self, spec: JobSpec, files: dict[str, str] | None = None) -> str:
        """Submit a gang (`spec.gang` says how many machines) with these files as its project; its id.

        The retries are the spec's: a `potluck run --gang` asks for those of `GANG_USUAL`.
        """
        return self.hub.submit_gang(GangRequest(spec, self._project(files or {}))).id

    def gang_is(self, ref: str, state: str, *, timeout_s: float = 90) -> GangView:
        """The gang, once it is in `state`."""
        self.until(lambda: self.hub.gang(ref).state == state, timeout_s=timeout_s, what=f"{ref} to be {state}")
        return self.hub.gang(ref)

    def gang_has(self, ref: str, members: int, *, state: str = "running", timeout_s: float = 90) -> GangView:
        """The gang, once so many of its members are in `state`."""
        self.until(
            lambda: sum(member.state == state for member in self.hub.gang(ref).members) >= members,
            timeout_s=timeout_s,
            what=f"{members} members of {ref} to be {state}",
        )
        return self.hub.gang(ref)

    def gang_ends(self, ref: str, *, timeout_s: float = 180) -> GangView:
        """The gang, once it has ended."""
        self.until(lambda: self.hub.gang(ref).state in ENDED, timeout_s=timeout_s, what=f"the end of {ref}")
        return self.hub.gang(ref)

    def gang_output(self, ref: str) -> dict[int, str]:
        """What each member's newest attempt has written so far, by the member's number."""
        members = [member for member in self.hub.gang(ref).members if member.worker]
        return {member.member: self.output(member.job) for member in members}

    # --- faults -------------------------------------------------------------------------------------------------

    def play(self, run: str, plan: FaultPlan) -> threading.Thread:
        """Carry a plan out in the background. Join the thread to know that everything in it has happened."""
        thread = threading.Thread(target=self._play, args=(run, plan), daemon=True)
        thread.start()
        return thread

    def _play(self, run: str, plan: FaultPlan) -> None:
        for fault in plan.faults:
            self.until(lambda at=fault.at: self._reached(run, at), timeout_s=300, what=f"{fault.at}")  # type: ignore[misc]
            match fault.action:
                case "kill":
                    self.kill(fault.target)
                case "kill_child":
                    self.kill_child(fault.target)
                case "freeze":
                    self.freeze(fault.target)
                    time.sleep(fault.seconds)  # the fault itself, not a wait for something
                    self.thaw(fault.target)
                case "kill_hub":
                    self.kill_hub()
                    time.sleep(fault.seconds)
                    self.start_hub()
                case "kill_postgres":
                    self.kill_postgres()
                case "add_worker":
                    self.add_worker(fault.target)

    def _reached(self, run: str, at: Version | Samples) -> bool:
        try:
            view = self.hub.run(run)
        except PotluckError:
            return False
        if view.state in ("done", "failed", "stopped"):
            return True
        if isinstance(at, Version):
            return view.version >= at.number
        return view.fates.applied + view.fates.late >= at.count

    # --- plumbing -----------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], bool], *, timeout_s: float, what: str = "the condition") -> None:
        """Wait for a condition; a hub that is away counts as not yet."""
        end = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(PotluckError):
                if condition():
                    return
            if time.monotonic() > end:
                raise TimedOut(f"waited {timeout_s:g} s for {what}\n{self.tails()}")
            dead = self.processes.get("hub")
            if what.endswith("hub.json") and dead is not None and dead.popen.poll() is not None:
                raise PotluckError(f"the hub ended with code {dead.popen.returncode}\n{self.tails()}")
            time.sleep(0.1)

    def tails(self) -> str:
        """The ends of all logs, for a test that failed."""
        logs = sorted(self.folder.rglob("*.log"))
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def spawn(self, name: str, arguments: list[str], *, inside: tuple[str, ...] = ()) -> None:
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            popen = subprocess.Popen(
                [*inside, sys.executable, "-m", "potluck.cli", *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.processes[name] = _Process(popen, log, arguments)

    def stop(self) -> None:
        """Workers first, by Ctrl-C, then the hub; whoever does not go is killed. PostgreSQL stops with the hub."""
        if self._hub is not None:
            self._hub.close()
        with contextlib.suppress(Exception):
            self._end(psutil.Process(self.house_pid()))
        for name in [*(name for name in self.processes if name != "hub"), "hub"]:
            if name in self.processes and self.processes[name].popen.poll() is None:
                self._end(psutil.Process(self.processes[name].popen.pid))
        self._stop_postgres()

    def _end(self, process: psutil.Process) -> None:
        children = process.children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in (process, *children):
                each.resume()
            process.terminate()
        _, alive = psutil.wait_procs([process], timeout=15)
        for each in [*alive, *children]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    def _stop_postgres(self) -> None:
        """A hub that was killed leaves its PostgreSQL behind."""
        from potluck.hub.postgres import EmbeddedPostgres

        place = self.data_dir / "ledger" / "place.json"
        if not place.exists():
            return
        with contextlib.suppress(PotluckError):
            EmbeddedPostgres(self.data_dir / "ledger").stop()
        home = Path(json.loads(place.read_text()).get("home", ""))
        if home.is_absolute() and not home.is_relative_to(self.folder):
            shutil.rmtree(home, ignore_errors=True)  # root's server could not reach our closed folder
