"""What does no request get past, whatever its route? Sizes, and the headers that every answer carries."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from potluck.hub.entrance import problem
from potluck.protocol import PROTOCOL, PROTOCOL_HEADER

MAX_BODY_BYTES = 16 << 20
_HEADERS = [
    (PROTOCOL_HEADER.lower().encode(), str(PROTOCOL).encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


class Limits:
    """ASGI middleware; plain, so that streaming answers stay streams."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > MAX_BODY_BYTES:
            answer = problem(413, "too_large", f"a request may have at most {MAX_BODY_BYTES:,} bytes")
            await answer(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > MAX_BODY_BYTES:
                return {"type": "http.disconnect"}
            return message

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self.app(scope, counted, labelled)
