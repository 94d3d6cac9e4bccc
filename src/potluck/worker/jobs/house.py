"""Which jobs does the owner of this machine allow on it?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from potluck.protocol import JobLease, Rules

LEAVING = "its worker is leaving"


@dataclass(frozen=True)
class House:
    """What the owner of this machine has decided."""

    rules: Rules = field(default_factory=Rules)
    labels: Mapping[str, str] = field(default_factory=dict)
    executor: str = ""  # the only one to use; empty: the best that works
    owner: str = ""  # the person who claimed the machine, as the hub calls them; empty: nobody


def refuse(lease: JobLease, house: House, *, at_work: int, leaving: bool) -> str:
    """Why this machine's owner does not allow this lease, whatever the hub thinks; empty: welcome."""
    rules = house.rules
    if leaving:
        return LEAVING
    if rules.accept == "pool":
        return "this worker's owner lets it work for pool runs only"
    if rules.whose == "me" and not lease.owns_worker:
        return "this worker's owner lets it run their own jobs only"
    if rules.whose == "me" and house.owner and house.owner not in (lease.owner, lease.owner_name):
        return f"this worker belongs to {house.owner}, and the job to {lease.owner_name}"
    if at_work >= max(1, rules.max_tasks):
        return f"this worker's owner lets it run {rules.max_tasks} at once, and it does already"
    return ""
