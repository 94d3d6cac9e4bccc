"""How does a browser come in, stay in for a week, and leave again?

By a link: the hub makes a credential for this browser alone. By a form: it takes one that exists already, a member's or
the admin's. Either way it lies in a cookie that no script can read and that no other site's request carries.
"""

from __future__ import annotations

from datetime import UTC, datetime
from time import monotonic

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from potluck import settings
from potluck.domain import access
from potluck.errors import NotAllowed, NotKnown, PotluckError
from potluck.hub.commands import people
from potluck.hub.dashboard.answers import Page, page, see
from potluck.hub.entrance import SESSION_COOKIE, At, came_encrypted, comes_from_here, desk_of, form_of, roles
from potluck.protocol import JoinRequest

SESSION_S = 7 * 86400
INSTALL = "pip install '.[train]'"
FAILURES_PER_MINUTE = 10
"""Wrong credentials from one address. Nobody guesses 256 bits; this keeps the ledger from being asked for nothing."""
MOST_ADDRESSES = 1000

router = APIRouter(route_class=Page, include_in_schema=False)


class Patience:
    """Who failed how often lately."""

    def __init__(self) -> None:
        self._failures: dict[str, list[float]] = {}

    def is_over(self, address: str, now: float) -> bool:
        lately = [at for at in self._failures.get(address, []) if now - at < 60]
        return len(lately) >= FAILURES_PER_MINUTE

    def failed(self, address: str, now: float) -> None:
        lately = [at for at in self._failures.pop(address, []) if now - at < 60]
        self._failures[address] = [*lately, now][-FAILURES_PER_MINUTE:]
        while len(self._failures) > MOST_ADDRESSES:
            self._failures.pop(next(iter(self._failures)))


@router.get("/j/{code}", response_class=HTMLResponse, **roles(access.OPEN))
async def link(request: Request, desk: At, code: str) -> Response:
    """What a link is for. Looking at it uses nothing up."""
    invite = await people.peek_invite(desk, code)
    if invite is None:
        text = "This hub never gave this link. Copy it again, whole, or ask for a fresh one."
        return page("message.html", 404, hub=desk.name, title="An unknown link", text=text, again=False)
    if not invite["usable"]:
        late = invite["expires_at"] <= datetime.now(UTC)
        text = "Its time is over. " if late else "All its uses are taken, or it was withdrawn. "
        text += "Ask for a fresh one (on the hub's machine: potluck invite)."
        return page("message.html", 410, hub=desk.name, title="This link no longer works", text=text, again=False)
    url = f"{desk.public_url}/j/{code}" + (f"#fp={desk.fingerprint}" if desk.fingerprint else "")
    return page(
        "link.html",
        hub=desk.name,
        role=invite["role"],
        expires_at=invite["expires_at"].isoformat(),
        seconds_left=(invite["expires_at"] - datetime.now(UTC)).total_seconds(),
        code=code,
        url=url,
        install=INSTALL,
        verb="work" if invite["role"] == "worker" else "member",
    )


@router.post("/j/{code}/enter", **roles(access.OPEN))
async def enter(request: Request, desk: At, code: str) -> Response:
    """Take a credential out of a viewer's or a member's link and leave it in the browser, where no script can read it."""
    _refuse_other_sites(request)
    invite = await people.peek_invite(desk, code)
    role = invite["role"] if invite else ""
    if await _role_here(request) in {"viewer": ("viewer", "member", "admin"), "member": ("member", "admin")}.get(
        role, ()
    ):
        return see("/")  # a second click does not use the link up
    if invite is None or not invite["usable"] or role not in ("viewer", "member"):
        return see(f"/j/{code}")  # that page says what is wrong with it
    token = settings.make_token(role)
    name = (await form_of(request)).get("name", "")
    await people.join(desk, JoinRequest(code, name, settings.hash_token(token)))
    return _let_in(request, token)


@router.get("/sign-in", response_class=HTMLResponse, **roles(access.OPEN))
async def sign_in_page(desk: At) -> Response:
    return page("sign_in.html", hub=desk.name, reason="", to="")


@router.post("/sign-in", response_class=HTMLResponse, **roles(access.OPEN))
async def sign_in(request: Request, desk: At) -> Response:
    """Let the owner of a credential in: a member's from their machine, the admin's from the hub's data folder."""
    _refuse_other_sites(request)
    patience: Patience = request.app.state.patience
    address = request.client.host if request.client else ""
    if patience.is_over(address, monotonic()):
        text = "Too many wrong credentials came from your address: wait a minute and try again."
        answer = page("sign_in.html", 429, hub=desk.name, reason=text, to="")
        answer.headers["Retry-After"] = "60"
        return answer
    token = (await form_of(request)).get("credential", "").strip()
    try:
        settings.check_token(token)
        caller = await people.authenticate(desk, token)
    except NotKnown as error:
        patience.failed(address, monotonic())
        return page("sign_in.html", 401, hub=desk.name, reason=str(error), to="")
    if caller.role == "worker":
        text = "This credential belongs to a machine, and a machine has nothing to press here: use a person's."
        return page("sign_in.html", 403, hub=desk.name, reason=text, to="")
    return _let_in(request, token)


@router.post("/sign-out", **roles(access.PEOPLE))
async def sign_out() -> Response:
    answer = see("/")
    answer.delete_cookie(SESSION_COOKIE, path="/", httponly=True, samesite="strict")
    return answer


def _let_in(request: Request, token: str) -> Response:
    answer = see("/")
    answer.set_cookie(
        SESSION_COOKIE,
        token,
        max_age=SESSION_S,
        path="/",
        httponly=True,
        samesite="strict",
        secure=came_encrypted(request),
    )
    return answer


def _refuse_other_sites(request: Request) -> None:
    """Nobody signs a browser in behind its owner's back. Programs say no origin, and have no owner to deceive."""
    if ("origin" in request.headers or "referer" in request.headers) and not comes_from_here(request):
        raise NotAllowed("another site sent you here: open this hub's own page and sign in there")


async def _role_here(request: Request) -> str:
    """The role that this browser has already; "" for none that still holds."""
    try:
        return (await people.authenticate(desk_of(request), request.cookies.get(SESSION_COOKIE, ""))).role
    except PotluckError:
        return ""
