"""The job that the cluster tests run: it counts, keeps a checkpoint, and finds out if it runs twice at once.

SHARED is a folder of the test's, which the plain process executor lets it see.
"""

import fcntl
import os
import sys
import time
from pathlib import Path

shared = Path(os.environ["SHARED"])
steps = int(os.environ.get("STEPS", "20"))
run = os.environ["POTLUCK_RUN_ID"]
lock = (shared / f"{run}.lock").open("w")  # the kernel lets go of it when this process is dead, and not before
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    (shared / f"{run}.twice").touch()
    sys.exit(99)
(shared / f"{run}.pid").write_text(str(os.getpid()))

checkpoints = Path(os.environ["POTLUCK_CHECKPOINT_DIR"])
earlier = Path(os.environ.get("POTLUCK_RESUME_FROM") or "nowhere") / "step"
step = int(earlier.read_text()) if earlier.exists() else 0
print(f"begins at step {step}", flush=True)
while step < steps:
    time.sleep(0.1)  # the work
    step += 1
    part = checkpoints / ".step"
    part.write_text(str(step))
    part.replace(checkpoints / "step")
    print(f"step {step}", flush=True)
(Path(os.environ["POTLUCK_OUTPUT_DIR"]) / "result.txt").write_text(f"{step}\n")
