"""Calls of tools as the interfaces have them."""

import json
import math
import secrets
import sys
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


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """A call's arguments as the object that they write; an empty one where they were cut, as
    Anthropic has it, or are no JSON.

    A number that no double holds is the largest one, and halves of characters that stand alone are
    question marks: neither can be sent.
    """
    try:
        found = json.loads(call.arguments, parse_float=_finite, parse_constant=_refused)
        if "\\u" in call.arguments:
            found = json.loads(json.dumps(found, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else math.copysign(sys.float_info.max, number)


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


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
