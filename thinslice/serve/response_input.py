"""The items of OpenAI's ``/v1/responses`` as messages and tools that templates know."""

from typing import Any

from thinslice.serve.bodies import ResponsesBody
from thinslice.serve.errors import ApiError
from thinslice.text.messages import Conversation, Message

_ROLES = ("user", "assistant", "system", "developer")
_PARTS = ("input_text", "output_text")
_OF_FUNCTIONS = ("name", "description", "parameters")


def conversation_of(body: ResponsesBody) -> Conversation:
    """The same conversation, with the instructions before it and the tools beside it.

    Errors: ApiError 400.
    """
    found: list[Message] = []
    if body.instructions is not None:
        found.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        found.append({"role": "user", "content": body.input})
    else:
        for number, item in enumerate(body.input):
            _add(item, f"input.{number}", found)
    return Conversation(
        found,
        [_tool(one, f"tools.{number}") for number, one in enumerate(body.tools or ())],
        enable_thinking=body.thinking.is_enabled,
        tool_choice=_choice(body),
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )


def _add(item: dict[str, Any], where: str, found: list[Message]) -> None:
    """Thoughts of earlier answers are left out, as templates leave them out."""
    kind = item.get("type", "message")
    if kind == "message":
        _add_message(item, where, found)
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": _call_id(item, where), "type": "function", "function": function}
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": None})
        found[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        text = _text(item.get("output"), f"{where}.output")
        found.append({"role": "tool", "content": text, "tool_call_id": _call_id(item, where)})
    elif kind != "reasoning":
        told = f"{where}: items of type {kind!r:.60} are not supported here"
        more = "message, function_call, function_call_output and reasoning are"
        raise ApiError(400, f"{told}; {more}", where, "unsupported_value")


def _add_message(item: dict[str, Any], where: str, found: list[Message]) -> None:
    role = item.get("role")
    if role not in _ROLES:
        told = f"{where}: the role is {role!r:.60}; one of {', '.join(_ROLES)}"
        raise ApiError(400, told, where)
    text = _text(item.get("content"), f"{where}.content")
    if role == "assistant" and found and found[-1].get("tool_calls"):
        # No result came in between: both are of one turn.
        found[-1]["content"] = (found[-1]["content"] or "") + text
    else:
        found.append({"role": role, "content": text})


def _call_id(item: dict[str, Any], where: str) -> str:
    found = item.get("call_id")
    if not isinstance(found, str):
        raise ApiError(400, f"{where}: call_id is {found!r:.60}; expected text", f"{where}.call_id")
    return found


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where} is {content!r:.60}; expected text, or a list of parts", where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PARTS or not isinstance(part.get("text"), str):
            told = f"{where}: parts of type {kind!r:.60} are not supported here"
            raise ApiError(400, f"{told}; {' and '.join(_PARTS)} are", where, "unsupported_value")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        told = f"{where}: tools of type {kind!r:.60} are not supported here; functions are"
        raise ApiError(400, told, f"{where}.type", "unsupported_value")
    known = {key: tool[key] for key in _OF_FUNCTIONS if tool.get(key) is not None}
    return {"type": "function", "function": known}


def _choice(body: ResponsesBody) -> str | dict[str, Any]:
    """Nothing can be chosen of no tools, which some clients do none the less."""
    choice = body.tool_choice
    if choice is None or (not body.tools and choice in ("auto", "none")):
        return "auto"
    if isinstance(choice, str):
        return choice
    kind = choice.get("type")
    if kind != "function":
        told = f"tool_choice: the type is {kind!r:.60}; expected function, or one of the texts"
        more = "auto, required and none"
        raise ApiError(400, f"{told} {more}", "tool_choice", "unsupported_value")
    return {"type": "function", "function": {"name": choice.get("name")}}
