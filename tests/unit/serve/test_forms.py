"""The form of an answer, asked for by the clients of OpenAI, Anthropic and Ollama."""

import json
import re
from typing import Any

import anthropic
import jsonschema
import ollama
import openai
import pytest

from tests.asking import client_fixture, openai_of, post, server_fixture
from tests.servers import NAME, Running

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
        (
            "/v1/chat/completions",
            {"structured_outputs": {"choice": ["<think>"]}, "max_thinking_tokens": 0},
            "there is no budget",
        ),
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
