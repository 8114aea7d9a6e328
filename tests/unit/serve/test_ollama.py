"""Ollama's interface, by Ollama's own client."""

from typing import Any

import httpx2
import ollama
import pytest

from tests.asking import post, server_fixture
from tests.servers import NAME, Running

MESSAGES: Any = [{"role": "user", "content": "the moon"}]
OPTIONS: Any = {"temperature": 0, "num_predict": 24}


server = server_fixture()


@pytest.fixture(scope="module")
def client(server: Running) -> ollama.Client:
    return ollama.Client(server.url)


@pytest.mark.parametrize("name", [NAME, f"{NAME}:latest"])
def test_a_chat_whole_and_streamed(server: Running, client: ollama.Client, name: str) -> None:
    whole = client.chat(name, MESSAGES, options=OPTIONS)
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 24)
    prompt = server.served.engine.llm.prepare(MESSAGES)
    assert whole.prompt_eval_count == len(prompt.token_ids)
    assert whole.total_duration
    *parts, last = client.chat(name, MESSAGES, options=OPTIONS, stream=True)
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert not any(part.done for part in parts)
    assert (last.done, last.eval_count, last.message.content) == (True, 24, "")


def test_a_prompt_whole_streamed_and_raw(server: Running, client: ollama.Client) -> None:
    whole = client.generate(NAME, "the moon", system="be brief", options=OPTIONS)
    parts = client.generate(NAME, "the moon", system="be brief", options=OPTIONS, stream=True)
    assert "".join(part.response or "" for part in parts) == whole.response
    raw = client.generate(NAME, "the moon", raw=True, options=OPTIONS)
    assert raw.prompt_eval_count == len(server.served.engine.llm.prepare("the moon").token_ids)


def test_options_are_those_of_the_library(server: Running, client: ollama.Client) -> None:
    options: Any = {"temperature": 1.2, "seed": 7, "num_predict": 12, "repeat_penalty": 1.3}
    texts = {client.generate(NAME, "a", raw=True, options=options).response for _ in range(2)}
    assert len(texts) == 1
    stop = next(iter(texts)) or ""
    stopped = client.generate(NAME, "a", raw=True, options={**options, "stop": [stop[3:5]]})
    assert stopped.response == stop[: stop.index(stop[3:5])]
    assert stopped.done_reason == "stop"


def test_nothing_asked_is_a_model_that_is_there(client: ollama.Client) -> None:
    assert client.generate(NAME, "").done_reason == "load"
    assert client.chat(NAME, []).done_reason == "load"


def test_what_is_there(server: Running, client: ollama.Client) -> None:
    assert [one.model for one in client.list().models] == [NAME]
    assert [one.context_length for one in client.ps().models] == [
        server.served.engine.llm.plan.context
    ]
    assert client.show(NAME).capabilities == ["completion", "tools"]
    assert httpx2.get(f"{server.url}/api/version").json()["version"]


@pytest.mark.parametrize(
    "change",
    [
        {"think": True},
        {"format": "yaml"},
        {"options": {"num_ctx": 1 << 20}},
        {"options": {"temperature": "hot"}},
        {"options": {"mirostat": 1}},
        {"messages": [{"role": "user", "content": "a", "images": ["aa"]}]},
        {"tools": [{}]},
    ],
)
def test_what_cannot_be_answered_is_refused(server: Running, change: dict[str, Any]) -> None:
    body = {"model": NAME, "messages": MESSAGES, **change}
    answer = post(server, "/api/chat", body)
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str)


def test_another_model_is_not_found(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("other", MESSAGES)
    assert caught.value.status_code == 404


@pytest.mark.parametrize("path", ["pull", "embed", "create", "push"])
def test_what_ollama_does_beside_is_not_there(server: Running, path: str) -> None:
    answer = httpx2.post(f"{server.url}/api/{path}", json={"model": NAME})
    assert answer.status_code == 404
    assert isinstance(answer.json()["error"], str)
