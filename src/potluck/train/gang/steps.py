"""One step's life, from its batch to its commit.

    epoch → begin            meet the others (heal, if behind) → shares → this member's samples
    sum_up                   at the end of the backward pass: gradients and figures are summed over all members
    step                     all look at the same report → commit, and only then the weights and the cursor move

A step that fails anywhere before its commit is given up by all and taken again, with whoever is left.
"""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from potluck.domain.balance import Replan
from potluck.errors import BadInput, PotluckError
from potluck.train.gang import report
from potluck.train.gang.advice import Adviser
from potluck.train.gang.engine import FIRST_PATIENCE_S, Crew, Engine
from potluck.train.gang.loader import Loader, Plan, plan
from potluck.train.gang.norms import Norms
from potluck.train.gang.profile import Profile, StepRecord, Times
from potluck.train.gang.pulse import Pulse
from potluck.train.gang.reduce import Reducer
from potluck.train.gang.report import Report, Row
from potluck.train.gang.state import State
from potluck.train.gang.voice import Voice

LEAST_PATIENCE_S = 2.0
LOAD_PATIENCE_S = 60.0
"""For a batch to be read: a disk that wakes up is no reason to end a member, though the others go on without it."""
NEWCOMER_S = 15.0
"""For the first steps of a member: a GPU that wakes up, a model that is compiled."""
COMPARE_EVERY = 50
"""Steps between comparisons of the members' weights."""
NOISE_EVERY = 5
MOST_SKIPPED = 25
_SLOW_BYTES_PER_S = 10e6
"""What a newcomer's state is expected to come with, at worst."""


@dataclass(slots=True)
class _Step:
    """What is open between a batch and its commit."""

    plan: Plan
    crew: Crew
    meet_s: float
    began_at: float
    weights: list[float]  # of the parts so far, for the count by which the sum is divided
    at_part: int = 0
    load_s: float = 0.0
    ready_s: float = 0.0  # since began_at, like the next two
    forward_s: float = 0.0
    summed_s: float = 0.0
    optimizer_s: float = 0.0
    square: float | None = None  # |g|² of the whole batch, where it was asked
    failure: str = ""
    report: Report | None = None

    @property
    def is_last_part(self) -> bool:
        return self.at_part == len(self.plan.parts) - 1

    @property
    def by_member(self) -> dict[str, int]:
        return dict(zip(self.crew.names, self.plan.shares, strict=True))


class Steps:
    """Of one member. It is made when everything is known, at the first batch."""

    def __init__(
        self,
        state: State,
        loader: Loader,
        reducer: Reducer,
        norms: Norms,
        engine: Engine,
        *,
        loss: str,
        at_once: int,
        pulse: Pulse,
        voice: Voice,
    ) -> None:
        self.state = state
        self.crew: Crew | None = None
        self.profile = Profile()
        self.committed = False  # did the last step change the weights?
        self.max_norm: float | None = None
        self.figures = report.Figures()
        self.means: dict[str, float] = {}  # the newest of the figures, over all members
        self.publish: Callable[[int, Mapping[str, float]], None] = lambda step, means: None
        self.whole: Callable[[int], int] = lambda step: loader.batch  # the batch of a step; a trial varies it
        self._loader, self._reducer, self._norms, self._engine = loader, reducer, norms, engine
        self._loss, self._at_once, self._pulse, self._voice = loss, at_once, pulse, voice
        self._open: _Step | None = None
        self._has_met = False  # and no step was opened since
        self._was_given_up = False
        self._grace = 0  # steps for which a newcomer may be slow
        self._tail_s = self._after_first_s = 0.0
        self._ended_at = 0.0
        self._last_share = 0.0
        self._times = Times()  # of the last committed step
        self._adviser = Adviser(state, reducer, self.profile, voice.say)
        atexit.register(engine.leave)

    def leave(self) -> None:
        atexit.unregister(self._engine.leave)
        self._engine.leave()
        self.crew = None

    # --- between steps

    def arrive(self) -> None:
        """Meet the others, so that this member is where they are.

        Who has met takes part in the step that follows: the others wait for it. Only at the end of an epoch nothing
        follows, which everybody sees by the cursor.
        """
        state, loads = self.state, self.state.loads
        self._pulse.beat("meet", state.cursor.step, 0.0)
        crew = self._engine.meet()
        self._voice.step, self._voice.is_first = state.cursor.step, crew.rank == 0
        if state.loads != loads and state.cursor.step:
            self._voice.say("healed", f"{state.name} took over the state of step {state.cursor.step}")
        if self.crew is None or crew.generation != self.crew.generation:
            self._welcome(crew)
        self._has_met = state.cursor.place < self._loader.length
        if not self._has_met:
            state.cursor.epoch, state.cursor.place = state.cursor.epoch + 1, 0

    def _welcome(self, crew: Crew) -> None:
        """Another crew, or the same one after a failure. Everybody does this in the same state."""
        before = set(self.crew.names) if self.crew is not None else set()
        caps = {card.name: int(card.papers["at_once"]) for card in crew.cards}
        told = self.state.balancer.members_changed(crew.names, at_once=caps)
        self.crew = crew
        self._tail_s = self._after_first_s = 0.0
        if set(crew.names) - before:
            self._grace = 2
        if set(crew.names) != before and crew.generation != "solo":
            self._voice.say("left" if before - set(crew.names) else "joined", _sentence(told))

    def epoch(self, wanted: int) -> Iterator[Any]:
        """One pass of the script over the loader: its `wanted`-th epoch, unless the gang is further than that."""
        state = self.state
        self._discard()
        while state.cursor.epoch <= wanted:
            if state.cursor.epoch < wanted:  # the script broke out of the epoch before
                state.cursor.epoch, state.cursor.place = wanted, 0
            step = self._begin(wanted)
            if step is None:
                return
            batches = self._loader.batches(step.plan, self._following(step.plan))
            for at, part in enumerate(step.plan.parts):
                self._pulse.beat("load", state.cursor.step, LOAD_PATIENCE_S)
                began_at = time.perf_counter()
                batch = next(batches)
                step.load_s += time.perf_counter() - began_at
                self._pulse.beat("compute", state.cursor.step, self._engine.patience_s)
                step.at_part = at
                step.weights.append(float(part))
                self._reducer.part(self._factor(step), is_last=step.is_last_part)
                yield batch
            self._need_step()

    def _begin(self, wanted: int) -> _Step | None:
        """Meet, and open the next step; None at the end of the epoch."""
        came_at = time.perf_counter()
        if not self._has_met:
            self.arrive()
        state, crew = self.state, self.crew
        if state.cursor.epoch != wanted or crew is None:
            return None
        self._has_met = False
        now = time.perf_counter()
        batch = min(self.whole(state.cursor.step), self._loader.length - state.cursor.place)
        shares = list(state.balancer.shares_of(batch).values())
        made = plan(state.cursor.epoch, state.cursor.place, shares, crew.rank, at_once=self._at_once)
        self._engine.patience_s = self._patience_s()
        self._open = _Step(made, crew, now - came_at, now, [])
        self.committed = False
        self._norms.remember()
        self._reducer.open(self._engine.sum, is_alone=len(crew.cards) == 1)
        return self._open

    def _following(self, step: Plan) -> Plan | None:
        """What the next step will be if nothing changes."""
        start = step.start + step.batch
        batch = min(self.whole(self.state.cursor.step + 1), self._loader.length - start)
        if batch < 1:
            return None
        shares = list(self.state.balancer.shares_of(batch).values())
        return plan(step.epoch, start, shares, step.rank, at_once=self._at_once)

    def _patience_s(self) -> float:
        """How long the others may take: derived from the steps seen, never set by hand."""
        usual = max(LEAST_PATIENCE_S, 5 * self.profile.p99_s())
        if self._grace <= 0 and self.profile.recent:
            return usual
        first_s = NEWCOMER_S if self.profile.recent else FIRST_PATIENCE_S
        return max(usual, first_s) + 3 * self._reducer.size_bytes / _SLOW_BYTES_PER_S

    # --- within a step

    def count(self, number: float) -> None:
        """Of what the loss of the present part is the mean, if not of its samples."""
        step = self._open
        if step is None:
            raise BadInput("gang.count belongs between a batch of gang.loader and loss.backward()")
        if step.plan.share:
            step.weights[-1] = float(number)
            self._reducer.weigh(self._factor(step))

    def log(self, values: Mapping[str, Any]) -> None:
        if "step" in values:
            raise BadInput("gang.log counts the steps itself: leave `step` out, or give the figure another name")
        weight = float(self._open.plan.share) if self._open is not None else self._last_share
        for name, value in values.items():
            number = float(value)
            if weight and math.isfinite(number):
                self.figures.add(name, number, weight)

    @property
    def holds_gradients(self) -> bool:
        """More parts of this member's share are to come."""
        return self._open is not None and not self._open.is_last_part

    @property
    def has_moved(self) -> bool:
        """Has the training gone on with the last batch? Not if it is to be taken again, or was only a part."""
        if self._open is None:
            return not self._was_given_up
        return self._open.is_last_part and self._open.report is not None

    def _factor(self, step: _Step) -> float:
        """What turns the gradient of the present part into its place in Σ ÷ planned batch."""
        if not step.plan.share or not step.weights[-1]:
            return 0.0
        return (step.weights[-1] if self._loss == "mean" else 1.0) / step.plan.batch

    def sum_up(self) -> None:
        """Called at the end of the backward pass of a share's last part."""
        step, reducer, state = self._open, self._reducer, self.state
        assert step is not None
        size, rank = len(step.crew.cards), step.crew.rank
        square, first_s, ready_s = reducer.launch_rest()
        before = self._times
        row = Row(
            count=sum(step.weights) if step.plan.share else 0.0,
            ready_s=ready_s,
            first_s=first_s,
            tail_s=self._tail_s,
            after_first_s=self._after_first_s,
            square=square if math.isfinite(square) else 0.0,
            is_bad=float(not math.isfinite(square)),
            plan=report.fingerprint(step.plan.epoch, step.plan.start, step.plan.shares),
            rate=_rates(state.optimizer),
            weights=self._weights_now() if size > 1 and state.cursor.step % COMPARE_EVERY == 0 else 0.0,
            meet_s=before.meet_s,
            load_s=before.load_s,
            forward_s=before.forward_s,
            backward_s=before.backward_s,
            optimizer_s=before.optimizer_s,
            outside_s=before.outside_s,
        )
        norms = self._norms.share(float(step.plan.share))
        vector = report.write(
            row, rank=rank, size=size, used=reducer.used(), norms=norms, figures=self.figures.places_and_sums()
        )
        self._pulse.beat("sum", state.cursor.step, self._engine.patience_s)
        summed = reducer.launch_last(vector)
        step.failure = self._engine.finish() or reducer.unpack(self._engine.finish)
        step.ready_s, step.forward_s = ready_s, reducer.forward_s
        step.summed_s = time.perf_counter() - step.began_at
        if step.failure:
            reducer.clear()
            return
        self._tail_s, self._after_first_s = step.summed_s - ready_s, step.summed_s - first_s
        seen = report.read(summed(), size=size, parameters=len(reducer.parameters))
        reducer.show(seen.used, step.plan.batch / seen.count if seen.count > 0 else 0.0)
        if size > 1 and state.cursor.step % NOISE_EVERY == 0:
            step.square = reducer.square()
        step.report = seen

    def _weights_now(self) -> float:
        return report.fingerprint_of([*self.state.model.parameters(), *self._norms.tensors()])

    # --- the commit

    def step(self, inner: Callable[[], Any]) -> Any:
        """What optimizer.step() does. `inner` changes the weights."""
        step = self._open
        if step is None:
            raise BadInput("optimizer.step() without a batch of gang.loader before it")
        if not step.is_last_part:
            return None
        if not self._reducer.is_over:
            self.sum_up()  # the loss does not depend on any parameter
        if step.report is None:
            return self._give_up(step, step.failure)
        bad = self._judge(step, step.report)
        if self.max_norm is not None and not bad:
            self._clip(self.max_norm)
        if not self._engine.commit(True):
            return self._give_up(step, "the others did not agree")
        began_at = time.perf_counter()
        result = None if bad else inner()
        step.optimizer_s = time.perf_counter() - began_at
        self._close(step, step.report, bad)
        return result

    def _judge(self, step: _Step, seen: Report) -> list[str]:
        """Do all agree, and is the gradient a number? The names of those whose is not."""
        names = step.crew.names
        if report.odd_ones([row.plan for row in seen.rows]):
            raise PotluckError("the members of the gang disagree on the step's shares: this is a fault of Potluck's")
        if seen.count <= 0 and not any(row.is_bad for row in seen.rows):
            raise BadInput("no member counted a sample in this step: gang.count was 0 on all of them")
        if odd := report.odd_ones([row.rate for row in seen.rows]):
            raise BadInput(
                f"{names[odd[0]]} has another learning rate than the other members: give the scheduler to "
                "gang.keep(scheduler=…), so that newcomers get it, and step it once for each batch or epoch"
            )
        for i in report.odd_ones([row.weights for row in seen.rows]):
            self._voice.say("drift", f"{names[i]}'s weights drifted from the others': it takes theirs over")
            if i == step.crew.rank:
                self.state.has_drifted = True
        return [name for name, row in zip(names, seen.rows, strict=True) if row.is_bad]

    def _clip(self, most: float) -> None:
        norm = math.sqrt(self._reducer.square())
        if norm > most:
            self._reducer.scale(most / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ does

    def _close(self, step: _Step, seen: Report, bad: Sequence[str]) -> None:
        """The step is committed: now everything moves."""
        state = self.state
        if bad:
            self._norms.forget()
            self._skip(bad)
        else:
            self._norms.settle(seen.norms, float(step.plan.batch))
            self._reducer.settle()
            state.skipped = 0
            state.noise = report.noise_seen(state.noise, seen, step.plan.shares, step.square)
        state.cursor.place += step.plan.batch
        state.cursor.step += 1
        self.committed, self._was_given_up = not bad, False
        self._grace -= 1
        self._last_share = float(step.plan.share)
        if means := self.figures.means(seen.figures):
            self.means.update(means)
            self.publish(state.cursor.step, means)
        self.figures = report.Figures()
        self._balance(step, seen)
        self._finish(step, is_committed=True, is_skipped=bool(bad))
        self._adviser.look()
        if state.skipped >= MOST_SKIPPED:
            raise BadInput(
                f"the gradient was not finite {MOST_SKIPPED} times in a row, last on {' and '.join(bad)}: "
                "lower the learning rate, clip the gradient, or look at that machine's data"
            )

    def _skip(self, bad: Sequence[str]) -> None:
        state = self.state
        state.skipped += 1
        text = f"the gradient of {' and '.join(bad)} was not finite at step {state.cursor.step}: all skip it"
        self._voice.say("skip", text)

    def _balance(self, step: _Step, seen: Report) -> None:
        names, balancer = step.crew.names, self.state.balancer
        if len(names) < 2:
            return
        self.profile.hear({name: row.spans() for name, row in zip(names, seen.rows, strict=True)})
        balancer.wire = report.wire_seen(balancer.wire, seen, self._reducer.others_by_last)
        told = balancer.observe(
            {name: row.ready_s for name, row in zip(names, seen.rows, strict=True)},
            first_s={name: row.first_s for name, row in zip(names, seen.rows, strict=True)},
            shares=step.by_member,
        )
        if told is not None:
            self._voice.say("replan", _sentence(told))

    def _give_up(self, step: _Step, reason: str) -> None:
        self._engine.commit(False)
        self._norms.forget()
        self._was_given_up = True
        self._voice.say("retry", f"step {self.state.cursor.step} is taken again: {reason.splitlines()[0][:200]}")
        self._finish(step, is_committed=False, is_skipped=False)

    def _finish(self, step: _Step, *, is_committed: bool, is_skipped: bool) -> None:
        self._reducer.abandon()
        self._open = None
        data_s = max(step.forward_s, step.load_s)
        times = Times(
            meet_s=step.meet_s,
            load_s=step.load_s,
            forward_s=data_s - step.load_s,
            backward_s=max(step.ready_s - data_s, 0.0),
            sum_s=max(step.summed_s - step.ready_s, 0.0),
            optimizer_s=step.optimizer_s,
            outside_s=max(step.began_at - step.meet_s - self._ended_at, 0.0) if self._ended_at else 0.0,
        )
        self._ended_at = time.perf_counter()
        if is_committed:
            self._times = times
            self.profile.add(step.plan.batch, times)
        cursor = self.state.cursor
        self._pulse.beat("outside", cursor.step, 0.0)
        rows = step.report.rows if step.report is not None and is_committed else ()
        self._voice.step = cursor.step
        self._voice.tell(
            StepRecord(
                step=cursor.step - is_committed,
                epoch=step.plan.epoch,
                start=step.plan.start,
                shares=step.by_member,
                is_committed=is_committed,
                is_skipped=is_skipped,
                times=times,
                ready_s={name: row.ready_s for name, row in zip(step.crew.names, rows, strict=False)},
                noise_scale=self.state.noise.scale,
            )
        )

    def _need_step(self) -> None:
        """The script asks for the next batch. Was the last one's step taken?"""
        step = self._open
        if step is None:
            return
        if self._reducer.is_over and step.report is None:
            self._give_up(step, step.failure)
        elif step.report is not None and any(row.is_bad for row in step.report.rows):
            self.step(lambda: None)  # a GradScaler saw the overflow, on every member, and left the step out
        else:
            raise BadInput(
                "optimizer.step() was not called for the last batch of gang.loader: each batch is one step. "
                "Instead of accumulating gradients by hand, raise batch_size and give at_once="
            )

    def _discard(self) -> None:
        """The script broke out of the loop with a batch in hand."""
        if self._open is not None:
            self._reducer.abandon()
            self._norms.forget()
            self._open = None


def _sentence(told: Replan) -> str:
    shares = ", ".join(f"{name} {share}" for name, share in told.shares.items())
    return f"{told.reason}; shares of {sum(told.shares.values())}: {shares}"


def _rates(optimizer: Optimizer) -> float:
    return float(sum(float(group.get("lr", 0.0)) * (1 + i) for i, group in enumerate(optimizer.param_groups)))
