"""How does a command run in a sandbox that bubblewrap builds from the machine's own /usr?

It has namespaces of its own for everything (the network too, unless the job may use it), sees its folders, /usr and the
Python it was given, and no capability is left to it. 25 ms to start, no daemon, no image, and an ordinary user can do it.

An agent that is root must not run jobs as root: a sandbox's root is still the owner of root's files in every place that
the kernel forgets to hide. So bubblewrap keeps the one right to change the user, setpriv changes it to JOB_USER and gives
up all the rest before the command starts. An ordinary user's sandbox has a user namespace instead, and can make no other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from potluck.worker.jobs.box import Box
from potluck.worker.jobs.executors.common import (
    CONTAINED,
    ETC,
    REACHES_THE_MACHINE,
    READ_ENV_AND_BECOME,
    Executor,
    Found,
    binds,
    exports,
    folders_of_root,
    hand_over,
    hosts,
    inside_environment,
    is_root,
    job_user,
    links_of_root,
    outside_environment,
    parents_of,
    passwd,
    shim_plan,
    system,
    tmp_bytes,
    try_out,
    visible_gpus,
)
from potluck.worker.jobs.limits import Groups

HOSTNAME = "potluck"
GPU_DEVICES = ("nvidia*", "dxg", "kfd", "dri")
SCRATCH = (Path("/dev/shm"), Path("/tmp"), Path("/var/tmp"))
# Programs count cores and find GPUs there.
SYS = ("devices/system/cpu", "devices/system/node")
OVER_SYS = ("/sys", "/sys/devices", "/sys/devices/system")
SYS_FOR_GPUS = ("devices", "class", "bus", "module")


class Bubblewrap(Executor):
    name = "bubblewrap"
    STOPS = CONTAINED - REACHES_THE_MACHINE

    def __init__(self) -> None:
        self.no_user_namespaces = False  # whether this bubblewrap can forbid them inside

    def probe(self) -> Found:
        if system() != "linux":
            return Found(self.name, False, "bubblewrap is only for Linux")
        there, version = try_out(["bwrap", "--version"])
        if not there:
            return Found(self.name, False, f"{version} (apt install bubblewrap)" if "installed" in version else version)
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        self.no_user_namespaces = numbers >= (0, 8)
        sandbox = [*self._isolation(network=False), *self._system(network=False, tmp=1_000_000)]
        works, said = try_out([*sandbox, "--", *self._become(), "sh", "-c", READ_ENV_AND_BECOME, "sh", "true"])
        if not works:
            return Found(self.name, False, f"bubblewrap cannot build a sandbox here: {said}", version)
        return Found(self.name, True, "", version.split()[-1])

    def prepare(self, box: Box) -> None:
        super().prepare(box)
        hand_over(box)

    def plan(self, box: Box, groups: Groups) -> dict[str, Any]:
        argv = [*self._isolation(network=box.network), *self._system(network=box.network, tmp=tmp_bytes(box))]
        bound = binds(box)
        for folder in parents_of([path for path, _ in bound]):
            if folder not in SCRATCH:
                argv += ["--perms", "0755", "--dir", str(folder)]  # else only root's to enter
        for path, may_write in bound:
            argv += ["--bind" if may_write else "--ro-bind", str(path), str(path)]
        if box.gpus:
            devices = sorted(str(path) for name in GPU_DEVICES for path in Path("/dev").glob(name))
            argv += [word for device in devices for word in ("--dev-bind", device, device)]
        for name in SYS_FOR_GPUS if box.gpus else SYS:
            argv += ["--ro-bind-try", f"/sys/{name}", f"/sys/{name}"]
        argv += ["--remount-ro", "/", "--chdir", str(box.work), "--", *self._become()]
        argv += ["sh", "-c", READ_ENV_AND_BECOME, "sh", *box.argv]
        return shim_plan(
            box,
            groups,
            argv=argv,
            env=outside_environment(),
            cwd="/",
            feed=exports({**visible_gpus(box), **inside_environment(box)}),
            nested=True,
        )

    def _isolation(self, *, network: bool) -> list[str]:
        if is_root():
            argv = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try"]
            argv += [] if network else ["--unshare-net"]
            argv += ["--cap-drop", "ALL"]
            for right in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
                argv += ["--cap-add", right]
        else:
            argv = ["bwrap", "--unshare-all"]
            argv += ["--share-net"] if network else []
            argv += ["--unshare-user", "--disable-userns"] if self.no_user_namespaces else []
        return [*argv, "--die-with-parent", "--new-session", "--hostname", HOSTNAME, "--clearenv"]

    def _system(self, *, network: bool, tmp: int) -> list[str]:
        argv = ["--ro-bind", "/usr", "/usr"]
        for folder in ("/etc", "/var", *OVER_SYS):
            argv += ["--perms", "0755", "--dir", folder]  # else only root's to enter
        for name, target in links_of_root():
            argv += ["--symlink", target, f"/{name}"]
        for folder in folders_of_root():
            argv += ["--ro-bind", folder, folder]
        for name in (*ETC, *(("resolv.conf",) if network else ())):
            argv += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        argv += ["--ro-bind", str(hosts(HOSTNAME, network=network)), "/etc/hosts"]
        users, groups = passwd()
        argv += ["--ro-bind", str(users), "/etc/passwd", "--ro-bind", str(groups), "/etc/group"]
        argv += ["--proc", "/proc", "--dev", "/dev"]
        for place in SCRATCH:
            argv += ["--perms", "1777", "--size", str(tmp), "--tmpfs", str(place)]
        return argv

    def _become(self) -> list[str]:
        if not is_root():
            return []
        user, group = job_user()
        return [
            *["/usr/bin/setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"],
            *["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"],
        ]
