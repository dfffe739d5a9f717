"""What a request must pass before it is read: the key, a place, its size and its time.

A place is held from before a request's body is read until its response is sent, so that their number bounds memory. A
client that goes away, or takes longer than allowed, gives its place back at once.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pam_espnet.serve.metrics import Metrics

OPEN = ("/health",)  # paths that need no key


@dataclass(frozen=True)
class Limits:
    """Of requests; see the options of ``pam_serve``."""

    max_bytes: int = 25 << 20  # of a body
    max_seconds: float = 600.0  # of a recording
    places: int = 64  # requests that are read, wait or are decoded
    upload_seconds: float = 60.0  # until a body must be there
    seconds: float = 120.0  # until its answer must be sent


class Refused(HTTPException):
    """An error for the client, in the form that OpenAI's clients read; ``code`` is for programs."""

    def __init__(self, status: int, message: str, code: str, retry_after: int | None = None) -> None:
        super().__init__(status, message, None if retry_after is None else {"Retry-After": str(retry_after)})
        self.code = code

    def response(self) -> JSONResponse:
        return error_response(self.status_code, str(self.detail), self.code, self.headers)


def error_response(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """OpenAI's form of an error."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


def too_large(limits: Limits) -> Refused:
    """More bytes than allowed."""
    message = f"the request is larger than {limits.max_bytes} bytes; send a compressed format, such as FLAC"
    return Refused(413, message, "request_too_large")


class Gate:
    """The limits as ASGI middleware.

    Args:
        key: that clients must send as ``Authorization: Bearer KEY``; None: no key is needed.
        metrics: counts requests and places.
        retry_after: seconds after which a place may be free.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, key: str | None, metrics: Metrics, retry_after: Callable[[], int]
    ) -> None:
        self.app, self.limits, self.key, self.metrics, self.retry_after = app, limits, key, metrics, retry_after
        self.taken = 0  # places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = "none"  # the client went away

        async def noted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        posted = False
        try:
            self._check(scope)
            if posted := scope["method"] == "POST":
                self._count(1)
                await self._pass(scope, receive, noted_send)
            else:
                await self.app(scope, receive, noted_send)
        except Refused as error:
            await error.response()(scope, receive, noted_send)
        finally:
            self._count(-posted)
            self.metrics.count_request(scope["path"], status)

    def _count(self, places: int) -> None:
        self.taken += places
        self.metrics.places.set(self.taken)

    def _check(self, scope: Scope) -> None:
        """Raises Refused: by what is in the headers, and for want of places."""
        headers = Headers(scope=scope)
        if self.key is not None and scope["path"] not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.key.encode()):  # takes as long for any wrong key
                raise Refused(401, "wrong or missing key: send Authorization: Bearer KEY", "invalid_api_key")
        if (length := headers.get("content-length", "0")).isdecimal() and int(length) > self.limits.max_bytes:
            raise too_large(self.limits)
        if scope["method"] == "POST" and self.taken >= self.limits.places:
            message = f"all {self.limits.places} places are taken; try again later"
            raise Refused(429, message, "rate_limit_exceeded", self.retry_after())

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The request within its limits; it ends early where its client goes away.
        Raises Refused: it took too long, and no response was begun."""
        body, sent = _Body(receive, self.limits), ""  # sent: the last message's type, "end" after the response's end

        async def noted_send(message: Message) -> None:
            nonlocal sent
            sent = message["type"] if message.get("more_body", message["type"] != "http.response.body") else "end"
            await send(message)

        answering = asyncio.ensure_future(self.app(scope, body.receive, noted_send))
        leaving = asyncio.create_task(body.left())
        try:
            async with asyncio.timeout(self.limits.seconds):
                await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
                if sent == "end" or not leaving.done():
                    await answering
        except TimeoutError:
            answering.cancel()
            await asyncio.wait((answering,))
            if not sent:  # else the client sees that the stream breaks off
                message = f"no answer within {self.limits.seconds:g} s; try again later"
                raise Refused(503, message, "timeout", self.retry_after()) from None
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)


class _Body:
    """The body of one request, counted and timed."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._size = 0
        self._end = asyncio.get_running_loop().time() + limits.upload_seconds
        self._read = asyncio.Event()  # the application gets no more of it
        self._gone = asyncio.Event()

    async def receive(self) -> Message:
        """In place of the server's. Raises Refused: too much, or too late."""
        if self._read.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._end):
                message = await self._receive()
        except TimeoutError:
            self._read.set()
            raise Refused(408, f"the request took longer than {self._limits.upload_seconds:g} s", "timeout") from None
        self._size += len(message.get("body", b""))
        if self._size > self._limits.max_bytes:
            self._read.set()
            raise too_large(self._limits)
        if not message.get("more_body", False):
            self._read.set()
        return message

    async def left(self) -> None:
        """Return when the client goes away; what is left of the body is thrown away."""
        await self._read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
