"""What does a hostile job try, and which of it works in an executor?

Every attempt is made for real, in boxes of the executor, by a small program. Whatever could hurt is bounded: a fork bomb
of 300, 200 MB of memory, 30 MB of disk. The network is one of the suite's own (a namespace, where the suite may make one)
with a neighbour and the address at which clouds hand out credentials.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from potluck.worker.jobs import executors
from potluck.worker.jobs.box import Box, Ended

ATTEMPTS = {
    "home": "read a key in the owner's home (`~/.ssh`)",
    "credential": "read the agent's credential",
    "other_job": "read another job's folder",
    "write_outside": "write outside the job's folders",
    "see_processes": "see the machine's other processes",
    "trace_agent": "trace the agent (ptrace), read its memory or environment",
    "kill_agent": "kill the agent",
    "become_root": "be root, when the agent is",
    "mount": "mount a file system, when the agent is root",
    "devices": "make a device node for the machine's disk, when the agent is root",
    "kernel_settings": "change settings of the kernel, when the agent is root",
    "engine_socket": "talk to a container engine's socket",
    "localhost_without_network": "reach a service on the machine itself, without `network`",
    "lan_without_network": "reach an address of the LAN, without `network`",
    "metadata_without_network": "reach a cloud's metadata address 169.254.169.254, without `network`",
    "abstract_without_network": "reach an abstract socket of the machine, without `network`",
    "localhost_with_network": "reach a service on the machine's 127.0.0.1, with `network`",
    "lan_with_network": "reach an address of the LAN, with `network`",
    "metadata_with_network": "reach 169.254.169.254, with `network`",
    "abstract_with_network": "reach an abstract socket of the machine, with `network`",
    "fork_bomb": "start more processes than its limit (fork bomb)",
    "memory": "take more memory than its limit",
    "disk": "write more than its disk limit",
    "overtime": "go on past its time limit, deaf to SIGTERM",
    "survive": "leave a process behind: fork, setsid, fork again",
    "survive_agent": "go on after the agent was killed with SIGKILL",
}
NEEDS_ROOT = {"become_root", "mount", "devices", "kernel_settings"}
NETWORK = ("localhost", "lan", "metadata", "abstract")
MARK = "potluck-escape-agent"
LAN = "192.168.177.1"
METADATA = "169.254.169.254"

LOOK_AROUND = """
import ctypes, json, os, socket, stat, sys
facts = json.loads(sys.argv[1])
done = {}

def attempt(name):
    def run(what):
        try:
            done[name] = bool(what())
        except BaseException as error:
            done[name] = False
            print(name, repr(error), file=sys.stderr)
    return run

def reads(path): return "SECRET" in open(path).read()

attempt("home")(lambda: reads(facts["key"]))
attempt("credential")(lambda: reads(facts["credential"]))
attempt("other_job")(lambda: reads(facts["other"]))

@attempt("write_outside")
def _():
    worked = False
    for path in facts["outside"]:
        try:
            open(path, "w").write("x")
            worked = True
        except OSError: pass
    return worked

@attempt("see_processes")
def _():
    for word in os.listdir("/proc"):
        try:
            if word.isdecimal() and facts["mark"] in open(f"/proc/{word}/cmdline").read() and int(word) != os.getpid():
                if "attempt.py" not in open(f"/proc/{word}/cmdline").read(): return True
        except OSError: pass
    return False

@attempt("trace_agent")
def _():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    pid = facts["agent"]
    if libc.ptrace(0x4206, pid, None, None) == 0: return True
    try: return b"SECRET" in open(f"/proc/{pid}/environ", "rb").read()
    except OSError: return False

@attempt("become_root")
def _():
    try: os.setuid(0)
    except OSError: pass
    return os.geteuid() == 0

@attempt("mount")
def _():
    os.makedirs("m", exist_ok=True)
    return ctypes.CDLL(None).mount(b"none", os.path.abspath("m").encode(), b"tmpfs", 0, b"size=64k") == 0

@attempt("devices")
def _():
    os.mknod("disk", 0o600 | stat.S_IFBLK, os.makedev(*facts["disk"]))
    return True

@attempt("kernel_settings")
def _():
    for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/kernel/uevent_helper"):
        try:
            os.close(os.open(path, os.O_WRONLY))
            return True
        except OSError: pass
    return False

def connects(family, address):
    with socket.socket(family) as s:
        s.settimeout(2)
        s.connect(address)
        return True

@attempt("engine_socket")
def _():
    for path in facts["engines"]:
        try:
            if connects(socket.AF_UNIX, path): return True
        except OSError: pass
    return False

for name, (family, *address) in facts["network"].items():
    attempt(name)(lambda: connects(getattr(socket, family), tuple(address) if family == "AF_INET" else "\\0" + address[0]))
print("RESULTS " + json.dumps(done), flush=True)
"""

KILL_AGENT = "import os, sys; os.kill(int(sys.argv[1]), 9)"

FORK_BOMB = """
import os, time
children = 0
try:
    while children < 300:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        children += 1
except OSError: pass
print("RESULTS", children, flush=True)
"""

MEMORY = """
held = []
for _ in range(20):
    held.append(bytearray(b"x") * 10_000_000)
print("RESULTS 1", flush=True)
"""

DISK = """
import os, time
for n in range(10):
    with open(f"big{n}", "wb") as file:
        file.write(os.urandom(3_000_000)); file.flush(); os.fsync(file.fileno())
time.sleep(15)
print("RESULTS 1", flush=True)
"""

OVERTIME = """
import signal, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
time.sleep(15)
print("RESULTS 1", flush=True)
"""

# Holds a lock as long as it lives; twice detached, deaf to every signal that can be ignored.
SURVIVE = """
import fcntl, os, signal, sys, time
lock, stay = sys.argv[1], float(sys.argv[2])
ready, told = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
        os.chdir("/")
        os.environ.clear()
        file = open(lock, "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        null = os.open("/dev/null", os.O_RDWR)
        os.write(told, b"x")
        for number in (0, 1, 2, told): os.dup2(null, number)
        time.sleep(40)
    os._exit(0)
os.read(ready, 1)
print("RESULTS 1", flush=True)
time.sleep(stay)
"""

AGENT = """
import json, sys, time
from pathlib import Path
from potluck.worker.jobs import executors
from potluck.worker.jobs.box import Box
facts = json.loads(sys.argv[1])
executors.found()
paths = {name: Path(facts[name]) for name in ("work", "output", "checkpoint", "cache", "scratch")}
box = Box(id=facts["id"], argv=facts["argv"], env={}, read_only=[Path(p) for p in facts["read_only"]], **paths)
executors.run(executors.ALL[facts["executor"]], box, on_output=lambda b: print(b.decode(), flush=True))
time.sleep(60)
"""


class Suite:
    """The attempts against one executor. `home` is the owner's home, with the agent's folder in it."""

    def __init__(self, executor: executors.Executor, home: Path) -> None:
        self.executor = executor
        self.home = home
        self.python = os.path.realpath(sys.executable)
        self.count = 0
        for name in ("ssh", "potluck", "jobs", "other"):
            (home / name).mkdir(parents=True, exist_ok=True)
        self.secrets = [home / "ssh" / "id_ed25519", home / "potluck" / "token", home / "other" / "model"]
        for path in self.secrets:
            path.write_text("SECRET")
            path.chmod(0o600)
        home.chmod(0o700)

    def box(self, script: str, *words: str, **more: Any) -> Box:
        self.count += 1
        folder = self.home / "jobs" / str(self.count)
        places = {name: folder / name for name in ("work", "output", "checkpoint", "scratch", "cache")}
        for place in places.values():
            place.mkdir(parents=True)
        (places["work"] / "attempt.py").write_text(textwrap.dedent(script))
        box = Box(
            id=f"escape-{os.getpid()}-{self.count}-{self.executor.name}",
            argv=[self.python, "-I", "-S", "attempt.py", *words],
            env={},
            read_only=[Path(sys.base_prefix)],
            pids=256,
            network=False,
            timeout_s=30.0,
            grace_s=0.2,
            **places,
        )
        return replace(box, **more)

    def run(self, box: Box) -> tuple[str, Ended]:
        """What it printed after RESULTS, and how it ended."""
        said: list[bytes] = []
        running = executors.run(self.executor, box, on_output=said.append)
        ended = running.wait(60.0)
        assert ended is not None, f"{box.argv}: it goes on after a minute"
        text = b"".join(said).decode(errors="replace")
        _, found, rest = text.partition("RESULTS ")
        return (rest.splitlines()[0] if found else ""), ended

    # --- attempts

    def look_around(self, neighbours: dict[str, list[Any]], agent: int, *, network: bool) -> dict[str, bool]:
        facts = {
            "key": str(self.secrets[0]),
            "credential": str(self.secrets[1]),
            "other": str(self.secrets[2]),
            "outside": [str(self.home / "ssh" / "authorized_keys"), "/usr/local/potluck-escape", "/etc/potluck-escape"],
            "mark": MARK,
            "agent": agent,
            "disk": disk_numbers(),
            "engines": [str(self.home / "engine.sock"), "/run/podman/podman.sock", "/var/run/docker.sock"],
            "network": neighbours,
        }
        with listener(socket.AF_UNIX, str(self.home / "engine.sock")):
            text, ended = self.run(self.box(LOOK_AROUND, json.dumps(facts), network=network))
        for path in facts["outside"]:
            Path(path).unlink(missing_ok=True)
        for place in self.home.glob("jobs/*/work/m"):
            if os.path.ismount(place):
                subprocess.run(["umount", str(place)], check=True)
        assert text, f"{self.executor.name}: the attempts were not made: {ended}"
        return {name: not worked for name, worked in json.loads(text).items()}

    def kill_agent(self, agent: subprocess.Popen[bytes]) -> bool:
        self.run(self.box(KILL_AGENT, str(agent.pid)))
        return agent.poll() is None

    def fork_bomb(self) -> tuple[bool, Ended]:
        text, ended = self.run(self.box(FORK_BOMB, pids=64))
        return not text or int(text) <= 64, ended

    def memory(self) -> tuple[bool, Ended]:
        text, ended = self.run(self.box(MEMORY, memory_bytes=64_000_000))
        return not text and ended.code == "memory", ended

    def disk(self) -> tuple[bool, Ended]:
        text, ended = self.run(self.box(DISK, disk_bytes=8_000_000))
        return not text and ended.code == "disk", ended

    def overtime(self) -> tuple[bool, Ended]:
        text, ended = self.run(self.box(OVERTIME, timeout_s=0.5))
        return not text and ended.code == "timeout", ended

    def survive(self) -> bool:
        box = self.box(SURVIVE)
        lock = box.output / "lock"
        text, _ = self.run(replace(box, argv=[*box.argv, str(lock), "0"]))
        assert text, f"{self.executor.name}: the daemon was not started"
        return is_free(lock)

    def survive_agent(self) -> bool:
        box = self.box(SURVIVE)
        lock = box.output / "lock"
        paths = {name: str(getattr(box, name)) for name in ("work", "output", "checkpoint", "cache", "scratch")}
        facts = {
            **paths,
            "id": box.id,
            "argv": [*box.argv, str(lock), "40"],
            "read_only": [str(path) for path in box.read_only],
            "executor": self.executor.name,
        }
        agent = subprocess.Popen([sys.executable, "-c", AGENT, json.dumps(facts)], stdout=subprocess.PIPE, text=True)
        assert agent.stdout is not None
        with agent.stdout:
            said = any("RESULTS" in line for line in agent.stdout)
            agent.send_signal(signal.SIGKILL)
            agent.wait()
        assert said, f"{self.executor.name}: the agent's job did not start"
        return until(lambda: is_free(lock), 20.0)


def measure(executor: executors.Executor, home: Path) -> tuple[dict[str, bool], dict[str, str]]:
    """Make every attempt: attempt → whether it was stopped; and the sentences that people read after some of them."""
    suite = Suite(executor, home)
    stopped: dict[str, bool] = {}
    sentences: dict[str, str] = {}
    with an_agent() as agent, neighbourhood() as neighbours:
        for network in (False, True):
            ending = "with_network" if network else "without_network"
            named = {f"{name}_{ending}": address for name, address in neighbours.items()}
            found = suite.look_around(named, agent.pid, network=network)
            for name, was in found.items():
                stopped[name] = stopped.get(name, True) and was
        stopped["kill_agent"] = suite.kill_agent(agent)
    for name in ("fork_bomb", "memory", "disk", "overtime"):
        stopped[name], ended = getattr(suite, name)()
        sentences[name] = ended.reason
    stopped["survive"] = suite.survive()
    stopped["survive_agent"] = suite.survive_agent()
    if not is_root():
        stopped = {name: was for name, was in stopped.items() if name not in NEEDS_ROOT}
    return stopped, sentences


# --- the surroundings


@contextlib.contextmanager
def an_agent() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody to attack, so that it is not the test."""
    code = "import time; time.sleep(120)"
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code, MARK], env={"TOKEN": "SECRET"})
    yield process
    process.kill()
    process.wait()


@contextlib.contextmanager
def listener(family: int, address: Any) -> Iterator[Any]:
    """Whoever connects has reached it: the kernel accepts for us."""
    with socket.socket(family) as ear:
        ear.bind(address)
        ear.listen(16)
        yield ear.getsockname()
    if family == socket.AF_UNIX and not str(address).startswith("\0"):
        os.unlink(address)


@contextlib.contextmanager
def neighbourhood() -> Iterator[dict[str, list[Any]]]:
    """Services that a job should not reach. In this thread's own network namespace if it has one."""
    with contextlib.ExitStack() as stack:
        name = f"potluck-escape-{os.getpid()}-{threading.get_ident()}"
        stack.enter_context(listener(socket.AF_UNIX, f"\0{name}"))
        _, port = stack.enter_context(listener(socket.AF_INET, ("127.0.0.1", 0)))
        found: dict[str, list[Any]] = {"localhost": ["AF_INET", "127.0.0.1", port], "abstract": ["AF_UNIX", name]}
        for key, address in (("lan", LAN), ("metadata", METADATA)):
            with contextlib.suppress(OSError):  # not our own network: there is no such address
                _, port = stack.enter_context(listener(socket.AF_INET, (address, 0)))
                found[key] = ["AF_INET", address, port]
        yield found


def in_own_network(do: Callable[[], None]) -> None:
    """Run `do` in a thread that has a network namespace of its own, with a LAN and a cloud's metadata address."""
    failure: list[BaseException] = []

    def work() -> None:
        try:
            if is_root() and ctypes.CDLL(None).unshare(0x40000000) == 0:  # CLONE_NEWNET, of this thread only
                for words in (*["link set lo up", f"addr add {METADATA}/32 dev lo", f"addr add {LAN}/32 dev lo"],):
                    subprocess.run(["ip", *words.split()], check=False, capture_output=True)
            do()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def disk_numbers() -> tuple[int, int]:
    """Of the disk that / is on, so far as it is one."""
    number = os.stat("/").st_dev
    return os.major(number), os.minor(number)


def is_free(lock: Path) -> bool:
    """Has whoever held it ended?"""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def until(is_so: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def is_root() -> bool:
    return os.geteuid() == 0


# --- the page

STOPS, DOES_NOT = "stopped", "**not stopped**"
BEGIN, END = "<!-- written by scripts/escape_table.py: begin -->", "<!-- end -->"


def table(results: dict[str, dict[str, bool]]) -> str:
    """Executor → attempt → whether it was stopped, for people."""
    names = list(results)
    lines = [f"| What a job tries | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for attempt, words in ATTEMPTS.items():
        cells = [STOPS if results[name][attempt] else DOES_NOT for name in names]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_table(page: str) -> dict[str, dict[str, bool]]:
    """Attempt → executor → whether the page says that it is stopped."""
    _, _, rest = page.partition(BEGIN)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in rest.partition(END)[0].splitlines()
        if line.startswith("|")
    ]
    keys = {words: attempt for attempt, words in ATTEMPTS.items()}
    names = rows[0][1:]
    return {keys[row[0]]: dict(zip(names, (cell == STOPS for cell in row[1:]), strict=True)) for row in rows[2:]}
