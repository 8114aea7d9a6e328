"""Server-sent events, and what ends with the client that asked for it."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
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
        last, sender = self._last, _Sender(send)
        with Contained() as trouble:
            async with aclosing(self._events) as events, sender.pausing(self._pause):
                async for event in events:
                    await sender.send(self._frame(event))
        if trouble.error is not None:  # the status is sent: it can only be told
            last = self._frame(told(trouble.error).body(path))
        await sender.send(last, is_more=False)


class _Sender:
    """Sends text, and something in between where there is none for long."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_sending = False
        self._sent_at = 0.0

    async def send(self, text: str, *, is_more: bool = True) -> None:
        """Send text, if there is any; the last one also where it is empty."""
        body = text.encode()
        if not body and is_more:
            return
        self._is_sending = True
        await self._send({"type": "http.response.body", "body": body, "more_body": is_more})
        self._is_sending, self._sent_at = False, asyncio.get_running_loop().time()

    @asynccontextmanager
    async def pausing(self, pause: str) -> AsyncGenerator[None]:
        """Inside, a pause is sent for each time that nothing else is for long.

        One task sees to all of a stream: one for each event takes a twentieth of a server's time.
        """
        task = asyncio.ensure_future(self._send_pauses(pause))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _send_pauses(self, pause: str) -> None:
        clock = asyncio.get_running_loop().time
        self._sent_at = clock()
        while True:
            left = self._sent_at + KEEP_ALIVE_S - clock()
            if left > 0:
                await asyncio.sleep(left)
            elif self._is_sending:  # to a slow reader, who has enough to read
                await asyncio.sleep(KEEP_ALIVE_S)
            else:
                await self.send(pause)
                self._sent_at = clock()  # also where a pause is nothing


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
