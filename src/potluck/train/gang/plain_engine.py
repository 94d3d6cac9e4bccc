"""How does a gang go on through deaths and arrivals with nothing but torch.distributed?

Before each step all members meet (meeting.py). Where the crew is another one than before, or a sum has failed, they form a
new Gloo group in the same process: the first member's own store tells the others where to connect. Nobody restarts.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from potluck.errors import PotluckError
from potluck.train.gang import groups, healing
from potluck.train.gang.engine import (
    CONNECT_S,
    FIRST_PATIENCE_S,
    Card,
    Crew,
    Lonely,
    Mismatch,
    Say,
    Shared,
    fits,
    lonely,
)
from potluck.train.gang.meeting import Line
from potluck.train.gang.place import Place

_AGAIN_S = 0.2


class PlainEngine:
    def __init__(self, place: Place, shared: Shared, say: Say) -> None:
        self.patience_s = FIRST_PATIENCE_S
        self._place, self._shared, self._say = place, shared, say
        self._line: Line | None = None
        self._store = groups.own_store(place.address)
        self._giver = healing.Giver(place.address, shared.save)
        self._group: groups.Group = None
        self._generation = ""
        self._works: list[Any] = []
        self._shown: list[Any] = []  # the members' names, papers and contacts, as the meeting told last

    # --- meeting

    def meet(self) -> Crew:
        deadline = time.monotonic() + self._place.wait_s
        while True:
            try:
                crew = self._try(max(deadline - time.monotonic(), 1.0))
            except Mismatch:
                raise
            except (OSError, ValueError, RuntimeError, PotluckError) as error:
                self._drop()
                crew, reason = None, str(error)
            else:
                reason = "some that do not fit are still here"
            if crew is not None:
                return crew
            if time.monotonic() > deadline:
                raise Lonely(lonely(self._place.wait_s, reason))
            self._say("retry", f"{self._place.member}: {reason}")
            time.sleep(_AGAIN_S)

    def _try(self, wait_s: float) -> Crew | None:
        answer = self._ask(wait_s)
        self._shown = answer.get("cards", self._shown)
        cards = tuple(
            Card(name, step, papers) for (name, papers, _), step in zip(self._shown, answer["steps"], strict=True)
        )
        contacts = [contact for _, _, contact in self._shown]
        crew = Crew(cards, int(answer["me"]), str(answer["generation"]))
        if crew.generation != self._generation:
            try:
                reason = fits(self._shared, cards, self._place.member)
            except Mismatch:
                self.leave()
                raise
            if reason:
                self._say("unfit", reason)
                self._drop()
                return None  # it leaves by itself
            self._connect(crew, contacts)
        self._heal(crew, contacts)
        return crew

    def _ask(self, wait_s: float) -> dict[str, Any]:
        card = self._shared.card()
        contact = {"store": f"{self._place.address}|{self._store.port}", "state": self._giver.url}
        try:
            if self._line is None:
                self._line = Line(self._place.now().store, self._place.member, timeout_s=CONNECT_S)
            line = self._line
            return line.meet(
                card.step,
                [card.name, card.papers, contact],
                broken=self._group is None,
                timeout_s=wait_s,
                is_elsewhere=lambda: self._place.now().store != line.place,
            )
        except (OSError, ValueError):
            if self._line is not None:
                self._line.close()
            self._line = None
            raise

    def _connect(self, crew: Crew, contacts: list[dict[str, str]]) -> None:
        self._drop()
        first = _most(crew.cards)
        host, _, port = contacts[first]["store"].rpartition("|")
        store: Store = self._store
        if first != crew.rank:
            store = groups.client_store(host, int(port))
        self._group = groups.connect(PrefixStore(crew.generation, store), crew.rank, crew.cards, self._place.address)
        self._generation = crew.generation

    def _heal(self, crew: Crew, contacts: list[dict[str, str]]) -> None:
        """Who is behind takes the state from one that is not. Before the first step all take the first one's."""
        newest = max(card.step for card in crew.cards)
        up_to_date = [i for i, card in enumerate(crew.cards) if card.step == newest]
        if newest == 0:
            up_to_date = up_to_date[:1]
        behind = [i for i in range(len(crew.cards)) if i not in up_to_date]
        givers = {giver: up_to_date[n % len(up_to_date)] for n, giver in enumerate(behind)}
        if crew.rank in givers.values():
            self._giver.offer(newest)
        if crew.rank in givers:
            url = contacts[givers[crew.rank]]["state"]
            healing.take(url, newest, silence_s=FIRST_PATIENCE_S, use=self._shared.load)

    # --- summing

    def sum(self, tensor: Tensor) -> None:
        if self._group is not None:
            self._works.append(self._group.allreduce([tensor], groups.summing(self.patience_s)))

    def finish(self) -> str:
        failure = "" if self._group is not None else "the group is gone"
        while self._works:  # one by one let go: as long as a work is held, so are the group's connections
            try:
                self._works.pop().wait()  # the last first: it is the figures, over Gloo (groups.py)
            except RuntimeError as error:
                failure = failure or str(error)
                groups.abort(self._group)
        if failure:
            self._drop()  # so that the others, who may wait for us, notice at once
        return failure

    def commit(self, ok: bool) -> bool:
        if not ok:
            self._drop()
        return ok

    def leave(self) -> None:
        self._drop()
        if self._line is not None:
            self._line.close()
        self._line = None
        self._giver.close()

    def _drop(self) -> None:
        groups.abort(self._group)
        self._works.clear()
        self._group = None
        self._generation = ""


def _most(cards: tuple[Card, ...]) -> int:
    return max(range(len(cards)), key=lambda i: (cards[i].step, -i))
