"""Which ways of running a command work on this machine, which is the best for a job, and how is it run?

    found()   every executor there is, each tried with something tiny
    choose()  the best one that the machine's owner allows, or why there is none
    run()     start a command in it: a `Running`, which ends in an `Ended`
    sweep()   end what an agent left here that was killed together with its shims

    agent ──► Running ──pipes──► shim.py ──► the command           process
                                        ──► bwrap … ──► it         bubblewrap
                                        ──► podman run … ──► it    podman, docker, apptainer

The choice: a job with an image needs podman, docker or apptainer, in this order (podman has no daemon that is root). A job
without one gets bubblewrap: as closed as a container for everything that the escape suite tries, and ready in 25 ms where
podman takes 0.7 s. Where it does not work, a container over the machine's own /usr; a plain process only if the job is the
owner's own, or the owner said `--runtime any`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from potluck.errors import NotAllowed, NotFound
from potluck.worker.jobs import limits
from potluck.worker.jobs.box import Box, Ended, check
from potluck.worker.jobs.executors.apptainer import Apptainer
from potluck.worker.jobs.executors.bubblewrap import Bubblewrap
from potluck.worker.jobs.executors.common import Executor, Found
from potluck.worker.jobs.executors.docker import Docker
from potluck.worker.jobs.executors.podman import Podman
from potluck.worker.jobs.executors.process import Process
from potluck.worker.jobs.executors.running import Running, clean_up

ALL: Mapping[str, Executor] = {
    executor.name: executor for executor in (Podman(), Docker(), Apptainer(), Bubblewrap(), Process())
}
FOR_IMAGES = ("podman", "docker", "apptainer")
WITHOUT_IMAGE = ("bubblewrap", "podman", "docker", "apptainer", "process")

_lock = threading.Lock()
_found: list[Found] = []


def found(*, fresh: bool = False) -> list[Found]:
    """Every executor there is, and whether it works here. Tried all at once, and once per process unless `fresh`."""
    with _lock:
        if not _found or fresh:
            answers: dict[str, Found] = {}
            threads = [threading.Thread(target=_probe, args=(executor, answers)) for executor in ALL.values()]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            _found[:] = [answers[name] for name in ALL]
        return list(_found)


def choose(
    *,
    image: str = "",
    foreign: bool,
    runtime: str,
    found: Sequence[Found],
    prefer: str = "",
) -> Executor:
    """The executor for a job. `foreign`: it is not the machine's owner's; `runtime` and `prefer` are the owner's words.

    `NotAllowed` if the owner's rules leave none, `NotFound` if none works here.
    """
    works = {one.name for one in found if one.works}
    why_not = {one.name: one.reason for one in found if not one.works}
    names: tuple[str, ...] = FOR_IMAGES if image else WITHOUT_IMAGE
    if prefer:
        if prefer not in ALL:
            raise NotFound(f"there is no executor {prefer!r}: the machine's owner can choose {', '.join(ALL)}")
        if image and prefer not in FOR_IMAGES:
            raise NotAllowed(f"this machine's owner runs jobs in {prefer} only, which runs no images such as {image}")
        names = (prefer,)
    for name in names:
        if name not in works:
            continue
        if foreign and runtime != "any" and not ALL[name].contains:
            raise NotAllowed(
                "this machine's owner lets other people's jobs run in a container only, and there is none that works "
                f"here ({_list(why_not, names)}): the owner can install bubblewrap or podman, or join with --runtime any"
            )
        return ALL[name]
    if image:
        raise NotFound(f"the image {image} needs podman, docker or apptainer on this machine: {_list(why_not, names)}")
    raise NotFound(f"no executor works on this machine: {_list(why_not, names)}")


def run(
    executor: Executor,
    box: Box,
    *,
    on_output: Callable[[bytes], None],
    deadline: Callable[[], float | None] | None = None,
) -> Running:
    """Start the box's command. `on_output` gets what it prints, from a thread.

    `deadline` says until when (`box.clock()`) it may live, or None: no such limit. It is asked every second; should
    this process freeze, the shim kills the command when the last answer has passed.
    """
    check(box)
    executor.prepare(box)
    return Running(executor, box, executor.plan(box, limits.here()), on_output=on_output, deadline=deadline)


def sweep(boxes: Mapping[str, Path]) -> None:
    """End what is left of boxes (id → its folder) of an agent that was killed together with its shims.

    For the start of an agent, with the leases that it finds in its home.
    """
    works = {one.name for one in found() if one.works} if boxes else set()
    for id_, folder in boxes.items():
        for name in works:
            clean_up(ALL[name], id_, folder)


def _probe(executor: Executor, answers: dict[str, Found]) -> None:
    try:
        answers[executor.name] = executor.probe()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with an engine: it does not work here
        answers[executor.name] = Found(executor.name, False, f"{type(error).__name__}: {error}"[:300])


def _list(why_not: Mapping[str, str], names: Sequence[str]) -> str:
    return "; ".join(f"{name}: {why_not[name]}" for name in names if name in why_not) or "none was tried"


__all__ = ["ALL", "Box", "Ended", "Executor", "Found", "Running", "choose", "found", "run", "sweep"]
