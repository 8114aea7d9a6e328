"""What becomes of a conversation's tools: what the template shows, and which calls are wanted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thinslice.text.chat_template import ChatTemplate
from thinslice.text.messages import Conversation, Message
from thinslice.text.tool_styles import HERMES, CallStyle

Function = Mapping[str, Any]
_HOW = """You can call these functions, described one a line:
{functions}
To call a function, write its name and its arguments as JSON between tags:
{example}
The results come between <tool_response> tags."""


_EXAMPLE = {"name": "FUNCTION", "arguments": {"ARGUMENT": "VALUE"}}


@dataclass(frozen=True)
class ToolUse:
    """The calls that an answer may have.

    Attributes:
        style: how they are written.
        functions: that may be called.
        is_required: whether the answer is calls, and nothing else behind the thought.
        is_parallel: whether there may be several.
    """

    style: CallStyle
    functions: Sequence[Function]
    is_required: bool
    is_parallel: bool

    @property
    def names(self) -> list[str]:
        """Of the functions."""
        return [one["name"] for one in self.functions]


def tool_use(conversation: Conversation, template: ChatTemplate) -> ToolUse | None:
    """The calls that a conversation asks for; None where it has no tools, or wants no calls.

    Args:
        conversation: as ``messages.for_template`` gives it.
    """
    choice = conversation.tool_choice
    if not conversation.tools or choice == "none":
        return None
    functions = [tool["function"] for tool in conversation.tools]
    if isinstance(choice, Mapping):
        functions = [one for one in functions if one["name"] == choice["function"]["name"]]
    return ToolUse(
        style=template.call_style or HERMES,
        functions=functions,
        is_required=choice != "auto",
        is_parallel=conversation.parallel_tool_calls and not isinstance(choice, Mapping),
    )


def for_tools(conversation: Conversation, template: ChatTemplate) -> Conversation:
    """The conversation as its template can show it.

    A template without a place for tools gets them in the system prompt, calls as the text that they
    are of, and results as a user's messages. Tools that are not to be called are left out.
    """
    if conversation.tool_choice == "none":
        conversation = replace(conversation, tools=())
    if template.has_place_for_tools:
        return conversation
    style = template.call_style or HERMES
    messages = [_as_text(one, style) for one in conversation.messages]
    if conversation.tools:
        functions = [tool["function"] for tool in conversation.tools]
        lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in functions)
        told = _HOW.format(functions=lines, example=style.written([_EXAMPLE]))
        messages = _with_system(messages, told)
    return replace(conversation, messages=messages, tools=())


def _as_text(message: Message, style: CallStyle) -> Message:
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = message.get("tool_calls", ())
    if not calls:
        return message
    functions = [one["function"] for one in calls]
    written = style.written(
        [{"name": one["name"], "arguments": one["arguments"]} for one in functions]
    )
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, (message["content"], written)))}


def _with_system(messages: list[Message], text: str) -> list[Message]:
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
