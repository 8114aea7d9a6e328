"""Tell reasoning, the text between <think> tags, from the answer in a stream of text."""

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
