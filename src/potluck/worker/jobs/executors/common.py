"""What do all executors have in common: the plan for the shim, the job's user, and how its environment reaches it?

An executor is little more than an argv: the shim starts it, watches it and ends it, whatever it is.

The environment has secrets, so it is on no command line; and it may name LD_PRELOAD or PATH, so it must not be the
environment of the program that builds the sandbox, which still is outside. It goes through stdin, as a script that the
sandbox's own shell reads before it becomes the command.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil

from potluck import settings
from potluck.errors import NotFound
from potluck.worker.jobs import limits
from potluck.worker.jobs.box import Box
from potluck.worker.jobs.limits import Groups
from potluck.worker.jobs.walking import walk

JOB_USER = 64738  # an agent that is root runs jobs as this user, who owns nothing else. No system hands the number out
PROBE_S = 20.0
USUAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READ_ENV_AND_BECOME = 'eval "$(cat)"; exec "$@" </dev/null'
# The first process of a namespace ignores SIGTERM unless it handles it: so that is the shell, and the command its child.
READ_ENV_AND_RUN = 'eval "$(cat)"; "$@" </dev/null; exit $?'

# What a container stops of the attempts of tests/security/escape_kit.py. Who shares the machine's network with a job that
# may use one (bubblewrap, apptainer, and every container of a gang's member) does not stop REACHES_THE_MACHINE.
REACHES_THE_MACHINE = frozenset({"localhost_with_network", "abstract_with_network"})
CONTAINED = REACHES_THE_MACHINE | frozenset(
    {
        *["home", "credential", "other_job", "write_outside", "see_processes", "trace_agent", "kill_agent"],
        *["become_root", "mount", "devices", "kernel_settings", "engine_socket"],
        *["localhost_without_network", "lan_without_network", "metadata_without_network", "abstract_without_network"],
        *["fork_bomb", "memory", "disk", "overtime", "survive", "survive_agent"],
    }
)

# What programs want to find in /etc: libraries' and time's settings and certificates; nobody's password.
ETC = (
    *["alternatives", "ca-certificates", "ca-certificates.conf", "crypto-policies", "fonts", "gai.conf", "host.conf"],
    *["ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "nsswitch.conf", "pki", "protocols"],
    *["services", "ssl", "timezone"],
)


@dataclass(frozen=True)
class Found:
    """An executor and whether it works here."""

    name: str  # podman | docker | apptainer | bubblewrap | process
    works: bool
    reason: str  # why not; or a remark
    version: str = ""


class Executor(ABC):
    """A way of running a command."""

    name: ClassVar[str]
    STOPS: ClassVar[frozenset[str]]  # attempts of tests/security/test_escape.py that fail in it; the suite proves it
    contains: ClassVar[bool] = True  # good enough for other people's code
    takes_images: ClassVar[bool] = False

    @abstractmethod
    def probe(self) -> Found:
        """Does it work here? Tried with something tiny."""

    @abstractmethod
    def plan(self, box: Box, groups: Groups) -> dict[str, Any]:
        """What the shim is told."""

    def prepare(self, box: Box) -> None:
        """Make what the box needs outside. Called before `plan`."""
        for folder in box.writable:
            folder.mkdir(parents=True, exist_ok=True)

    def cleanup(self, id_: str) -> list[list[str]]:
        """Commands that remove what is left of a box whose shim could not."""
        return []

    def pull(self, image: str, *, stop: threading.Event, say: Callable[[str], None]) -> str:
        """Have the image here; returns its digest. `NotFound` with the engine's own words if it cannot be had."""
        raise NotFound(f"{self.name} runs no images: the image {image} needs podman, docker or apptainer")


def shim_plan(
    box: Box,
    groups: Groups,
    *,
    argv: list[str],
    env: dict[str, str],
    cwd: str | None = None,
    feed: str = "",
    join: bool = True,
    nested: bool = False,
    kernel_limits: bool = False,
    rlimits: bool = True,
    term: Sequence[str] = (),
    kill: Sequence[str] = (),
    ask: Sequence[str] = (),
    ask_after: Sequence[int] = (),
    cleanup: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """Everything that the shim wants to know. The shim's own comments say what each is for."""
    return {
        "argv": argv,
        "env": env,
        "cwd": cwd or str(box.work),
        "feed": feed,
        "join": join and groups.works,
        "nested": nested,
        "rlimits": limits.rlimits(box, groups) if rlimits else {"RLIMIT_CORE": 0},
        "watch": limits.watch(box, groups, by_engine=kernel_limits),
        "timeout": box.timeout_s,
        "grace": box.grace_s,
        "fence": None,
        "term": list(term),
        "kill": list(kill),
        "ask": list(ask),
        "ask_after": list(ask_after),
        "cleanup": [list(words) for words in cleanup],
        "remove": [],  # folders of control groups that an engine makes beside ours
        **limits.plan(box, groups),
    }


def exports(env: dict[str, str]) -> str:
    """A script for any POSIX shell."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items()) + ":\n"


def inside_environment(
    box: Box, *, path: str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
) -> dict[str, str]:
    """What a command in a sandbox knows: nothing of the agent's environment, its own on top of the usual."""
    if box.python is not None:
        path = f"{box.python}/bin:{path}"
    usual = {
        "HOME": str(box.scratch / "home"),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": "/tmp",
        "USER": "job",
    }
    if path:
        usual["PATH"] = path
    return {**usual, **box.env}


def outside_environment() -> dict[str, str]:
    """For the program that builds the sandbox: what it needs to find its things, and no secret."""
    names = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR")
    more = ("DBUS_SESSION_BUS_ADDRESS", "DOCKER_HOST", "DOCKER_CONTEXT", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF")
    proxies = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
    return {name: os.environ[name] for name in (*names, *more, *proxies) if name in os.environ}


def visible_gpus(box: Box) -> dict[str, str]:
    """Where devices are not handed out one by one: CUDA is told which it may see. No GPU asked for: none."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, box.gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def job_user() -> tuple[int, int]:
    """Who the job is: never root."""
    return (JOB_USER, JOB_USER) if is_root() else (os.getuid(), os.getgid())


def hand_over(box: Box) -> None:
    """Give the box's folders to the job's user, if that is another one. The shared cache: only its upper two floors."""
    home = box.scratch / "home"
    home.mkdir(exist_ok=True)
    if not is_root():
        return
    user, group = job_user()
    for top in (box.work, box.output, box.checkpoint, box.scratch, box.cache):
        top.chmod(0o755)  # whatever root's umask is: who builds the sandbox enters them without root's rights
    own = [box.work, box.output, box.checkpoint, box.scratch, *([box.resume] if box.resume else [])]
    for top in own:
        # By handle: another build of the same person may be at work below, and put a link in the place of a folder.
        for _, _, names, at in walk(top):
            assert at is not None
            os.fchown(at, user, group)
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.chown(name, user, group, dir_fd=at, follow_symlinks=False)
    below = [Path(entry.path) for entry in os.scandir(box.cache) if entry.is_dir(follow_symlinks=False)]
    for place in [box.cache, *below]:
        os.chown(place, user, group, follow_symlinks=False)


def tmp_bytes(box: Box) -> int:
    """How much /tmp may hold. It is memory, and counts as the job's."""
    return box.memory_bytes or int(psutil.virtual_memory().total) // 4


def binds(box: Box) -> list[tuple[Path, bool]]:
    """(path, may be written), outer folders before inner ones. What lies below /usr is there anyway."""
    writable = dict.fromkeys(box.writable, True)
    readable: dict[Path, bool] = {}
    for path in box.readable:
        for place in (path, path.resolve()):
            if place.exists() and place not in writable and Path("/usr") not in (place, *place.parents):
                readable[place] = False
    return sorted({**readable, **writable}.items(), key=lambda item: (len(item[0].parts), str(item[0])))


def parents_of(paths: Sequence[Path]) -> list[Path]:
    """The folders above, outermost first, without those that lie in one of the paths themselves."""
    found = {parent for path in paths for parent in path.parents if len(parent.parts) > 1}
    apart = [parent for parent in found if not any(path == parent or path in parent.parents for path in paths)]
    return sorted(apart, key=lambda path: (len(path.parts), str(path)))


def links_of_root() -> list[tuple[str, str]]:
    """/bin, /lib … as links into /usr, as this system has them."""
    found = []
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if Path("/", name).is_symlink():
            found.append((name, os.readlink(f"/{name}").lstrip("/")))
    return found


def folders_of_root() -> list[str]:
    """/bin, /lib … of a system that has not merged them with /usr."""
    names = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
    return [f"/{name}" for name in names if Path("/", name).is_dir() and not Path("/", name).is_symlink()]


def own_folder() -> Path:
    """For files that the executors themselves need."""
    folder = settings.cache_dir() / "executors"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def own_file(name: str, text: str) -> Path:
    """A file of ours that every user may read, written once."""
    path = own_folder() / name
    with contextlib.suppress(OSError):
        if path.read_text() == text:
            return path
    part = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}")
    part.write_text(text)
    part.chmod(0o644)
    part.replace(path)
    return path


def passwd() -> tuple[Path, Path]:
    """/etc/passwd and /etc/group of a sandbox: programs ask them for the name of their user."""
    user, group = job_user()
    users = f"root:x:0:0:root:/:/usr/sbin/nologin\njob:x:{user}:{group}:job:/tmp:/bin/sh\n"
    return own_file("passwd", users), own_file("group", f"root:x:0:\njob:x:{group}:\n")


def hosts(hostname: str, *, network: bool) -> Path:
    """/etc/hosts of a sandbox. Programs look their own machine's name up; torch.distributed waits until it is found."""
    known = ""
    if network:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            known = Path("/etc/hosts").read_text()
    text = f"{known.rstrip()}\n127.0.0.1 localhost {hostname}\n::1 localhost\n".lstrip()
    return own_file("hosts" if network else "hosts-alone", text)


def try_out(argv: list[str], *, feed: str = "", env: dict[str, str] | None = None) -> tuple[bool, str]:
    """Run something tiny: did it go well, and what did it say?"""
    try:
        done = subprocess.run(
            argv,
            input=feed,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_S,
            env=env if env is not None else outside_environment(),
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError:
        return False, f"{argv[0]} is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"{argv[0]}: {error}"
    if done.returncode == 0:
        return True, done.stdout.strip()
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return False, (said[-1] if said else f"{argv[0]} ended with exit code {done.returncode}")[:300]


@functools.cache
def system() -> str:
    return "linux" if sys.platform.startswith("linux") else platform.system().lower()
