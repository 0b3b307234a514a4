"""What every request passes before the app sees it: the key, and limits on its body's size and patience."""

from __future__ import annotations

import hmac

import anyio
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptcli.serve.errors import error_response

BODY_SECONDS = 20.0


class Gate:
    """ASGI middleware. Paths under /v1 need the key, if there is one."""

    def __init__(
        self, app: ASGIApp, *, api_key: str | None = None, max_body: int, body_seconds: float = BODY_SECONDS
    ) -> None:
        self.app, self.api_key, self.max_body, self.body_seconds = app, api_key, max_body, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.api_key is not None and scope["path"].startswith("/v1/") and not self._knows_key(scope):
            refusal = error_response(
                401, "a valid API key is needed (Authorization: Bearer KEY)", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
            await refusal(scope, receive, send)
            return
        try:
            with anyio.fail_after(self.body_seconds):
                body = await self._read(receive)
        except TimeoutError:
            late = error_response(408, f"the body took longer than {self.body_seconds:g} seconds to come")
            await late(scope, receive, send)
        except ClientDisconnect:
            return
        else:
            if body is None:
                await error_response(413, f"the body is larger than {self.max_body} bytes")(scope, receive, send)
            else:
                await self.app(scope, _replay(body, receive), send)

    def _knows_key(self, scope: Scope) -> bool:
        """In a time that does not tell how much of a guess was right."""
        assert self.api_key is not None
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(key, self.api_key.encode()) and scheme.lower() == b"bearer"

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None if it is too large. That one is read to its end all the same, because a client that is
        still sending would lose the answer with the connection."""
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= self.max_body:
                chunks.append(chunk)
            else:
                chunks.clear()
        return b"".join(chunks) if size <= self.max_body else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body at once, and then whatever comes, such as a disconnect."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
