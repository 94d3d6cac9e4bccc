"""Why does this job wait, which machine is nearest to taking it, and what would help?

Each machine is asked for its *obstacles*. The nearest machine is the one whose obstacles weigh least: one that is free in
ten minutes is nearer than one that is switched off, and that one is nearer than one that is too small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from potluck.domain.placement.decide import over_limit, soonest
from potluck.domain.placement.gang import say_names
from potluck.domain.placement.records import (
    CONTAINERS,
    SANDBOXES,
    Explanation,
    GangPlace,
    Held,
    Limits,
    Machine,
    Plan,
    Reservation,
    Waiting,
)
from potluck.domain.placement.room import Room, has_engine, large_enough
from potluck.domain.quantity import say_count, say_duration, say_size
from potluck.domain.resources import Demand, describe, describe_gpus, is_model

MOST_NEAR = 3
"""So many machines are named."""
FREE = 0.5
"""The weight of having to wait for one's turn only."""


class Obstacle(NamedTuple):
    weight: float
    lacks: str  # goes on after the machine's name: "has no GPU"
    advice: str


def explain(
    one: Waiting,
    machines: Sequence[Machine],
    *,
    plan: Plan,
    limits: Mapping[str, Limits],
    now: float,
) -> Explanation:
    """Say why `one` waits after `plan`, or where `plan` puts it. `machines` are those that the plan was made with."""
    names = {machine.id: machine.name for machine in machines}
    for placed in plan.placed:
        if placed.job == one.job:
            return Explanation(placed.reason, worker=placed.worker, worker_name=names.get(placed.worker, ""))
    position = _position(one, plan)
    if not machines:
        advice = "run `potluck invite`, and `potluck join` with its link on a machine"
        return Explanation("no machine has joined this hub", advice, position=position)
    mine = limits.get(one.owner)
    if mine and (limit := over_limit(one, mine, placed=plan.placed_by.get(one.owner, 0))):
        return Explanation(limit, _advise_at_limit(one, mine, limit), position=position)
    found = sorted(
        ((_obstacles(one, _room(machine, plan), plan, now), machine) for machine in machines),
        key=lambda pair: (sum(obstacle.weight for obstacle in pair[0]), pair[1].name, pair[1].id),
    )
    if one.gang is not None:
        return _explain_gang(one, one.gang, found, plan=plan, position=position)
    near = tuple((machine.name, _join(obstacles)) for obstacles, machine in found[:MOST_NEAR])
    obstacles, machine = found[0]
    if plan.reserved and plan.reserved.job == one.job:
        kept = names.get(plan.reserved.worker, plan.reserved.worker)
        if plan.reserved.starts_at is None:
            advice = "nobody knows how long the jobs there run: with --timeout the hub could plan, or stop one of them"
            return Explanation(f"`{kept}` is kept for it as soon as it is free", advice, near, position=position)
        when = say_duration(plan.reserved.starts_at - now)
        return Explanation(f"`{kept}` is kept for it: free in ~{when} at the latest", "", near, position=position)
    reason = f"`{machine.name}` {_join(obstacles)}"
    if len(machines) > 1:
        reason = f"none of {len(machines)} machines takes it now: the nearest, `{machine.name}`, {_join(obstacles)}"
    advice = "; ".join(dict.fromkeys(obstacle.advice for obstacle in obstacles if obstacle.advice))
    return Explanation(reason, advice, near, position=position)


def _explain_gang(
    one: Waiting, place: GangPlace, found: Sequence[tuple[list[Obstacle], Machine]], *, plan: Plan, position: int
) -> Explanation:
    """`found`: what keeps each machine, the nearest first. The pass has said the reason; here is what would help."""
    reason = plan.waits.get(one.job, "its gang has just been submitted")
    ready = [machine for obstacles, machine in found if _is_free(obstacles)]
    missing = max(1, place.needed) - len(ready)
    if missing <= 0:
        near = tuple((machine.name, "has room") for machine in ready[:MOST_NEAR])
        here = place.on.union(machine.id for machine in ready)
        if any(here.issuperset(knock) for knock in plan.knocks):
            return Explanation(reason, "wait a few seconds: they knock at each other's doors", near, position=position)
        if not plan.kept or any(kept.gang == place.gang for kept in plan.kept):
            advice = "let the machines' firewalls pass what comes from each other, or join them to one network"
            return Explanation(
                reason, f"{advice}: `potluck gang profile` shows who reaches whom", near, position=position
            )
        return Explanation(reason, "wait: others are before it in line", near, position=position)
    nearest = [(obs, machine) for obs, machine in found if not _is_free(obs) and machine.id not in place.on]
    near = tuple((machine.name, _join(obstacles)) for obstacles, machine in nearest[:MOST_NEAR])
    help_ = [
        f"`{machine.name}`: {advice}"
        for obstacles, machine in nearest[: min(missing, MOST_NEAR)]
        for advice in dict.fromkeys(obstacle.advice for obstacle in obstacles if obstacle.advice)
    ]
    if missing > len(nearest):
        fewer = f", or let the gang begin with fewer, like --gang {len(found)}..{place.needed}" if not place.on else ""
        help_.append(f"join {say_count(missing - len(nearest), 'more machine')}{fewer}")
    return Explanation(reason, "; ".join(help_), near, position=position)


def impossible(demand: Demand, machines: Iterable[Machine], *, least: int = 1) -> str:
    """Why no `least` of `machines`, even empty, could ever hold `demand` each; "" if they could, or if none is known.

    What people can change with a word is not asked: labels, an owner's rules, a container runtime, free disk, who reaches
    whom.
    """
    known = [machine for machine in machines if machine.cores or machine.memory]
    found = []
    able = []
    for machine in known:
        obstacles = [*_wrong_system(machine, demand), *_too_small(machine, demand)]
        if obstacles:
            found.append((sum(obstacle.weight for obstacle in obstacles), machine.name, _join(obstacles)))
            continue
        able.append(machine)
        if len(able) >= least:
            return ""
    if not known:
        return ""
    wants = describe(demand)
    _, name, lacks = min(found, default=(0.0, "", ""))
    if least > 1:
        have = say_names((machine.id for machine in able), {machine.id: machine.name for machine in able})
        only = f"only {have} could hold one" if able else "none could hold one"
        nearest = f", and the nearest other, `{name}`, {lacks}" if able and found else ""
        nearest = nearest or (f": the nearest, `{name}`, {lacks}" if found else "")
        fewer = f", or let the gang begin with fewer, like --gang {len(able)}..{least}" if able else ""
        return (
            f"a gang that begins with {least} needs as many machines, each with {wants}; of the {len(known)} of this hub "
            f"{only}{nearest}; join more machines{fewer}"
        )
    which = f"`{name}`" if len(found) == 1 else f"the nearest of {len(found)} machines, `{name}`,"
    return f"no machine of this hub could hold it: it wants {wants}, and {which} {lacks}"


def _advise_at_limit(one: Waiting, limits: Limits, limit: str) -> str:
    if "at once" not in limit:
        return "ask an admin for more"
    needed, most = (one.gang.needed if one.gang else 1), limits.running or 0
    if needed > most > 0:
        return f"let the gang begin with fewer, like --gang {most}..{needed}, or ask an admin for more"
    return "wait until one of these jobs ends, stop one, or ask an admin for more"


def _position(one: Waiting, plan: Plan) -> int:
    position = 0
    for job in plan.order:
        position += job in plan.waits
        if job == one.job:
            return position
    return 0


def _room(machine: Machine, plan: Plan) -> Room:
    """The machine after `plan`."""
    room = Room(machine)
    for placed in plan.placed:
        if placed.worker == machine.id:
            room.take(Held(placed.job, "", placed.grant, None, 0, 0))
    return room


def _join(obstacles: Sequence[Obstacle]) -> str:
    """The heaviest two, in one breath."""
    heaviest = sorted(obstacles, key=lambda obstacle: -obstacle.weight)[:2]
    return ", and ".join(obstacle.lacks for obstacle in heaviest)


def _is_free(obstacles: Sequence[Obstacle]) -> bool:
    return sum(obstacle.weight for obstacle in obstacles) <= FREE


# --- obstacles ------------------------------------------------------------------------------------------------------


def _obstacles(one: Waiting, room: Room, plan: Plan, now: float) -> list[Obstacle]:
    machine, demand = room.machine, one.demand
    lasting = [*_wrong_system(machine, demand), *_too_small(machine, demand), *_wrong_label(machine, demand)]
    lasting += [*_not_allowed(one, machine), *_not_there(one, machine), *_not_for_gang(one, machine)]
    if lasting:
        return lasting
    if not room.fits(demand):
        return _no_room(one, room, now)
    for kept in plan.kept:
        if kept.worker == machine.id and not (one.gang and one.gang.gang == kept.gang):
            return [_kept(kept, now)]
    return [Obstacle(FREE, "has room now: it is the job's turn in the next pass", "")]


def _wrong_system(machine: Machine, demand: Demand) -> Iterator[Obstacle]:
    if (demand.os and machine.os != demand.os) or (demand.arch and machine.arch != demand.arch):
        has = " ".join(word for word in (machine.os, machine.arch) if word) or "an unknown system"
        wants = " ".join(word for word in (demand.os, demand.arch) if word)
        yield Obstacle(
            10_000, f"runs {has}, the job wants {wants}", "ask for another system, if the job can do with it"
        )


def _too_small(machine: Machine, demand: Demand) -> Iterator[Obstacle]:
    if machine.cores < demand.cpu:
        lacks = f"has {say_count(machine.cores, 'core')}, the job wants {demand.cpu:g}"
        yield Obstacle(100 * _ratio(demand.cpu, machine.cores), lacks, f"lower cpu to {machine.cores:g}")
    if machine.memory < demand.memory:
        lacks = f"has {say_size(machine.memory)} of memory, the job wants {say_size(demand.memory)}"
        yield Obstacle(
            100 * _ratio(demand.memory, machine.memory), lacks, f"lower memory to {_at_most(machine.memory)}"
        )
    if demand.gpus_min and len(large := large_enough(machine, demand)) < demand.gpus_min:
        ours = [gpu for gpu in machine.gpus if is_model(gpu.name, demand.models)]
        if not machine.gpus:
            yield Obstacle(5000, "has no GPU", f"the job wants {describe_gpus(demand)}: join a machine with one")
        elif not ours:
            names = " and ".join(sorted({gpu.name for gpu in machine.gpus}))
            wants = " or ".join(demand.models)
            yield Obstacle(2000, f"has {names}, the job wants {wants}", f"ask for a GPU by its memory, not as {wants}")
        elif not large:
            most = max(gpu.memory for gpu in ours)
            lacks = f"has {say_size(most)} of GPU memory, the job wants {say_size(demand.vram_min)}"
            yield Obstacle(
                100 * _ratio(demand.vram_min, most), lacks, f"lower the GPU memory of the job to {_at_most(most)}"
            )
        else:
            lacks = f"has {say_count(len(large), 'such GPU')}, the job wants {demand.gpus_min}"
            yield Obstacle(100 * _ratio(demand.gpus_min, len(large)), lacks, f"ask for {say_count(len(large), 'GPU')}")


def _wrong_label(machine: Machine, demand: Demand) -> Iterator[Obstacle]:
    for key, value in demand.labels:
        if machine.labels.get(key) != value:
            has = f"is labelled {key}={machine.labels[key]}" if key in machine.labels else f"has no label {key}"
            lacks = f"{has}, the job wants {key}={value}"
            yield Obstacle(1000, lacks, f"leave the label out, or `potluck workers label {machine.name} {key}={value}`")


def _not_allowed(one: Waiting, machine: Machine) -> Iterator[Obstacle]:
    owns = bool(machine.owner) and machine.owner == one.owner
    if one.demand.image and machine.executors.isdisjoint(CONTAINERS):
        yield Obstacle(80, "runs no containers", "install podman there, or leave the image out")
    if machine.accept == "pool":
        yield Obstacle(40, "takes only pool work", "ask its owner to allow jobs: `potluck join --accept all`")
    elif not machine.executors:
        yield Obstacle(60, "has nothing that runs jobs", "run `potluck doctor` there")
    elif not owns and machine.whose == "me":
        yield Obstacle(40, "takes only its owner's jobs", "ask its owner to allow others': `potluck join --from hub`")
    elif not owns and machine.runtime != "any" and machine.executors.isdisjoint(SANDBOXES):
        advice = "install podman or bubblewrap there, or ask its owner to allow it: `potluck join --runtime any`"
        yield Obstacle(50, "has no container runtime, without which its owner takes no foreign code", advice)


def _not_there(one: Waiting, machine: Machine) -> Iterator[Obstacle]:
    if not machine.present:
        yield Obstacle(20, "is away", f"switch `{machine.name}` on, or run `potluck join` there")
    elif machine.draining:
        yield Obstacle(10, "is drained: it takes nothing new", f"`potluck workers undrain {machine.name}`")
    if machine.max_tasks < 1:
        yield Obstacle(40, "takes no jobs at all", "ask its owner to allow one: `potluck join --max-tasks 1`")
    if machine.id in one.avoid:
        yield Obstacle(3, "gave the job back a moment ago", "it is asked again in a few minutes")


def _not_for_gang(one: Waiting, machine: Machine) -> Iterator[Obstacle]:
    place = one.gang
    if place is None:
        return
    if machine.id in place.on:
        yield Obstacle(6000, "has a member of its gang already", "")
    if machine.present and not machine.has_door:
        advice = "start `potluck join` there again, with this version of Potluck"
        yield Obstacle(30, "has no door at which the others could knock", advice)
    if not has_engine(machine, place.engine):
        package = "torchft" if place.engine == "torchft" else "torch"
        lacks = f"has no {package} in its own Python, which the engine {place.engine} needs"
        yield Obstacle(70, lacks, f"install {package} there, or leave the engine to the hub: --gang-engine auto")


def _no_room(one: Waiting, room: Room, now: float) -> list[Obstacle]:
    """The machine is right, and busy: with our jobs, or with something else."""
    demand = one.demand
    lacks = list(_lacks_now(room, demand))
    said = ", and ".join(lacks[:2])
    if room.emptied().fits(demand):
        unknown, at, after = soonest(room, demand, now)
        if not unknown:
            when = say_duration(at - now)
            return [Obstacle(1 + (at - now) / 1e6, said, f"wait: it is free in ~{when} at the latest")]
        names = [held.name or held.job for held in room.held if held.job in after]
        jobs = f"`{names[0]}` ends" if len(names) == 1 else f"{len(names)} jobs there end"
        return [Obstacle(2 + unknown / 1e6, said, f"wait until {jobs}: nobody knows when, they have no --timeout")]
    advice = "other programs use the rest of it: close them there"
    less = _less(room, demand)
    return [Obstacle(5, said, f"{advice}, or {less}" if less else advice)]


def _lacks_now(room: Room, demand: Demand) -> Iterator[str]:
    machine = room.machine
    if room.slots <= 0:
        yield f"runs {say_count(len(room.held), 'job')}, as many as its owner allows"
    if room.cores < round(demand.cpu * 1000):
        yield f"has {room.cores / 1000:g} of {say_count(machine.cores, 'core')} free, the job wants {demand.cpu:g}"
    if room.memory < demand.memory:
        free = say_size(max(0, room.memory))
        yield f"has {free} of memory free, the job wants {say_size(demand.memory)}"
    if room.disk < demand.disk:
        yield f"has {say_size(max(0, room.disk))} of disk free, the job wants {say_size(demand.disk)}"
    if demand.gpus_min and len(able := room.gpus_for(demand)) < demand.gpus_min:
        kinds = large_enough(machine, demand)
        spare = [one for one in room.gpus if one.gpu in kinds and not (one.whole if demand.vram_slice else one.users)]
        if demand.vram_min and len(spare) >= demand.gpus_min:
            most = sorted((one.free for one in spare), reverse=True)[demand.gpus_min - 1]
            yield f"has {say_size(max(0, most))} of GPU memory free, the job wants {say_size(demand.vram_min)}"
        else:
            yield f"has {len(able)} of {say_count(len(kinds), 'GPU')} free, the job wants {demand.gpus_min}"


def _less(room: Room, demand: Demand) -> str:
    """What the job could ask for instead, to fit beside the other programs."""
    empty = room.emptied()
    if empty.memory < demand.memory and empty.memory > 10**9:
        return f"lower memory to {_at_most(empty.memory)}"
    if empty.disk < demand.disk and empty.disk > 10**9:
        return f"lower disk to {_at_most(empty.disk)}"
    free = max((one.free for one in empty.gpus if is_model(one.gpu.name, demand.models)), default=0)
    if free > 10**9 and free < demand.vram_min and demand.gpus_min == 1:
        return f"lower the GPU memory of the job to {_at_most(free)}"
    return ""


def _kept(kept: Reservation, now: float) -> Obstacle:
    if kept.starts_at is None:
        return Obstacle(1.5, f"is kept for `{kept.name}`, which is before it in line", "wait until that one has run")
    left = kept.starts_at - now
    advice = f"with --timeout {int(left // 60)}m or less it may run before that" if left >= 60 else ""
    return Obstacle(
        1.5, f"is kept for `{kept.name}`, which starts there in ~{say_duration(left)} at the latest", advice
    )


def _ratio(wants: float, has: float) -> float:
    return wants / has if has > 0 else 100.0


def _at_most(size_bytes: int) -> str:
    """A size to type that is not larger: 15.8e9 bytes are `15GB`."""
    if size_bytes >= 10**9:
        return f"{size_bytes // 10**9}GB"
    return f"{size_bytes // 10**6}MB"
