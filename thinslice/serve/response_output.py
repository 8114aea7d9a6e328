"""The items of an answer of ``/v1/responses``, and the events that tell of them."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from thinslice.engine.request import TextChunk
from thinslice.serve.calls import new_call_id

Event = dict[str, Any]
_PREFIXES = {"answer": "msg", "reasoning": "rs", "call": "fc"}
# What the events of a text are called by, and what its part is.
_TEXTS = {"answer": "output_text", "reasoning": "reasoning_text"}
# What else each has beside its text.
_WITH_TEXT: dict[str, dict[str, Any]] = {"answer": {"logprobs": []}, "reasoning": {}}
_OF_PART: dict[str, dict[str, Any]] = {
    "answer": {"annotations": [], "logprobs": []},
    "reasoning": {},
}


class Output:
    """What has come of an answer: items that have ended, and the one that has not.

    Attributes:
        items: that have ended.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: _Item | None = None

    def add(self, chunk: TextChunk) -> Iterator[Event]:
        """Take a piece and tell of it; a piece of another kind ends the item before it."""
        if chunk.kind == "call":
            yield from self._begin("call", chunk.text)
            return
        kind = "call" if chunk.kind == "arguments" else chunk.kind
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        assert self._open is not None, "it has begun"
        yield self._open.piece(chunk.text)

    def end(self, status: str) -> Iterator[Event]:
        """End the item that is open, ``completed`` or ``incomplete``; of no text at all there is
        an empty message."""
        if self._open is None and not self.items:
            yield from self._begin("answer")
        yield from self._end(status)

    def _begin(self, kind: str, name: str = "") -> Iterator[Event]:
        yield from self._end("completed")
        self._open = _Item(kind, len(self.items), name)
        yield from self._open.begun()

    def _end(self, status: str) -> Iterator[Event]:
        ended, self._open = self._open, None
        if ended is not None:
            self.items.append(ended.whole(status))
            yield from ended.ended(self.items[-1])


@dataclass
class _Item:
    """A message, a thought or a call that is being written.

    Attributes:
        index: its place among the items.
        name: of the function that is called.
    """

    kind: str
    index: int
    name: str
    pieces: list[str] = field(default_factory=list)
    call_id: str = field(default_factory=new_call_id)
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def id(self) -> str:
        return f"{_PREFIXES[self.kind]}_{self.number}"

    def whole(self, status: str) -> dict[str, Any]:
        """With all that has come."""
        return self._object(status, "".join(self.pieces), [self._part("".join(self.pieces))])

    def begun(self) -> Iterator[Event]:
        yield self._of_items("added", self._object("in_progress", "", []))
        if self.kind != "call":
            yield self._event("content_part.added", content_index=0, part=self._part(""))

    def piece(self, text: str) -> Event:
        self.pieces.append(text)
        return self._of_text("delta", delta=text)

    def ended(self, whole: dict[str, Any]) -> Iterator[Event]:
        text = "".join(self.pieces)
        if self.kind == "call":
            yield self._of_text("done", arguments=text, name=self.name)
        else:
            yield self._of_text("done", text=text)
            yield self._event("content_part.done", content_index=0, part=self._part(text))
        yield self._of_items("done", whole)

    def _object(self, status: str, text: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "status": status}
        if self.kind == "call":
            called = {"call_id": self.call_id, "name": self.name, "arguments": text}
            return {**head, "type": "function_call", **called}
        if self.kind == "reasoning":
            return {**head, "type": "reasoning", "summary": [], "content": parts}
        return {**head, "type": "message", "role": "assistant", "content": parts}

    def _part(self, text: str) -> dict[str, Any]:
        if self.kind == "call":
            return {}
        return {"type": _TEXTS[self.kind], "text": text, **_OF_PART[self.kind]}

    def _of_text(self, what: str, **more: Any) -> Event:
        if self.kind == "call":
            return self._event(f"function_call_arguments.{what}", **more)
        more = {"content_index": 0, **more, **_WITH_TEXT[self.kind]}
        return self._event(f"{_TEXTS[self.kind]}.{what}", **more)

    def _event(self, kind: str, **more: Any) -> Event:
        head = {"type": f"response.{kind}", "item_id": self.id, "output_index": self.index}
        return {**head, **more}

    def _of_items(self, what: str, item: dict[str, Any]) -> Event:
        return {
            "type": f"response.output_item.{what}",
            "output_index": self.index,
            "item": item,
        }
