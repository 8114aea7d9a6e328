"""Clients that load a server: some leave in the middle, some read nothing for long."""

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

# Of each choice: its text, its calls, why it ended, and the log-probabilities of its tokens.
Choice = tuple[str, tuple[tuple[str, str], ...], str | None, tuple[float | None, ...]]
_SMALL_BUFFER = 4096


@dataclass(frozen=True)
class Asked:
    """A request whose answer is the same each time."""

    path: str
    body: dict[str, Any]


@dataclass
class Tally:
    """What clients met.

    Attributes:
        statuses: of answers, and ``left`` for those that were not waited for.
        errors: messages of errors within streams.
        wrong: finished answers that are not as expected.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    wrong: list[object] = field(default_factory=list)


@dataclass
class Load:
    """A server under load.

    Args:
        asked: what clients choose from.
        expected: the answers.
        keys: of clients.
    """

    port: int
    asked: Sequence[Asked]
    expected: Sequence[dict[int, Choice]]
    keys: Sequence[str]
    tally: Tally = field(default_factory=Tally)

    async def client(self, draws: random.Random, until: float) -> None:
        """Ask until then, one request after the other."""
        while monotonic() < until:
            place = draws.randrange(len(self.asked))
            asked, is_stream = self.asked[place], draws.random() < 0.6
            patience = draws.uniform(0, 4) if draws.random() < 0.2 else None
            pause = draws.uniform(1, 5) if draws.random() < 0.2 else 0.0
            body = {**asked.body, "stream": is_stream}
            key = draws.choice(self.keys)
            work = post(self.port, asked.path, json.dumps(body).encode(), key, pause)
            try:
                status, content = await asyncio.wait_for(work, patience)
            except TimeoutError:
                self.tally.statuses["left"] += 1
                continue
            self.tally.statuses[str(status)] += 1
            if status == 200:
                self._compare(place, content, is_stream)
            else:
                await asyncio.sleep(draws.uniform(0.1, 0.5))

    def _compare(self, place: int, content: bytes, is_stream: bool) -> None:
        events = events_of(content) if is_stream else [json.loads(content)]
        told = [event["error"]["message"] for event in events if "error" in event]
        if told:
            self.tally.errors[told[0][:60]] += 1
            return
        found = choices_of(events)
        self.tally.finished += 1
        if found != self.expected[place]:
            self.tally.wrong.append((self.asked[place], found, self.expected[place]))


async def post(
    port: int, path: str, body: bytes, key: str = "", pause_s: float = 0.0
) -> tuple[int, bytes]:
    """Send a body and read the answer; a status of 0 where the connection ended before one.

    Args:
        pause_s: seconds in which nothing is read, with small buffers, so that the server waits.
    """
    connecting = socket.socket()
    connecting.setblocking(False)
    if pause_s:
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
    await asyncio.get_running_loop().sock_connect(connecting, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connecting, limit=_SMALL_BUFFER)
    content = bytearray()
    try:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        head += f"authorization: Bearer {key}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await asyncio.sleep(pause_s)
        # A body that is too large is answered before its end, and the rest meets nobody.
        with suppress(ConnectionError):
            while piece := await reader.read(_SMALL_BUFFER):
                content += piece
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return parsed(bytes(content)) if content else (0, b"")


def parsed(content: bytes) -> tuple[int, bytes]:
    """Status and body of an answer that ended with its connection."""
    head, _, body = content.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        whole, rest = b"", body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            whole, rest = whole + rest[:length], rest[length + 2 :]
        body = whole
    return int(head.split(b" ")[1]), body


def refusal_of(content: bytes) -> str:
    """What an error tells, in the form of any of the three interfaces."""
    error = json.loads(content)["error"]
    told: str = error["message"] if isinstance(error, dict) else error
    return told


def events_of(content: bytes) -> list[dict[str, Any]]:
    """The events of a stream that ended as it should."""
    lines = [line for line in content.decode().split("\n\n") if line.startswith("data: ")]
    found = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
    assert lines[-1] == "data: [DONE]" or "error" in found[-1], lines[-1:]
    return found


def choices_of(events: Sequence[dict[str, Any]]) -> dict[int, Choice]:
    """The choices of a whole answer, or of a stream's events."""
    found: dict[int, Choice] = {}
    for event in events:
        for one in event["choices"]:
            text, calls, _, logprobs = found.get(one["index"], ("", (), None, ()))
            message = one.get("message", one.get("delta", one))
            text += message.get("reasoning_content") or ""
            text += message.get("content") or message.get("text") or ""
            calls = _with(calls, message.get("tool_calls") or ())
            logprobs += _of(one["logprobs"])
            found[one["index"]] = (text, calls, one["finish_reason"], logprobs)
    return found


def _with(
    calls: tuple[tuple[str, str], ...], more: Sequence[dict[str, Any]]
) -> tuple[tuple[str, str], ...]:
    made = [*calls]
    for place, one in enumerate(more):
        index, function = one.get("index", place), one["function"]
        if index == len(made):
            made.append(("", ""))
        name, arguments = made[index]
        more_of = function.get("name") or "", function.get("arguments") or ""
        made[index] = (name + more_of[0], arguments + more_of[1])
    return tuple(made)


def _of(logprobs: dict[str, Any] | None) -> tuple[float | None, ...]:
    if logprobs is None:
        return ()
    if "content" in logprobs:
        return tuple(one["logprob"] for one in logprobs["content"] or ())
    return tuple(logprobs["token_logprobs"])
