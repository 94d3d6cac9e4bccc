"""How does a program that the hub started end with the hub, however the hub ends?

Run as a file by a bare interpreter: `python -I -S leash.py PROGRAM ARGUMENT…`. Its stdin is a pipe that only the hub holds,
and into which nothing is ever written: when the hub is gone, even by SIGKILL, the kernel closes it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 5.0


def main(command: list[str]) -> int:
    """Run `command` until it ends by itself or the hub is gone. Its exit code, 128 + n after signal n."""
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda number, frame: program.terminate())
    threading.Thread(target=_end_with_the_hub, args=(program,), daemon=True).start()
    code = program.wait()
    return code if code >= 0 else 128 - code


def _end_with_the_hub(program: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass  # the pipe says nothing: only its end counts
    program.terminate()
    try:
        program.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        program.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
