"""What would make this gang faster? Looked at now and then, said once.

Every member looks at the same step, at figures of which all hold the same bits: so when `compress="auto"` switches, it does
so everywhere in the same step.
"""

from __future__ import annotations

from collections.abc import Callable

from potluck.domain import gangs
from potluck.domain.gangs import WireVerdict
from potluck.train.gang.profile import Profile, bottleneck
from potluck.train.gang.reduce import Reducer
from potluck.train.gang.state import State

EVERY = 50
"""Steps between two looks."""
_WORTH = 0.3
"""Of a step: with less, a loader is not worth a word."""
_REMEDIES = {
    "load_s": "give gang.loader more workers=, or prepare the data once",
    "outside_s": "the script does something between two steps: do it less often, or only where gang.is_first",
}


class Adviser:
    def __init__(self, state: State, reducer: Reducer, profile: Profile, say: Callable[[str, str], None]) -> None:
        self._state, self._reducer, self._profile, self._say = state, reducer, profile, say
        self._said: set[tuple[str, str]] = set()

    def look(self) -> None:
        """After a committed step, before the next one is planned."""
        if self._state.cursor.step % EVERY:
            return
        self._look_at_members()
        self._look_at_wire()

    def _look_at_members(self) -> None:
        found = bottleneck(self._profile.members or {"": self._profile.means()})
        key = (found.phase, found.member)
        if found.phase in _REMEDIES and found.share >= _WORTH and key not in self._said:
            self._said.add(key)
            self._say("profile", f"{found.sentence}: {_REMEDIES[found.phase]}")

    def _look_at_wire(self) -> None:
        verdict = self.verdict()
        if verdict is None or not verdict.is_bound:
            return
        compression = self._reducer.compression
        if compression.asked == "auto" and compression.now == "none":
            compression.take("fp16")
            text = f"{verdict.sentence.partition('; ')[0]}: from now on they travel as fp16"
            self._say("compress", text)
            return
        key = ("wire", f"{compression.now} {len(self._state.balancer.shares)}")
        if key not in self._said:
            self._said.add(key)
            self._say("profile", verdict.sentence)

    def verdict(self) -> WireVerdict | None:
        """On the network; None as long as the members' paces are not known."""
        balancer = self._state.balancer
        paces = [balancer.fits[name].pace for name in balancer.shares]
        known = [pace for pace in paces if pace is not None]
        if len(known) < 2 or len(known) < len(paces) or not balancer.wire.last_s:
            return None
        now = self._reducer.part_sent(self._reducer.compression.now)
        parts = {way: self._reducer.part_sent(way) for way in ("fp16", "powersgd")}
        size_bytes = int(self._reducer.size_bytes * now)
        ways = {way: part / now for way, part in parts.items() if part < 0.9 * now}
        return gangs.wire_verdict(
            list(balancer.shares.values()), known, balancer.wire, size_bytes=size_bytes, ways=ways
        )
