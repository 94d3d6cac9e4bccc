"""What is asked of a gang: how many machines, which batch, how it is shared out, and what carries it?

`gang: 2..8` in potluck.yaml, or a mapping with the keys below. The rest of the job holds for each member.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from potluck.domain.keys import AMOUNT, TEXT, Key, check_keys, read_switch, read_text, short
from potluck.errors import BadInput


@dataclass(frozen=True)
class GangSpec:
    """How many machines train together, and how. `potluck.yaml`: `gang: 2..8`, or a mapping with these keys."""

    least: int = 2  # without so many no step is taken, and nothing is begun
    most: int = 2
    batch: int = 0  # samples in a step of the whole gang; 0: as the script says
    policy: str = "dynamic"  # dynamic | proportional | uniform: how the batch is shared out
    engine: str = "auto"  # auto | torchft | plain; auto: torchft where all members have it
    compat: bool = False  # an unmodified torchrun script: exactly `most` members with RANK, WORLD_SIZE and MASTER_*


MOST_MEMBERS: Final = 64
MOST_BATCH: Final = 1_000_000
GANG_POLICIES: Final = ("dynamic", "proportional", "uniform")
GANG_ENGINES: Final = ("auto", "torchft", "plain")
GANG_USUAL: Final[Mapping[str, Any]] = {"retries": 10, "retry_on": "any"}
"""What a gang's members have unless it is said otherwise: the others train on, so coming back costs nobody anything."""

GANG_KEYS: Final[Mapping[str, Key]] = {
    "members": Key(
        {**AMOUNT, "examples": ["2..8", 4]},
        "How many machines. 2..8: it begins with two, takes up to eight, and goes on as long as two are there.",
    ),
    "batch": Key(
        {**AMOUNT, "examples": [512]},
        "Samples in a step of the whole gang, whoever is there. Without it: what the script gives to gang.loader.",
    ),
    "policy": Key(
        {**TEXT, "enum": list(GANG_POLICIES), "default": "dynamic"},
        "How the batch is shared out. dynamic: by what is measured, all the time. proportional: by speed, once. "
        "uniform: equally.",
    ),
    "engine": Key(
        {**TEXT, "enum": list(GANG_ENGINES), "default": "auto"},
        "What carries the gang. auto: torchft where all its machines have it, else plain torch.distributed.",
    ),
    "compat": Key(
        {"type": "boolean", "default": False},
        "For an unmodified torchrun script: a fixed number of machines, with RANK, WORLD_SIZE and MASTER_ADDR.",
    ),
}


def check_gang(gang: GangSpec, *, procs: int, network: bool) -> None:
    """Refuse what could not be; `procs` and `network` are the job's."""
    wanted = f"{gang.least}..{gang.most}"
    if gang.least > gang.most:
        raise BadInput(f"gang: members is {wanted}, which counts down: write {gang.most}..{gang.least}")
    if gang.least < 2:
        raise BadInput(
            f"gang: members is {gang.least if gang.least == gang.most else wanted}: a gang has two machines or more; "
            "for one machine leave gang out, the same script trains there alone"
        )
    if gang.most > MOST_MEMBERS:
        raise BadInput(f"gang: members is {wanted}: at most {MOST_MEMBERS} machines train together")
    if gang.policy not in GANG_POLICIES:
        raise BadInput(f"gang: policy is {gang.policy[:80]!r}: it must be one of {', '.join(GANG_POLICIES)}")
    if gang.engine not in GANG_ENGINES:
        raise BadInput(f"gang: engine is {gang.engine[:80]!r}: it must be one of {', '.join(GANG_ENGINES)}")
    if not 0 <= gang.batch <= MOST_BATCH:
        raise BadInput(f"gang: batch is {gang.batch}: it must lie between {gang.most} and {MOST_BATCH:,} samples")
    if 0 < gang.batch < gang.most:
        raise BadInput(
            f"gang: batch is {gang.batch}, which cannot feed {gang.most} machines: each needs a sample of every step. "
            f"Raise it to {gang.most} or more, or ask for at most {gang.batch} machines"
        )
    if procs > 1:
        raise BadInput(f"procs is {procs}, and a gang has one process on each machine: drop procs")
    if not network:
        raise BadInput("network is no, and the members of a gang talk to one another over it: drop one of the two")
    if gang.compat:
        _check_compat(gang)


def _check_compat(gang: GangSpec) -> None:
    """A torchrun script has a world of a fixed size, shares the batch out evenly by itself, and knows no engine of ours."""
    if gang.least != gang.most:
        raise BadInput(
            f"gang: compat needs a fixed number of machines, which becomes WORLD_SIZE, and members is {gang.least}.."
            f"{gang.most}: write {gang.most}; a script with potluck.gang.join() can have a range"
        )
    for name in ("batch", "policy", "engine"):
        if getattr(gang, name) != getattr(GangSpec(), name):
            raise BadInput(
                f"gang: {name} is for scripts with potluck.gang.join(), and a compat script does that by itself: "
                f"drop {name}, or compat"
            )


def gang_to_mapping(gang: GangSpec) -> dict[str, Any] | str | int:
    """As potluck.yaml says it; `read_gang` reads it back equal."""
    members = gang.least if gang.least == gang.most else f"{gang.least}..{gang.most}"
    more = {
        name: getattr(gang, name)
        for name in GANG_KEYS
        if name != "members" and getattr(gang, name) != getattr(GangSpec(), name)
    }
    return {"members": members, **more} if more else members


def read_gang(key: str, value: Any) -> GangSpec:
    """The gang that `gang: …` describes. BadInput begins with `key`."""
    if not isinstance(value, Mapping):
        value = {"members": value}
    check_keys(value, GANG_KEYS, f"{key}: ")
    if "members" not in value:
        raise BadInput(f"{key}: members is missing: how many machines? Write members: 2..8, or --gang 2..8")
    least, most = _read_members(f"{key}: members", value["members"])
    given: dict[str, Any] = {"least": least, "most": most}
    if "batch" in value:
        given["batch"] = _read_batch(f"{key}: batch", value["batch"])
    for name in ("policy", "engine"):
        if name in value:
            given[name] = read_text(f"{key}: {name}", value[name])
    if "compat" in value:
        given["compat"] = read_switch(f"{key}: compat", value["compat"])
    return GangSpec(**given)


def _read_members(key: str, value: Any) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", read_text(key, value).strip(), re.ASCII)
    if not found:
        raise BadInput(f"{key} is {short(value)}: write how many machines, like 4, or from how many to how many, 2..8")
    least = int(found[1])
    return least, int(found[2]) if found[2] else least


def _read_batch(key: str, value: Any) -> int:
    text = value if isinstance(value, str) else f"{value}" if type(value) is int else ""
    if not re.fullmatch(r"[+]?\d{1,9}", text.strip(), re.ASCII) or int(text) < 1:
        raise BadInput(f"{key} is {short(value)}: it is a whole number of samples, like 512")
    return int(text)
