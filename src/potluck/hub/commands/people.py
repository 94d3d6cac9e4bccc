"""Who may come in, by which link, and who has to leave?"""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import timedelta
from typing import Any

from potluck.domain.access import ROLES
from potluck.domain.names import clean_name, unique_name
from potluck.errors import BadInput, NotAllowed, NotFound, NotKnown, VersionMismatch
from potluck.hub.commands import attempts, jobs
from potluck.hub.commands.desk import Caller, Desk, as_json, as_type, fair_share, new_id, note, pass_on, spread
from potluck.protocol import (
    OLDEST_PROTOCOL,
    PROTOCOL,
    Fates,
    Hardware,
    InviteAnswer,
    InviteRequest,
    JoinAnswer,
    JoinRequest,
    WorkerView,
)

_CODE_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # none that look alike on a projector


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_protocol(theirs: int) -> None:
    """Refuse a caller that is too far apart, and say which side has to move."""
    if theirs < OLDEST_PROTOCOL:
        raise VersionMismatch(
            f"this worker speaks protocol {theirs}, the hub needs {OLDEST_PROTOCOL} to {PROTOCOL}: "
            "upgrade potluck on this machine"
        )
    if theirs > PROTOCOL:
        raise VersionMismatch(
            f"this worker speaks protocol {theirs}, the hub only knows {OLDEST_PROTOCOL} to {PROTOCOL}: "
            "upgrade the hub, or install its version here"
        )


async def put_admin(desk: Desk, token: str) -> None:
    """Let the bearer of `token` be the admin. Called once a start; the token is in the hub's own folder."""
    async with desk.ledger.transaction() as tx:
        await tx.run("put_admin", token_sha256=sha256(token), subject=f"admin-{sha256(token)[:8]}")


async def authenticate(desk: Desk, token: str) -> Caller:
    if not token:
        raise NotKnown("this needs a credential: join with a link, or set POTLUCK_TOKEN")
    rows = await desk.ledger.shared("credential", token_sha256=sha256(token))
    if not rows:
        raise NotKnown("this hub does not know this credential: join again with a fresh link")
    row = rows[0]
    if row["revoked"]:
        raise NotKnown(f"the credential of {row['name']} was revoked: ask whoever runs this hub")
    return Caller(row["role"], row["subject"], row["name"], row["trusted"])


async def invite(desk: Desk, request: InviteRequest, *, actor: str) -> InviteAnswer:
    if request.role not in ROLES or request.role == "admin":
        raise BadInput(f"a link cannot give the role `{request.role}`: choose worker, member or viewer")
    if not 1 <= request.uses <= 10_000:
        raise BadInput(f"uses is {request.uses}: it must lie between 1 and 10,000")
    if not 1 <= request.ttl_s <= 366 * 86400:
        raise BadInput(f"the link would be valid for {request.ttl_s:g} s: choose between a second and a year")
    if request.trusted and request.role != "worker":
        raise BadInput("only a worker can be trusted with merges")
    code = (
        request.role[0] + "-" + "-".join("".join(secrets.choice(_CODE_LETTERS) for _ in range(4)) for _ in range(4))
    )  # 79 bits
    async with desk.ledger.transaction() as tx:
        id_ = "i-" + new_id()
        row = await tx.row(
            "add_invite",
            id=id_,
            code_sha256=sha256(code),
            role=request.role,
            trusted=request.trusted,
            name=clean_name(request.name, ""),
            uses=request.uses,
            ttl=timedelta(seconds=request.ttl_s),
            created_by=actor,
        )
        assert row is not None
        await note(tx, "invite.made", id_, f"{actor} made a {request.role} link for {request.uses} uses", actor=actor)
    url = f"{desk.public_url}/j/{code}" + (f"#fp={desk.fingerprint}" if desk.fingerprint else "")
    return InviteAnswer(id_, code, request.role, request.uses, row["expires_at"].isoformat(), url)


async def invites(desk: Desk) -> list[dict[str, Any]]:
    async with desk.ledger.transaction() as tx:
        return await tx.rows("invites")


async def peek_invite(desk: Desk, code: str) -> dict[str, Any] | None:
    """What the page behind a link may say about it without using it."""
    async with desk.ledger.transaction() as tx:
        return await tx.row("peek_invite", code_sha256=sha256(code))


async def revoke_invite(desk: Desk, id_: str, *, actor: str) -> None:
    """The link and everybody who joined by it, at once; their jobs, too, wherever those run."""
    async with desk.ledger.transaction() as tx:
        row = await tx.row("revoke_invite", id=id_)
        if row is None or not row["found"]:
            raise NotFound(f"there is no link {id_}: `potluck invites` shows them")
        for subject in row["subjects"] or []:
            await _take_leases(tx, subject, "its link was revoked")
        await note(tx, "invite.revoked", id_, f"{actor} revoked the link {id_}", actor=actor)
        await tx.notify("work")
        await spread(tx, "orders", row["subjects"] or [])
    pass_on(desk, "orders", row["subjects"] or [])
    for subject in row["subjects"] or []:
        await attempts.take_back(desk, subject, "its worker's link was revoked")
        await jobs.stop_all_of(desk, subject, actor=actor)


async def join(desk: Desk, request: JoinRequest) -> JoinAnswer:
    """Exchange a link's code for a credential. The machine made the secret; we keep its hash."""
    check_protocol(request.protocol)
    if not re.fullmatch(r"[0-9a-f]{64}", request.token_sha256):
        raise BadInput("token_sha256 must be 64 hexadecimal digits")
    async with desk.ledger.transaction() as tx:
        link = await tx.row("use_invite", code_sha256=sha256(request.code))
        if link is None:
            raise NotAllowed("this hub never gave this link: copy it again, whole, or ask for a fresh one")
        if link["verdict"] != "ok":
            detail = {
                "expired": f"expired at {link['expires_at']:%Y-%m-%d %H:%M} UTC",
                "used up": f"was for {link['uses']} uses and all are taken",
                "revoked": "was revoked",
            }[link["verdict"]]
            raise NotAllowed(f"this link {detail}: ask for a fresh one (`potluck invite`)")
        role = link["role"]
        wanted = clean_name(request.name, "") or link["name"] or clean_name(request.hardware.hostname, role)
        subject = f"{role[0]}-{new_id(10)}"  # nobody types it, and thousands may join
        name = wanted
        if role == "worker":
            taken = await tx.rows(
                "worker_names", prefix=wanted.replace("\\", "").replace("%", "").replace("_", r"\_") + "%"
            )
            name = unique_name(wanted, {row["name"] for row in taken})
            await tx.run(
                "add_worker",
                id=subject,
                name=name,
                device=clean_name(request.device, "cpu"),
                share=fair_share(request.share),
                trusted=link["trusted"],
                hardware=as_json(request.hardware),
            )
        added = await tx.row(
            "add_credential",
            token_sha256=request.token_sha256,
            role=role,
            subject=subject,
            name=name,
            invite_id=link["id"],
        )
        if added is None:
            raise NotAllowed("this secret is in use already: make a new one")
        await note(tx, f"{role}.joined", subject, f"{name} joined as {role}", actor=name)
    desk.news.tell("change")
    return JoinAnswer(subject, name, role, desk.name)


async def revoke_worker(desk: Desk, ref: str, *, actor: str) -> str:
    async with desk.ledger.transaction() as tx:
        row = await tx.row("revoke_worker", id=ref)
        if row is None:
            raise NotFound(f"there is no worker {ref}: `potluck workers` shows them")
        await _take_leases(tx, row["id"], "the worker was revoked")
        await note(tx, "worker.revoked", row["id"], f"{actor} revoked {row['name']}", actor=actor)
        await tx.notify("work")
        await spread(tx, "orders", [row["id"]])
    pass_on(desk, "orders", [row["id"]])
    await attempts.take_back(desk, row["id"], "its worker was revoked")
    return str(row["name"])


async def _take_leases(tx: Any, worker_id: str, reason: str) -> None:
    for lease in await tx.rows("live_leases_of_worker", worker_id=worker_id):
        await tx.run(
            "give_back",
            lease_id=lease["id"],
            worker_id=None,
            only_if_late=False,
            outcome="revoked",
            reason=reason,
            max_attempts=5,
        )


async def workers(desk: Desk, *, totals: bool = True, only: str | None = None) -> list[WorkerView]:
    """All of them, or `only` the one with this id.

    Without `totals` the fates and units stay 0: they cost a walk through every update that there ever was.
    """
    async with desk.ledger.transaction() as tx:
        rows = await tx.rows("workers", only=only)
        sums = {row["worker_id"]: row for row in await tx.rows("worker_totals")} if totals else {}
    return [_worker_view(row, sums.get(row["id"], {})) for row in rows]


def _worker_view(row: dict[str, Any], totals: dict[str, Any]) -> WorkerView:
    kinds = ("applied", "late", "superseded", "rejected", "pending")
    counts = {kind: int(totals.get(kind, 0)) for kind in kinds}
    state = row["state"]
    if row["revoked_at"] is not None:
        state = "revoked"
    elif state != "left" and not row["present"]:
        state = "away"
    elif state != "left":
        state = "working" if row["kind"] or row["jobs"] else "idle"
    doing = ""
    if row["kind"] and state == "working":
        doing = f"{row['kind']} {row['task_id']} of {row['doing_run']}"
        if row["doing_of"]:
            doing += f", {row['doing_samples']:,} samples"
    jobs = [_place(each) for each in row["jobs"] or []]
    if not doing and jobs and state == "working":
        doing = ", ".join(jobs)
    return WorkerView(
        id=row["id"],
        name=row["name"],
        state=state,
        device=row["device"],
        share=row["share"],
        trusted=row["trusted"],
        hardware=as_type(row["hardware"], Hardware),
        joined_at=row["joined_at"].isoformat(),
        last_seen=row["last_seen"].isoformat(),
        doing=doing,
        samples_per_s=float(row["rate"] or 0) if state == "working" else 0.0,
        fates=Fates(handed_out=sum(counts.values()), **counts),
        units=int(totals.get("units", 0)),
        owner=row["owner_name"],
        labels=row["all_labels"],
        rules=row["rules"],
        executors=row["executors"],
        machine=row["machine"],
        draining=row["draining_at"] is not None,
        jobs=jobs,
    )


def _place(job: dict[str, Any]) -> str:
    """A job, and which part of the machine is its."""
    gpus = [str(index) for index in job["gpus"]]
    return str(job["name"]) + (f" on gpu {', '.join(gpus)}" if gpus else "")
