"""A gang of one: the script's own view, and what it is told when it does something wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import potluck
from potluck.domain.gangs import ShareError
from potluck.domain.order import permutation
from potluck.errors import BadInput
from potluck.train.gang import reduce
from potluck.train.gang.loader import Loader
from potluck.train.gang.member import Gang
from potluck.train.gang.place import Place

LENGTH, WIDTH, BATCH = 150, 6, 32


@pytest.fixture(autouse=True)
def _several_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "BUCKET_BYTES", 256)
    monkeypatch.delenv("POTLUCK_GANG", raising=False)


def points() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (LENGTH,), generator=generator))


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def in_a_gang(
    model: nn.Module, epochs: int = 2, loss: Loss = mean_loss, *, kind: str = "mean", **given: Any
) -> tuple[Gang, nn.Module]:
    gang = potluck.gang.join()
    loader = gang.loader(points(), batch_size=BATCH, **given)
    model, optimizer = gang.wrap(model, adam(model), loss=kind)
    for _ in gang.epochs(epochs):
        for x, y in loader:
            loss(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return gang, model


def by_hand(model: nn.Module, epochs: int = 2, loss: Loss = mean_loss) -> nn.Module:
    x, y = points().tensors
    optimizer = adam(model)
    for epoch in range(epochs):
        order = permutation(LENGTH, 0, 2, epoch)
        for start in range(0, LENGTH, BATCH):
            chosen = order[start : start + BATCH]
            optimizer.zero_grad()
            loss(model, x[chosen], y[chosen]).backward()
            optimizer.step()
    return model


def furthest(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


# --- the same as on one machine ------------------------------------------------------------------------------------


def test_alone_a_gang_trains_bit_by_bit_as_the_script_without_it() -> None:
    gang, model = in_a_gang(network())

    assert furthest(model, by_hand(network())) == 0
    assert gang.steps == 10 and gang.epoch == 2 and gang.members == ("alone",) and gang.is_first
    assert gang.profile.samples_per_s > 0 and gang.profile.sentence().endswith("of the step")


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("at_once", [1, 5, 31])
def test_parts_that_fit_into_memory_add_up_to_the_whole_batch(workers: int, at_once: int) -> None:
    gang, model = in_a_gang(network(), at_once=at_once, workers=workers)

    assert furthest(model, by_hand(network())) < 1e-14
    assert gang.steps == 10


def test_a_loss_that_is_a_sum_is_divided_by_the_samples() -> None:
    def summed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y, reduction="sum")

    _, model = in_a_gang(network(), loss=summed, kind="sum", at_once=7)

    assert furthest(model, by_hand(network())) < 1e-14


def test_a_loss_over_tokens_is_divided_by_what_gang_count_says() -> None:
    """Some samples are ignored, as padding is: the mean is over the others, in parts of different numbers of them."""
    gang = potluck.gang.join()
    loader = gang.loader(points(), batch_size=BATCH, at_once=5)
    model = network()
    model, optimizer = gang.wrap(model, adam(model))

    def ignoring(y: Tensor) -> Tensor:
        return torch.where(y == 2, -100, y)

    for _ in gang.epochs(2):
        for x, y in loader:
            kept = ignoring(y)
            gang.count(int((kept != -100).sum()))
            loss = nn.functional.cross_entropy(model(x), kept)  # NaN, where all of a part are ignored
            loss.backward()
            optimizer.step()

    by = by_hand(network(), loss=lambda m, x, y: nn.functional.cross_entropy(m(x), ignoring(y)))
    assert furthest(model, by) < 1e-13


class Odd(nn.Module):
    """A parameter that nothing uses, and a part that is computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(WIDTH, 8).double(), nn.Linear(8, 3).double()
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
        self.unused = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = checkpoint(self.middle, torch.tanh(self.first(x)), use_reentrant=self.reentrant)
        return {"logits": self.last(hidden)}


@pytest.mark.parametrize("reentrant", [True, False])
def test_unused_parameters_and_checkpointing_change_nothing(reentrant: bool) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x)["logits"], y)

    _, model = in_a_gang(Odd(reentrant), loss=loss)

    assert furthest(model, by_hand(Odd(reentrant), loss=loss)) == 0
    assert model.unused.grad is None and bool((model.unused == 1).all())


def test_after_backward_the_gradient_is_the_one_that_will_be_applied_so_the_script_may_clip_it() -> None:
    clipped = potluck.gang.join()
    loader = clipped.loader(points(), batch_size=BATCH, at_once=9)
    model = network()
    model, optimizer = clipped.wrap(model, adam(model))
    for x, y in loader:
        mean_loss(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    by_gang = potluck.gang.join()
    by_gang.clip_grad_norm(0.1)
    loader = by_gang.loader(points(), batch_size=BATCH)
    other = network()
    other, optimizer = by_gang.wrap(other, adam(other))
    for x, y in loader:
        mean_loss(other, x, y).backward()
        optimizer.step()

    assert furthest(model, other) < 1e-12
    assert furthest(model, by_hand(network(), 1)) > 1e-6


def test_a_gradscaler_that_leaves_out_an_overflow_loses_no_place_in_the_data() -> None:
    gang = potluck.gang.join()
    loader = gang.loader(points(), batch_size=BATCH)
    model = network().float()
    model, optimizer = gang.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    gang.keep(scaler=scaler)
    told: list[Any] = []
    gang.watch(told.append)
    for i, (x, y) in enumerate(loader):
        loss = mean_loss(model, x.float(), y) * (float("inf") if i == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    steps = [record for record in told if hasattr(record, "is_skipped")]
    assert [record.is_skipped for record in steps] == [False, False, True, False, False]
    assert sum(sum(record.shares.values()) for record in steps) == LENGTH
    assert scaler.get_scale() == 2.0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("before", [True, False])
def test_a_kept_scheduler_steps_once_for_each_batch_however_many_parts_it_had(before: bool) -> None:
    gang = potluck.gang.join()
    loader = gang.loader(points(), batch_size=BATCH, at_once=4)
    model = network()
    optimizer = adam(model)
    if before:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, optimizer = gang.wrap(model, optimizer)
    if not before:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    gang.keep(scheduler=scheduler)
    for x, y in loader:
        mean_loss(model, x, y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    assert scheduler.get_last_lr() == [0.05 / 4]
    assert set(scheduler.state_dict()) == set(torch.optim.lr_scheduler.StepLR(adam(network()), 2).state_dict())


def test_figures_are_means_over_the_samples() -> None:
    gang = potluck.gang.join()
    loader = gang.loader(points(), batch_size=BATCH)
    model = network()
    model, optimizer = gang.wrap(model, adam(model))
    for i, (x, y) in enumerate(loader):
        mean_loss(model, x, y).backward()
        optimizer.step()
        gang.log(number=i, bad=float("nan"))

    assert gang.figures == {"number": 3.0}  # the last one's travel with the next step


def test_it_goes_on_at_the_exact_sample_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    whole = network()
    in_a_gang(whole, 3)

    first = potluck.gang.join()
    assert not first.resume(path)
    loader = first.loader(points(), batch_size=BATCH)
    model = network()
    model, optimizer = first.wrap(model, adam(model))
    for x, y in loader:
        mean_loss(model, x, y).backward()
        optimizer.step()
        if first.steps == 3:
            first.save(path)
            break
    second = potluck.gang.join()
    assert second.resume(path)
    loader = second.loader(points(), batch_size=BATCH)
    torch.manual_seed(99)
    other = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    other, optimizer = second.wrap(other, adam(other))
    for _ in second.epochs(3):
        for x, y in loader:
            mean_loss(other, x, y).backward()
            optimizer.step()

    assert furthest(other, whole) == 0 and second.steps == 15


def test_a_plain_range_of_epochs_works_as_well_and_breaking_out_ends_the_epoch() -> None:
    gang = potluck.gang.join()
    loader = gang.loader(points(), batch_size=BATCH)
    model = network()
    model, optimizer = gang.wrap(model, adam(model))
    seen = []
    for epoch in range(3):
        for i, (x, y) in enumerate(loader):
            if epoch == 1 and i == 2:
                break
            mean_loss(model, x, y).backward()
            optimizer.step()
            seen.append((gang.epoch, epoch))

    assert len(seen) == 5 + 2 + 5 and all(a == b for a, b in seen)


# --- what a script may do wrong ------------------------------------------------------------------------------------


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([])


class Nothing(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 0

    def __getitem__(self, i: int) -> int:
        return i


def started(**given: Any) -> tuple[Gang, Loader, nn.Module, torch.optim.Optimizer]:
    gang = potluck.gang.join()
    loader = gang.loader(points(), batch_size=BATCH, **given)
    model = network()
    return (gang, loader, *gang.wrap(model, adam(model)))


def test_a_data_set_that_cannot_be_counted_is_refused() -> None:
    with pytest.raises(BadInput, match="Stream has no length"):
        potluck.gang.join().loader(Stream(), batch_size=4)
    with pytest.raises(BadInput, match="no samples"):
        potluck.gang.join().loader(Nothing(), batch_size=4)


def test_a_batch_that_cannot_feed_all_members_is_refused() -> None:
    gang = Gang(Place(member="a", store="127.0.0.1:1", least=2, most=8))

    with pytest.raises(ShareError, match=r"a batch of 4 cannot feed up to 8 members: raise batch_size to at least 8"):
        gang.loader(points(), batch_size=4)
    with pytest.raises(ShareError, match="at least 1"):
        potluck.gang.join().loader(points(), batch_size=0)


def test_the_batch_that_was_asked_on_the_command_line_wins() -> None:
    assert Gang(Place(batch=25)).loader(points(), batch_size=10).batch == 25


def test_a_model_without_anything_to_train_is_refused() -> None:
    model = network().requires_grad_(False)

    with pytest.raises(BadInput, match="no parameter that needs a gradient"):
        potluck.gang.join().wrap(model, adam(network()))


def test_what_a_gang_cannot_do_is_said_with_what_to_do_instead() -> None:
    gang, _, model, optimizer = started()
    with pytest.raises(BadInput, match="one optimizer"):
        gang.wrap(model, optimizer)
    with pytest.raises(BadInput, match="ConcatDataset"):
        gang.loader(points(), batch_size=3)
    with pytest.raises(BadInput, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(BadInput, match="without a batch"):
        optimizer.step()
    with pytest.raises(BadInput, match="between a batch"):
        gang.count(3)
    with pytest.raises(BadInput, match="`sum`"):
        potluck.gang.join().wrap(network(), adam(network()), loss="max")
    with pytest.raises(BadInput, match="no state_dict"):
        gang.keep(thing=3)
    with pytest.raises(BadInput, match="above 0"):
        gang.clip_grad_norm(0)
    with pytest.raises(BadInput, match="SyncBatchNorm"):
        potluck.gang.join().wrap(nn.Sequential(nn.SyncBatchNorm(3)), adam(network()))
    with pytest.raises(BadInput, match=r"gang.loader\(dataset"):
        next(iter(potluck.gang.join().epochs(1)))
    with pytest.raises(BadInput, match=r"call gang.wrap"):
        next(iter(potluck.gang.join().loader(points(), batch_size=3)))


def test_a_step_that_was_forgotten_is_noticed() -> None:
    _, loader, model, _ = started()
    batches = iter(loader)
    mean_loss(model, *next(batches)).backward()

    with pytest.raises(BadInput, match=r"optimizer.step\(\) was not called"):
        next(batches)


def test_an_epoch_that_was_not_iterated_is_noticed() -> None:
    gang, _, _, _ = started()

    with pytest.raises(BadInput, match=r"did not iterate over gang.loader"):
        list(gang.epochs(2))


def test_two_backward_passes_for_a_batch_are_refused() -> None:
    _, loader, model, _ = started()
    x, y = next(iter(loader))
    mean_loss(model, x, y).backward()

    with pytest.raises(BadInput, match="add the losses up"):
        mean_loss(model, x, y).backward()


def test_sparse_gradients_are_refused() -> None:
    gang = potluck.gang.join()
    loader = gang.loader(TensorDataset(torch.arange(8)), batch_size=4)
    model = nn.Embedding(8, 2, sparse=True)
    gang.wrap(model, torch.optim.SGD(model.parameters(), lr=1))
    (i,) = next(iter(loader))

    with pytest.raises(BadInput, match="sparse=False"):
        model(i).sum().backward()


def test_a_gradient_that_never_is_a_number_ends_the_training_with_advice() -> None:
    _, loader, model, optimizer = started()

    def train() -> None:
        for _ in range(6):
            for x, y in loader:
                (mean_loss(model, x, y) * float("nan")).backward()
                optimizer.step()

    with pytest.raises(BadInput, match="25 times in a row, last on alone: lower the learning rate"):
        train()


def test_figures_that_cannot_be_told_apart_are_refused() -> None:
    gang, loader, model, optimizer = started()
    batches = iter(loader)
    mean_loss(model, *next(batches)).backward()
    optimizer.step()

    gang.log(**{f"figure{i}": 1.0 for i in range(40)})

    with pytest.raises(BadInput, match="rename one of them"):
        mean_loss(model, *next(batches)).backward()
    with pytest.raises(BadInput, match="counts the steps itself"):
        gang.log(step=3)


@pytest.mark.slow
def test_a_process_ends_by_itself_and_imports_no_network_alone(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch, potluck\n"
        "gang = potluck.gang.join()\n"
        "loader = gang.loader(torch.utils.data.TensorDataset(torch.randn(8, 2)), batch_size=4)\n"
        "m = torch.nn.Linear(2, 1)\n"
        "m, o = gang.wrap(m, torch.optim.SGD(m.parameters(), 0.1))\n"
        "for (x,) in loader: m(x).sum().backward(); o.step(); o.zero_grad()\n"
        "print(gang.steps, 'torchft' in sys.modules, 'potluck.train.gang.meeting' in sys.modules)\n"
    )

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)

    assert done.stdout.split() == ["2", "False", "False"]


def test_the_pulse_says_what_the_member_does(tmp_path: Path) -> None:
    path = tmp_path / "pulse"
    gang = Gang(Place(pulse=str(path)))
    loader = gang.loader(points(), batch_size=BATCH)
    model = network()
    model, optimizer = gang.wrap(model, adam(model))
    phases = []
    for x, y in loader:
        phases.append(json.loads(path.read_text())["phase"])
        mean_loss(model, x, y).backward()
        phases.append(json.loads(path.read_text())["phase"])
        optimizer.step()
        phases.append(json.loads(path.read_text())["phase"])

    assert phases == ["compute", "sum", "outside"] * 5
    assert json.loads(path.read_text())["step"] == 5
