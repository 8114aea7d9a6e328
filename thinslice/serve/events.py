"""Server-sent events, and what ends with the client that asked for it."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from thinslice.engine.contained import Contained
from thinslice.serve.errors import told

# Seconds without an event after which a comment keeps clients and proxies from giving up.
KEEP_ALIVE_S = 15.0
# The last one keeps nginx from collecting events.
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
Result = TypeVar("Result")
Events = AsyncGenerator[dict[str, Any]]


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def until_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What some work gives; it is cancelled where the client goes away first.

    Errors: ClientGoneError.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A response whose events are JSON objects.

    The iterator is closed where the client goes away, whatever it waits for, and where a client
    reads slowly it waits with it. An error becomes the last event, as the status is sent by then.

    Args:
        last: an event of its own text behind all others.
    """

    def __init__(self, events: Events, last: str | None = "[DONE]") -> None:
        super().__init__((), headers=_HEADERS, media_type="text/event-stream")
        self._events = events
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        with suppress(ClientGoneError):
            await until_gone(Request(scope, receive), self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        last = "" if self._last is None else _framed(self._last)
        with Contained() as trouble:
            async with aclosing(_with_pauses(self._events)) as events:
                async for event in events:
                    text = ": waiting\n\n" if event is None else _framed(json.dumps(event))
                    await _send(send, text, True)
        if trouble.error is not None:  # the status is sent: it can only be told
            last = _framed(json.dumps(told(trouble.error).body))
        await _send(send, last, False)


async def _send(send: Send, text: str, is_more: bool) -> None:
    body = text.encode()
    await send({"type": "http.response.body", "body": body, "more_body": is_more})


def _framed(data: str) -> str:
    return f"data: {data}\n\n"


async def _with_pauses(events: Events) -> AsyncGenerator[dict[str, Any] | None]:
    """The events, and None for each time that none comes for long; closed with it."""
    async with aclosing(events):
        while True:
            coming = asyncio.ensure_future(anext(events, None))
            try:
                while not (await asyncio.wait((coming,), timeout=KEEP_ALIVE_S))[0]:
                    yield None
                event = coming.result()
            finally:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            if event is None:
                return
            yield event
