"""How does a command run in docker? Its daemon makes the container, so that is no descendant of the shim's.

Signals go through the daemon, and reach the command alone: what it has started is out of our sight. A user who may talk to
the daemon is as good as root on the machine; the job may not: the socket is not in its container.
"""

from __future__ import annotations

from typing import Any

from potluck.worker.jobs.box import Box
from potluck.worker.jobs.executors.common import READ_ENV_AND_BECOME, Found, system, try_out
from potluck.worker.jobs.executors.containers import ContainerEngine
from potluck.worker.jobs.limits import PREFIX, Groups

NOWHERE = Groups(0, {}, "docker's daemon makes its own groups")


class Docker(ContainerEngine):
    name = "docker"
    program = "docker"
    script = (
        READ_ENV_AND_BECOME  # --init is the first process, and its child, whom signals reach, is the command itself
    )

    def probe(self) -> Found:
        if system() != "linux":
            return Found(self.name, False, "docker is taken on Linux only: elsewhere it is a virtual machine")
        there, version = try_out(["docker", "version", "--format", "{{.Server.Version}}"])
        if not there:
            return Found(self.name, False, version)
        self.skeleton()
        test = ["docker", "run", "--rm", "--network", "none", "--volume", "/usr:/usr:ro"]
        works, said = try_out([*test, self.skeleton_name(), "/usr/bin/true"])
        return Found(self.name, works, "" if works else f"docker cannot run a container here: {said}", version)

    def own_options(self, box: Box, groups: Groups) -> list[str]:
        # The daemon sends a signal only to the first process of a container: --init's, which hands it on.
        return ["--init"]

    def gpu_options(self, box: Box) -> list[str]:
        return ["--gpus", f'"device={",".join(map(str, box.gpus))}"']

    def plan(self, box: Box, groups: Groups) -> dict[str, Any]:
        name = f"{PREFIX}{box.id}"
        return self.container_plan(
            box,
            NOWHERE,
            term=["docker", "kill", "--signal", "TERM", name],
            kill=["docker", "kill", name],
        )
