"""The OpenAI interface, by OpenAI's own client with its types held strictly."""

import dataclasses
import json
import re
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.asking import client_fixture, events, openai_of, post, server_fixture
from tests.servers import NAME, Running
from thinslice.engine.metrics import Metrics

MESSAGES: Any = [{"role": "user", "content": "the moon"}]
# Greedy, so that two requests give the same text.
GREEDY: Any = {"model": NAME, "temperature": 0, "max_tokens": 24}


server = server_fixture()


client = client_fixture(openai_of)


def test_a_chat_is_what_the_library_says(server: Running, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert answer.model == NAME
    usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens == 24
    prompt = server.served.engine.llm.prepare(MESSAGES)
    assert usage.prompt_tokens == len(prompt.token_ids)
    assert usage.total_tokens == usage.prompt_tokens + 24


def test_a_stream_is_the_whole_answer_piece_by_piece(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == whole.choices[0].message.content
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_chunks_come_as_the_wire_has_them(server: Running) -> None:
    body = {**GREEDY, "messages": MESSAGES, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(server, "/v1/chat/completions", body)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 48
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        first, *inner, last = own
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in one["delta"] and one["delta"] for one in inner)
        assert all(one["finish_reason"] is None for one in (first, *inner))
        assert (last["delta"], last["finish_reason"]) == ({}, "length")


def test_usage_comes_only_where_it_is_asked_for(server: Running) -> None:
    chunks = events(server, "/v1/chat/completions", {**GREEDY, "messages": MESSAGES})
    assert all("usage" not in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize("is_streamed", [False, True])
def test_log_probabilities_of_a_chat(client: openai.OpenAI, is_streamed: bool) -> None:
    asked = {**GREEDY, "messages": MESSAGES, "logprobs": True, "top_logprobs": 3}
    if is_streamed:
        chunks = client.chat.completions.create(**asked, stream=True)
        found = [chunk.choices[0].logprobs for chunk in chunks]
    else:
        found = [client.chat.completions.create(**asked).choices[0].logprobs]
    entries = [entry for one in found if one is not None for entry in one.content or ()]
    assert len(entries) == 24
    for entry in entries:
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy takes the likeliest


def test_completions(server: Running, client: openai.OpenAI) -> None:
    asked: Any = {**GREEDY, "prompt": "the moon", "logprobs": 2}
    whole = client.completions.create(**asked).choices[0]
    assert whole.logprobs is not None
    tokens, offsets = whole.logprobs.tokens, whole.logprobs.text_offset
    assert tokens is not None
    assert len(tokens) == 24
    assert offsets is not None
    for token, offset in zip(tokens, offsets, strict=True):
        assert token == "\ufffd" or whole.text[offset:].startswith(token)
    # OpenAI's type of a completion has no place for the null that its own API streams.
    *chunks, done = (one for one in events(server, "/v1/completions", asked))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert done == "[DONE]"
    assert "".join(one["text"] for one in choices) == whole.text
    assert [token for one in choices for token in one["logprobs"]["tokens"]] == tokens
    assert [place for one in choices for place in one["logprobs"]["text_offset"]] == offsets
    assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + ["length"]


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "messages": MESSAGES, "max_tokens": 16, "temperature": 1.0}
    first, again, other = (
        client.chat.completions.create(**asked, seed=seed).choices[0].message.content
        for seed in (-5, -5, 6)
    )
    assert first == again != other


def test_models(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "thinslice"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"n": 10_000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, None),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"messages": "a"}, "messages"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"store": True}, "store"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"tool_choice": "required"}, None),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(
    server: Running, change: dict[str, Any], param: str | None
) -> None:
    answer = post(server, "/v1/chat/completions", {**GREEDY, "messages": MESSAGES, **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param is None or re.fullmatch(rf"{param}(\.\d+)?|logit_bias\.\d+", error["param"])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"1", b"\xff", b"[" * 20_000])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_none_is_refused(server: Running, path: str, body: bytes) -> None:
    answer = post(server, path, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_a_body_is_json_whatever_it_is_called(server: Running, kind: str | None) -> None:
    content = json.dumps({**GREEDY, "messages": MESSAGES}).encode()
    headers = {} if kind is None else {"content-type": kind}
    url = f"{server.url}/v1/chat/completions"
    assert httpx2.post(url, content=content, headers=headers, timeout=60).status_code == 200


def test_a_body_is_bounded(server: Running) -> None:
    answer = post(server, "/v1/completions", b" " * (1 << 20))
    assert answer.status_code == 413


def test_a_prompt_beyond_the_context_is_told_so(server: Running) -> None:
    messages = [{"role": "user", "content": "a b " * 4000}]
    answer = post(server, "/v1/chat/completions", {**GREEDY, "messages": messages})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "512" in error["message"]
    answer = post(server, "/v1/completions", {**GREEDY, "prompt": "a b", "max_tokens": 5000})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "max_tokens 5000 exceed the context of 512" in error["message"]


def test_an_end_token_may_be_passed_over(server: Running) -> None:
    (end, *_) = server.served.engine.llm.tokenizer.special.eos_token_ids
    body = {**GREEDY, "prompt": "a b", "max_tokens": 8, "logit_bias": {f"{end}": 100}}
    ended = post(server, "/v1/completions", body).json()["choices"][0]
    assert ended["finish_reason"] == "stop"
    on = post(server, "/v1/completions", {**body, "ignore_eos": True}).json()["choices"][0]
    assert on["finish_reason"] == "length"


def test_fields_that_change_nothing_are_accepted(server: Running) -> None:
    more = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    more |= {"tools": None, "something_new": {"x": 1}, "tool_choice": "auto"}
    more |= {
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
    }
    answer = post(server, "/v1/chat/completions", {**GREEDY, "messages": MESSAGES, **more})
    assert answer.status_code == 200, answer.text
    assert server.served.unknown_fields == {"something_new"}
    for ending in "ab":  # of a long name little is kept
        named = {**GREEDY, "messages": MESSAGES, "x" * 100_000 + ending: 1}
        assert post(server, "/v1/chat/completions", named).status_code == 200
    assert server.served.unknown_fields == {"something_new", "x" * 60}


def test_no_such_path_or_method(server: Running) -> None:
    assert httpx2.get(f"{server.url}/v1/nothing").status_code == 404
    assert httpx2.get(f"{server.url}/v1/chat/completions").json()["error"]["message"]


def test_health_readiness_and_plan(server: Running) -> None:
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx2.get(f"{server.url}/ready").json() == {"status": "ready"}
    plan = httpx2.get(f"{server.url}/plan").json()
    assert plan["plan"] == json.loads(json.dumps(server.served.engine.llm.plan.to_dict()))
    assert 0 < plan["rss_bytes"] <= plan["peak_bytes"]


def test_metrics_are_the_engine_s_numbers(server: Running, client: openai.OpenAI) -> None:
    client.chat.completions.create(messages=MESSAGES, **GREEDY)
    text = httpx2.get(f"{server.url}/metrics").text
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    numbers = server.served.engine.llm.engine.metrics
    assert found["thinslice_completion_tokens_total",] == numbers.completion_tokens >= 24
    assert found["thinslice_requests_total", "length"] == numbers.requests["length"]
    assert found["thinslice_time_to_first_token_seconds_bucket", "+Inf"] == (
        numbers.time_to_first_token_s.count
    )
    assert 0 < found["thinslice_rss_bytes",] <= found["thinslice_peak_bytes",]
    families = {family.name for family in text_string_to_metric_families(text)}
    told = {name.removeprefix("thinslice_").replace("_seconds", "_s") for name in families}
    assert {field.name for field in dataclasses.fields(Metrics)} <= told
