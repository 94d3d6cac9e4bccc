"""What does a training script need to be a member of a gang?

    gang = potluck.gang.join()
    loader = gang.loader(dataset, batch_size=512)
    model, optimizer = gang.wrap(model, optimizer)
    for x, y in loader: loss_fn(model(x), y).backward(); optimizer.step(); optimizer.zero_grad()

Who knows whom, from the top:

    member.py        Gang: what the script sees; one step's life from its batch to its commit
    loader.py        which samples are mine, and are they here already?        (Cursor moves only on commit)
    reduce.py        gradients → buckets → sums over the members, during the backward pass
    report.py        the vector of figures that is summed with them
    compress.py      buckets in fewer bytes, for slow networks
    papers.py        do all members have the same script, data and model?
    norms.py         BatchNorm's running statistics
    healing.py       the whole state as one file, and how it gets to a newcomer
    profile.py       where each member's time goes, and whom all wait for;  advice.py: what would help
    journal.py       points, events and the metrics file, with what machine.py sees;  trial.py: how fast alone?
    engine.py        what the above ask of an engine; the engine of one
    torchft_engine.py, plain_engine.py (with meeting.py)    the engines of many, one conformance suite

Identities that hold at each commit, whoever came, left or was slow (tests/train/test_gang_*.py):

    gradient = Σ over all members' samples ÷ count, so it does not depend on the shares
    the cursor of an epoch = samples that entered a committed step, in the one order of (seed, epoch)
    model, optimizer, cursor and shares are the same bits on every member

What fails, and then: a member dies or hangs → the sum fails on the others, nobody commits, they meet again without it and
take the same samples. A member that had committed while others had not is ahead: they heal from it. A member that comes
(or comes back) is behind: it heals before its first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potluck.train.gang.member import Gang, join

__all__ = ["Gang", "join"]


def __getattr__(name: str) -> Any:
    # Only on demand: an agent starts a meeting (__main__.py) where there need be no torch.
    if name in __all__:
        from potluck.train.gang import member

        return getattr(member, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
