"""A stream of the engine's, followed to its end or piece by piece, with its errors raised."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.contained import Contained
from thinslice.engine.request import Completion, Delta
from thinslice.serve.errors import ApiError
from thinslice.serve.request_log import note_stream
from thinslice.serve.served import FINGERPRINT

Result = TypeVar("Result")


@dataclass(frozen=True)
class Head:
    """What all chunks of an answer begin with, or the answer itself.

    Attributes:
        kind: the object's type.
        prefix: of its id.
    """

    model: str
    kind: str
    prefix: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def with_choices(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The object with its choices."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **more,
        }


async def deltas(stream: AsyncStream) -> AsyncGenerator[Delta]:
    """What comes, until all completions have ended; they end with the iterator.

    Errors: what went wrong in one of them.
    """
    note_stream(stream)
    async with stream:
        async for delta in stream:
            if delta.error is not None:
                raise delta.error
            if delta.finish_reason == "abort":
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            yield delta


async def whole(stream: AsyncStream) -> list[Completion]:
    """All completions of a prompt. Errors: as ``deltas``."""
    async for _ in deltas(stream):
        pass
    return stream.completions


async def all_of(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """What several works give, side by side; where one fails, or this is cancelled, all end."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _ended(tasks)


async def merged(sources: Sequence[AsyncGenerator[Result]]) -> AsyncGenerator[Result]:
    """What comes of several sources, as it comes; where one fails, or this is closed, all end.

    A source waits with whoever reads slowly.
    """
    coming: asyncio.Queue[tuple[Result] | None] = asyncio.Queue(1)
    turn = asyncio.Lock()  # whose waiters come in order; at a full queue the quickest always wins

    async def follow(source: AsyncGenerator[Result]) -> None:
        async with aclosing(source):
            async for one in source:
                async with turn:
                    await coming.put((one,))

    async def follow_all() -> None:
        with Contained() as trouble:
            await all_of([follow(source) for source in sources])
        await coming.put(None)
        if trouble.error is not None:
            raise trouble.error

    following = asyncio.ensure_future(follow_all())
    try:
        while (found := await coming.get()) is not None:
            yield found[0]
        await following
    finally:
        await _ended([following])


async def _ended(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
