"""Thought: how far a completion's tokens are in its thought, followed token by token."""

from codecs import utf_8_decode
from dataclasses import dataclass
from enum import Enum, auto

from thinslice.text.reasoning import CLOSE, OPEN, ends_in_open_block, overlap


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
