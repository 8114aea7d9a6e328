"""Bodies of requests: taken in whole, within bounds, in a room that they share.

A body is held, raw and as objects, until its request has been answered. What it may come to is
told by its length and by how many values it has, before it is parsed.
"""

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thinslice.serve.errors import ApiError
from thinslice.units import KIB, MIB, format_bytes

# Of a body, beside what its prompt takes: tools, schemas, fields.
_BASE_BYTES = 256 * KIB
# A token is four letters, or some with their JSON escapes of six bytes.
_BYTES_PER_TOKEN = 32
# A prompt may come as the ids of its tokens, and several at once: those that may wait.
_BASE_VALUES, _VALUES_PER_TOKEN = 98_304, 4
# What parsing holds at most: a character beyond 16 bits makes each byte of a text take four, twice
# at a time, beside the text as it came; most small objects take less than their share.
_HELD_PER_BYTE = 10
_HELD_PER_VALUE = 50
# Beside one body of the largest size.
_OTHERS_BYTES = 8 * MIB
_METHODS = frozenset(("POST", "PUT", "PATCH", "DELETE"))
_VALUES = (b",", b":", b"[", b"{")
# Seconds for a body to come.
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class BodyBounds:
    """What one body may be, and what all may come to that are held at a time.

    Attributes:
        num_bytes: of one body.
        num_values: commas, colons and opening brackets in it.
        room_bytes: for all of them, raw and parsed.
    """

    num_bytes: int
    num_values: int
    room_bytes: int

    @classmethod
    def of(cls, context: int) -> "BodyBounds":
        """For a model whose longest prompt has so many tokens."""
        num_bytes = _BASE_BYTES + _BYTES_PER_TOKEN * context
        num_values = _BASE_VALUES + _VALUES_PER_TOKEN * context
        return cls(num_bytes, num_values, held_bytes(num_bytes, num_values) + _OTHERS_BYTES)


def held_bytes(num_bytes: int, num_values: int) -> int:
    """The most that a body comes to, raw and as objects."""
    return _HELD_PER_BYTE * num_bytes + _HELD_PER_VALUE * num_values


class Intake:
    """Reads a request's body before an application sees it, or answers with an error.

    Errors: 408 for a body that does not come, 413 for one that is too large, and 429 where others
    leave no room for it.
    """

    def __init__(self, app: ASGIApp, bounds: BodyBounds) -> None:
        self._app = app
        self._bounds = bounds
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body, which counts until it is answered."""
        if scope["type"] != "http" or scope["method"] not in _METHODS:
            await self._app(scope, receive, send)
            return
        claim = _Claim(self)
        try:
            try:
                body = await self._taken(scope, receive, claim)
            except ApiError as error:
                response = JSONResponse(error.body(scope["path"]), error.status, error.headers)
                await response(scope, receive, send)
                return
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)
        finally:
            claim.release()

    async def _taken(self, scope: Scope, receive: Receive, claim: "_Claim") -> bytes | None:
        """The body; None where the client goes away before its end.

        Errors: ApiError.
        """
        length = Headers(scope=scope).get("content-length", "")
        if length.isascii() and length.isdigit():
            self._check_length(int(length[:20]))
        body = bytearray()
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    self._check_length(len(body))
                    claim.grow(held_bytes(len(body), 0))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            told = f"the body did not come in {_TIMEOUT_S:.0f} s"
            raise ApiError(408, told, code="request_timeout") from None
        num_values = sum(map(body.count, _VALUES))
        if num_values > self._bounds.num_values:
            told = f"the body has {num_values} values; at most {self._bounds.num_values} are taken"
            raise ApiError(413, told, code="body_too_large")
        claim.grow(held_bytes(len(body), num_values))
        return bytes(body)

    def _check_length(self, num_bytes: int) -> None:
        most = self._bounds.num_bytes
        if num_bytes > most:
            told = f"the body is larger than {format_bytes(most)}, which hold any prompt that fits"
            raise ApiError(413, f"{told} the context", code="body_too_large")

    def take(self, num_bytes: int) -> None:
        """Count bytes that bodies come to. Errors: ApiError 429 where there is no room."""
        if self._held_bytes + num_bytes > self._bounds.room_bytes:
            told = "the bodies of other requests leave no room for this one: try again later"
            raise ApiError(429, told, code="queue_full")
        self._held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """What was taken, or a part of it."""
        self._held_bytes -= num_bytes


class _Claim:
    """What one body takes of the room."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Take so many bytes in all."""
        self._intake.take(num_bytes - self._num_bytes)
        self._num_bytes = num_bytes

    def release(self) -> None:
        self._intake.give_back(self._num_bytes)
        self._num_bytes = 0


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what else the client does."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
