"""gang_nursery.py, whose members live on the machines of gang_net.py: each moves there before it begins.

The machine comes in the variable BED of the member's environment. The kind "train" is gang_train.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import gang_nursery
import gang_train

_CLONE_NEWNET = 0x40000000
_run = gang_nursery.run


def run(command: dict[str, Any]) -> None:
    bed = json.loads(os.environ["BED"])
    for group in bed["groups"]:
        Path(group).write_text("0")
    netns = os.open(bed["netns"], os.O_RDONLY | os.O_CLOEXEC)
    if ctypes.CDLL(None, use_errno=True).setns(netns, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns {bed['netns']}")
    if command["start"] == "train":
        gang_train.main()
    else:
        _run(command)


if __name__ == "__main__":
    gang_nursery.run = run
    gang_nursery.main()
