"""Anthropic's messages and tools, in the form of OpenAI's that templates know."""

from typing import Any

from thinslice.serve.bodies import MessagesBody
from thinslice.serve.errors import ApiError
from thinslice.text.messages import Conversation, Message

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def conversation_of(body: MessagesBody) -> Conversation:
    """The same conversation, with the system prompt before it and the tools beside it.

    Errors: ApiError 400.
    """
    found: list[Message] = []
    if body.system is not None:
        found.append({"role": "system", "content": _text(body.system, "system")})
    for number, message in enumerate(body.messages):
        where = f"messages.{number}"
        role = message.get("role")
        if role == "system" and number > 0:
            found.append(_instruction(message, where))
            continue
        if role not in ("user", "assistant"):
            told = f"{where}: the role is {role!r:.60}; one of user, assistant"
            raise ApiError(400, f"{told} and, behind the first message, system", where)
        content = message.get("content")
        turn = _assistant if role == "assistant" else _user
        found += turn(content, where) if isinstance(content, list) else _plain(role, content, where)
    tools = [_tool(one, f"tools.{number}") for number, one in enumerate(body.tools or ())]
    choice = dict(body.tool_choice or {"type": "auto"})
    is_parallel = choice.get("disable_parallel_tool_use") is not True
    has_calls = tools or choice.get("type") in ("any", "tool")  # of no tools they are refused
    asked = _choice(choice) if has_calls else "auto"
    return Conversation(found, tools, tool_choice=asked, parallel_tool_calls=is_parallel)


def _instruction(message: Message, where: str) -> Message:
    """A system message within the conversation, which stays there for all later turns."""
    if message.get("clear_at") not in (None, "never"):
        told = f"{where}: clear_at is {message['clear_at']!r:.60}; only never is supported here"
        raise ApiError(400, told, f"{where}.clear_at")
    if message.get("output_config"):
        told = f"{where}: output_config of a message is not supported here; that of the body is"
        raise ApiError(400, told, f"{where}.output_config")
    return {"role": "system", "content": _text(message.get("content"), where)}


def _plain(role: str, content: object, where: str) -> list[Message]:
    return [{"role": role, "content": _text(content, where)}]


def _assistant(blocks: list[Any], where: str) -> list[Message]:
    """One message with the text and the calls of its blocks."""
    calls, rest = [], []
    for block in blocks:
        if _kind(block) != "tool_use":
            rest.append(block)
            continue
        function = {"name": block.get("name"), "arguments": block.get("input", {})}
        calls.append({"id": block.get("id"), "type": "function", "function": function})
    if not calls:
        return _plain("assistant", rest, where)
    return [{"role": "assistant", "content": _text(rest, where) or None, "tool_calls": calls}]


def _user(blocks: list[Any], where: str) -> list[Message]:
    """Results of tools, each a message of its own, then what the user says."""
    found: list[Message] = []
    rest = [block for block in blocks if _kind(block) != "tool_result"]
    for block in blocks:
        if _kind(block) == "tool_result":
            text = _text(block.get("content") or "", where)
            found.append(
                {"role": "tool", "content": text, "tool_call_id": block.get("tool_use_id")}
            )
    return found if found and not rest else [*found, *_plain("user", rest, where)]


def _kind(block: object) -> object:
    return block.get("type") if isinstance(block, dict) else None


def _text(content: object, where: str) -> str:
    """The text of blocks. Thoughts of earlier answers are left out, as templates leave them out."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: the content is no text and no list of blocks", where)
    texts = []
    for block in content:
        kind = _kind(block)
        if kind in ("thinking", "redacted_thinking"):
            continue
        if kind != "text" or not isinstance(block.get("text"), str):
            told = f"{where}: blocks of type {kind!r:.60} are not supported here; text is"
            raise ApiError(400, told, where)
        texts.append(block["text"])
    return "\n".join(texts)


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type", "custom")
    if kind not in ("custom", None):
        told = f"{where}: tools of type {kind!r:.60} are not supported; custom ones are"
        raise ApiError(400, told, where)
    if not isinstance(tool.get("input_schema"), dict):
        raise ApiError(400, f"{where}: input_schema is missing, or no JSON schema", where)
    function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _choice(choice: dict[str, Any]) -> str | dict[str, Any]:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        told = f"tool_choice: the type is {kind!r:.60}; one of auto, any, tool, none"
        raise ApiError(400, told, "tool_choice")
    return _CHOICES[kind]
