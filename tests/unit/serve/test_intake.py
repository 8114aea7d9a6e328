"""Bodies: what is too large, too many or too slow is refused, and what was held comes back."""

import asyncio
import json
import random
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from thinslice.serve import intake
from thinslice.serve.bodies import ChatBody
from thinslice.serve.intake import BodyBounds, Intake, held_bytes
from thinslice.units import KIB

BOUNDS = BodyBounds(num_bytes=1000, num_values=100, room_bytes=held_bytes(1000, 100))


class Client:
    """Sends a body in pieces to an application that waits before it answers."""

    def __init__(self, *pieces: bytes, length: str | None = None, method: str = "POST") -> None:
        self.messages: list[Message] = [
            {"type": "http.request", "body": piece, "more_body": place < len(pieces) - 1}
            for place, piece in enumerate(pieces)
        ]
        headers = [] if length is None else [(b"content-length", length.encode())]
        self.scope: Scope = {"type": "http", "method": method, "path": "/v1/x", "headers": headers}
        self.answered = asyncio.Event()
        self.status = 0
        self.told = b""

    async def receive(self) -> Message:
        if self.messages:
            return self.messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def send(self, message: Message) -> None:
        self.status = message.get("status", self.status)
        self.told += message.get("body", b"")


class Application:
    """Takes bodies, and answers once it is let."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.may_answer = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append((await receive())["body"])
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def until_idle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def ask(taking: Intake, client: Client) -> Client:
    await asyncio.wait_for(taking(client.scope, client.receive, client.send), 20)
    return client


def test_a_body_comes_whole_and_its_room_comes_back() -> None:
    async def run() -> None:
        application = Application()
        taking = Intake(application, replace(BOUNDS, room_bytes=held_bytes(1100, 0)))
        first = asyncio.ensure_future(ask(taking, Client(b"a" * 600, b"", b"b" * 300)))
        await until_idle()
        assert application.bodies == [b"a" * 600 + b"b" * 300]
        refused = await ask(taking, Client(b"c" * 900))
        assert refused.status == 429
        assert json.loads(refused.told)["error"]["code"] == "queue_full"
        small = asyncio.ensure_future(ask(taking, Client(b"d" * 100)))
        await until_idle()
        application.may_answer.set()
        assert (await first).status == (await small).status == 200
        assert (await ask(taking, Client(b"e" * 1000, length="1000"))).status == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (lambda: Client(b"", length="1001"), 413),
        (lambda: Client(b"", length="9" * 4000), 413),
        (lambda: Client(b"a" * 500, b"a" * 501), 413),
        (lambda: Client(b"[" * 101), 413),
        (lambda: Client(b"[1,{" * 33 + b","), 200),
        (lambda: Client(b"a" * 1000), 200),
        (lambda: Client(b"a" * 2000, method="GET"), 200),
        (lambda: Client(b"a", length="x"), 200),
    ],
)
def test_bounds(client: Any, status: int) -> None:
    async def run() -> None:
        application = Application()
        application.may_answer.set()
        taking = Intake(application, BOUNDS)
        assert (await ask(taking, client())).status == status
        # Nothing of it is held.
        assert (await ask(taking, Client(b"," * 100 + b"a" * 900))).status == 200

    asyncio.run(run())


def test_a_body_that_does_not_come_is_told_and_one_whose_client_leaves_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "_TIMEOUT_S", 0.01)

    async def run() -> None:
        application = Application()
        taking = Intake(application, BOUNDS)
        slow = Client(b"a")
        slow.messages[0]["more_body"] = True
        assert (await ask(taking, slow)).status == 408
        gone = Client(b"a", b"b")
        gone.messages[1] = {"type": "http.disconnect"}
        assert (await ask(taking, gone)).status == 0
        assert application.bodies == []
        application.may_answer.set()
        assert (await ask(taking, Client(b"," * 100 + b"a" * 900))).status == 200

    asyncio.run(run())


def test_a_prompt_that_fills_the_context_is_taken_in() -> None:
    bounds = BodyBounds.of(4096)
    for prompt in ("a" * 4 * 4096, "\u0915" * 4096, list(range(4096)), ", " * 4096):
        body = json.dumps({"model": "m", "prompt": prompt}).encode()
        assert len(body) <= bounds.num_bytes
        assert sum(map(body.count, (b",", b":", b"[", b"{"))) <= bounds.num_values


def values(rng: random.Random) -> list[Any]:
    """Values of many kinds, each as small as its text can be."""
    kind = rng.choice([[], {}, 0, 1000, 0.5, "a", "\U0001f600", {"a": 0}, {"": {}}, [[[]]], None])
    return [kind] * rng.randrange(1, 4000)


@pytest.mark.parametrize("seed", range(30))
def test_a_body_comes_to_no_more_than_is_counted(seed: int) -> None:
    rng = random.Random(seed)
    text = "a" * rng.randrange(100 * KIB) + "\U0001f600" * rng.randrange(3)
    message = {"role": "user", "content": text, "x": values(rng), f"{seed}": values(rng)}
    more = {f"k{n}": n for n in range(rng.randrange(3000))}
    asked = {"model": "m", "messages": [message] * rng.randrange(1, 4), **more}
    body = json.dumps(asked, separators=(",", ":"), ensure_ascii=rng.random() < 0.5).encode()
    counted = held_bytes(len(body), sum(map(body.count, (b",", b":", b"[", b"{"))))
    tracemalloc.start()
    try:
        raw = bytes(bytearray(body))
        parsed = ChatBody.model_validate(json.loads(raw))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(parsed.messages) == len(asked["messages"])
    assert peak <= counted + 16 * KIB
