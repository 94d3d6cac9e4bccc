"""What is below the shim: which processes, in which control groups, with how much on the disk?

Standard library only, and little of it: the shim imports this with a bare interpreter.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

LINUX = sys.platform.startswith("linux")

# --- processes ------------------------------------------------------------------------------------------------------


SHELLS = {"sh", "dash", "bash", "ash", "ksh", "zsh", "busybox"}


class Process:
    """What /proc says of a process."""

    __slots__ = ("handles", "has_trap", "is_first", "name", "nested", "parent", "pid", "zombie")

    def __init__(self, pid: int, parent: int, name: str, *, zombie: bool = False) -> None:
        self.pid, self.parent, self.name, self.zombie = pid, parent, name, zombie
        self.nested = False  # it has a number of its own in a process namespace below ours
        self.is_first = False  # and that number is 1
        self.handles = True  # SIGTERM, so that it does not die of it at once. Where nobody can tell: yes
        self.has_trap = False  # for SIGTERM; if it is a shell

    def look_closer(self) -> None:
        with contextlib.suppress(OSError):
            # The name of a script's process is the script's.
            self.name = os.path.basename(os.readlink(f"/proc/{self.pid}/exe"))
        for line in read(f"/proc/{self.pid}/status").splitlines():
            word, _, rest = line.partition(":")
            if word == "NSpid":
                numbers = rest.split()
                self.nested = len(numbers) > 1
                self.is_first = self.nested and numbers[-1] == "1"
            elif word == "SigBlk":  # to be waited for with sigwait
                self.handles = _has(rest, signal.SIGTERM)
            elif word == "SigCgt":
                caught = _has(rest, signal.SIGTERM)
                self.handles = self.handles or caught
                # bash with a trap for EXIT catches all that could end it, to die of it at once; nobody traps SIGXCPU.
                self.has_trap = caught and self.is_shell and not _has(rest, signal.SIGXCPU)

    @property
    def is_shell(self) -> bool:
        return self.name in SHELLS


def _has(mask: str, number: int) -> bool:
    return bool(int(mask, 16) >> (number - 1) & 1)


def in_charge(processes: list[Process]) -> set[int]:
    """The programs that handle SIGTERM, without what these have started. Parents must come before their children.

    Shells are none of them: they run a trap only when the program that they wait for has ended.
    """
    found: set[int] = set()
    covered: set[int] = set()
    for process in processes:
        if process.parent in covered:
            covered.add(process.pid)
        elif process.handles and not process.is_shell and not process.is_first:
            covered.add(process.pid)
            found.add(process.pid)
    return found


def descendants(root: int, *, closely: bool = False) -> list[Process]:
    """Everything below `root`; parents come before their children. `closely`: what `look_closer` finds, too."""
    by_parent: dict[int, list[Process]] = {}
    for process in _all_processes():
        by_parent.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    ahead = [root]
    while ahead:
        below = by_parent.get(ahead.pop(), [])
        found += below
        ahead += [process.pid for process in below]
    if closely:
        for process in found:
            process.look_closer()
    return found


def _all_processes() -> list[Process]:
    if not LINUX:
        return _all_by_ps()
    found = []
    for word in os.listdir("/proc"):
        if not word.isdecimal():
            continue
        text = read(f"/proc/{word}/stat")
        before, _, after = text.rpartition(")")  # a name may hold spaces and brackets
        fields = after.split()
        if len(fields) > 2:
            name = before.partition("(")[2]
            found.append(Process(int(word), int(fields[1]), name, zombie=fields[0] in "ZX"))
    return found


def _all_by_ps() -> list[Process]:
    """macOS has no /proc."""
    ours, theirs = os.pipe()
    pid = os.posix_spawn(
        "/bin/ps",
        ["ps", "-A", "-o", "pid=,ppid=,stat=,comm="],
        {"PATH": "/bin:/usr/bin"},
        file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 1)],
    )
    os.close(theirs)
    with os.fdopen(ours, errors="replace") as lines:
        rows = [line.split(None, 3) for line in lines]
    os.waitpid(pid, 0)
    return [
        Process(int(row[0]), int(row[1]), os.path.basename(row[3].strip()), zombie="Z" in row[2])
        for row in rows
        if len(row) == 4 and int(row[0]) != pid
    ]


def resident(pids: list[int], limit: int) -> int:
    """Bytes of memory of all of them. What they share counts once if it matters, that is near `limit`."""
    page = os.sysconf("SC_PAGE_SIZE")
    quick = 0
    for pid in pids:
        words = read(f"/proc/{pid}/statm").split()
        quick += int(words[1]) * page if len(words) > 1 else 0
    if not limit or quick <= limit:
        return quick
    fair = 0
    for pid in pids:
        pss = [line.split() for line in read(f"/proc/{pid}/smaps_rollup").splitlines() if line.startswith("Pss:")]
        words = read(f"/proc/{pid}/statm").split()
        fair += int(pss[0][1]) * 1024 if pss else int(words[1]) * page if len(words) > 1 else 0
    return fair


def read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""  # it is gone already


def send(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


# --- control groups -------------------------------------------------------------------------------------------------


class Groups:
    """The control groups of one command, in either version. limits.py plans them; here they are made and removed."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.folders: list[str] = [group["folder"] for group in plan.get("groups", ())]
        self._plan = plan

    def make(self) -> None:
        for group in self._plan.get("groups", ()):
            os.makedirs(group["folder"], exist_ok=True)
            for name, value, needed in group["write"]:
                try:
                    write(f"{group['folder']}/{name}", value)
                except OSError:
                    if needed:
                        raise

    def join(self) -> None:
        for folder in self.folders:
            write(f"{folder}/cgroup.procs", "0")

    def members(self) -> list[int]:
        found = set()
        for top in self.folders:
            for folder, _, _ in os.walk(top):  # a container runtime makes its own below ours
                found |= {int(word) for word in read(f"{folder}/cgroup.procs").split()}
        return sorted(found)

    def stop_forking(self) -> None:
        for folder in self.folders:
            with contextlib.suppress(OSError):
                write(f"{folder}/pids.max", "0")
            with contextlib.suppress(OSError):
                write(f"{folder}/cgroup.kill", "1")

    def figure(self, name: str) -> int:
        """memory peak, number of kills by the memory limit, CPU time …, as the plan says where they are."""
        for path, key, unit in self._plan.get("figures", {}).get(name, ()):
            for line in read(path).splitlines():
                words = line.split()
                if (not key and len(words) == 1) or (key and len(words) == 2 and words[0] == key):
                    return int(words[-1]) * unit if words[-1].isdecimal() else 0
        return 0

    def remove(self) -> None:
        for top in [*self.folders, *self._plan["remove"]]:
            for folder, _, _ in os.walk(top, topdown=False):
                for _ in range(50):
                    try:
                        os.rmdir(folder)
                    except FileNotFoundError:
                        break
                    except OSError:
                        time.sleep(0.01)  # the kernel lets go of the last process a moment after its end
                    else:
                        break


def write(path: str, text: str) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


# --- the disk -------------------------------------------------------------------------------------------------------


def occupied(folders: list[str]) -> int:
    """Bytes on the disk below the folders; a file with two names counts once, links are not followed."""
    total = 0
    seen = set()
    ahead = list(folders)
    while ahead:
        try:
            with os.scandir(ahead.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        facts = entry.stat(follow_symlinks=False)
                        if facts.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                            if (facts.st_dev, facts.st_ino) in seen:
                                continue
                            seen.add((facts.st_dev, facts.st_ino))
                        total += getattr(facts, "st_blocks", facts.st_size // 512 + 1) * 512  # Windows has none
                        if entry.is_dir(follow_symlinks=False):
                            ahead.append(entry.path)
        except OSError:
            continue  # removed while we looked
    return total


class DiskWatch:
    """In a thread, because a look at a hundred thousand files must not keep the deadline waiting."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._folders: list[str] = plan["folders"]
        self._limit: int = plan["disk"]
        self._floor: int = plan["floor"]
        self._before = occupied(self._folders) if self._limit else 0
        self.added = 0
        self.over = ""  # disk | full

    def start(self) -> None:
        if self._folders:
            threading.Thread(target=self._watch, daemon=True).start()

    def look(self) -> None:
        if self._limit:
            self.added = occupied(self._folders) - self._before
            if self.added > self._limit:
                self.over = "disk"
        with contextlib.suppress(OSError):
            if _free_bytes(self._folders[0]) < self._floor:
                self.over = self.over or "full"

    def _watch(self) -> None:
        while not self.over:
            begin = time.monotonic()
            self.look()
            # At most a twentieth of a core, and as soon as that allows.
            time.sleep(min(5.0, max(0.5, 20 * (time.monotonic() - begin))))


def _free_bytes(folder: str) -> int:
    if hasattr(os, "statvfs"):
        facts = os.statvfs(folder)
        return facts.f_bavail * facts.f_frsize
    import shutil  # on Windows only: it takes longer than all the rest

    return shutil.disk_usage(folder).free
