"""`potluck why`: one sentence, the nearest machine, and what would help."""

from __future__ import annotations

import pytest
from placement_kit import GB, HOUR, NOW, decide, held, job, machine

from potluck.domain.job import Resources
from potluck.domain.placement import Gpu, Limits, Machine, Waiting, explain, impossible
from potluck.domain.resources import Demand, read

X = held("train", NOW + 720, cpu=8, memory=16 * GB)
SITUATIONS: list[tuple[str, Waiting, list[Machine], str, str]] = [
    ("nobody is here", job("a"), [], "no machine has joined this hub", "potluck invite"),
    ("it fits", job("a", cpu="1"), [machine()], "`m` is the smallest machine that has room", ""),
    ("it fits, idle", job("a"), [machine()], "`m` has room, and no other job", ""),
    ("own machine", job("a"), [machine(owner="ann")], "`m` is its owner's own machine", ""),
    ("busy until", job("a", cpu="1"), [machine(held=(X,))], "`m` is kept for it: free in ~12 min at the latest", ""),
    (
        "busy, nobody knows",
        job("a", cpu="8"),
        [machine(held=(held("train", cpu=2),))],
        "`m` is kept for it as soon as it is free",
        "--timeout",
    ),
    ("os", job("a", os="macos"), [machine()], "`m` runs linux x86_64, the job wants macos", "another system"),
    ("arch", job("a", arch="arm64"), [machine()], "`m` runs linux x86_64, the job wants arm64", "another system"),
    ("no gpu", job("a", gpu="1"), [machine()], "`m` has no GPU", "the job wants 1 GPU: join a machine with one"),
    ("gpus", job("a", gpu="2"), [machine(gpus=[8])], "`m` has 1 such GPU, the job wants 2", "ask for 1 GPU"),
    (
        "vram",
        job("a", gpu="24GB.."),
        [machine(gpus=[16])],
        "`m` has 16 GB of GPU memory, the job wants 24 GB",
        "lower the GPU memory of the job to 16GB",
    ),
    (
        "model",
        job("a", gpu="A100"),
        [machine(gpus=[16])],
        "`m` has RTX 3060, the job wants a100",
        "ask for a GPU by its memory, not as a100",
    ),
    ("cores", job("a", cpu="16"), [machine()], "`m` has 8 cores, the job wants 16", "lower cpu to 8"),
    (
        "memory",
        job("a", memory="32GB"),
        [machine()],
        "`m` has 16 GB of memory, the job wants 32 GB",
        "lower memory to 16GB",
    ),
    (
        "a browser has it",
        job("a", memory="16GB"),
        [machine(memory_free=3 * GB)],
        "`m` has 3 GB of memory free, the job wants 16 GB",
        "other programs use the rest of it: close them there, or lower memory to 3GB",
    ),
    (
        "a game has it",
        job("a", gpu="12GB.."),
        [machine(gpus=[Gpu(0, "x", 12 * GB, 5 * GB)])],
        "`m` has 5 GB of GPU memory free, the job wants 12 GB",
        "lower the GPU memory of the job to 5GB",
    ),
    (
        "disk",
        job("a", disk="500GB"),
        [machine()],
        "`m` has 100 GB of disk free, the job wants 500 GB",
        "lower disk to 100GB",
    ),
    (
        "label",
        job("a", labels={"room": "1"}),
        [machine()],
        "`m` has no label room, the job wants room=1",
        "potluck workers label m room=1",
    ),
    (
        "other label",
        job("a", labels={"room": "1"}),
        [machine(labels={"room": "2"})],
        "`m` is labelled room=2, the job wants room=1",
        "leave the label out",
    ),
    ("pool only", job("a"), [machine(accept="pool")], "`m` takes only pool work", "ask its owner to allow jobs"),
    (
        "owner only",
        job("a"),
        [machine(owner="bob", whose="me")],
        "`m` takes only its owner's jobs",
        "ask its owner to allow others'",
    ),
    (
        "no sandbox",
        job("a"),
        [machine(executors=frozenset({"process"}))],
        "`m` has no container runtime, without which its owner takes no foreign code",
        "install podman or bubblewrap",
    ),
    (
        "own machine needs no sandbox",
        job("a"),
        [machine(owner="ann", executors=frozenset({"process"}))],
        "`m` is its owner's own machine",
        "",
    ),
    (
        "any runtime",
        job("a"),
        [machine(runtime="any", executors=frozenset({"process"}))],
        "`m` has room, and no other job",
        "",
    ),
    ("no executor", job("a"), [machine(executors=frozenset())], "`m` has nothing that runs jobs", "potluck doctor"),
    ("image", job("a", image="python"), [machine()], "`m` runs no containers", "install podman there"),
    ("away", job("a"), [machine(present=False)], "`m` is away", "switch `m` on"),
    ("draining", job("a"), [machine(draining=True)], "`m` is drained", "potluck workers undrain m"),
    ("avoided", job("a", avoid=frozenset({"w-m"})), [machine()], "`m` gave the job back", "in a few minutes"),
    ("no tasks", job("a"), [machine(max_tasks=0)], "`m` takes no jobs at all", "--max-tasks 1"),
    (
        "the nearest of several",
        job("a", gpu="24GB..", memory="8GB"),
        [machine("cpu"), machine("old", [8]), machine("gamer", [24], present=False)],
        "none of 3 machines takes it now: the nearest, `gamer`, is away",
        "switch `gamer` on",
    ),
    (
        "two things at once",
        job("a", cpu="16", memory="64GB"),
        [machine()],
        "`m` has 16 GB of memory, the job wants 64 GB, and has 8 cores, the job wants 16",
        "lower cpu to 8; lower memory to 16GB",
    ),
]


@pytest.mark.parametrize(
    ("one", "machines", "reason", "advice"), [s[1:] for s in SITUATIONS], ids=[s[0] for s in SITUATIONS]
)
def test_why_is_one_sentence_and_what_would_help(
    one: Waiting, machines: list[Machine], reason: str, advice: str
) -> None:
    plan = decide([one], machines)

    said = explain(one, machines, plan=plan, limits={}, now=NOW)

    assert said.reason.startswith(reason)
    assert advice in said.advice
    assert "\n" not in said.reason
    assert (said.position == 0) == bool(said.worker)
    assert bool(said.worker) == bool(plan.placed)


def test_who_waits_behind_a_kept_place_is_told_for_whom_and_how_long() -> None:
    one = machine(held=(held("x", NOW + HOUR, cpu=4),))
    big, small, mid = job("big", cpu="8", queued_at=0.0), job("small", cpu="2"), job("mid", cpu="6")
    plan = decide([big, small, mid], [one])

    said = explain(small, [one], plan=plan, limits={}, now=NOW)
    assert said.reason == "`m` is kept for `big`, which starts there in ~60 min at the latest"
    assert said.advice == "with --timeout 60m or less it may run before that"
    assert (said.position, explain(big, [one], plan=plan, limits={}, now=NOW).position) == (3, 1)
    assert "has 4 of 8 cores free, the job wants 6" in explain(mid, [one], plan=plan, limits={}, now=NOW).reason


def test_who_is_at_the_limit_is_told_which() -> None:
    limits = {"ann": Limits(running=1, name="Ann"), "bob": Limits(cpu_hours=2, cpu_hours_used=2, name="Bob")}
    jobs = [job("a", cpu="1"), job("b", cpu="1", queued_at=NOW), job("c", "bob", cpu="1")]
    plan = decide(jobs, [machine()], limits=limits)

    said = [explain(one, [machine()], plan=plan, limits=limits, now=NOW) for one in jobs]

    assert said[0].worker_name == "m"
    assert said[1].reason == "`Ann` may run 1 job at once, and 1 run"
    assert said[2].reason == "`Bob` may use 2 core hours in seven days, and that is used up"


def test_busy_until_is_said_of_the_second_in_line_too() -> None:
    one = machine(held=(X,))
    first, second = job("first", cpu="1"), job("second", cpu="4", queued_at=NOW)

    said = explain(second, [one], plan=decide([first, second], [one]), limits={}, now=NOW)

    assert said.reason == "`m` has 0 of 8 cores free, the job wants 4"
    assert said.advice == "wait: it is free in ~12 min at the latest"


def test_what_nobody_could_ever_hold_is_impossible() -> None:
    away = machine("away", [24], present=False, accept="pool", draining=True, held=(X,))
    unknown = Machine("w-new", "new")

    def asks(**asked: str) -> Demand:
        return read(Resources(**asked))  # type: ignore[arg-type]

    assert impossible(asks(gpu="1", cpu="8"), [away]) == ""
    assert impossible(asks(labels={"room": "9"}, disk="900GB"), [away]) == ""  # type: ignore[arg-type]
    assert impossible(asks(gpu="8"), []) == ""
    assert impossible(asks(gpu="8"), [unknown]) == ""
    assert impossible(asks(gpu="40GB.."), [machine("small"), away, unknown]) == (
        "no machine of this hub could hold it: it wants 1 GPU of 40 GB or more, and the nearest of 2 machines, `away`, "
        "has 24 GB of GPU memory, the job wants 40 GB"
    )
    assert "`m` runs linux x86_64" in impossible(asks(os="windows"), [machine()])
