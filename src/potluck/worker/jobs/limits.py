"""Can this machine's kernel hold a command to its limits, and how is that written down for it?

Control groups do it where this process may make some: as root, or below a group that was given to its user (version 2).
Version 2 is one tree; in version 1 each controller has its own, and the limits are spread over them. Where there are
none, the shim looks at the processes four times a second and ends what is too big: honest, but a quarter of a second
late; and the number of processes is bounded for the user (RLIMIT_NPROC), not for the job.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.worker.jobs.box import Box

MOUNT = Path("/sys/fs/cgroup")
NEEDED = ("memory", "pids")
PERIOD_US = 100_000
PREFIX = "potluck-"
FLOOR_BYTES = 256_000_000  # what must stay free on the disk: for the machine's owner, and for the job's own outputs


@dataclass(frozen=True)
class Groups:
    """Where groups can be made: the folder of each controller. In version 2 it is one folder for all."""

    version: int  # 1 | 2; 0: nowhere
    folders: dict[str, str]
    reason: str  # a sentence: where, or why nowhere

    @property
    def works(self) -> bool:
        return self.version > 0


@functools.cache
def here() -> Groups:
    """This machine's, found out once, by moving a process into a group that is made for it."""
    return detect()


def detect(mount: Path = MOUNT, own: str | None = None, *, try_it: bool = True) -> Groups:
    """Where may this process make groups? `own` is what /proc/self/cgroup says."""
    if sys.platform != "linux":
        return Groups(0, {}, "control groups are a thing of Linux: limits are watched, not enforced by the kernel")
    if own is None:
        with contextlib.suppress(OSError):
            own = Path("/proc/self/cgroup").read_text()
    paths = _own_paths(own or "")
    for groups in (_second(mount, paths.get("", "/")), _first(mount, paths)):
        if groups is not None and (not try_it or _moves(groups)):
            return groups
    who = "as root in a container without them" if _is_root() else f"for user {os.getuid()}"
    return Groups(
        0,
        {},
        f"no control group can be made here {who}: limits are watched four times a second instead "
        "(a systemd service with Delegate=yes gives its user some)",
    )


def plan(box: Box, groups: Groups) -> dict[str, Any]:
    """The part of the shim's plan that is about control groups: which to make, what to write, what to read after."""
    if not groups.works:
        return {"groups": [], "figures": {}}
    folders = {controller: f"{folder}/{PREFIX}{box.id}" for controller, folder in groups.folders.items()}
    writes: dict[str, list[tuple[str, str, bool]]] = {folder: [] for folder in folders.values()}
    for controller, entry in _entries(box, groups.version):
        if controller in folders:
            writes[folders[controller]].append(entry)
    return {
        "groups": [{"folder": folder, "write": entries} for folder, entries in writes.items()],
        "figures": _figures(folders, groups.version),
    }


def watch(box: Box, groups: Groups, *, by_engine: bool = False) -> dict[str, Any]:
    """The part of the shim's plan that is about what it watches itself."""
    kernel = groups.works or by_engine
    folders = [box.work, box.output, box.checkpoint, box.scratch]
    return {
        "memory": 0 if kernel else box.memory_bytes,
        "pids": 0 if kernel else box.pids,
        "disk": box.disk_bytes,
        "folders": [str(folder) for folder in folders],
        "floor": FLOOR_BYTES,
    }


def rlimits(box: Box, groups: Groups) -> dict[str, int]:
    """What each of its processes is bound to."""
    bounds = {"RLIMIT_CORE": 0}  # a core file holds secrets, and may be as big as the memory
    if box.disk_bytes:
        bounds["RLIMIT_FSIZE"] = box.disk_bytes  # one file cannot outrun the watch
    if not groups.works and not _is_root():  # the kernel does not count root's
        bounds["RLIMIT_NPROC"] = box.pids + _tasks_of_user()
    return bounds


def sweep(ids: Iterable[str]) -> int:
    """Kill what lives in the groups of these boxes, and remove the groups: their shims were killed before they could."""
    names = [f"{PREFIX}{id_}{builds}" for id_ in ids for builds in ("", "-b*")]  # a job's builds are boxes, too
    tops = [Path(top) for top in dict.fromkeys(here().folders.values())]
    folders = [folder for name in names for top in tops for folder in top.glob(name)]
    folders += [folder for name in names for folder in MOUNT.glob(f"*/{name}")]  # podman's
    return sum(_empty(folder) for folder in folders if folder.is_dir())


# --- version 2 ------------------------------------------------------------------------------------------------------


def _second(mount: Path, own: str) -> Groups | None:
    """The nearest group at or above our own that hands its controllers on to the groups below it, and that is ours."""
    if not (mount / "cgroup.controllers").exists():
        return None
    folder = mount / own.strip("/")
    while folder == mount or mount in folder.parents:
        handed_on = set(_read(folder / "cgroup.subtree_control").split())
        offered = set(_read(folder / "cgroup.controllers").split())
        if not set(NEEDED) <= handed_on and set(NEEDED) <= offered and folder == mount:
            # Only the root may hold processes itself and hand controllers on.
            with contextlib.suppress(OSError):
                (folder / "cgroup.subtree_control").write_text("+cpu +memory +pids")
            handed_on = set(_read(folder / "cgroup.subtree_control").split())
        if set(NEEDED) <= handed_on and os.access(folder, os.W_OK):
            controllers = [name for name in ("memory", "pids", "cpu") if name in handed_on]
            return Groups(2, dict.fromkeys(controllers, str(folder)), f"control groups (version 2) below {folder}")
        if folder == mount:
            break
        folder = folder.parent
    return None


# --- version 1 ------------------------------------------------------------------------------------------------------


def _first(mount: Path, paths: dict[str, str]) -> Groups | None:
    """Below our own group of each controller."""
    folders = {}
    for controller in ("memory", "pids", "cpu", "cpuacct"):
        folder = mount / controller / paths.get(controller, "/").strip("/")
        if (folder / "cgroup.procs").exists() and os.access(folder, os.W_OK):
            folders[controller] = str(folder)
    if not set(NEEDED) <= set(folders):
        return None
    return Groups(1, folders, f"control groups (version 1) below {folders['memory']}")


def _entries(box: Box, version: int) -> list[tuple[str, tuple[str, str, bool]]]:
    """(controller, (file, text, whether it must succeed))."""
    found: list[tuple[str, tuple[str, str, bool]]] = []
    first = version == 1
    if box.memory_bytes:
        if first:
            found.append(("memory", ("memory.limit_in_bytes", str(box.memory_bytes), True)))
            found.append(("memory", ("memory.memsw.limit_in_bytes", str(box.memory_bytes), False)))  # no swap on top
        else:
            found.append(("memory", ("memory.max", str(box.memory_bytes), True)))
            found.append(("memory", ("memory.swap.max", "0", False)))
            found.append(("memory", ("memory.oom.group", "1", False)))
    if box.pids:
        found.append(("pids", ("pids.max", str(box.pids), True)))
    if box.cpu > 0:
        quota = str(max(1000, round(box.cpu * PERIOD_US)))
        if first:
            found.append(("cpu", ("cpu.cfs_period_us", str(PERIOD_US), False)))
            found.append(("cpu", ("cpu.cfs_quota_us", quota, False)))
        else:
            found.append(("cpu", ("cpu.max", f"{quota} {PERIOD_US}", False)))
    return found


def _figures(folders: dict[str, str], version: int) -> dict[str, list[tuple[str, str, int]]]:
    """name -> (file, key, factor)."""
    memory, cpu = folders["memory"], folders.get("cpuacct", folders["memory"])
    if version == 1:
        return {
            "peak": [(f"{memory}/memory.max_usage_in_bytes", "", 1)],
            "oom": [(f"{memory}/memory.oom_control", "oom_kill", 1)],
            "cpu_ns": [(f"{cpu}/cpuacct.usage", "", 1)] if "cpuacct" in folders else [],
        }
    return {
        "peak": [(f"{memory}/memory.peak", "", 1)],  # since Linux 5.19
        "oom": [(f"{memory}/memory.events", "oom_kill", 1)],
        "cpu_ns": [(f"{cpu}/cpu.stat", "usage_usec", 1000)],
    }


# --- both -----------------------------------------------------------------------------------------------------------


def _own_paths(text: str) -> dict[str, str]:
    """Controller -> our group's path; version 2 has the empty name."""
    paths = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(","):
            paths[name] = path
    return paths


def _moves(groups: Groups) -> bool:
    """Can a process really be moved there? In version 2 that takes rights on a group above both, too."""
    folders = [Path(top) / f"{PREFIX}probe-{os.getpid()}" for top in dict.fromkeys(groups.folders.values())]
    try:
        for folder in folders:
            folder.mkdir()
        script = " && ".join(f'echo 0 > "${n}/cgroup.procs"' for n in range(1, len(folders) + 1))
        argv = ["/bin/sh", "-c", script, "sh", *map(str, folders)]
        return subprocess.run(argv, capture_output=True, timeout=5, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
    finally:
        for folder in folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _empty(folder: Path) -> int:
    killed = 0
    for _ in range(100):
        below = [Path(name) for name, _, _ in os.walk(folder, topdown=False)]
        members = {int(word) for group in below for word in _read(group / "cgroup.procs").split()}
        for pid in members:
            with contextlib.suppress(OSError):
                os.kill(pid, 9)
                killed += 1
        for group in below:
            with contextlib.suppress(OSError):
                group.rmdir()
        if not folder.exists():
            break
    return killed


def _tasks_of_user() -> int:
    """How many threads this user has already: RLIMIT_NPROC counts them all."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                count += len(os.listdir(folder / "task"))
    return count


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
