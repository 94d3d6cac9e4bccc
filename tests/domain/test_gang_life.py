"""Does what is decided for a gang always lead somewhere, and never end what still works?"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from potluck.domain.gang_life import ENOUGH, Mate, Standing, Step, decide

LIVE = ("placed", "preparing", "running")
OVER = ("succeeded", "failed", "cancelled", "lost")


@st.composite
def mates(draw: st.DrawFn, number: int) -> Mate:
    state = draw(st.sampled_from([*LIVE, "queued", *OVER]))
    live = state in LIVE or (state == "cancelled" and draw(st.booleans()))
    code = draw(st.sampled_from([None, 0, 1])) if not live else None
    return Mate(
        number=number,
        job=f"m{number}",
        state=state,
        worker=f"lab-{number}",
        lease=f"lease-{number}" if live else "",
        delivered=live and draw(st.booleans()),
        sound=live and draw(st.booleans()),
        exit_code=code,
    )


@st.composite
def gangs(draw: st.DrawFn) -> Standing:
    most = draw(st.integers(1, 5))
    crew = [draw(mates(number)) for number in range(1, most + 1)]
    live = [mate.lease for mate in crew if mate.lease]
    return Standing(
        least=draw(st.integers(1, most)),
        mates=crew,
        compat=draw(st.booleans()),
        formed=bool(live) or draw(st.booleans()),
        cancelled_by=draw(st.sampled_from(["", "mia"])),
        own_failures=draw(st.integers(0, 3)),
        misfortunes=draw(st.integers(0, 3)),
        hurt_s=draw(st.sampled_from([0.0, 10.0])),
        host=draw(st.sampled_from(["", "gone", *live])),
        late=draw(st.booleans()),
    )


def after(gang: Standing, step: Step) -> Standing:
    """The gang when the step was done, and whoever was told to end has ended."""

    def done(mate: Mate) -> Mate:
        if mate.job in step.cancel or mate.job in step.stop:
            return replace(mate, state="cancelled", lease="")
        if mate.job in step.part:
            return replace(mate, state="cancelled" if mate.state == "cancelled" else "queued", lease="")
        return mate

    return replace(
        gang,
        mates=[done(mate) for mate in gang.mates],
        formed=gang.formed and not step.unform,
        misfortunes=gang.misfortunes + len(step.part),
        hurt_s=gang.hurt_s + 10 if step.again else gang.hurt_s,
        host=gang.host if step.host is None else step.host,
        late=gang.late and step.host is None,
    )


@given(gangs())
def test_what_is_decided_comes_to_rest(gang: Standing) -> None:
    for _ in range(8):
        step = decide(gang)
        if step.end or step == replace(Step(), reason=step.reason):
            return
        gang = after(gang, step)
    raise AssertionError(f"no end: {gang}, {step}")


@given(gangs())
def test_a_gang_ends_only_when_nobody_is_at_work_and_nobody_waits(gang: Standing) -> None:
    step = decide(gang)

    if step.end:
        left = after(gang, step)
        assert not [mate for mate in left.mates if mate.lease or mate.state not in OVER]


@given(gangs())
def test_only_jobs_that_wait_are_cancelled_and_only_live_ones_taken_back(gang: Standing) -> None:
    step = decide(gang)

    waiting = {mate.job for mate in gang.mates if mate.state == "queued" and not mate.lease}
    assert set(step.cancel) <= waiting
    assert set(step.part) <= {mate.job for mate in gang.mates if mate.lease}


@given(gangs())
def test_whoever_hosts_is_there(gang: Standing) -> None:
    step = decide(gang)

    if step.host:
        (mate,) = [mate for mate in gang.mates if mate.lease == step.host]
        assert mate.delivered
        assert mate.number == 1 if gang.compat else mate.sound


@given(gangs())
def test_a_host_that_is_well_stays_the_host(gang: Standing) -> None:
    now = next((mate for mate in gang.mates if mate.lease and mate.lease == gang.host), None)

    if now is not None and now.sound and not gang.late and not gang.compat:
        assert decide(gang).host is None


@given(gangs())
def test_a_gang_that_succeeded_is_never_taken_apart(gang: Standing) -> None:
    if not gang.cancelled_by and any(mate.state == "succeeded" for mate in gang.mates):
        step = decide(gang)
        assert not step.part and not step.unform
        assert step.end in ("", "succeeded")
        assert step.says_goodbye == ENOUGH


def test_the_reason_names_who_failed_and_where() -> None:
    crew = [
        Mate(1, "m1", "queued", "lab-1", exit_code=None, said="no such package: torhc"),
        Mate(2, "m2", "queued", "lab-2"),
    ]

    step = decide(Standing(2, crew, formed=True, own_failures=2))

    assert (step.end, step.exit_code, step.cancel) == ("failed", None, ("m1", "m2"))
    assert step.reason == "it failed on every machine; member 1 on lab-1: no such package: torhc"
    assert step.says_goodbye.startswith("the gang has failed: it failed on every machine")
