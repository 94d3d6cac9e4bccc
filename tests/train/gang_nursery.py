"""Processes that have torch already: each test member is forked from this one, instead of importing it for seconds.

It reads commands from its standard input, one JSON object a line, and answers each with a line:

    {"start": "member" | "plain" | "torchft", "environment": {…}, "log": path, "host": …, "port": …, "least": …} → {"pid"}
    {"start": "script", "arguments": [path, …], …}, as `python path …` would                                     → {"pid"}
    {"status": pid} → {"status": null while it runs, else its exit code, negative for a signal}
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
import traceback
from typing import Any

import gang_script
import torch
import torch._dynamo  # the first optimizer of a process imports it, for seconds

from potluck.train.gang import meeting, member, torchft_engine

torch.set_num_threads(1)


def start(command: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for mine, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(mine, number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(command["environment"])
        run(command)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:  # noqa: BLE001 - as an interpreter does at its end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        leave()
        os._exit(code)


def run(command: dict[str, Any]) -> None:
    match command["start"]:
        case "member":
            gang_script.main()
        case "script":
            sys.argv = command["arguments"]
            runpy.run_path(sys.argv[0], run_name="__main__")
        case "plain":
            meeting.serve(command["host"], command["port"], least=command["least"], say=print_flushed)
        case "torchft":
            server = torchft_engine.lighthouse(command["host"], command["port"], least=command["least"])
            print_flushed(torchft_engine.reachable(server.address(), command["host"]))
            threading.Event().wait()


def leave() -> None:
    """What the end of an interpreter would do: potluck.gang takes leave by itself."""
    import atexit

    atexit._run_exitfuncs()


def print_flushed(text: str) -> None:
    print(text, flush=True)


def status(pid: int) -> int | None:
    done, how = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(how) if done else None


def main() -> None:
    known: dict[int, int] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            answer: dict[str, Any] = {"pid": start(command)}
        else:
            pid = command["status"]
            if pid not in known and (ended := status(pid)) is not None:
                known[pid] = ended
            answer = {"status": known.get(pid)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    assert member.Gang
    main()
