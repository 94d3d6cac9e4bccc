"""How does a command run as a plain process of the agent's user?

It is held to its limits and nothing of it survives, but it sees and may do all that the user sees and may do. That is
right for the owner's own jobs that want the machine as it is, and for other people's only after an explicit yes.
"""

from __future__ import annotations

import os
from typing import Any

from potluck.worker.jobs.box import Box
from potluck.worker.jobs.executors.common import Executor, Found, shim_plan, visible_gpus
from potluck.worker.jobs.limits import Groups, here
from potluck.worker.runners import child_environment


class Process(Executor):
    name = "process"
    contains = False
    STOPS = frozenset({"fork_bomb", "memory", "disk", "overtime", "survive", "survive_agent"})

    def probe(self) -> Found:
        groups = here()
        return Found(self.name, True, groups.reason, "")

    def plan(self, box: Box, groups: Groups) -> dict[str, Any]:
        threads = max(1, round(box.cpu)) if box.cpu else os.cpu_count() or 1
        env = {**child_environment(os.environ, threads=threads), **visible_gpus(box), **box.env}
        if box.python is not None and "PATH" not in box.env:
            folder = "Scripts" if os.name == "nt" else "bin"
            env["PATH"] = f"{box.python / folder}{os.pathsep}{env.get('PATH', os.defpath)}"
        return shim_plan(box, groups, argv=box.argv, env=env)
