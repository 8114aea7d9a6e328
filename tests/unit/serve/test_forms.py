"""The form of an answer, asked for by the clients of OpenAI, Anthropic and Ollama."""

import gc
import json
import re
import time
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import ollama
import openai
import pytest

from tests.asking import client_fixture, openai_of, post, server_fixture
from tests.servers import NAME, Running, running
from thinslice.engine import grammar
from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.grammar import Grammars
from thinslice.engine.results import ResultsRoom

MESSAGES: Any = [{"role": "user", "content": "the moon"}]
# What a random model comes to the end of.
SCHEMA: Any = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["moon", "sun"]},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "maxItems": 2,
        },
    },
    "required": ["kind", "sizes"],
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
ASKED: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 400}


server = server_fixture()


client = client_fixture(openai_of)


def check(text: str | None) -> None:
    assert text is not None
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("is_strict", [None, True, False])
def test_openai_whole_and_streamed(client: openai.OpenAI, is_strict: bool | None) -> None:
    form = {**FORMAT, "json_schema": {**FORMAT["json_schema"], "strict": is_strict}}
    answer = client.chat.completions.create(**ASKED, response_format=form, n=2, seed=1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)
    chunks = client.chat.completions.create(**ASKED, response_format=form, stream=True, seed=1)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content


def test_openai_s_other_forms(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASKED, response_format={"type": "json_object"})
    choice = answer.choices[0]
    assert choice.message.content is not None
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    for form, pattern in (
        ({"regex": r"\d{3}-[a-f]{2}"}, r"[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
    ):
        more = {"structured_outputs": form}
        answer = client.chat.completions.create(**ASKED, extra_body=more)
        assert re.fullmatch(pattern, answer.choices[0].message.content or "")
        plain: Any = {"model": NAME, "prompt": "the moon", "max_tokens": 60}
        text = client.completions.create(**plain, extra_body=more).choices[0].text
        assert re.fullmatch(pattern, text)


def test_anthropic_whole_and_streamed(server: Running) -> None:
    config: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(**ASKED, output_config=config)
        assert answer.stop_reason == "end_turn"
        check(answer.content[0].text)
        with client.messages.stream(**ASKED, output_config=config) as stream:
            check("".join(stream.text_stream))


def test_ollama_whole_and_streamed(server: Running) -> None:
    client = ollama.Client(host=server.url)
    asked: Any = {"model": NAME, "format": SCHEMA, "options": {"num_predict": 400}}
    check(client.chat(messages=MESSAGES, **asked).message.content)
    check(client.generate(prompt="the moon", **asked).response)
    parts = client.chat(messages=MESSAGES, stream=True, **asked)
    check("".join(part.message.content or "" for part in parts))
    options = {"num_predict": 3}
    begun = client.chat(model=NAME, messages=MESSAGES, format="json", options=options)
    assert (begun.message.content or "").startswith("{")


FORM: Any = {"structured_outputs": {"choice": ["yes", "no"]}}


def wait_until_let_go() -> None:
    """Until nobody holds an answer, or what follows the form of one, any more."""
    while any(isinstance(one, AsyncStream | grammar.Follower) for one in gc.get_objects()):
        time.sleep(0.01)
        gc.collect()


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_without_room_for_its_form_does_not_begin(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: str, is_streamed: bool
) -> None:
    asked = {**ASKED, **FORM, "prompt": "the moon", "n": 2, "stream": is_streamed}
    assert post(server, path, asked).status_code == 200
    room = server.served.engine.llm.engine.results
    wait_until_let_go()
    left, take = room.left_bytes, ResultsRoom.take

    def but_for_matchers(room: ResultsRoom, num_bytes: int) -> bool:
        return num_bytes != grammar._MATCHER_BYTES and take(room, num_bytes)

    monkeypatch.setattr(ResultsRoom, "take", but_for_matchers)
    answer = post(server, path, asked)
    assert answer.status_code == 429, answer.text
    assert answer.headers["retry-after"] == "1"
    assert "an answer of a given form" in answer.text
    monkeypatch.undo()
    wait_until_let_go()
    assert room.left_bytes == left
    with monkeypatch.context() as patched:
        patched.setattr(ResultsRoom, "most_bytes", 0)
        refused = post(server, path, asked)
    assert refused.status_code == 400
    assert "at most 0 fit" in refused.text
    assert post(server, path, asked).status_code == 200


def test_where_nothing_is_generated_no_grammar_is_made(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Grammars, text: str) -> None:
        raise AssertionError("a grammar is made")

    monkeypatch.setattr(Grammars, "compiled", refuse)
    plain = {"model": NAME, "prompt": "the moon", **FORM}
    assert (
        post(server, "/v1/completions", {**plain, "max_tokens": 0, "echo": True}).status_code == 200
    )
    counted = {
        "model": NAME,
        "messages": MESSAGES,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    }
    found = post(server, "/v1/messages/count_tokens", counted)
    llm = server.served.engine.llm
    assert found.json() == {"input_tokens": len(llm.prepare(MESSAGES).token_ids)}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("budget", [{}, {"max_thinking_tokens": 0}, {"max_thinking_tokens": 12}])
def test_a_form_may_have_tags_of_thoughts_where_the_model_has_no_thoughts(
    client: openai.OpenAI, budget: dict[str, int], is_streamed: bool
) -> None:
    """The answer is of the form as a whole, and no budget ends what is no thought."""
    more = {"structured_outputs": {"regex": "<think>[ab]{30}</think>c"}, **budget}
    if is_streamed:
        chunks = [*client.chat.completions.create(**ASKED, extra_body=more, stream=True)]
        assert chunks[-1].choices[0].finish_reason == "stop"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        (choice,) = client.chat.completions.create(**ASKED, extra_body=more).choices
        assert choice.finish_reason == "stop"
        text = choice.message.content or ""
    assert re.fullmatch("<think>[ab]{30}</think>c", text)


def test_a_form_of_a_model_that_thinks_has_no_tags_of_thoughts(tmp_path: Path) -> None:
    thinks = "{% for m in messages %}{% if '</think>' in m.content %}{% endif %}{{ m.content }}"
    with running(tmp_path, template=f"{thinks}{{% endfor %}}") as thinking:
        assert thinking.served.engine.llm.thinks
        path, more = "/v1/chat/completions", {"structured_outputs": {"choice": ["<think>", "a"]}}
        answer = post(thinking, path, {**ASKED, **more, "stream": True})
        assert answer.status_code == 400
        assert "with which this model begins its thoughts" in answer.text
        for budget in (0, 40):
            free = {"structured_outputs": {"choice": ["ab", "cd"]}, "max_thinking_tokens": budget}
            answer = post(thinking, path, {**ASKED, **free})
            assert answer.json()["choices"][0]["message"]["content"] in ("ab", "cd")
        answer = post(thinking, path, {**ASKED, **more, "max_thinking_tokens": 0})
        assert answer.json()["choices"][0]["message"]["content"] in ("<think>", "a")


def test_without_forms_each_is_refused_and_free_answers_come(tmp_path: Path) -> None:
    with running(tmp_path, forms="off") as server:
        tools = [{"type": "function", "function": {"name": "now"}}]
        path = "/v1/chat/completions"
        for more in (FORM, {"tools": tools, "tool_choice": "required"}):
            answer = post(server, path, {**ASKED, **more})
            assert answer.status_code == 400
            assert "loaded with forms off" in answer.text
        for more in ({}, {"tools": tools}):
            assert post(server, path, {**ASKED, "max_tokens": 4, **more}).status_code == 200


NAMELESS = {"type": "json_schema", "json_schema": {"name": "a b", "schema": SCHEMA}}
HUGE = {"enum": [f"value{one}" for one in range(20_000)]}
DEEP: Any = {"type": "string"}
for _ in range(100):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("path", "change", "told"),
    [
        ("/v1/chat/completions", {"response_format": NAMELESS}, "the name is 'a b'"),
        ("/v1/chat/completions", {"response_format": FORMAT, "structured_outputs": {}}, "both"),
        ("/v1/chat/completions", {"structured_outputs": {"grammar": "x"}}, "one of json, regex"),
        ("/v1/chat/completions", {"structured_outputs": {"regex": "("}}, "unclosed group"),
        ("/v1/chat/completions", {"structured_outputs": {"regex": "a" * 5000}}, "at most 4096"),
        ("/v1/chat/completions", {"structured_outputs": {"json": HUGE}}, "at most 131072"),
        ("/v1/chat/completions", {"structured_outputs": {"json": DEEP}}, "64 levels"),
        ("/v1/chat/completions", {"structured_outputs": {"json": {"type": "x"}}}, "Invalid type"),
        ("/v1/chat/completions", {"structured_outputs": {"json": {"multipleOf": 999983}}}, "multi"),
        ("/v1/messages", {"output_config": {"task_budget": {}}}, "task_budget is not supported"),
        ("/v1/messages", {"output_config": {"format": {"type": "xml"}}}, "not json_schema"),
        ("/api/chat", {"format": "yaml"}, "no JSON schema"),
    ],
)
def test_what_is_no_form_is_refused(
    server: Running, path: str, change: dict[str, Any], told: str
) -> None:
    answer = post(server, path, {**ASKED, **change})
    assert answer.status_code == 400, answer.text
    assert told in answer.text
    server.wait_until_idle()
