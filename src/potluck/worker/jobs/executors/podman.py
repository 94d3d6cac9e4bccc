"""How does a command run in podman? Without a daemon, and for an ordinary user without root.

As root the container's groups are made below one of ours, so that the same limits hold and the same figures are read as
everywhere; for a user, podman makes them. crun, podman's first choice of a runtime, refuses some machines (a mix of both
versions of control groups) on which runc works: the probe takes the one that does.
"""

from __future__ import annotations

import shutil
from typing import Any

from potluck.errors import NotFound
from potluck.worker.jobs.box import Box
from potluck.worker.jobs.executors.common import Found, is_root, system, try_out
from potluck.worker.jobs.executors.containers import ContainerEngine, ulimits
from potluck.worker.jobs.limits import MOUNT, PREFIX, Groups


class Podman(ContainerEngine):
    name = "podman"
    program = "podman"

    def __init__(self) -> None:
        self.options: list[str] = []  # what the probe found to be needed
        self.holds_limits = True

    def engine(self) -> list[str]:
        return ["podman", *self.options]

    def probe(self) -> Found:
        if system() != "linux":
            return Found(self.name, False, "podman is taken on Linux only: elsewhere it is a virtual machine")
        there, version = try_out(["podman", "--version"])
        if not there:
            return Found(self.name, False, f"{version} (apt install podman)" if "installed" in version else version)
        tries = [[], ["--runtime", "runc"]] if shutil.which("runc") else [[]]
        said = ""
        for options in tries:
            self.options = [*options, *(["--cgroup-manager", "cgroupfs"] if is_root() else [])]
            works, said = self._try()
            if works:
                self.holds_limits = is_root() or self._user_has_groups()
                return Found(self.name, True, f"with {' '.join(options)}" if options else "", version.split()[-1])
        return Found(self.name, False, f"podman cannot run a container here: {said}", version.split()[-1])

    def _try(self) -> tuple[bool, str]:
        try:
            self.skeleton()
        except NotFound as error:
            return False, str(error)
        return try_out(
            [
                *[*self.engine(), "run", "--rm", "--network", "none", "--log-driver", "none", "--read-only"],
                *[*ulimits(), "--cap-drop", "all"],
                *["--pids-limit", "64", "--memory", "64000000", "--volume", "/usr:/usr:ro", *self._user()],
                *[self.skeleton_name(), "/usr/bin/true"],
            ]
        )

    def _user_has_groups(self) -> bool:
        """With control groups version 1, podman ignores a user's limits, and says so only in passing."""
        _, said = try_out([*self.engine(), "info", "--format", "{{.Host.CgroupsVersion}} {{.Host.CgroupControllers}}"])
        return all(word in said for word in ("v2", "memory", "pids"))

    def _user(self) -> list[str]:
        return [] if is_root() else ["--userns", "keep-id"]

    def own_options(self, box: Box, groups: Groups) -> list[str]:
        argv = ["--read-only-tmpfs=false", *self._user()]
        if is_root() and groups.works:
            argv += ["--cgroup-parent", f"/{PREFIX}{box.id}"]
        return argv

    def gpu_options(self, box: Box) -> list[str]:
        return [word for index in box.gpus for word in ("--device", f"nvidia.com/gpu={index}")]  # CDI

    def plan(self, box: Box, groups: Groups) -> dict[str, Any]:
        plan = self.container_plan(
            box, _at_the_root(groups) if is_root() else NOWHERE, nested=True, kernel_limits=self.holds_limits
        )
        # The runtime makes a group of each controller there is, and removes only the container's own below it.
        return {**plan, "remove": [f"{folder}/{PREFIX}{box.id}" for folder in MOUNT.glob("*") if is_root()]}


NOWHERE = Groups(0, {}, "podman makes its own groups")


def _at_the_root(groups: Groups) -> Groups:
    """podman takes one path for all controllers, and ours may have a different one in each: so below the roots."""
    if groups.version != 1:
        return groups
    folders = {name: str(MOUNT / name) for name in groups.folders}
    return Groups(1, folders, groups.reason)
