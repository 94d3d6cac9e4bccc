"""What becomes of a job when an attempt ends: for every way to end, in every standing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck.domain.job import ENDED
from potluck.domain.outcome import MOST_RETURNS, Ending, Standing, settle

KINDS = ("exited", "failed", "cancelled", "returned", "lost", "withdrawn")
ENDINGS = st.builds(
    Ending,
    kind=st.sampled_from(KINDS),
    worker=st.just("box"),
    exit_code=st.sampled_from([None, 0, 1, 137]),
    signal=st.sampled_from(["", "SIGKILL"]),
    reason=st.sampled_from(["", "so it is"]),
    ran=st.booleans(),
)
STANDINGS = st.builds(
    Standing,
    number=st.integers(1, 9),
    cancelled_by=st.sampled_from([None, "mia"]),
    retries_left=st.integers(0, 3),
    retry_on=st.sampled_from(["lost", "any"]),
    returns=st.integers(0, MOST_RETURNS),
)


@given(ENDINGS, STANDINGS)
def test_every_end_has_a_reason_and_a_next_state(ending: Ending, standing: Standing) -> None:
    verdict = settle(ending, standing)

    assert verdict.attempt in ENDED
    assert verdict.job in ENDED | {"queued"}
    assert verdict.final == (verdict.job != "queued")
    assert verdict.reason
    assert verdict.attempt_reason or verdict.job == "succeeded"


@given(ENDINGS, STANDINGS)
def test_what_was_stopped_stays_stopped(ending: Ending, standing: Standing) -> None:
    verdict = settle(ending, standing)

    assert (verdict.job == "cancelled") == (standing.cancelled_by is not None)


@given(ENDINGS, STANDINGS)
def test_a_retry_is_counted_only_for_losses_and_failures_and_never_below_none(
    ending: Ending, standing: Standing
) -> None:
    verdict = settle(ending, standing)

    spent = standing.retries_left - verdict.retries_left
    assert verdict.retries_left >= 0
    assert spent == (verdict.job == "queued" and verdict.attempt in ("lost", "failed"))
    if spent and verdict.attempt == "failed":
        assert standing.retry_on == "any"


@given(st.lists(ENDINGS, max_size=60), STANDINGS)
def test_no_job_goes_round_for_ever_without_running(endings: list[Ending], standing: Standing) -> None:
    """Every time round costs a retry or a return, unless its command ran, or the hub itself took it back."""
    rounds = 0
    for ending in endings:
        verdict = settle(ending, standing)
        if verdict.final:
            break
        free = ending.kind == "withdrawn" or (ending.kind in ("returned", "cancelled") and ending.ran)
        rounds += not free
        standing = Standing(standing.number + 1, None, verdict.retries_left, standing.retry_on, verdict.returns)
    assert rounds <= 3 + MOST_RETURNS
