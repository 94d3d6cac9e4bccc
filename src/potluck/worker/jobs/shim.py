"""How does nothing of a job survive its end, or its agent's?

A small process between the agent and a command, run as a file by a bare interpreter (`python -I -S shim.py`), standard
library and below.py only. It has three pipes to the agent:

    stdin     the plan, one line of JSON; then lines: "renew <seconds>", "end <grace>", "kill"
    stdout    what happened, lines of JSON: {"started": pid} or {"failed": text}; at the end {"exit": …}
    stderr    what the command prints on either of its own

It is the reaper of everything below it (PR_SET_CHILD_SUBREAPER): a process that detaches itself from its parents with
fork and setsid becomes a child of the shim, and stays in its control group. So at the end, whatever ended the command,
all that is left is found and killed. The end comes

    by itself                  the command left
    from the agent             "end": SIGTERM, grace, SIGKILL
    with the agent             stdin is at its end, because the agent was killed: at once
    in spite of the agent      the deadline that "renew" pushes has passed, because the agent is frozen or cut off
    by a limit                 of time, disk, processes or memory

Should the shim itself be killed, then the command is by the kernel (PR_SET_PDEATHSIG), and the agent sweeps.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from typing import Any

# Potluck's own folder comes last: a bare interpreter knows the standard library only, and that goes first.
sys.path.append(os.path.dirname(os.path.abspath(__file__)).removesuffix(os.path.join("potluck", "worker", "jobs")))

from potluck.worker.jobs.below import LINUX, DiskWatch, Groups, descendants, in_charge, resident, send, write

MOMENT_S = 2.0  # for a script to go on by itself when its program has handled SIGTERM
LOOK_S = 0.25  # between two looks at memory and processes, where no control group watches them
KILL_S = 15.0  # how long to try; a process that hangs in the kernel outlives even SIGKILL


def clock() -> float:
    """Goes on while the machine sleeps: a lease lapses meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if LINUX else time.monotonic()


# --- the life of one command ----------------------------------------------------------------------------------------


class Shim:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.groups = Groups(plan)
        self.disk = DiskWatch(plan["watch"])
        self.child = 0
        self.status: int | None = None  # of the child, as wait() gives it
        self.why = ""  # ended | killed | orphaned | fenced | timeout | memory | disk | full | pids
        self.peak = 0
        self.left = 0  # processes that the command left behind
        self.started = clock()
        self._kill_at: float | None = None
        self._asked: set[int] | None = None  # programs that handle SIGTERM: they had it first
        self._told: set[int] = set()  # they, and shells with a trap
        self._rest_at: float | None = None  # when all others get theirs
        self._all_told = False
        self._fence: float | None = None
        self._next_look = 0.0
        self._parent = os.getppid()

    # --- beginning

    def start(self, wake: int) -> None:
        self.groups.make()
        feed: str = self.plan["feed"]
        stdin, feeding = os.pipe() if feed else (os.open(os.devnull, os.O_RDONLY), -1)
        problem, theirs = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            self._become(stdin, theirs)
        os.close(theirs)
        os.close(stdin)
        with os.fdopen(problem, errors="replace") as lines:
            text = lines.read()
        if text:
            os.waitpid(self.child, 0)
            raise OSError(text)
        if feed:
            # From a thread: a command that never reads must not hold us up.
            threading.Thread(target=_feed, args=(feeding, feed.encode()), daemon=True).start()
        self.started = clock()
        if self.plan["fence"] is not None:
            self._fence = self.started + self.plan["fence"]
        self.disk.start()

    def _become(self, stdin: int, problem: int) -> None:
        """In the child: never returns."""
        try:
            parent = os.getppid()
            os.setsid()
            if LINUX:
                prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with us, however we end
                if os.getppid() != parent:
                    os._exit(127)
                with contextlib.suppress(OSError):
                    write("/proc/self/oom_score_adj", "500")  # when memory runs out: rather the job than its agent
            if self.plan["join"]:
                self.groups.join()
            for name, value in self.plan["rlimits"].items():
                bound = getattr(resource, name, None)
                if bound is not None:
                    _, hard = resource.getrlimit(bound)
                    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
                    resource.setrlimit(bound, (most, most))
            for deaf in ("SIGPIPE", "SIGXFSZ", "SIGCHLD", "SIGTERM", "SIGHUP", "SIGINT"):
                signal.signal(getattr(signal, deaf), signal.SIG_DFL)
            os.dup2(stdin, 0)
            os.dup2(2, 1)
            os.chdir(self.plan["cwd"])
            os.execvpe(self.plan["argv"][0], self.plan["argv"], self.plan["env"])
        except OSError as error:
            os.write(problem, f"{error.errno}".encode())
        except BaseException as error:  # noqa: BLE001 - nothing may return into the parent's code
            os.write(problem, repr(error).encode())
        os._exit(127)

    # --- what happens

    def hear(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "renew":
            self._fence = clock() + float(rest)
        elif word == "end":
            self.end("ended", float(rest))
        elif word == "kill":
            self.end("killed", 0.0)

    def end(self, why: str, grace_s: float) -> None:
        """SIGTERM now, SIGKILL after the grace. A second word can only make it sooner."""
        self.why = self.why or why
        due = clock() + grace_s
        if self._kill_at is None and grace_s > 0:
            self.terminate()
        self._kill_at = due if self._kill_at is None else min(due, self._kill_at)

    def tick(self) -> None:
        """Is it time for something?"""
        now = clock()
        timeout = self.plan["timeout"]
        if os.getppid() != self._parent:
            self.end("orphaned", 0.0)
        if self._fence is not None and now > self._fence:
            self.end("fenced", 0.0)
        if timeout is not None and not self.why and now > self.started + timeout:
            self.end("timeout", self.plan["grace"])
        if self.disk.over:
            self.end(self.disk.over, min(2.0, self.plan["grace"]))
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._look()
        if self._kill_at is not None and now >= self._kill_at and self.status is None:
            self.kill_job()

    def _look(self) -> None:
        watch = self.plan["watch"]
        if self._kill_at is not None:
            self.terminate()
        if not watch["memory"] and not watch["pids"]:
            return
        pids = [process.pid for process in descendants(os.getpid()) if not process.zombie]
        used = resident(pids, watch["memory"])
        self.peak = max(self.peak, used)
        if watch["memory"] and used > watch["memory"]:
            self.end("memory", 0.0)
        if watch["pids"] and len(pids) > watch["pids"]:
            self.end("pids", 0.0)

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                self.status = status

    def patience(self) -> float:
        dues = [1.0]
        if self._kill_at is not None:
            dues.append(self._kill_at - clock())
            dues += [] if self._all_told else [LOOK_S]
        if self._fence is not None:
            dues.append(self._fence - clock())
        if self.plan["timeout"] is not None and not self.why:
            dues.append(self.started + self.plan["timeout"] - clock())
        watch = self.plan["watch"]
        if watch["memory"] or watch["pids"] or watch["folders"]:
            dues.append(LOOK_S)
        return max(0.0, min(dues)) + 0.001

    # --- ending

    def terminate(self) -> None:
        """SIGTERM to each process once, in two steps. Called again and again: the second waits for the first.

        First to the programs that handle it, not to what these have started: a data loader's process must not die under
        a training that saves. To shells with a trap, too, which run it when their program has ended. When the programs
        have ended, at once if there are none, to all the rest: they would have died of it and taken those who save along.
        """
        if self._all_told:
            return
        if self.plan["term"]:
            self._all_told = True
            spawn(self.plan["term"], self.plan["env"])
            return
        now = clock()
        nested = self.plan["nested"]
        below = [one for one in descendants(os.getpid(), closely=True) if not one.zombie and one.nested == nested]
        if self._asked is None:
            self._asked = in_charge(below)
            self._told = self._asked | {one.pid for one in below if one.has_trap}
            for pid in self._told:
                send(pid, signal.SIGTERM)
        if self._rest_at is None and not any(one.pid in self._asked for one in below):
            self._rest_at = now + (MOMENT_S if self._asked else 0.0)
        if self._rest_at is not None and now >= self._rest_at:
            self._all_told = True
            for one in below:
                if one.pid not in self._told:
                    send(one.pid, signal.SIGTERM)

    def kill_job(self) -> None:
        """A sandbox ends when what is inside does, and tidies up then. If not, `sweep` takes it down too."""
        if self.plan["nested"] or self.plan["term"]:
            if self.plan["term"]:
                spawn(self.plan["kill"], self.plan["env"])
            until = clock() + 5.0
            while self.status is None and clock() < until:
                for process in descendants(os.getpid(), closely=True):
                    if process.nested:
                        send(process.pid, signal.SIGKILL)
                time.sleep(0.02)
                self.reap()
        if self.status is None:
            self.sweep()

    def sweep(self) -> list[int]:
        """Kill all that is below us or in our groups. Returns who would not die."""
        until = clock() + KILL_S
        stopped: set[int] = set()
        while True:
            self.reap()
            alive = {process.pid for process in descendants(os.getpid()) if not process.zombie}
            alive |= set(self.groups.members())
            if not alive or clock() > until:
                return sorted(alive)
            self.groups.stop_forking()
            # First nobody moves: else a fork bomb has a new child for each that dies.
            for pid in alive - stopped:
                send(pid, signal.SIGSTOP)
            fresh = alive - stopped
            stopped |= fresh
            if fresh and not self.groups.folders and len(stopped) < 20_000:
                continue
            for pid in alive:
                send(pid, signal.SIGKILL)
            time.sleep(0.005)

    def finish(self) -> dict[str, Any]:
        left = [process for process in descendants(os.getpid()) if not process.zombie]
        if self.plan["nested"]:
            self._let_helpers_leave()
        else:
            self.left = len(left)
        survivors = self.sweep()
        wall = clock() - self.started
        status = self.status if self.status is not None else 9
        code = os.waitstatus_to_exitcode(status)
        told = None  # nobody was asked
        if (128 + -code if code < 0 else code) in self.plan["ask_after"]:
            told = ask(self.plan["ask"], self.plan["env"])
        for argv in self.plan["cleanup"]:
            ask(argv, self.plan["env"])
        below = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s, peak = below.ru_utime + below.ru_stime, below.ru_maxrss * (1024 if LINUX else 1)
        if self.plan["ask"]:
            cpu_s, peak = 0.0, 0  # an engine's client's, not the command's: unknown is better than wrong
        if self.plan["watch"]["disk"]:
            self.disk.look()
        result = {
            "exit": code,
            "why": self.why,
            "told": told,
            "left": self.left,
            "survivors": survivors,
            "wall_s": round(wall, 3),
            "cpu_s": round(self.groups.figure("cpu_ns") / 1e9 or cpu_s, 3),
            "peak": self.groups.figure("peak") or max(self.peak, peak),
            "oom": self.groups.figure("oom"),
            "added": self.disk.added,
        }
        self.groups.remove()
        return result

    def _let_helpers_leave(self) -> None:
        """A container runtime takes its networks and mounts down after the command's end; killed, it would leave them."""
        until = clock() + 5.0
        while clock() < until and any(not process.zombie for process in descendants(os.getpid())):
            time.sleep(0.01)
            self.reap()


def _feed(handle: int, text: bytes) -> None:
    with contextlib.suppress(OSError), os.fdopen(handle, "wb") as pipe:
        pipe.write(text)


def spawn(argv: list[str], env: dict[str, str]) -> int:
    """Start a helper of a container runtime, silently. It is reaped with all others."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        return os.posix_spawnp(argv[0], argv, env, file_actions=[(os.POSIX_SPAWN_DUP2, null, n) for n in (0, 1, 2)])
    except OSError:
        return 0
    finally:
        os.close(null)


def ask(argv: list[str], env: dict[str, str]) -> str:
    """Run a helper to its end, for at most 20 seconds, and return what it printed."""
    if not argv:
        return ""
    ours, theirs = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, theirs, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
    try:
        pid = os.posix_spawnp(argv[0], argv, env, file_actions=actions)
    except OSError:
        os.close(ours)
        return ""
    finally:
        os.close(theirs)
        os.close(null)
    said = b""
    until = clock() + 20.0
    while clock() < until and select.select([ours], [], [], max(0.0, until - clock()))[0]:
        piece = os.read(ours, 65536)
        if not piece:
            break
        said += piece
    else:
        send(pid, signal.SIGKILL)
    os.close(ours)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    return said.decode(errors="replace").strip()[:2000]


def prctl(option: int, value: int) -> None:
    """Ask the kernel; a kernel that does not know the option goes without."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def tell(message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the agent is gone: nobody wants to know
        os.write(1, json.dumps(message).encode() + b"\n")


def main() -> int:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    if LINUX:
        prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    asked_to_end = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: asked_to_end.append(1))  # the machine shuts down

    buffer = b""
    while b"\n" not in buffer:
        piece = os.read(0, 1 << 20)
        if not piece:
            return 1  # the agent died before it could say what to do
        buffer += piece
    first, _, buffer = buffer.partition(b"\n")
    shim = Shim(json.loads(first))
    try:
        shim.start(wake)
    except OSError as error:
        shim.groups.remove()
        code = int(str(error)) if str(error).isdecimal() else error.errno
        text = os.strerror(code) if code else str(error)
        tell({"failed": text, "missing": code == errno.ENOENT, "forbidden": code == errno.EACCES})
        return 1
    tell({"started": shim.child})

    ears = [0, woken]
    while shim.status is None:
        ready, _, _ = select.select(ears, [], [], shim.patience())
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        if 0 in ready:
            piece = os.read(0, 65536)
            if not piece:
                ears.remove(0)
                shim.end("orphaned", 0.0)
            buffer += piece
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                shim.hear(line.decode())
        if asked_to_end:
            shim.end("ended", min(10.0, shim.plan["grace"]))
        shim.reap()
        if shim.status is None:
            shim.tick()
    tell(shim.finish())
    return 0


if __name__ == "__main__":
    sys.exit(main())
