"""Who comes in by which link, under which name, and who is out when it is revoked?"""

from __future__ import annotations

import pytest

from hub_kit import Hub, check_positions, sha256
from potluck.errors import BadInput, NotAllowed, NotFound, NotKnown, TryLater, VersionMismatch
from potluck.hub.commands import people
from potluck.hub.commands.desk import Caller
from potluck.protocol import PROTOCOL, Hardware, InviteRequest, JoinRequest


def invite(hub: Hub, **wishes: object) -> str:
    return hub.run(people.invite(hub.desk, InviteRequest(**wishes), actor="the test")).code  # type: ignore[arg-type]


def join(hub: Hub, code: str, name: str, **facts: object):  # type: ignore[no-untyped-def]
    secret = f"secret of {name} {hub.one('SELECT count(*) FROM credentials')}"
    return hub.run(people.join(hub.desk, JoinRequest(code, name, sha256(secret), **facts)))  # type: ignore[arg-type]


def test_a_link_is_good_for_its_uses_and_then_says_so(hub: Hub) -> None:
    code = invite(hub, uses=2)
    join(hub, code, "a")
    join(hub, code, "b")

    with pytest.raises(NotAllowed, match="for 2 uses and all are taken"):
        join(hub, code, "c")


def test_the_last_use_goes_to_one_machine_only(hub: Hub) -> None:
    code = invite(hub, uses=3)

    async def one(n: int) -> str:
        try:
            return (await people.join(hub.desk, JoinRequest(code, "w", sha256(f"s{n}")))).name
        except NotAllowed:
            return "refused"

    names = hub.together(*(one(n) for n in range(8)))

    assert sorted(names) == ["refused"] * 5 + ["w", "w-2", "w-3"]


def test_an_expired_a_revoked_and_an_unknown_link_each_say_what_to_do(hub: Hub) -> None:
    old, withdrawn = invite(hub), invite(hub)
    hub.sql("UPDATE invites SET expires_at = now() - interval '1 s' WHERE code_sha256 = %(c)s", c=sha256(old))
    id_ = hub.one("SELECT id FROM invites WHERE code_sha256 = %(c)s", c=sha256(withdrawn))
    hub.run(people.revoke_invite(hub.desk, id_, actor="the test"))

    for code, words in ((old, "expired at"), (withdrawn, "was revoked"), ("aaaa-bbbb", "never gave this link")):
        with pytest.raises(NotAllowed, match=words):
            join(hub, code, "late")


def test_names_are_made_unique_and_clean(hub: Hub) -> None:
    code = invite(hub, uses=9)

    names = [
        join(hub, code, name).name for name in ("ann", "ann", "ann", "a%n", "a_n", "\x1b[31mred\x00\u202e", "x" * 99)
    ]

    assert names == ["ann", "ann-2", "ann-3", "a%n", "a_n", "[31mred", "x" * 40]


def test_without_a_name_it_is_the_links_or_the_machines(hub: Hub) -> None:
    assert join(hub, invite(hub, name="lab"), "").name == "lab"
    assert join(hub, invite(hub), "", hardware=Hardware(hostname="pc-7")).name == "pc-7"
    assert join(hub, invite(hub), "").name == "worker"


def test_two_links_and_one_name_at_the_same_moment(hub: Hub) -> None:
    codes = [invite(hub) for _ in range(6)]

    async def one(n: int, code: str) -> str:
        for _ in range(10):
            try:
                return (await people.join(hub.desk, JoinRequest(code, "same", sha256(f"t{n}")))).name
            except TryLater:
                continue  # what a client does with a 503
        return "never"

    names = hub.together(*(one(n, code) for n, code in enumerate(codes)))

    assert len(set(names)) == 6
    assert "never" not in names
    assert hub.one("SELECT SUM(used)::int FROM invites") == 6


def test_a_secret_serves_one_machine_only(hub: Hub) -> None:
    code = invite(hub, uses=2)
    hub.run(people.join(hub.desk, JoinRequest(code, "a", sha256("same"))))

    with pytest.raises(NotAllowed, match="in use already"):
        hub.run(people.join(hub.desk, JoinRequest(code, "b", sha256("same"))))

    assert hub.one("SELECT SUM(used)::int FROM invites") == 1
    assert hub.one("SELECT count(*) FROM workers") == 1


def test_another_protocol_may_not_join_and_uses_nothing_up(hub: Hub) -> None:
    code = invite(hub)

    with pytest.raises(VersionMismatch, match="upgrade"):
        join(hub, code, "new", protocol=PROTOCOL + 1)

    assert join(hub, code, "same").name == "same"


@pytest.mark.parametrize(
    "wishes",
    [
        {"role": "admin"},
        {"role": "boss"},
        {"uses": 0},
        {"uses": 10**6},
        {"ttl_s": 0},
        {"ttl_s": float("nan")},
        {"role": "member", "trusted": True},
    ],
)
def test_a_link_that_makes_no_sense_is_not_made(hub: Hub, wishes: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        invite(hub, **wishes)


@pytest.mark.parametrize("share", [0.0, -1.0, 7.0, float("nan"), float("inf")])
def test_a_share_is_between_nothing_and_all(hub: Hub, share: float) -> None:
    join(hub, invite(hub), "w", share=share)

    assert 0.009 < hub.one("SELECT share FROM workers") <= 1


def test_revoking_a_worker_shuts_it_out_and_frees_its_units(hub: Hub, house: Caller) -> None:
    eve, token = hub.join_with_token("eve")
    run = hub.start_run(house)
    leases = [hub.unit(eve, run) for _ in range(2)]

    assert hub.run(people.revoke_worker(hub.desk, "eve", actor="the test")) == "eve"

    with pytest.raises(NotKnown, match="revoked"):
        hub.run(people.authenticate(hub.desk, token))
    check_positions(hub, run, 1000)
    # a request that was let in a moment before changes nothing either
    assert not hub.report(eve, leases[0], hub.unit_report(leases[0])).accepted
    (view,) = [w for w in hub.run(people.workers(hub.desk)) if w.name == "eve"]
    assert view.state == "revoked"
    assert hub.view(run).fates.pending == 0


def test_revoking_a_link_revokes_all_who_came_by_it(hub: Hub) -> None:
    code = invite(hub, uses=2, role="member")
    hub.run(people.join(hub.desk, JoinRequest(code, "m", sha256("m-token"))))
    id_ = hub.one("SELECT id FROM invites WHERE code_sha256 = %(c)s", c=sha256(code))

    hub.run(people.revoke_invite(hub.desk, id_, actor="the test"))

    with pytest.raises(NotKnown):
        hub.run(people.authenticate(hub.desk, "m-token"))
    with pytest.raises(NotFound):
        hub.run(people.revoke_invite(hub.desk, "i-nothing", actor="the test"))


def test_the_admin_is_put_once(hub: Hub) -> None:
    for _ in range(2):
        hub.run(people.put_admin(hub.desk, "the admin's"))

    assert hub.run(people.authenticate(hub.desk, "the admin's")).role == "admin"
    assert hub.one("SELECT count(*) FROM credentials WHERE role = 'admin'") == 1


def test_no_credential_and_an_unknown_one_say_what_to_do(hub: Hub) -> None:
    with pytest.raises(NotKnown, match="join with a link"):
        hub.run(people.authenticate(hub.desk, ""))
    with pytest.raises(NotKnown, match="fresh link"):
        hub.run(people.authenticate(hub.desk, "stolen"))


def test_revoking_a_members_link_stops_their_jobs_and_nobody_elses(hub: Hub) -> None:
    eve, mia, box = hub.member("eve"), hub.member("mia"), hub.join("box")
    runs_there = hub.submit_job(eve)
    hub.orders(box)
    assert hub.place() == 1
    (lease,) = hub.orders(box).leases
    waits, other = hub.submit_job(eve), hub.submit_job(mia)
    link = hub.one("SELECT invite_id FROM credentials WHERE subject = %(s)s", s=eve.subject)

    hub.run(people.revoke_invite(hub.desk, link, actor="the test"))

    states = {id_: hub.job(mia, id_).state for id_ in (runs_there, waits, other)}
    assert states == {runs_there: "cancelled", waits: "cancelled", other: "queued"}
    assert [end.lease_id for end in hub.orders(box, lease.id).end] == [lease.id]
