"""Server-sent events, and what ends with the client that asked for it."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

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


async def until_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What some work gives; it is cancelled where the client goes away first.

    Errors: ClientGoneError.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
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
        frame: an event as it is sent.
        last: what is sent behind all events.
        pause: what is sent where no event comes for long.
    """

    def __init__(
        self,
        events: Events,
        frame: Callable[[dict[str, Any]], str],
        last: str,
        pause: str,
        media_type: str = "text/event-stream",
    ) -> None:
        super().__init__((), headers=_HEADERS, media_type=media_type)
        self._events = events
        self._frame = frame
        self._last = last
        self._pause = pause

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        with suppress(ClientGoneError):
            await until_gone(receive, self._send_all(scope["path"], send))

    async def _send_all(self, path: str, send: Send) -> None:
        last = self._last
        with Contained() as trouble:
            async with aclosing(_with_pauses(self._events)) as events:
                async for event in events:
                    await _send(send, self._pause if event is None else self._frame(event), True)
        if trouble.error is not None:  # the status is sent: it can only be told
            last = self._frame(told(trouble.error).body(path))
        await _send(send, last, False)


def openai_events(events: Events) -> EventStream:
    """As OpenAI's API sends them."""
    return EventStream(events, _data, "data: [DONE]\n\n", ": waiting\n\n")


def anthropic_events(events: Events) -> EventStream:
    """As Anthropic's API sends them: each has its type as its name."""
    ping = _named({"type": "ping"})
    return EventStream(events, _named, "", ping)


def responses_events(events: Events) -> EventStream:
    """As OpenAI's API sends those of ``/v1/responses``: the last of them is the end."""
    return EventStream(events, _named, "", ": waiting\n\n")


def json_lines(events: Events) -> EventStream:
    """As Ollama sends them, which has nothing for a pause."""
    return EventStream(events, _line, "", "", "application/x-ndjson")


def _data(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def _named(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\n{_data(event)}"


def _line(event: dict[str, Any]) -> str:
    return f"{json.dumps(event)}\n"


async def _send(send: Send, text: str, is_more: bool) -> None:
    body = text.encode()
    if body or not is_more:
        await send({"type": "http.response.body", "body": body, "more_body": is_more})


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
