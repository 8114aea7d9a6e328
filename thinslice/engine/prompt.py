"""Prompt: what is asked of a model, ready for the engine."""

from dataclasses import dataclass

from thinslice.engine.grammar import Grammar
from thinslice.text.tool_styles import CallStyle


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the engine.

    Attributes:
        rendered: the text of a conversation's.
        grammar: what its constraint and its tools make of the answer.
        call_style: how the answer writes calls of tools, where it may have any.
    """

    token_ids: list[int]
    rendered: str | None
    grammar: Grammar | None = None
    call_style: CallStyle | None = None
