"""What would a gang of these machines reach, by what each does alone and what the network between them gives?

`forecast` puts the measurements of `potluck gang profile` into the model of gangs.py. What it leaves out: how
well a machine's processor does two things at once, so a gang on one crowded machine reaches less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from potluck.domain.gangs import Pace, Wire, ring_s, split, step_s, uniform, worth_it

BUCKET_BYTES = 25_000_000  # of gradient, in which the library sums it
FORWARD = 1 / 3  # of a step; only then does the backward pass make the first bucket


@dataclass(frozen=True, slots=True)
class Solo:
    """What one machine does alone: a step of b samples takes fixed_s + per_sample_s · b."""

    fixed_s: float
    per_sample_s: float
    samples_per_s: float
    gradient_bytes: int = 0
    device: str = ""


@dataclass(frozen=True, slots=True)
class Way:
    """From one machine to another, as it was found. Not reached: `reason` says why."""

    reached: bool
    rtt_s: float = 0.0
    bytes_per_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Forecast:
    batch: int
    shares: dict[str, int]  # of the machines that make the gang fastest
    step_s: float
    network_s: float  # of the step, in which nobody computes
    uniform_per_s: float  # with equal shares on the same machines
    alone_per_s: float  # the sum of what they do alone
    verdicts: dict[str, str]  # a sentence on each machine that is better left out
    slowest: tuple[str, str] | None  # the pair of machines in it with the slowest way; None: no way is known

    @property
    def samples_per_s(self) -> float:
        return self.batch / self.step_s


def forecast(batch: int, solos: Mapping[str, Solo], ways: Mapping[tuple[str, str], Way]) -> Forecast:
    """The best gang of these machines, with its shares. ShareError if the batch has no sample for each of two."""
    reachable, verdicts = _reachable(solos, ways)
    size_bytes = max(solo.gradient_bytes for solo in solos.values())
    buckets = max(1, -(-size_bytes // BUCKET_BYTES))
    first = FORWARD + (1 - FORWARD) / buckets
    paces = {name: _pace(solos[name], first) for name in reachable}
    wires = {count: _wire(size_bytes, buckets, count, reachable, ways) for count in range(1, len(reachable) + 1)}
    kept, slow = worth_it(batch, paces, wires)
    chosen = [paces[name] for name in kept]
    wire = wires[len(kept)]
    shares = split(batch, chosen, wire)
    seconds = step_s(chosen, shares, wire)
    computing = max(pace.ready_s(share) for pace, share in zip(chosen, shares, strict=True))
    even = step_s(chosen, uniform(batch, len(chosen)), wire)
    return Forecast(
        batch,
        dict(zip(kept, shares, strict=True)),
        seconds,
        seconds - computing,
        batch / even,
        sum(solos[name].samples_per_s for name in kept),
        verdicts | slow,
        _slowest(kept, ways),
    )


def _pace(solo: Solo, first: float) -> Pace:
    return Pace(solo.fixed_s, solo.per_sample_s, solo.fixed_s * first, solo.per_sample_s * first)


def _reachable(
    solos: Mapping[str, Solo], ways: Mapping[tuple[str, str], Way]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The machines that reach one another: of a pair that does not, the slower one stays out."""
    kept, verdicts = sorted(solos), {}
    for (source, target), way in sorted(ways.items()):
        if source in kept and target in kept and not way.reached:
            out = min(source, target, key=lambda name: solos[name].samples_per_s)
            kept.remove(out)
            why = f" ({way.reason})" if way.reason else ""
            verdicts[out] = f"{source} cannot reach {target}{why}: {out} would have to stay out"
    return tuple(kept), verdicts


def _wire(size_bytes: int, buckets: int, count: int, names: Sequence[str], ways: Mapping[tuple[str, str], Way]) -> Wire:
    """What the sum takes with so many of these machines, if the slowest way is among theirs."""
    pair = _slowest(names, ways)
    if count < 2 or pair is None:
        return Wire()
    bytes_per_s = ways[pair].bytes_per_s
    delay_s = max(way.rtt_s for (a, b), way in ways.items() if a in names and b in names) / 2
    last = ring_s(size_bytes // buckets, count, bytes_per_s=bytes_per_s, delay_s=delay_s)
    return Wire(last, last * (buckets - 1))


def _slowest(names: Sequence[str], ways: Mapping[tuple[str, str], Way]) -> tuple[str, str] | None:
    known = [
        pair for pair, way in ways.items() if pair[0] in names and pair[1] in names and way.reached and way.bytes_per_s
    ]
    return min(known, key=lambda pair: (ways[pair].bytes_per_s, pair)) if known else None
