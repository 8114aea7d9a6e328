"""Conversations: parts, calls of tools and their results, and what is refused."""

from typing import Any

import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from thinslice.errors import RequestError
from thinslice.text.chat_template import ChatTemplate
from thinslice.text.messages import Conversation, for_template

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "पुणे", "days": [1, 2.5, null]}'},
}
ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Warm"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "31 °C"},
    {"role": "assistant", "content": "Yes.", "refusal": None},
    {"role": "user", "content": "And <b>tomorrow</b>?"},
]
# In the manner of Qwen2.5's: tools in the system message, calls and results in tags.
WITH_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.reasoning_content %}
            {{- '\n<think>' + message.reasoning_content + '</think>' }}
        {%- endif %}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set function = tool_call.function %}
            {{- '\n<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content }}
        {{- '\n</tool_response><|im_end|>\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
# In the manner of DeepSeek's: calls only where there is no content, and arguments as text.
JOINS_ARGUMENTS = """{%- for message in messages %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}
        {%- for call in message['tool_calls'] %}
            {{- 'CALL ' + call['function']['name'] + ' ' + call['function']['arguments'] }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}"""
# It looks at them, and shows the names of tools, which are those of the calls.
LEAVES_CALLS_OUT = """{% for message in messages %}{% if message.tool_calls %}weather{% else %}
{{ message.content }}{% endif %}{% endfor %}"""
# It shows contents alone, as templates did before there were tools.
WITHOUT_TOOLS = (
    "{% for message in messages %}{{ message.content }}{# tools, tool_calls #}{% endfor %}"
)


def test_a_conversation_with_tools_is_rendered_as_transformers_does() -> None:
    conversation = for_template(Conversation(ASKED, [WEATHER]))
    ours = ChatTemplate(WITH_TOOLS).render(conversation.messages, tools=conversation.tools)
    plain = [{**message} for message in ASKED]
    plain[1]["content"] = "Warm\n?"
    arguments = {"city": "पुणे", "days": [1, 2.5, None]}
    plain[2]["tool_calls"] = [{**CALL, "function": {"name": "weather", "arguments": arguments}}]
    theirs, _ = render_jinja_template(
        [plain], tools=[WEATHER], chat_template=WITH_TOOLS, add_generation_prompt=True
    )
    assert ours == theirs[0]
    assert '{"name": "weather", "arguments": {"city": "पुणे", "days": [1, 2.5, null]}}' in ours
    assert "Warm\n?" in ours
    assert "<think>Look.</think>" in ours


def test_no_tools_are_no_tools() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    template = ChatTemplate(WITH_TOOLS)
    assert template.render(messages, tools=()) == template.render(messages)
    assert "Tools" not in template.render(messages)


def test_tools_and_calls_that_a_template_would_leave_out_are_refused() -> None:
    template = ChatTemplate(WITHOUT_TOOLS)
    assert template.render(for_template(ASKED[:2]).messages) == "Be brief.Warm\n?"
    with pytest.raises(RequestError, match="has no place for tools"):
        template.render(for_template(ASKED[:2]).messages, tools=[WEATHER])
    for source in (
        WITHOUT_TOOLS.replace("message.content", "message.content or ''"),
        LEAVES_CALLS_OUT,
    ):
        with pytest.raises(RequestError, match="leaves calls of tools out"):
            ChatTemplate(source).render(for_template(ASKED).messages)
    prose = ChatTemplate("You may use no tools. {{ messages[0].content }}")
    with pytest.raises(RequestError, match="has no place for tools"):
        prose.render(for_template(ASKED[:1]).messages, tools=[WEATHER])


def test_arguments_are_text_for_templates_that_join_them_to_text() -> None:
    messages = for_template(ASKED).messages
    text = ChatTemplate(JOINS_ARGUMENTS).render(messages)
    assert text == 'CALL weather {"city": "पुणे", "days": [1, 2.5, null]}'
    assert (
        for_template([{"role": "assistant", "tool_calls": [CALL]}]).messages[0]["content"] is None
    )


def test_the_callers_messages_stay_as_they_are() -> None:
    before = repr(ASKED)
    once = for_template(Conversation(ASKED, [WEATHER]))
    assert repr(ASKED) == before
    assert for_template(once) == once


def call_with(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("hi", "a conversation is a list of messages"),
        ([], "a conversation is a list of messages"),
        (None, "a conversation is a list of messages"),
        (["hi"], "message 1 is 'hi'; expected one such as"),
        ([{"content": "x"}], "message 1 has no role; one of system"),
        ([{"role": "usr", "content": "x"}], "message 1 has the role 'usr', which is unknown"),
        ([{"role": ["user"], "content": "x"}], r"message 1 has the role \['user'\]"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": None}], "message 1 has no content"),
        ([{"role": "user", "content": 3}], "message 1: content is 3; expected text, or parts"),
        ([{"role": "user", "content": ["x"]}], "message 1 has a part 'x'; expected"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "message 1 has a part of type 'image_url'; expected",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has a part of type 'text'"),
        ([{"role": "user", "content": "x", "name": 3}], "message 1: name is 3; expected text"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "an assistant's calls"),
        ([{"role": "assistant", "tool_calls": CALL}], "tool_calls is a list"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "message 1, call 1 is 'x'; expected"),
        ([{"role": "assistant", "tool_calls": []}], "message 1 has no content"),
        ([call_with(arguments="{}")], "message 1, call 1: the function has no name"),
        ([call_with(name="f", arguments="{")], "arguments are '{'; expected a JSON object"),
        ([call_with(name="f", arguments="[]")], r"arguments are '\[\]'; expected a JSON object"),
        ([call_with(name="f", arguments="[" * 99999)], "expected a JSON object"),
        ([call_with(name="f", arguments=3)], "arguments are 3; expected a JSON object"),
        (
            [{"role": "assistant", "tool_calls": [{"type": "custom", "function": {}}]}],
            "message 1, call 1 is of type 'custom'; expected function",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        for_template(messages)


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        ("weather", "tools is 'weather'; expected a list of functions"),
        ({"type": "function"}, "expected a list of functions"),
        (["weather"], "tool 1 is 'weather'; only functions can be called"),
        ([WEATHER, {"type": "retrieval"}], "tool 2 is .*; only functions can be called"),
        ([{"type": "function"}], "tool 1 is .*; expected one such as"),
        ([{"function": {"name": 3}}], "tool 1 is .*; expected one such as"),
        ([{"function": {"name": "f", "parameters": []}}], r"tool 1: parameters are \[\]"),
        ([{"function": {"name": "f", "parameters": "x"}}], "tool 1: parameters are 'x'; expected"),
    ],
)
def test_what_is_no_tool_is_refused(tools: Any, told: str) -> None:
    conversation = Conversation([{"role": "user", "content": "Hi"}], tools)
    with pytest.raises(RequestError, match=told):
        for_template(conversation)


@pytest.mark.parametrize("given", ["yes", 1, [False]])
def test_whether_to_think_is_yes_or_no(given: Any) -> None:
    asked = [{"role": "user", "content": "a"}]
    with pytest.raises(RequestError, match="; expected true or false"):
        for_template(Conversation(asked, enable_thinking=given))
    assert for_template(Conversation(asked, enable_thinking=False)).enable_thinking is False


CIRCLE: dict[str, Any] = {}
CIRCLE["a"] = CIRCLE
NO_JSON: list[Any] = [b"x", {1}, np.int64(3), np.array([1, 2]), 10**5000, CIRCLE, object()]


def with_tool(**changes: Any) -> Conversation:
    function = {**WEATHER["function"], **changes}  # type: ignore[dict-item]
    return Conversation(ASKED, [{"type": "function", "function": function}])


@pytest.mark.parametrize("value", NO_JSON, ids=lambda value: type(value).__name__)
def test_what_is_no_json_in_tools_and_calls_is_refused_in_a_line(value: Any) -> None:
    call = {"function": {"name": "weather", "arguments": {"a": value}}}
    for given, told in (
        (with_tool(description=value), "tool 1: description is .*; expected text"),
        (with_tool(parameters={"a": value}), "tool 1 is no JSON: "),
        (with_tool(strict=value), "tool 1 is no JSON: "),
        (
            [{"role": "assistant", "tool_calls": [call]}],
            "message 1, call 1: what arguments are is no JSON: ",
        ),
    ):
        with pytest.raises(RequestError, match=f"^{told}.*$") as caught:
            for_template(given)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", [np.array([1, 2]), np.array([["text"]]), b"x", 3, [None]])
def test_a_value_of_any_kind_in_the_place_of_a_word_is_refused_in_a_line(value: Any) -> None:
    call = {"type": value, "function": {"name": "f"}}
    for given, told in (
        ([{"role": value, "content": "a"}], "message 1 has the role"),
        ([{"role": "user", "content": [{"type": value, "text": "a"}]}], "message 1 has a part"),
        ([{"role": "assistant", "tool_calls": [call]}], "message 1, call 1 is of type"),
        (Conversation(ASKED, [{**WEATHER, "type": value}]), "tool 1 is"),
        (Conversation(ASKED, [WEATHER], tool_choice=value), "tool_choice is"),
        (Conversation(ASKED, [WEATHER], parallel_tool_calls=value), "parallel_tool_calls is"),
    ):
        with pytest.raises(RequestError, match=f"^{told} ") as caught:
            for_template(given)  # type: ignore[arg-type]
        assert str(caught.value).isprintable()
