"""Which job goes to which machine, and why does the other one wait?

    facts ──► place(waiting, machines, usage, limits, now, reach) ──► Plan(placed, waits, order, kept)
                                                                   │
              explain(one, machines, plan, limits, now)  ◄─────────┘   one sentence and what would help
              impossible(demand, machines)                             at submit: nobody could ever hold it

A pass walks the line once (`line.py`) and gives each job the smallest machine that has room for it (`room.py`,
`shelves.py`):

1. jobs that an admin moved to the front, by rank;
2. jobs that have waited for a week, oldest first; then the oldest job of each person who has waited for a day while
   nothing of theirs runs. Nobody starves, whatever others submit;
3. the rest by priority. Waiting lifts a job one point every ten minutes, never above the highest priority that waits;
4. within one priority by what its owner used lately (`fairness.py`), what was placed in this very pass included;
5. then by the time it was queued, then by its id.

The first job that no machine has room for, but some machine could hold, gets a *reservation* (EASY backfill; Lifka,
"The ANL/IBM SP scheduling system", 1995): the machine where it fits soonest. Others may be placed there only if they
end before it starts, or if they leave it the room it needs. If nobody knows when that machine will be free, only what
the reservation leaves over may be used. After each day that it waits, one more machine is kept for it.

A gang (`gang.py`) has its turn with the first of its members that wait: all of them that find a machine of their own are
placed in that pass, if they are as many as it begins with; else none is. Its machines reach each other, everybody reaches
a machine by one address, and what nobody knows yet is asked for (`Plan.knocks`). Of a gang that runs each member has its
own turn. The reservation of a gang is as many machines as it begins with, kept until the last of them is free.
"""

from potluck.domain import fairness as fair
from potluck.domain.placement.decide import place
from potluck.domain.placement.outlook import explain, impossible
from potluck.domain.placement.records import (
    CONTAINERS,
    SANDBOXES,
    Explanation,
    GangPlace,
    Gpu,
    Held,
    Limits,
    Machine,
    Placed,
    Plan,
    Reservation,
    Waiting,
)
from potluck.domain.resources import Demand, Grant

__all__ = [
    "CONTAINERS",
    "SANDBOXES",
    "Demand",
    "Explanation",
    "GangPlace",
    "Gpu",
    "Grant",
    "Held",
    "Limits",
    "Machine",
    "Placed",
    "Plan",
    "Reservation",
    "Waiting",
    "explain",
    "fair",
    "impossible",
    "place",
]
