"""Calls of tools as OpenAI's API has them."""

import secrets
from collections.abc import Sequence
from typing import Any

from thinslice.engine.request import Completion, TextChunk, ToolCall


def new_call_id() -> str:
    """An id of nine letters and digits: Mistral's templates take no other."""
    return secrets.token_hex(5)[:9]


def call_objects(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Whole calls."""
    return [
        {
            "id": new_call_id(),
            "type": "function",
            "function": {"name": one.name, "arguments": one.arguments},
        }
        for one in calls
    ]


def finish_reason(completion: Completion) -> str | None:
    """Why an answer ended: a cut one was cut, whatever calls it has."""
    has_called = completion.finish_reason == "stop" and completion.tool_calls
    return "tool_calls" if has_called else completion.finish_reason


class CallDeltas:
    """The deltas of the calls of one choice: id and name in the first of each, its index in all."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, chunk: TextChunk) -> dict[str, Any]:
        """The delta of a name or of a piece of arguments."""
        if chunk.kind == "call":
            self.count += 1
            function = {"name": chunk.text, "arguments": ""}
            return self._delta({"id": new_call_id(), "type": "function", "function": function})
        return self._delta({"function": {"arguments": chunk.text}})

    def finish_reason(self, reason: str | None) -> str | None:
        """As the function of that name."""
        return "tool_calls" if reason == "stop" and self.count else reason

    def _delta(self, call: dict[str, Any]) -> dict[str, Any]:
        return {"tool_calls": [{"index": self.count - 1, **call}]}
