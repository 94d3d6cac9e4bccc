"""Which weights does a lane's child hold, and which newer ones have come to this machine since?"""

from __future__ import annotations

from collections import OrderedDict

from potluck.protocol import WeightFile
from potluck.worker import orders

RUNS_REMEMBERED = 3  # of which the child holds weights; it keeps four


class Held:
    """By run, the version in the child's memory; and for one run the chain from there to the newest here."""

    def __init__(self) -> None:
        self._versions: OrderedDict[str, int] = OrderedDict()
        self._news: list[WeightFile] = []
        self._run = ""  # whose news they are
        self._at = 0.0  # when the last came

    def version(self, run: str) -> int | None:
        return self._versions.get(run)

    def hold(self, run: str, version: int) -> None:
        """The child will have this version."""
        self._versions[run] = version
        self._versions.move_to_end(run)
        while len(self._versions) > RUNS_REMEMBERED:
            self._versions.popitem(last=False)
        if run == self._run:
            self._news = orders.usable(self._news, version) or []

    def forget(self, run: str) -> None:
        """Nobody knows any more how far the child's weights of this run are."""
        self._versions.pop(run, None)

    def clear(self) -> None:
        """The child is gone."""
        self._versions.clear()
        self._news, self._run = [], ""

    def hear(self, run: str, chain: list[WeightFile], now: float) -> None:
        """Newer weights are here."""
        if run in self._versions:
            known = self._news if run == self._run else []
            self._news = orders.extended(known, chain, self._versions[run])
            self._run, self._at = run, now

    def onto(self, run: str, chain: list[WeightFile]) -> list[WeightFile]:
        """The chain, gone on with to the newest version here."""
        return orders.extended(chain, self._news, self._versions.get(run)) if run == self._run else chain

    def news_at(self, run: str) -> float | None:
        """When the last news came that the child could change over to; None if there are none."""
        return self._at if run == self._run and self._news and run in self._versions else None

    def take_news(self, run: str) -> list[WeightFile]:
        """The chain to the newest, which the child will have then."""
        chain, self._news = self._news, []
        self.hold(run, chain[-1].version)
        return chain

    def newest(self, run: str) -> int:
        """The newest version here of a run that the child holds."""
        newest = self._news[-1].version if self._news and run == self._run else -1
        return max(newest, self._versions[run])
