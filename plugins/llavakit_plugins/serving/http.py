"""The server's face to the network: bodies with limits, answers with errors of OpenAI's form.

Everything here is plain ASGI, so that a body is counted as it comes and a client that goes away
is noticed while its answer is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from starlette.types import Message, Receive, Scope, Send

from llavakit_plugins.serving.errors import Gone, RequestError
from llavakit_plugins.serving.limits import Limits
from llavakit_plugins.serving.responses import encode

JSON = "application/json"


class Bodies:
    """Reads bodies, within a limit for each and one for all that are held at once."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    @property
    def held(self) -> int:
        """Return the bytes that are held now."""
        return self._held

    @asynccontextmanager
    async def read(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """Yield a JSON body; what it takes counts until the block ends.

        Raises RequestError for one that is too large, too slow or no JSON, Gone where the client
        left.
        """
        headers = {name.lower(): value for name, value in scope["headers"]}
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != JSON.encode():  # a form of some other site's page can send no JSON
            raise RequestError(415, f"send `Content-Type: {JSON}`")
        stated = headers.get(b"content-length", b"0")
        # refused by what is stated where possible; what comes is counted in any case
        if stated.isdigit() and int(stated) > self._limits.body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        try:
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    await self._collect(receive, parts)
            except TimeoutError:
                raise RequestError(
                    408, "the body took too long to come", headers={"Connection": "close"}
                ) from None
            # in the same list, so that `finally` gives back what is held, and the pieces are freed
            parts[:] = [b"".join(parts)]
            yield parts[0]
        finally:
            self._held -= sum(map(len, parts))

    async def _collect(self, receive: Receive, parts: list[bytes]) -> None:
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._held += len(parts[-1])
            if size > self._limits.body_bytes:
                raise self._too_large()
            if self._held > self._limits.bodies_bytes:
                raise RequestError(
                    503, "too many large requests at once; try again", headers=again(1)
                )
            if not message.get("more_body"):
                return

    def _too_large(self) -> RequestError:
        most = self._limits.body_bytes
        return RequestError(
            413,
            f"the body is larger than {most} bytes; send smaller images",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def again(seconds: float) -> dict[str, str]:
    """Return the header that says when to ask again."""
    return {"Retry-After": str(max(1, round(seconds)))}


class Answer:
    """Sends one answer, each part within a time limit."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self.begun = False

    async def begin(self, status: int, kind: str, headers: Mapping[str, str] = {}) -> None:
        self.begun = True
        own = {"content-type": kind, "cache-control": "no-store", **headers}
        pairs = [(name.lower().encode(), value.encode()) for name, value in own.items()]
        await self._within({"type": "http.response.start", "status": status, "headers": pairs})

    async def part(self, data: bytes, *, more: bool = True) -> None:
        await self._within({"type": "http.response.body", "body": data, "more_body": more})

    async def whole(
        self, status: int, data: bytes, kind: str = JSON, headers: Mapping[str, str] = {}
    ) -> None:
        length = {"content-length": str(len(data))}
        await self.begin(status, kind, {**length, **headers})
        await self.part(data, more=False)

    async def error(self, error: RequestError) -> None:
        await self.whole(error.status, encode(error.body), headers=error.headers)

    async def _within(self, message: Message) -> None:
        """Send; raise Gone for a client that does not read."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            raise Gone from None


Endpoint = Callable[[Scope, Receive, Answer], Awaitable[None]]


async def left(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
