"""Tell reasoning, what stands between <think> tags, from the answer: in a stream of text, and token
by token."""

from codecs import utf_8_decode
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
# What leads a model to the end of a thought whose budget is spent. Qwen3's models are led so (arXiv
# 2505.09388, section 4.3 and the documentation's page on thinking budgets), and go on to answer
# without having been trained for it; no other family here states a text of its own.
WRAP_UP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    "thinking directly now.\n"
)
# Whether an answer begins within a thought, may begin with one, or cannot.
Beginning = Literal["open", "possible", "none"]
Piece = tuple[str, str]


class ReasoningSplitter:
    """Splits a completion's text into pieces of kind ``reasoning`` and ``answer``.

    Whether it begins inside the reasoning is read off the rendered prompt, which may already have
    opened or closed a think block. Only a tag before any answer text opens one; later tags are
    text. Newlines next to the tags belong to them. Partial tags are held back.
    """

    def __init__(self, rendered_prompt: str) -> None:
        self._held = ""
        self._state = "reasoning" if ends_in_open_block(rendered_prompt) else "before"
        self._is_after_tag = self._state == "reasoning"

    def push(self, text: str) -> list[Piece]:
        """The pieces that are sure now."""
        self._held += text
        pieces: list[Piece] = []
        while (piece := self._next()) is not None:
            if piece[1]:
                pieces.append(piece)
        return pieces

    def finish(self) -> list[Piece]:
        """The rest, when no more text comes."""
        held, self._held = self._held, ""
        if self._is_after_tag:
            held = held.lstrip("\n")
        if self._state == "reasoning":
            # A tag that was cut off is no reasoning.
            held = held[: len(held) - overlap(held, CLOSE)].rstrip("\n")
            return [("reasoning", held)] if held else []
        return [("answer", held)] if held else []

    def _next(self) -> Piece | None:
        """Take one piece off the held text, or None where more text is needed."""
        if self._is_after_tag:
            self._held = self._held.lstrip("\n")
            if not self._held:
                return None
            self._is_after_tag = False
        if self._state == "before":
            return self._before()
        return self._reasoning() if self._state == "reasoning" else self._answer()

    def _before(self) -> Piece | None:
        """Nothing but white space so far: a tag or an answer may follow."""
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._held = start.removeprefix(OPEN)
            self._state, self._is_after_tag = "reasoning", True
            return ("reasoning", "")
        if OPEN.startswith(start):
            return None
        self._state = "answer"
        return ("answer", "")

    def _reasoning(self) -> Piece | None:
        end = self._held.find(CLOSE)
        if end >= 0:
            text = self._held[:end].rstrip("\n")
            self._held = self._held[end + len(CLOSE) :]
            self._state, self._is_after_tag = "answer", True
            return ("reasoning", text)
        sure = len(self._held) - overlap(self._held, CLOSE)
        sure = len(self._held[:sure].rstrip("\n"))
        return self._take(sure)

    def _answer(self) -> Piece | None:
        return self._take(len(self._held))

    def _take(self, count: int) -> Piece | None:
        if count == 0:
            return None
        text, self._held = self._held[:count], self._held[count:]
        return (self._state, text)


class Phase(Enum):
    """Where the next token of a completion stands."""

    BEFORE = auto()
    INSIDE = auto()
    BEHIND = auto()


@dataclass(frozen=True, slots=True)
class Thought:
    """Where a completion stands, by the text of its tokens; it says what ReasoningSplitter says.

    A tag may be one token, or spread over several, or share one with other text.

    Attributes:
        num_tokens: tokens of the thought so far: from the first that bears a part of the opening
            tag to the last that bears one of the closing tag, both included. Tags of the prompt
            are not among them.
        held: the end of the text that may begin a tag.
        partial: bytes of a character that is not whole yet.
        num_held: tokens that bear a part of an opening tag that is not whole yet.
    """

    phase: Phase
    num_tokens: int = 0
    held: str = ""
    partial: bytes = b""
    num_held: int = 0

    @classmethod
    def behind(cls, rendered_prompt: str | None) -> "Thought":
        """Before the first token; a plain completion, whose prompt is None, has no thought."""
        if rendered_prompt is None:
            return cls(Phase.BEHIND)
        return cls(Phase.INSIDE if ends_in_open_block(rendered_prompt) else Phase.BEFORE)

    def after(self, token: bytes) -> "Thought":
        """Where it stands after one more token of this text; special tokens have none."""
        if self.phase is Phase.BEHIND:
            return self
        data = self.partial + token
        text, num_used = utf_8_decode(data, "replace", False)
        text, partial = self.held + text, data[num_used:]
        num_tokens = self.num_tokens + 1
        if self.phase is Phase.BEFORE:
            text, num_tokens = text.lstrip(), self.num_held + 1
            if not text.startswith(OPEN):
                if not OPEN.startswith(text):
                    return Thought(Phase.BEHIND)
                return Thought(Phase.BEFORE, 0, text, partial, num_tokens if text else 0)
            text = text.removeprefix(OPEN)
        if CLOSE in text:
            return Thought(Phase.BEHIND, num_tokens)
        return Thought(Phase.INSIDE, num_tokens, text[len(text) - overlap(text, CLOSE) :], partial)


def beginning_behind(rendered_prompt: str, thinks: bool) -> Beginning:
    """What an answer to a rendered prompt may begin with."""
    if ends_in_open_block(rendered_prompt):
        return "open"
    is_closed = rendered_prompt.rstrip().endswith(CLOSE)
    return "possible" if thinks and not is_closed else "none"


def ends_in_open_block(rendered_prompt: str) -> bool:
    """Whether the prompt's last think tag is an opening one with nothing but space after it."""
    return rendered_prompt.rstrip().endswith(OPEN)


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of the text that is a beginning of the tag."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
