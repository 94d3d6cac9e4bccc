"""What the members of a gang wrote in their diaries, and what must hold of it: gang_train.py writes them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gang_train
import torch
from torch import nn

from potluck.domain.order import permutation

Record = dict[str, Any]


@dataclass(frozen=True)
class Life:
    """One process of one member."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem.rpartition("-")[0]

    @property
    def pid(self) -> int:
        return int(self.path.stem.rpartition("-")[2])

    @property
    def diary(self) -> list[Record]:
        lines = self.path.read_text().split("\n")[:-1]  # what follows the last one is being written
        return [json.loads(line) for line in lines]

    def of(self, kind: str) -> list[Record]:
        return [record for record in self.diary if record["kind"] == kind]

    @property
    def committed(self) -> list[Record]:
        return [record for record in self.of("step") if record["committed"]]

    @property
    def newest(self) -> int:
        """The newest committed step; -1: none yet."""
        return max((record["step"] for record in self.committed), default=-1)

    def events(self, what: str) -> list[str]:
        return [record["text"] for record in self.of("event") if record["what"] == what]

    @property
    def end(self) -> Record | None:
        return next(iter(self.of("end")), None)


@dataclass(frozen=True)
class Diaries:
    """Of all lives of all members, by the folder that they are in."""

    folder: Path
    length: int
    batch: int
    epochs: int
    dtype: str = "float64"

    @property
    def task(self) -> dict[str, Any]:
        keys = ("length", "batch", "epochs", "dtype")
        return {"diary": str(self.folder), **{key: getattr(self, key) for key in keys}}

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.length // self.batch)

    def lives(self, name: str = "") -> list[Life]:
        """In the order in which they began; of this member, or of all."""
        lives = [Life(path) for path in self.folder.glob("*.jsonl")]
        born = {life: life.of("begin") for life in lives if name in ("", life.name)}
        return sorted((life for life in born if born[life]), key=lambda life: float(born[life][0]["at"]))

    def newest(self, *names: str) -> int:
        """The newest step that all of these have committed in their present lives, or all members together."""
        lives = [self.lives(name)[-1:] for name in names] if names else [[life] for life in self.lives()]
        return (min if names else max)((life[0].newest if life else -1 for life in lives), default=-1)

    # --- what must hold

    def ledger(self) -> dict[tuple[int, int], list[Record]]:
        """The committed steps by (epoch, start), as each member wrote them.

        All must have written the same. Only the last step of a life, or before a pause of one, may be one that its
        member committed when it was cut off and the others took it again: it heals from them, or is dead.
        """
        steps: dict[tuple[int, int], list[Record]] = {}
        for life in self.lives():
            committed = life.committed
            for record, following in zip(committed, [*committed[1:], None], strict=True):
                is_last = following is None or following["step"] != record["step"] + 1
                steps.setdefault((record["epoch"], record["start"]), []).append(
                    record | {"by": life.name, "is_last": is_last}
                )
        for key, records in steps.items():
            sure = [record for record in records if not record["is_last"]] or records
            steps[key] = kept = [record for record in records if record in sure or _same(record, sure[0])]
            for record in kept:
                assert _same(record, kept[0]), (kept[0], record)
        return steps

    def assert_exactly_once(self) -> None:
        """Each sample entered one committed step of each epoch, and each member computed the ones that were its own."""
        steps = self.ledger()
        for epoch in range(self.epochs):
            seen: Counter[int] = Counter()
            order = order_of(self.length, epoch)
            for (of, start), records in steps.items():
                if of == epoch:
                    seen.update(order[start : start + sum(records[0]["shares"].values())])
                    for record in records:
                        low = start + sum(_before(record["shares"], record["by"]))
                        assert record["mine"] == order[low : low + record["shares"].get(record["by"], 0)], record
            assert seen == Counter(range(self.length)), f"epoch {epoch}: {seen.most_common(3)}, {len(seen)} seen"
        numbers = sorted(records[0]["step"] for records in steps.values())
        assert numbers == list(range(self.steps))

    def losses(self) -> dict[int, float]:
        """The loss of each step's whole batch, where all its members' diaries have their parts."""
        curve: dict[int, float] = {}
        for records in self.ledger().values():
            by = {record["by"]: record["loss_sum"] for record in records}
            shares = records[0]["shares"]
            if all(name in by for name, share in shares.items() if share):
                curve[records[0]["step"]] = sum(by[name] for name in shares if name in by) / sum(shares.values())
        return curve

    def assert_as_on_one_machine(self, *, within: float) -> None:
        """The loss curve and the last weights, bit-equal among the members."""
        ends = [life.end for life in self.lives() if life.end is not None]
        assert ends
        assert all(end["weights"] == ends[0]["weights"] and end["steps"] == self.steps for end in ends)
        expected, weights = on_one_machine(self.length, self.batch, self.epochs, self.dtype)
        curve = self.losses()
        assert len(curve) > 0.8 * self.steps
        furthest = max(abs(loss - expected[step]) for step, loss in curve.items())
        assert furthest < within, f"the loss is {furthest} away from that of one machine"
        for mine, other in zip(ends[0]["weights"], weights, strict=True):
            away = float((torch.tensor(mine, dtype=other.dtype) - other).abs().max())
            assert away < within, f"weights are {away} away from those of one machine"
        assert expected[-1] < 0.7 * expected[0]  # it learns


def _same(one: Record, other: Record) -> bool:
    return (one["step"], one["shares"]) == (other["step"], other["shares"])


def _before(shares: dict[str, int], name: str) -> list[int]:
    names = list(shares)
    return [shares[other] for other in names[: names.index(name)]] if name in shares else []


def order_of(length: int, epoch: int) -> list[int]:
    return permutation(length, 5, 2, epoch)


@lru_cache
def on_one_machine(length: int, batch: int, epochs: int, dtype: str) -> tuple[list[float], list[torch.Tensor]]:
    """The loss of each step, and the weights at the end: plain PyTorch over the same order of samples."""
    kind = getattr(torch, dtype)
    data, model = gang_train.Pictures(length, kind), gang_train.network(kind)
    optimizer = gang_train.optimizer_of(model)
    losses = []
    for epoch in range(epochs):
        order = order_of(length, epoch)
        for start in range(0, length, batch):
            chosen = order[start : start + batch]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.x[chosen]), data.y[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, list(model.state_dict().values())
