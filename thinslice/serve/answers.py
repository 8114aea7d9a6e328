"""A stream of the engine's, followed to its end or piece by piece, with its errors raised."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from thinslice.engine.async_engine import AsyncStream
from thinslice.engine.request import Completion, Delta
from thinslice.serve.errors import ApiError
from thinslice.serve.served import FINGERPRINT


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


async def deltas(stream: AsyncStream) -> AsyncIterator[Delta]:
    """What comes, until all completions have ended; they end with the iterator.

    Errors: what went wrong in one of them.
    """
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
