"""A line of the log for each request, and the name that it goes by."""

import re
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.sequence import Sequence
from thinslice.serve.log import Log

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")
_MOST_PATH = 200
# Of a request and of its answer each, where --log-content asks for them.
_MOST_CONTENT = 16 * 1024


@dataclass
class RequestRecord:
    """What the log tells of a request.

    Attributes:
        began_at: on the engine's clock.
        streams: of its prompts.
        status: None where nothing was answered.
        is_whole: whether the answer was sent to its end.
        asked, answered: contents, where they are asked for.
    """

    request_id: str
    began_at: float = field(default_factory=perf_counter)
    streams: list[AsyncStream] = field(default_factory=list)
    status: int | None = None
    is_whole: bool = False
    asked: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)

    def numbers(self) -> dict[str, float | int]:
        """Seconds and counts of tokens, as far as there are any."""
        told: dict[str, float | int] = {"total_s": perf_counter() - self.began_at}
        found = [one for stream in self.streams for one in stream.sequences]
        if found:
            told |= _of_sequences(found, self.began_at)
        return {
            name: round(one, 6) if isinstance(one, float) else one for name, one in told.items()
        }


def _of_sequences(found: list[Sequence], began_at: float) -> dict[str, float | int]:
    told: dict[str, float | int] = {}
    admitted = [one.admitted_at for one in found if one.admitted_at is not None]
    first = [one.first_token_at for one in found if one.first_token_at is not None]
    if admitted:
        told["queue_s"] = min(admitted) - min(one.arrived_at for one in found)
    if first:
        told["first_token_s"] = min(first) - began_at
    # A prompt has one list of tokens, whatever is asked of it.
    prompts = {id(one.prompt_token_ids): one for one in found}.values()
    told["prompt_tokens"] = sum(len(one.prompt_token_ids) for one in prompts)
    told["completion_tokens"] = sum(len(one.completion_token_ids) for one in found)
    return told


_CURRENT: ContextVar[RequestRecord | None] = ContextVar("request", default=None)


def note_stream(stream: AsyncStream) -> None:
    """Have a stream told in the line of the request that it is read for."""
    record = _CURRENT.get()
    if record is not None:
        record.streams.append(stream)


class RequestLog:
    """Passes requests on to an application and writes a line for each, once it is answered.

    Args:
        has_content: whether bodies and answers stand in the log, up to 16 KiB each.
    """

    def __init__(self, app: ASGIApp, log: Log, *, has_content: bool) -> None:
        self._app = app
        self._log = log
        self._has_content = has_content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, whose answer has its ``x-request-id``."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_id_of(Headers(scope=scope)))

        async def received() -> Message:
            message = await receive()
            if self._has_content:
                _keep(record.asked, message)
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                _name(scope, message, record.request_id)
            elif self._has_content:
                _keep(record.answered, message)
            await send(message)
            is_body = message["type"] == "http.response.body"
            record.is_whole |= is_body and not message.get("more_body", False)

        token = _CURRENT.set(record)
        try:
            await self._app(scope, received, sent)
        finally:
            _CURRENT.reset(token)
            self._write(scope, record)
            record.streams.clear()  # they hold the plan's room

    def _write(self, scope: Scope, record: RequestRecord) -> None:
        key = scope.get("state", {}).get("key")
        told: dict[str, Any] = {
            "id": record.request_id,
            "method": scope["method"],
            "path": scope["path"][:_MOST_PATH],
            "status": record.status,
            **({} if record.is_whole else {"is_cut": True}),
            **record.numbers(),
            **({} if key is None else {"key": key.name}),
        }
        if self._has_content:
            told["request"] = record.asked.decode(errors="replace")
            told["response"] = record.answered.decode(errors="replace")
        self._log.write(told, _text(told))


def _text(told: Mapping[str, Any]) -> str:
    """The line for a person."""
    first = f"{told['status']} {told['method']} {_printable(told['path'])}"
    shown = ("method", "path", "status")
    rest = [f"{name}={_printable(value)}" for name, value in told.items() if name not in shown]
    return " ".join((first, *rest))


def _printable(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and " " not in text else repr(text)


def _id_of(headers: Headers) -> str:
    """The name that a request comes with, where that is one, or a new one."""
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _name(scope: Scope, start: Message, request_id: str) -> None:
    headers = MutableHeaders(raw=start.setdefault("headers", []))
    headers["x-request-id"] = request_id
    if scope["path"].startswith("/v1/messages"):  # as Anthropic's clients look for it
        headers["request-id"] = request_id
    start["headers"] = headers.raw


def _keep(content: bytearray, message: Message) -> None:
    content += message.get("body", b"")[: _MOST_CONTENT - len(content)]
