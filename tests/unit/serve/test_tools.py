"""Calls of tools, asked for by the clients of OpenAI, Anthropic and Ollama."""

import json
import sys
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import ollama
import openai
import pytest

from tests.asking import anthropic_of, client_fixture, events, openai_of, post, server_fixture
from tests.servers import NAME, Running, serving
from tests.tiny_llm import write_model
from thinslice.engine.request import Request
from thinslice.text.tool_styles import DEEPSEEK

# A template that shows tools, calls and results, as Qwen's does.
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }}{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rom"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
BY_NAME: Any = {"type": "function", "function": {"name": "get"}}
MESSAGES: Any = [{"role": "user", "content": "how warm?"}]
ASKED: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 240}
CALLING: Any = {**ASKED, "tools": TOOLS, "tool_choice": BY_NAME, "seed": 4}
SAID = 'I look.\n<tool_call>\n{"name": "get", "arguments": {"city": "Rom"}}\n</tool_call>\n' * 2


server = server_fixture(template=TEMPLATE)


client = client_fixture(openai_of)


claude = client_fixture(anthropic_of)


def check(arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMA)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never calls by itself: its text becomes one that does, a sign a token."""

    def advance(self: Request) -> list[Any]:
        place = getattr(self, "_place", 0)
        self._num_seen = len(self.sequence.completion_token_ids)
        self._place = max(place, self._num_seen)  # type: ignore[attr-defined]
        self.is_told = self.is_finished
        text = SAID[place : len(SAID) if self.is_finished else self._place]
        return self._record([("answer", text)]) + (self._flush() if self.is_told else [])

    monkeypatch.setattr(Request, "_new_text", advance)


@pytest.mark.parametrize("choice", ["required", BY_NAME])
def test_openai_calls_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    asked = {**CALLING, "tool_choice": choice, "parallel_tool_calls": False}
    (answer,) = client.chat.completions.create(**asked).choices
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    (call,) = answer.message.tool_calls or ()
    assert call.type == "function"
    if call.function.name == "get":
        check(call.function.arguments)
    chunks = [one.choices[0] for one in client.chat.completions.create(**asked, stream=True)]
    deltas = [call for one in chunks for call in one.delta.tool_calls or ()]
    assert {one.index for one in deltas} == {0}
    first, *more = deltas
    assert first.function is not None
    assert (first.type, first.function.name) == ("function", call.function.name)
    assert first.id
    assert first.function.arguments == ""
    assert all(one.id is None and one.function and one.function.name is None for one in more)
    pieces = [one.function.arguments or "" for one in more if one.function]
    assert "".join(pieces) == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    assert not any(one.delta.content for one in chunks)


def test_arguments_of_nothing_are_an_object(client: openai.OpenAI) -> None:
    now = {"type": "function", "function": {"name": "now"}}
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "now", "parameters": schema}}]
    asked: Any = {**CALLING, "tools": tools, "tool_choice": now}
    (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments) == {}  # type: ignore[union-attr]


def test_a_call_that_is_cut_ends_by_its_length(client: openai.OpenAI) -> None:
    asked = {**CALLING, "max_tokens": 50}
    assert client.chat.completions.create(**asked).choices[0].finish_reason == "length"
    *_, last = client.chat.completions.create(**asked, stream=True)
    assert last.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stop", ['"city', '"days"', "days", '"'])
def test_a_call_that_a_stop_string_cuts_is_none(client: openai.OpenAI, stop: str) -> None:
    """It is text, as what only looks like a call is; whole and streamed."""
    asked = {**CALLING, "stop": [stop]}
    (choice,) = client.chat.completions.create(**asked).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert (choice.message.content or "").lstrip().startswith("<tool_call>")
    assert stop not in (choice.message.content or "")
    chunks = [one.choices[0] for one in client.chat.completions.create(**asked, stream=True)]
    assert not any(one.delta.tool_calls for one in chunks)
    assert chunks[-1].finish_reason == "stop"
    assert "".join(one.delta.content or "" for one in chunks) == choice.message.content


@pytest.mark.parametrize("stop", ["</tool_call>", "never"])
def test_a_call_that_is_whole_is_told_whatever_stops_the_answer(
    client: openai.OpenAI, stop: str
) -> None:
    (free,) = client.chat.completions.create(**CALLING).choices
    asked = {**CALLING, "stop": [stop]}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"
    told = [one.function.arguments for one in choice.message.tool_calls or ()]  # type: ignore[union-attr]
    assert told == [one.function.arguments for one in free.message.tool_calls or ()]  # type: ignore[union-attr]
    chunks = [one.choices[0] for one in client.chat.completions.create(**asked, stream=True)]
    deltas = [one.function for part in chunks for one in part.delta.tool_calls or ()]
    assert "".join(one.arguments or "" for one in deltas if one) == told[0]


def test_a_call_that_is_cut_by_its_length_is_told_with_stop_strings_too(
    client: openai.OpenAI,
) -> None:
    asked = {**CALLING, "max_tokens": 50}
    free, held = (
        client.chat.completions.create(**asked, **more).choices[0].message.tool_calls or ()
        for more in ({}, {"stop": ["never"]})
    )
    assert [one.function for one in held] == [one.function for one in free]  # type: ignore[union-attr]
    assert held


@pytest.mark.usefixtures("says")
def test_calls_that_a_model_makes_by_itself(client: openai.OpenAI) -> None:
    asked: Any = {**ASKED, "max_tokens": 40, "tools": TOOLS, "temperature": 0}
    asked["logit_bias"] = {"257": -100, "258": -100}
    whole = client.chat.completions.create(**asked).choices[0].message
    calls = whole.tool_calls or []
    assert [one.function.name for one in calls] == ["get", "get"]  # type: ignore[union-attr]
    assert len({one.id for one in calls}) == 2
    assert whole.content == "I look.I look."
    chunks = client.chat.completions.create(**asked, stream=True)
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ()]
    assert [one.index for one in deltas if one.id] == [0, 1]
    for index in (0, 1):
        own = [one.function.arguments for one in deltas if one.index == index and one.function]
        assert "".join(one or "" for one in own) == '{"city": "Rom"}'
    none = client.chat.completions.create(**{**asked, "tool_choice": "none"}).choices[0]
    assert none.message.content == SAID
    assert none.finish_reason == "length"


@pytest.mark.usefixtures("says")
def test_a_call_of_no_function_of_the_request_is_text(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    tools: Any = [{"type": "function", "function": {"name": "put"}}]
    asked: Any = {**ASKED, "max_tokens": 40, "tools": tools, "temperature": 0}
    asked["logit_bias"] = {"257": -100, "258": -100}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.message.tool_calls is None
    assert (whole.message.content, whole.finish_reason) == (SAID, "length")
    chunks = [one.choices[0] for one in client.chat.completions.create(**asked, stream=True)]
    assert "".join(one.delta.content or "" for one in chunks) == SAID
    assert not any(one.delta.tool_calls for one in chunks)
    others: Any = [{"name": "put", "input_schema": {}}]
    (block,) = claude.messages.create(**ASKED, tools=others).content
    assert block.type == "text"
    assert block.text == SAID


def test_deepseeks_calls_whole_and_streamed(tmp_path: Path) -> None:
    shown = f"{{% if 0 %}}{DEEPSEEK.begin}{{% endif %}}"
    template = shown + TEMPLATE.replace("tools", "nothing")
    with serving(write_model(tmp_path / "tiny.gguf", template, context=4096)) as server:
        path = "/v1/chat/completions"
        body = {**CALLING, "tool_choice": "required", "max_tokens": 1500}
        (choice,) = post(server, path, body).json()["choices"]
        told = {one["function"]["name"] for one in choice["message"]["tool_calls"]}
        assert told <= {"get", "now"}
        assert choice["message"]["content"] is None
        body["tool_choice"] = BY_NAME
        (choice,) = post(server, path, body).json()["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert (call["function"]["name"], choice["finish_reason"]) == ("get", "tool_calls")
        check(call["function"]["arguments"])
        *chunks, done = events(server, path, body)
        assert done == "[DONE]"
        deltas = [one["choices"][0]["delta"].get("tool_calls", ()) for one in chunks]
        pieces = [one["function"].get("arguments", "") for delta in deltas for one in delta]
        assert "".join(pieces) == call["function"]["arguments"]


def test_anthropic_calls_whole_and_streamed(claude: anthropic.Anthropic) -> None:
    tools: Any = [{"name": "get", "description": "Weather.", "input_schema": SCHEMA}]
    asked: Any = {**ASKED, "tools": tools, "tool_choice": {"type": "tool", "name": "get"}}
    answer = claude.messages.create(**asked)
    assert answer.stop_reason == "tool_use"
    (block,) = answer.content
    assert block.type == "tool_use"
    jsonschema.validate(block.input, SCHEMA)
    with claude.messages.stream(**asked) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in events
    (block,) = final.content
    assert (block.type, block.name, final.stop_reason) == ("tool_use", "get", "tool_use")
    jsonschema.validate(block.input, SCHEMA)
    results: Any = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "20"},
        {"type": "text", "text": "and now?"},
    ]
    turns = [*MESSAGES, {"role": "assistant", "content": final.content}]
    again = {**asked, "messages": [*turns, {"role": "user", "content": results}]}
    for kind in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "none"}):
        assert claude.messages.create(**{**again, "tool_choice": kind}).content
    more = claude.messages.count_tokens(
        model=NAME, messages=again["messages"], tools=tools
    ).input_tokens
    assert more > claude.messages.count_tokens(model=NAME, messages=MESSAGES).input_tokens


@pytest.mark.usefixtures("says")
def test_ollama_calls_whole_and_streamed(server: Running) -> None:
    client = ollama.Client(host=server.url)
    asked: Any = {"model": NAME, "messages": MESSAGES, "tools": TOOLS}
    asked["options"] = {"num_predict": 40, "temperature": 0}
    calls = client.chat(**asked).message.tool_calls or []
    expected = [("get", {"city": "Rom"})] * 2
    assert [(one.function.name, one.function.arguments) for one in calls] == expected
    parts = list(client.chat(**asked, stream=True))
    calls = [one for part in parts for one in part.message.tool_calls or ()]
    assert [(one.function.name, one.function.arguments) for one in calls] == expected
    assert parts[-1].done
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [one.model_dump() for one in calls]},
        {"role": "tool", "content": "20", "tool_name": "get"},
    ]
    assert client.chat(**{**asked, "messages": turns}).message.tool_calls


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ('{"a": -1e999, "b": 1.5, "c": 7}', {"a": -sys.float_info.max, "b": 1.5, "c": 7}),
        ('{"a": "\\ud83d", "b": "\\ud83d\\ude00"}', {"a": "?", "b": "\U0001f600"}),
        ('{"a": NaN}', {}),
    ],
)
@pytest.mark.usefixtures("says")
def test_what_json_cannot_send_of_a_models_arguments_is_told_all_the_same(
    server: Running, monkeypatch: pytest.MonkeyPatch, written: str, sent: dict[str, Any]
) -> None:
    said = f'<tool_call>\n{{"name": "get", "arguments": {written}}}\n</tool_call>'
    monkeypatch.setattr(sys.modules[__name__], "SAID", said)
    asked: Any = {**ASKED, "max_tokens": 1, "stream": False, "options": {"num_predict": 1}}
    answer = post(server, "/api/chat", {**asked, "tools": TOOLS})
    (call,) = answer.json()["message"]["tool_calls"]
    assert call["function"] == {"name": "get", "arguments": sent}
    tools = [{"name": "get", "input_schema": SCHEMA}]
    answer = post(server, "/v1/messages", {**asked, "tools": tools})
    (block,) = answer.json()["content"]
    assert (block["name"], block["input"]) == ("get", sent)


def test_openai_takes_calls_and_results_back(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(**CALLING).choices[0].message
    (call,) = message.tool_calls or ()
    turns = [
        *MESSAGES,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "20"},
    ]
    answer = client.chat.completions.create(**{**CALLING, "messages": turns, "max_tokens": 200})
    assert answer.usage is not None
    assert answer.choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("path", "change", "told"),
    [
        ("/v1/chat/completions", {"tool_choice": "required"}, "there are no tools"),
        ("/v1/messages", {"max_tokens": 9, "tool_choice": {"type": "any"}}, "there are no tools"),
        ("/v1/chat/completions", {"tools": TOOLS, "tool_choice": "often"}, "tool_choice is"),
        ("/v1/chat/completions", {**CALLING, "ignore_eos": True}, "ignore_eos goes on past"),
        ("/v1/chat/completions", {"tools": TOOLS * 100}, "tools"),
        ("/v1/chat/completions", {"tools": [{"type": "code"}]}, "only functions"),
        ("/v1/messages", {"tools": [{"name": "a"}]}, "input_schema"),
        (
            "/v1/messages",
            {"tools": [{"name": "a", "input_schema": {}}], "tool_choice": {"type": []}},
            "tool_choice: the type is []",
        ),
        ("/v1/messages", {"tools": [{"type": "web_search_20260318", "name": "w"}]}, "web_search"),
        ("/api/chat", {"tools": [{}]}, "tool 1"),
    ],
)
def test_what_cannot_be_called_is_refused(
    server: Running, path: str, change: dict[str, Any], told: str
) -> None:
    answer = post(server, path, {**ASKED, **change})
    assert answer.status_code == 400, answer.text
    assert told in answer.text
