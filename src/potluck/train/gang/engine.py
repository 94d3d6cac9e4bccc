"""What does a gang ask of the machinery that brings its members together?

An engine agrees on who takes part in a step, brings whoever is behind up to date, sums tensors over the members, and
says whether a step may be committed. It knows nothing of models, data or shares. There are three: `Solo` here,
torchft_engine.py, and plain_engine.py; the latter two pass the same tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from potluck.errors import PotluckError

CONNECT_S = 5.0
"""For members that have just agreed to take part to connect with each other."""
FIRST_PATIENCE_S = 60.0
"""For a sum, as long as nobody knows how long a step takes."""


class Mismatch(PotluckError):
    """This member does not fit to the others; the message says in what."""

    exit_code, status, code = 2, 422, "gang_mismatch"


class Lonely(PotluckError):
    """The others did not come, or are gone."""

    exit_code, status, code = 69, 503, "gang_lonely"


@dataclass(frozen=True, slots=True)
class Card:
    """What a member shows the others when they meet."""

    name: str
    step: int  # committed ones
    papers: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Crew:
    """Who takes part in a step, in the order of their ranks."""

    cards: tuple[Card, ...]
    rank: int
    generation: str  # another one after each change, and after each failure

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(card.name for card in self.cards)

    @property
    def me(self) -> str:
        return self.cards[self.rank].name


class Shared(Protocol):
    """What all members hold the same copy of."""

    @property
    def step(self) -> int:
        """How many steps it has behind it."""

    def card(self) -> Card: ...

    def unfit(self, cards: Sequence[Card]) -> dict[str, str]:
        """Which of these do not fit to the rest, and in what."""

    def save(self, path: Path) -> None: ...

    def load(self, path: Path) -> None: ...


class Engine(Protocol):
    patience_s: float  # how long a sum may take

    def meet(self) -> Crew:
        """Agree on who takes part in the next step. When it returns, this member's state is the newest there is.

        Raises Mismatch if this member does not fit, Lonely if not enough others come.
        """

    def sum(self, tensor: Tensor) -> None:
        """Begin to sum it over the members, in place. All members must begin the same sums in the same order."""

    def finish(self) -> str:
        """Wait until all sums are done. Why they are not, or an empty string."""

    def commit(self, ok: bool) -> bool:
        """Does this member commit the step? Others may have failed where it did not; they will heal from it."""

    def leave(self) -> None: ...


class Solo:
    """A gang of one: no network, no other process."""

    def __init__(self, shared: Shared) -> None:
        self.patience_s = FIRST_PATIENCE_S
        self._shared = shared

    def meet(self) -> Crew:
        return Crew((self._shared.card(),), 0, "solo")

    def sum(self, tensor: Tensor) -> None:
        """It is the sum already."""

    def finish(self) -> str:
        return ""

    def commit(self, ok: bool) -> bool:
        return ok

    def leave(self) -> None:
        """Nobody to leave."""


Say = Callable[[str, str], None]
"""An event: its kind, and a sentence."""


def fits(shared: Shared, cards: Sequence[Card], me: str) -> str:
    """Why these cannot train together, or an empty string. Raises Mismatch if it is this member that does not fit.

    Before the first step nothing is lost by stopping everybody, so everybody's log has the reason.
    """
    unfit = shared.unfit(cards)
    if not unfit:
        return ""
    if me in unfit or all(card.step == 0 for card in cards):
        raise Mismatch(". ".join(unfit.values()))
    return ". ".join(unfit.values())


def lonely(waited_s: float, reason: str) -> str:
    return (
        f"not enough members of the gang came together within {waited_s:g} s ({reason.splitlines()[0][:300]}): "
        "look at `potluck why`, or allow fewer with --gang"
    )
