"""What a conversation's tools become: for a template with a place for them, and for one without."""

import json
from typing import Any

import pytest

from thinslice.constraint import Constraint
from thinslice.errors import RequestError
from thinslice.text.chat_template import ChatTemplate
from thinslice.text.lark import grammar_of
from thinslice.text.messages import Conversation, for_template
from thinslice.text.tool_styles import DEEPSEEK, HERMES, LLAMA, MISTRAL
from thinslice.text.tool_use import ToolUse, for_tools, tool_use

PLAIN = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
KNOWING = ChatTemplate("{{ tools }}<tool_call>{{ messages }}")
# As the templates of DeepSeek-R1's distills: it leaves the calls of a message with a text out.
SHOWING = ChatTemplate(
    "{% for m in messages %}{{ m.role }}: {% if m.content is none %}{% for c in m.tool_calls %}"
    f"{DEEPSEEK.begin}{{{{ c.type }}}}{{% endfor %}}{{% else %}}{{{{ m.content }}}}{{% endif %}}\n"
    "{% endfor %}"
)
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {"a": {}}}}}
    for name in ("get", "put")
]
NAMED: Any = {"type": "function", "function": {"name": "put"}}
ASKED: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How warm is it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "get", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "content": "20", "tool_call_id": "1"},
]


def conversation(choice: Any = "auto", **more: Any) -> Conversation:
    return for_template(Conversation(ASKED, TOOLS, choice, **more))


def test_a_template_without_a_place_for_tools_gets_them_as_text() -> None:
    shown = for_tools(conversation(), PLAIN)
    assert not shown.tools
    system, _, called, result = (one["content"] for one in shown.messages)
    assert system.startswith("Be brief.\n\nYou can call these functions")
    assert json.dumps(TOOLS[0]["function"]) in system
    assert called == '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>'
    assert result == "<tool_response>\n20\n</tool_response>"
    assert [one["role"] for one in shown.messages] == ["system", "user", "assistant", "user"]
    PLAIN.render(shown.messages)


def test_deepseeks_template_shows_calls_and_has_no_place_for_tools() -> None:
    assert (SHOWING.call_style, SHOWING.has_place_for_tools) == (DEEPSEEK, False)
    asked = [*ASKED[:2], {**ASKED[2], "content": "I look."}, ASKED[3]]
    asked[2]["tool_calls"] = ASKED[2]["tool_calls"] * 2
    shown = for_tools(for_template(Conversation(asked, TOOLS)), SHOWING)
    system, _, called, _ = (one["content"] for one in shown.messages)
    before, behind = DEEPSEEK.around_arguments("get")
    call = f'{before}{{"a": 1}}{behind}'
    assert called == f"I look.\n{DEEPSEEK.begin}{call}\n{call}{DEEPSEEK.end}"
    assert DEEPSEEK.around_arguments("FUNCTION")[0] in system
    assert HERMES.begin not in system
    assert SHOWING.render(shown.messages).count(call) == 2
    use = tool_use(for_template(Conversation(asked, TOOLS)), SHOWING)
    assert use is not None
    assert (use.style, use.names) == (DEEPSEEK, ["get", "put"])


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    assert for_tools(conversation(), KNOWING) == conversation()
    assert not for_tools(conversation("none"), KNOWING).tools


def test_a_choice_says_what_may_be_called() -> None:
    assert tool_use(conversation("none"), KNOWING) is None
    assert tool_use(for_template(ASKED), KNOWING) is None
    auto, required, named = (
        tool_use(conversation(one), PLAIN) for one in ("auto", "required", NAMED)
    )
    assert auto is not None
    assert required is not None
    assert named is not None
    assert [one.is_required for one in (auto, required, named)] == [False, True, True]
    assert [one.is_parallel for one in (auto, required, named)] == [True, True, False]
    assert [one["name"] for one in named.functions] == ["put"]
    assert required.style == HERMES


@pytest.mark.parametrize(
    "choice", ["always", {}, {"type": "function", "function": {"name": "other"}}, None, 3]
)
def test_a_choice_of_nothing_is_refused(choice: Any) -> None:
    with pytest.raises(RequestError, match="tool_choice"):
        conversation(choice)
    with pytest.raises(RequestError, match="there are no tools"):
        for_template(Conversation(ASKED, (), "required"))


def use(style: Any, **more: Any) -> ToolUse:
    functions = [tool["function"] for tool in TOOLS]
    return ToolUse(style, functions, **{"is_required": True, "is_parallel": True, **more})


def test_calls_are_written_as_the_style_has_them() -> None:
    whole = json.loads(grammar_of(None, use(HERMES), "none"))["grammars"]
    assert "{0,7}" in whole[0]["lark_grammar"]
    assert [one.get("name") for one in whole] == [None, "arguments_0", "arguments_1"]
    assert whole[1]["json_schema"]["type"] == "object"
    assert "{0,7}" not in grammar_of(None, use(HERMES, is_parallel=False), "none")
    assert "[TOOL_CALLS][" in grammar_of(None, use(MISTRAL), "none")
    fenced = json.loads(grammar_of(None, use(DEEPSEEK), "none"))["grammars"][0]["lark_grammar"]
    before, behind = (
        json.dumps(one, ensure_ascii=False) for one in DEEPSEEK.around_arguments("put")
    )
    assert f"call_1: {before} @arguments_1 {behind}" in fenced
    assert "(NEWLINE call){0,7}" in fenced


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"multipleOf": 9973}, "sum of their values"),
        ({"pattern": "a", "$ref": "#/$defs/b", "$defs": {"b": {"format": "date"}}}, "joined"),
        ({"patternProperties": {"^a": {}, "^b": {}}}, "patternProperties"),
        ({"enum": ["a" * 20_000]}, "bytes together"),
    ],
)
def test_what_is_too_large_in_sum_is_told(schema: Any, told: str) -> None:
    functions = [{"name": f"f{one}", "parameters": {"properties": {"a": schema}}} for one in (1, 2)]
    grammar_of(None, ToolUse(HERMES, functions, True, True), "none")
    with pytest.raises(RequestError, match=told):
        grammar_of(None, ToolUse(HERMES, functions * 10, True, True), "none")


def test_a_form_beside_calls_has_to_be_told_from_them() -> None:
    form = Constraint.json_object()
    both = json.loads(grammar_of(form, use(HERMES, is_required=False), "none"))["grammars"]
    assert "body: calls | @answer" in both[0]["lark_grammar"]
    with pytest.raises(RequestError, match="set tool_choice to none or required"):
        grammar_of(form, use(LLAMA, is_required=False), "none")
    assert "@answer" not in grammar_of(form, use(LLAMA), "none")
