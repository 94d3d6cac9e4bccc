"""Which share of the batch does each machine of a gang get, and what is a gang worth?

A member needs `a + c·b` seconds for `b` samples, up to the moment when the last bucket of its gradient is ready. All
wait for the slowest, then the sum over all machines takes its own time, part of it hidden behind the backward pass:

    T = max( max_i(a_i + c_i·b_i) + last,  max_i(r_i + s_i·b_i) + others + last )

with `r_i + s_i·b` for the first bucket, `others` for the sum of all buckets but the last, and `last` for that one. It is
the model of Cannikin (Nie et al. 2024, arXiv 2402.05302), whose three cases fall out of the one formula. A share that
does not fit into a member's memory is computed in k parts, and `a` is paid k times.

    split, split_small     the shares with the shortest step: whole numbers that sum to the batch, within the bounds
    uniform, proportional  the two simpler ways, to compare
    worth_it               is a machine worth its place?
    wire_verdict           is the network what all wait for, and what would help?
    Noise                  would another batch be better?

How the shares follow what is measured is the business of balance.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from potluck.errors import BadInput

NO_BOUND = 1 << 40
_TINY_S = 1e-9


class ShareError(BadInput):
    """A batch that these machines cannot share."""

    code = "bad_share"


@dataclass(frozen=True, slots=True)
class Pace:
    """What a step costs one member. Seconds, and seconds per sample."""

    base_s: float  # a: what a step costs before its first sample
    sample_s: float  # c
    first_base_s: float = 0.0  # r: until the first bucket of the gradient is ready; with first_sample_s 0: not known
    first_sample_s: float = 0.0  # s
    least: int = 1  # samples a step; fewer make no sense (BatchNorm)
    most: int = NO_BOUND  # and never more
    at_once: int = NO_BOUND  # samples that fit into its memory; a larger share is computed in parts

    def parts(self, share: int) -> int:
        """Into how many parts its memory cuts a share."""
        return max(1, -(-share // self.at_once))

    def ready_s(self, share: int) -> float:
        """When its last bucket is ready."""
        return self.base_s * self.parts(share) + self.sample_s * share

    def first_s(self, share: int) -> float:
        """When its first bucket is ready. Only the last part's gradient is summed over the members."""
        parts = self.parts(share)
        last = -(-share // parts)
        before = self.base_s * (parts - 1) + self.sample_s * (share - last)
        return before + self.first_base_s + self.first_sample_s * last

    def scaled(self, factor: float) -> Pace:
        """As it would be if everything took `factor` times as long."""
        return replace(
            self,
            base_s=self.base_s * factor,
            sample_s=self.sample_s * factor,
            first_base_s=self.first_base_s * factor,
            first_sample_s=self.first_sample_s * factor,
        )


@dataclass(frozen=True, slots=True)
class Wire:
    """What the sum over all members takes, in seconds: of the last bucket, and of all the others."""

    last_s: float = 0.0
    others_s: float = 0.0


INSTANT = Wire()


def step_s(paces: Sequence[Pace], shares: Sequence[int], wire: Wire = INSTANT) -> float:
    """How long a step takes with these shares."""
    return max(_cost(pace, share, wire) for pace, share in zip(paces, shares, strict=True))


def _cost(pace: Pace, share: int, wire: Wire) -> float:
    """The step's time if this member were the slowest; it never falls as the share grows."""
    return max(pace.ready_s(share) + wire.last_s, pace.first_s(share) + wire.others_s + wire.last_s)


# --- splitting ------------------------------------------------------------------------------------------------------


def split(batch: int, paces: Sequence[Pace], wire: Wire = INSTANT) -> list[int]:
    """The shares of `batch` with the shortest step. Raises ShareError when the bounds leave no room for it.

    The samples that fit into a step of T seconds grow with T, so T is found by bisection and rounded down to whole
    samples; each sample that is missing then goes where it delays the step least.
    """
    check(batch, paces)
    return _split(batch, paces, wire)


def split_small(batch: int, paces: Sequence[Pace], wire: Wire = INSTANT) -> list[int]:
    """The same for the last batch of an epoch, which may leave some members without a sample."""
    return _split(batch, [replace(pace, least=0) for pace in paces], wire)


def check(batch: int, paces: Sequence[Pace]) -> None:
    """ShareError if the members' bounds leave no room for the batch."""
    if not paces:
        raise ShareError("a gang without members cannot share a batch")
    least, most = sum(p.least for p in paces), sum(p.most for p in paces)
    if batch < least:
        raise ShareError(
            f"a batch of {batch} cannot feed {len(paces)} members that need {least} samples together: "
            f"raise the batch to at least {least}, or use fewer machines"
        )
    if batch > most:
        raise ShareError(
            f"a batch of {batch} does not fit: these {len(paces)} members take at most {most} samples together: "
            "use a smaller batch, or more machines"
        )


def _split(batch: int, paces: Sequence[Pace], wire: Wire) -> list[int]:
    low, high = 0.0, max(_cost(p, min(batch, p.most), wire) for p in paces)
    for _ in range(50):
        middle = (low + high) / 2
        if sum(_fits(p, middle, wire, batch) for p in paces) < batch:
            low = middle
        else:
            high = middle
    shares = [int(_fits(p, low, wire, batch)) for p in paces]
    heap = [(_cost(p, b + 1, wire), i) for i, (p, b) in enumerate(zip(paces, shares, strict=True)) if b < p.most]
    heapq.heapify(heap)
    for _ in range(batch - sum(shares)):
        _, i = heapq.heappop(heap)
        shares[i] += 1
        if shares[i] < paces[i].most:
            heapq.heappush(heap, (_cost(paces[i], shares[i] + 1, wire), i))
    return shares


def _fits(pace: Pace, seconds: float, wire: Wire, batch: int) -> float:
    """How many samples, not always a whole number, a member may have in a step of so many seconds."""
    if pace.at_once < batch:
        return _fits_in_parts(pace, seconds, wire, batch)
    room = (seconds - wire.last_s - pace.base_s) / max(pace.sample_s, _TINY_S)
    if pace.first_sample_s > 0:
        room = min(room, (seconds - wire.last_s - wire.others_s - pace.first_base_s) / pace.first_sample_s)
    return min(max(room, float(pace.least)), float(pace.most))


def _fits_in_parts(pace: Pace, seconds: float, wire: Wire, batch: int) -> int:
    """With a stair at each full memory there is no formula, but it still only rises."""
    low, high = pace.least, max(pace.least, min(pace.most, batch))
    while low < high:
        middle = (low + high + 1) // 2
        if _cost(pace, middle, wire) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low


def uniform(batch: int, members: int) -> list[int]:
    """Equal shares, as plain DistributedDataParallel has them; the first ones get what is left over."""
    return [batch // members + (i < batch % members) for i in range(members)]


def proportional(batch: int, samples_per_s: Sequence[float]) -> list[int]:
    """Shares in proportion to speed, at least one sample each, rounded by largest remainder."""
    spare = batch - len(samples_per_s)  # every member gets one sample before any gets two
    if spare < 0:
        raise ShareError(f"a batch of {batch} cannot feed {len(samples_per_s)} members: raise it")
    total = sum(samples_per_s)
    exact = [batch * speed / total for speed in samples_per_s]
    shares = [max(1, int(part)) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder * 2:
        if sum(shares) < batch:
            shares[i] += 1
    while sum(shares) > batch:  # the ones that were lifted to a sample are paid by the largest
        shares[max(range(len(shares)), key=lambda i: (shares[i], -i))] -= 1
    return shares


# --- verdicts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Noise:
    """The gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162), from any split of the batch.

    With w_i = b_i/B and q = Σ w_i|g_i|²: E q = |G|² + nS/B and E|g|² = |G|² + S/B, so both follow from one step.
    """

    signal: float = 0.0  # |G|², smoothed
    noise: float = 0.0  # S = tr Σ, smoothed
    weight: float = 0.0  # of the steps seen so far

    @property
    def scale(self) -> float:
        """The batch beyond which more samples a step stop paying; 0: cannot be told yet."""
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else 0.0

    def seen(self, shares: Sequence[int], squares: Sequence[float], square: float, keep: float = 0.95) -> Noise:
        """One step: each member's |g_i|² before the sum, and |g|² after it, all of mean gradients."""
        parts = [(share, local) for share, local in zip(shares, squares, strict=True) if share > 0]
        members, batch = len(parts), sum(shares)
        if members < 2:
            return self
        q = sum(share / batch * local for share, local in parts)
        noise = batch * (q - square) / (members - 1)
        signal = (members * square - q) / (members - 1)
        weight = keep * self.weight + (1 - keep)
        share = (1 - keep) / weight  # as if the average had begun with the first step
        return Noise(self.signal + share * (signal - self.signal), self.noise + share * (noise - self.noise), weight)


def worth_it(
    batch: int, paces: Mapping[str, Pace], wires: Mapping[int, Wire]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which members make the gang fastest, and a sentence on each that would slow it.

    `wires`: what the sum takes with so many members; it grows with them, so a slow laptop can cost more than it gives.
    Exact up to eight machines; beyond, the one that is missed least is taken out again and again.
    """
    best: tuple[float, tuple[str, ...]] = (float("inf"), ())
    for names in _candidates(batch, paces, wires):
        seconds = _gang_s(batch, paces, names, wires)
        if seconds < best[0] or (seconds == best[0] and len(names) > len(best[1])):
            best = (seconds, names)
    seconds, kept = best
    verdicts = {}
    for name in sorted(paces):
        if kept and name not in kept:
            slower = _gang_s(batch, paces, (*kept, name), wires) / seconds - 1
            verdicts[name] = f"{name} would make a step {max(slower, 0):.0%} slower: better as a spare"
    return kept, verdicts


def _candidates(batch: int, paces: Mapping[str, Pace], wires: Mapping[int, Wire]) -> Iterator[tuple[str, ...]]:
    names = tuple(sorted(paces))
    while len(names) > 8:
        yield names
        less = [tuple(other for other in names if other != name) for name in names]
        names = min(less, key=lambda rest: _gang_s(batch, paces, rest, wires))
    for count in range(1, len(names) + 1):
        yield from combinations(names, count)


def _gang_s(batch: int, paces: Mapping[str, Pace], names: Sequence[str], wires: Mapping[int, Wire]) -> float:
    """A step of these members; infinite if they cannot share the batch."""
    chosen = [paces[name] for name in names]
    if not sum(p.least for p in chosen) <= batch <= sum(p.most for p in chosen):
        return float("inf")
    wire = wires.get(len(chosen), INSTANT)
    return step_s(chosen, _split(batch, chosen, wire), wire)


def ring_s(size_bytes: int, members: int, *, bytes_per_s: float, delay_s: float) -> float:
    """What a ring all-reduce of so many bytes takes (Patarasuk and Yuan 2009)."""
    if members < 2:
        return 0.0
    return 2 * (members - 1) / members * size_bytes / bytes_per_s + 2 * (members - 1) * delay_s


@dataclass(frozen=True, slots=True)
class WireVerdict:
    """What the network costs a gang. Seconds are those of a step."""

    step_s: float
    share: float  # of the step, that goes into waiting for sums that no computation hides
    offers: dict[str, float]  # seconds, by way of compression, at best
    gang_per_s: float  # samples
    alone_per_s: float  # of all members together, each by itself
    sentence: str  # empty: the network is not what they wait for

    @property
    def is_bound(self) -> bool:
        return bool(self.sentence)


BOUND = 0.25
"""Of a step: with less, nothing that compression does is worth its loss."""


def wire_verdict(
    shares: Sequence[int], paces: Sequence[Pace], wire: Wire, *, size_bytes: int, ways: Mapping[str, float]
) -> WireVerdict:
    """Does the sum over the members hold this gang back, and what would help?

    `ways`: of each way of compression that is not in use, how much it sends of what is sent now. In pool mode machines
    train by themselves and send seldom, so they reach the sum of what each does alone, though a sample teaches less there:
    it is worth a word only where a gang would reach less than half of that.
    """
    batch = sum(shares)
    now_s, free_s = step_s(paces, shares, wire), step_s(paces, shares)
    offers = {way: step_s(paces, shares, Wire(wire.last_s * part, wire.others_s * part)) for way, part in ways.items()}
    gang_per_s = batch / max(now_s, _TINY_S)
    alone_per_s = sum(batch / max(pace.ready_s(batch), _TINY_S) for pace in paces)
    share = 1 - free_s / max(now_s, _TINY_S)
    text = ""
    if share >= BOUND:
        text = (
            f"the network holds the gang back: waiting for the sum of {_bytes(size_bytes)} takes {share:.0%} of a step "
            f"({(now_s - free_s) * 1e3:.0f} of {now_s * 1e3:.0f} ms)"
        )
        if offers:
            steps = ", ".join(f'{seconds * 1e3:.0f} ms with "{way}"' for way, seconds in offers.items())
            text += f"; gang.wrap(…, compress=…) could make it {steps}"
        best_per_s = batch / max(min([now_s, *offers.values()]), _TINY_S)
        if best_per_s < alone_per_s / 2:
            text += (
                f"; pool mode would be faster: by themselves these machines compute {alone_per_s:.0f} samples/s, "
                f"and {best_per_s:.0f} at best as a gang"
            )
    return WireVerdict(now_s, share, offers, gang_per_s, alone_per_s, text)


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.0f} kB"
