"""Messages: what a conversation is made of, checked and put as chat templates expect it.

The form is that of the OpenAI API and of transformers' templates: text or parts of text, an
assistant's calls of tools, and their results. What a message holds beyond that goes to the template
as it is.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thinslice.errors import RequestError, shown

Message = dict[str, Any]
# A template would leave a message of any other role out, or show it as anything.
_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
# Keys of a message whose value is text, where it is there and not null.
_TEXTS = ("name", "tool_call_id", "reasoning_content")
# Parts of a message are joined as llama.cpp and vLLM do it for templates that take text alone.
_BETWEEN_PARTS = "\n"


@dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that the model may call in its answer.

    Attributes:
        messages: such as ``{"role": "user", "content": "Hello"}``; content is text, or a list of
            parts ``{"type": "text", "text": ...}``. An assistant's may have ``tool_calls`` and no
            content, and its ``reasoning_content``; a tool's result has ``tool_call_id``.
        tools: such as ``{"type": "function", "function": {"name": ..., "parameters": SCHEMA}}``.
        tool_choice: ``auto``, where the model may call them; ``none``, where it sees no tools;
            ``required``, where it calls at least one; or
            ``{"type": "function", "function": {"name": ...}}`` for calls of that one.
        parallel_tool_calls: whether an answer whose calls are required may have several.
        enable_thinking: whether the model is to think; where it is None, the template's own choice
            holds.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    enable_thinking: bool | None = None


def for_template(conversation: "Sequence[Message] | Conversation") -> Conversation:
    """The same with contents as one text, arguments of calls as objects, and nulls left out, but
    for the content of a message that has calls alone.

    Errors: RequestError for what is no conversation, naming the message.
    """
    if not isinstance(conversation, Conversation):
        conversation = Conversation(conversation)
    messages, tools = conversation.messages, conversation.tools
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(
            'a conversation is a list of messages such as {"role": "user", "content": "Hello"}'
        )
    if not isinstance(tools, list | tuple):
        raise RequestError(f"tools is {shown(tools)}; expected a list of functions")
    if not isinstance(conversation.parallel_tool_calls, bool):
        told = f"parallel_tool_calls is {shown(conversation.parallel_tool_calls)}"
        raise RequestError(f"{told}; expected true or false")
    if not isinstance(conversation.enable_thinking, bool | None):
        told = f"enable_thinking is {shown(conversation.enable_thinking)}; expected true or false"
        raise RequestError(told)
    for number, tool in enumerate(tools, 1):
        _check_tool(tool, f"tool {number}")
    _check_choice(conversation)
    checked = [_message(one, number) for number, one in enumerate(messages, 1)]
    return replace(conversation, messages=checked)


def _message(message: object, number: int) -> Message:
    """Errors: RequestError."""
    where = f"message {number}"
    if not isinstance(message, dict):
        raise RequestError(
            f'{where} is {shown(message)}; expected one such as {{"role": "user", "content": '
            '"Hello"}'
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        told = "has no role" if role is None else f"has the role {shown(role)}, which is unknown"
        raise RequestError(f"{where} {told}; one of {', '.join(_ROLES)}")
    kept = {key: value for key, value in message.items() if value is not None}
    for key in _TEXTS:
        if not isinstance(kept.get(key, ""), str):
            raise RequestError(f"{where}: {key} is {shown(kept[key])}; expected text")
    calls = kept.get("tool_calls", [])
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise RequestError(f"{where}: tool_calls is a list of an assistant's calls")
    kept.pop("tool_calls", None)
    if calls:
        kept["tool_calls"] = [_call(one, f"{where}, call {at}") for at, one in enumerate(calls, 1)]
    if "content" not in kept and not calls:
        raise RequestError(f"{where} has no content")
    # Some templates show calls only where the content is none.
    kept["content"] = _text(kept["content"], where) if "content" in kept else None
    return kept


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}: content is {shown(content)}; expected text, or parts of text")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not _is_text(kind, "text") or not isinstance(part.get("text"), str):
            told = f"of type {shown(kind)}" if isinstance(kind, str) else shown(part)
            raise RequestError(
                f'{where} has a part {told}; expected {{"type": "text", "text": ...}}, as models '
                "here take text alone"
            )
    return _BETWEEN_PARTS.join(part["text"] for part in content)


def with_calls(
    messages: Sequence[Mapping[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[Mapping[str, Any]]:
    """The same messages with the function of each call changed."""
    changed: list[Mapping[str, Any]] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            calls = [{**call, "function": change(call["function"])} for call in calls]
            message = {**message, "tool_calls": calls}
        changed.append(message)
    return changed


def arguments_as_text(function: dict[str, Any]) -> dict[str, Any]:
    """A call's function as the OpenAI API has it: its arguments are text of JSON."""
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise RequestError(
            f'{where} is {shown(call)}; expected one such as {{"type": "function", "function": '
            '{"name": ..., "arguments": ...}}'
        )
    if not _is_text(call.get("type", "function"), "function"):
        raise RequestError(f"{where} is of type {shown(call['type'])}; expected function")
    if not isinstance(function.get("name"), str):
        raise RequestError(f"{where}: the function has no name")
    arguments = _arguments(function.get("arguments", {}), where)
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _arguments(given: object, where: str) -> dict[str, Any]:
    """The object that a model's text of arguments writes: templates write it in their own way."""
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}: arguments are {shown(given)}; expected a JSON object")
    _check_json(arguments, f"{where}: what arguments are")
    return arguments


def _check_tool(tool: object, where: str) -> None:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or not _is_text(tool.get("type", "function"), "function"):
        raise RequestError(f"{where} is {shown(tool)}; only functions can be called")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(
            f'{where} is {shown(tool)}; expected one such as {{"type": "function", "function": '
            '{"name": ..., "parameters": {...}}}'
        )
    if not isinstance(function.get("parameters", {}), Mapping | None):
        told = f"parameters are {shown(function['parameters'])}; expected a JSON schema"
        raise RequestError(f"{where}: {told}")
    if not isinstance(function.get("description"), str | None):
        told = f"description is {shown(function['description'])}; expected text"
        raise RequestError(f"{where}: {told}")
    _check_json(tool, where)


def _is_text(value: object, text: str) -> bool:
    """Whether a value is this text; what may not be compared, such as an array, is not."""
    return isinstance(value, str) and value == text


def _check_json(value: object, what: str) -> None:
    """Errors: RequestError for what JSON cannot say, as templates write it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what} is no JSON: {error}") from None


def _check_choice(conversation: Conversation) -> None:
    """Errors: RequestError for a choice that is none, or of tools that are not there."""
    choice = conversation.tool_choice
    if isinstance(choice, str) and choice in ("none", "auto", "required"):
        if choice == "required" and not conversation.tools:
            raise RequestError("tool_choice is required and there are no tools")
        return
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            f"tool_choice is {shown(choice)}; expected none, auto, required or "
            '{"type": "function", "function": {"name": ...}}'
        )
    if name not in [tool["function"]["name"] for tool in conversation.tools]:
        raise RequestError(f"tool_choice names the function {shown(name)}, which no tool is")
