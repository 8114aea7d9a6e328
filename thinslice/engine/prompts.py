"""Prompts as the engine takes them: the tokens of a text, or of a conversation."""

from collections.abc import Callable
from dataclasses import dataclass

from thinslice.engine.grammar import Grammar
from thinslice.engine.thought_budget import ThoughtTokens
from thinslice.text.chat_template import ChatTemplate
from thinslice.text.messages import Conversation
from thinslice.text.reasoning import CLOSE, OPEN
from thinslice.text.thought import Phase, Thought
from thinslice.text.tool_use import ToolUse


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the engine.

    Attributes:
        rendered: the text of a conversation's; None of a plain text.
        is_thoughtless: whether the answer is to come without a thought.
        grammar: what its constraint and its tools make of the answer.
        tools: the calls that the answer may have; None where there are none.
    """

    token_ids: list[int]
    rendered: str | None
    is_thoughtless: bool = False
    grammar: Grammar | None = None
    tools: ToolUse | None = None


def render(
    template: ChatTemplate, asked: Conversation, most: int | None, tags: Callable[[], ThoughtTokens]
) -> tuple[str, bool]:
    """The text of a conversation, and whether no thought is to follow it.

    None follows where the conversation says so, or where the budget has no room for one. Then the
    template is told so; and where that leaves the thought open, or the template cannot be told but
    the model is known to think, the text ends in a thought that is closed and empty, as Qwen3's
    template writes it (arXiv 2504.09858: models go on to answer).

    Args:
        most: tokens of a thought; None is without a bound.
        tags: asked where they are needed.

    Errors: as ``ChatTemplate.render``.
    """
    template = template.used_for(asked.tools)
    messages, tools, is_thinking = asked.messages, asked.tools, asked.enable_thinking
    if is_thinking is not False:
        text = template.render(messages, tools=tools, enable_thinking=is_thinking)
        if most is None or most >= tags().least(Thought.behind(text)):
            return text, False
    text = template.render(messages, tools=tools, enable_thinking=False)
    if Thought.behind(text).phase is Phase.INSIDE:
        return f"{text.rstrip()}\n\n{CLOSE}\n\n", True
    if not template.takes_enable_thinking and (template.writes_thoughts or tags().are_tokens):
        return f"{text}{OPEN}\n\n{CLOSE}\n\n", True
    return text, True
