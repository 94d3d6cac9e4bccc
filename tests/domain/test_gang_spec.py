"""What may be asked of a gang, in potluck.yaml and in a request?"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.domain import balance
from potluck.domain.gangspec import GANG_KEYS, GANG_POLICIES, MOST_MEMBERS
from potluck.domain.job import GangSpec, JobSpec, check, from_mapping, json_schema, to_mapping
from potluck.errors import BadInput, UnknownSetting


@pytest.mark.parametrize(
    ("written", "gang"),
    [
        ("2..8", GangSpec(2, 8)),
        (4, GangSpec(4, 4)),
        ("4", GangSpec(4, 4)),
        ({"members": "2..8", "batch": "512"}, GangSpec(2, 8, batch=512)),
        (
            {"members": "2..3", "batch": 64, "policy": "uniform", "engine": "plain"},
            GangSpec(2, 3, batch=64, policy="uniform", engine="plain"),
        ),
        ({"members": 2, "compat": "yes"}, GangSpec(2, 2, compat=True)),
    ],
)
def test_a_gang_is_a_number_a_range_or_a_mapping(written: object, gang: GangSpec) -> None:
    assert from_mapping({"command": "x", "gang": written}).gang == gang


def test_members_come_back_more_often_than_other_jobs_unless_it_is_said_otherwise() -> None:
    usual = from_mapping({"command": "x", "gang": 2})
    said = from_mapping({"command": "x", "gang": 2, "retries": 0, "retry_on": "lost"})
    alone = from_mapping({"command": "x"})

    assert (usual.retries, usual.retry_on) == (10, "any")
    assert (said.retries, said.retry_on) == (0, "lost")
    assert (alone.retries, alone.retry_on) == (2, "lost")


@pytest.mark.parametrize(
    ("gang", "says"),
    [
        ("8..2", r"gang: members is 8\.\.2, which counts down: write 2\.\.8"),
        ("1", "two machines or more; for one machine leave gang out"),
        ("1..4", r"members is 1\.\.4: a gang has two machines or more"),
        ("0..0", "two machines or more"),
        ("2..", r"write how many machines, like 4, or from how many to how many, 2\.\.8"),
        ("..8", "write how many machines"),
        ("two", "write how many machines"),
        ("-2", "write how many machines"),
        ("٢..٨", "write how many machines"),
        (2.5, "write how many machines"),
        (True, "gang: members is True"),
        ([2, 8], "gang: members is"),
        (f"2..{MOST_MEMBERS + 1}", f"at most {MOST_MEMBERS} machines"),
        ({"members": "2..8", "batch": 7}, "batch is 7, which cannot feed 8 machines"),
        ({"members": 2, "batch": 0}, "a whole number of samples, like 512"),
        ({"members": 2, "batch": "1e3"}, "a whole number of samples"),
        ({"members": 2, "batch": True}, "a whole number of samples"),
        ({"members": 2, "batch": 10**8}, "must lie between"),
        ({"members": 2, "policy": "fair"}, "policy is 'fair': it must be one of dynamic, proportional, uniform"),
        ({"members": 2, "engine": "mpi"}, "engine is 'mpi': it must be one of auto, torchft, plain"),
        ({"members": 2, "compat": "perhaps"}, "compat is 'perhaps': it is yes or no"),
        ({"members": "2..4", "compat": True}, "becomes WORLD_SIZE, and members is 2..4: write 4"),
        ({"members": 2, "compat": True, "batch": 64}, "drop batch, or compat"),
        ({"members": 2, "compat": True, "engine": "plain"}, "drop engine, or compat"),
        ({"batch": 64}, r"members is missing: how many machines\? Write members: 2\.\.8"),
    ],
)
def test_a_gang_that_cannot_be_is_refused_with_the_reason(gang: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        from_mapping({"command": "x", "gang": gang})


def test_an_unknown_key_of_a_gang_names_the_nearest() -> None:
    with pytest.raises(UnknownSetting, match=r"gang: no key `member`: did you mean `members`\?"):
        from_mapping({"command": "x", "gang": {"member": 2}})
    with pytest.raises(UnknownSetting, match="no key `members` here: it belongs below gang"):
        from_mapping({"command": "x", "members": 2})


@pytest.mark.parametrize(("more", "says"), [({"procs": 2}, "procs is 2"), ({"network": False}, "network is no")])
def test_what_a_job_may_be_and_a_gang_may_not(more: dict[str, object], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        from_mapping({"command": "x", "gang": 2} | more)


def test_a_gang_that_a_client_sends_is_checked_the_same() -> None:
    for gang in (GangSpec(3, 2), GangSpec(0, 2), GangSpec(2, 10**6), GangSpec(2, 2, batch=-1), GangSpec(policy="x")):
        with pytest.raises(BadInput, match="gang: "):
            check(JobSpec(["true"], gang=gang))


gangs = st.builds(
    lambda least, more, batch, policy, engine: GangSpec(least, least + more, batch, policy, engine),
    st.integers(2, 8),
    st.integers(0, 8),
    st.sampled_from([0, 16, 512]),
    st.sampled_from(GANG_POLICIES),
    st.sampled_from(["auto", "torchft", "plain"]),
) | st.builds(lambda members: GangSpec(members, members, compat=True), st.integers(2, 64))


@given(gangs, st.integers(0, 12), st.sampled_from(["lost", "any"]))
def test_a_gang_survives_being_written_and_read(gang: GangSpec, retries: int, retry_on: str) -> None:
    spec = JobSpec(["x"], gang=gang, retries=retries, retry_on=retry_on)

    assert from_mapping(json.loads(json.dumps(to_mapping(spec)))) == spec


def test_the_schema_knows_every_key_of_a_gang_and_explains_it() -> None:
    known = json_schema()["properties"]["gang"]["properties"]

    assert set(known) == set(GANG_KEYS)
    assert {*known, "least", "most"} - {"members"} == set(GangSpec.__dataclass_fields__)
    assert all(len(key["description"]) > 10 for key in known.values())


def test_the_policies_are_those_of_the_balancer() -> None:
    assert set(GANG_POLICIES) == set(balance.POLICIES)
