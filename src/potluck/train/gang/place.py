"""Where are the others? What `POTLUCK_GANG` tells a member."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from potluck.domain.balance import POLICIES
from potluck.errors import BadInput

VARIABLE = "POTLUCK_GANG"
ENGINES = ("auto", "torchft", "plain")


@dataclass(frozen=True, slots=True)
class Place:
    """One member's place in its gang. Without a variable: a gang of one."""

    member: str = "alone"
    gang: str = ""  # its name
    address: str = "127.0.0.1"  # of this member, as the others reach it
    lighthouse: str = ""  # of torchft: "http://IP:PORT"
    store: str = ""  # the meeting of the plain engine: "IP:PORT"
    where: str = ""  # a file with the newest {"lighthouse", "store"}, for when they are started elsewhere
    pulse: str = ""  # a file into which the member writes what it does, for its agent to see that it hangs
    least: int = 1
    most: int = 1
    batch: int = 0  # the global batch that --batch asked; 0: the script's own
    at_once: int = 0  # samples that fit into this machine's memory; 0: all
    policy: str = "dynamic"
    seed: int = 0
    engine: str = "auto"
    wait_s: float = 600.0  # for `least` members to be there

    @property
    def is_alone(self) -> bool:
        return not self.lighthouse and not self.store and not self.where

    def now(self) -> Place:
        """With the addresses that the file `where` has by now."""
        if not self.where:
            return self
        try:
            newest = json.loads(Path(self.where).read_text())
            changes = {key: str(newest[key]) for key in ("lighthouse", "store") if newest.get(key)}
        except (OSError, ValueError, AttributeError):
            return self  # it is being written
        return Place(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)


def read(environment: Mapping[str, str] = os.environ) -> Place:
    """The member's place. BadInput if the variable is not what an agent writes."""
    text = environment.get(VARIABLE, "")
    if not text:
        return Place()
    try:
        given = json.loads(text)
        known = {f.name: f for f in fields(Place)}
        place = Place(**{name: _as(known[name].default, value) for name, value in given.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{VARIABLE} is not what a Potluck agent writes ({error}): unset it to train alone") from None
    if place.policy not in POLICIES:
        raise BadInput(f"{VARIABLE} has the policy `{place.policy}`: there are {', '.join(POLICIES)}")
    if place.engine not in ENGINES:
        raise BadInput(f"{VARIABLE} has the engine `{place.engine}`: there are {', '.join(ENGINES)}")
    if not 1 <= place.least <= place.most:
        raise BadInput(f"{VARIABLE} asks for {place.least} to {place.most} members: it must be 1 ≤ least ≤ most")
    if place.address.startswith("127.0.1."):
        raise BadInput(
            f"{VARIABLE} has the address {place.address}, which no other machine can reach (Debian's hosts file gives it "
            "to the machine's own name): the agent must give the address on the network"
        )
    return place


def _as(default: Any, value: Any) -> Any:
    return type(default)(value)
