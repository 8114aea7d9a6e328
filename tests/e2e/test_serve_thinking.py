"""Thinking budgets over HTTP, by the clients of OpenAI, of Anthropic and of Ollama."""

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import ollama
import openai
import pytest
from anthropic.types import RawContentBlockDeltaEvent, RawMessageDeltaEvent

from tests.servers import NAME, Running, running, serving
from tests.thinking import SMALL_THINKER, asked, held_out, opened
from thinslice.serve.thinking import EFFORTS

# The longest of some, so that every budget ends it.
EXAMPLE = max(held_out(20), key=lambda one: len(one.answer))
MESSAGES: Any = asked(EXAMPLE)
ASKED: Any = {"model": NAME, "messages": MESSAGES, "temperature": 0}
LONG = 200  # tokens of its thought, at least


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(SMALL_THINKER) as found:
        yield found


@pytest.fixture(scope="module")
def opened_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(opened(tmp_path_factory.mktemp("opened"))) as found:
        yield found


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model that nobody knows to think."""
    with running(tmp_path_factory.mktemp("other")) as found:
        yield found


@pytest.fixture(scope="module")
def openai_client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def anthropic_client(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True
    )


@pytest.fixture(scope="module")
def ollama_client(server: Running) -> ollama.Client:
    return ollama.Client(server.url)


def spent(answer: openai.types.chat.ChatCompletion) -> int:
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    count = answer.usage.completion_tokens_details.reasoning_tokens
    assert count is not None
    return count


@pytest.mark.parametrize("budget", [0, 1, 16, 64, 256])
def test_openai_within_a_budget(openai_client: openai.OpenAI, budget: int) -> None:
    extra = {"max_thinking_tokens": budget}
    answer = openai_client.chat.completions.create(**ASKED, extra_body=extra)
    message = answer.choices[0].message
    assert spent(answer) <= budget
    assert message.content
    assert (getattr(message, "reasoning_content", "") == "") == (budget < 2)
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(
        openai_client.chat.completions.create(
            **ASKED, extra_body=extra, stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(one.content or "" for one in deltas) == message.content
    thought = "".join(getattr(one, "reasoning_content", "") for one in deltas)
    assert thought == getattr(message, "reasoning_content", "")
    assert chunks[-1].usage is not None
    assert answer.usage is not None
    # The prompt's share that a prefix cache has may differ.
    for name in ("prompt_tokens", "completion_tokens", "completion_tokens_details"):
        assert getattr(chunks[-1].usage, name) == getattr(answer.usage, name)


@pytest.mark.parametrize("effort", EFFORTS)
def test_openai_by_effort(openai_client: openai.OpenAI, effort: Any) -> None:
    """The table's budgets are longer than any thought here, but for that of none."""
    answer = openai_client.chat.completions.create(**ASKED, reasoning_effort=effort)
    assert (spent(answer) == 0) == (effort == "none")
    assert spent(answer) == 0 or spent(answer) > LONG


def test_efforts_are_budgets(openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EFFORTS, "low", 20)
    answer = openai_client.chat.completions.create(**ASKED, reasoning_effort="low")
    assert 0 < spent(answer) <= 20


@pytest.mark.parametrize("is_streamed", [False, True])
def test_responses_have_the_thought_as_an_item(
    openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    monkeypatch.setitem(EFFORTS, "low", 20)
    chat = openai_client.chat.completions.create(**ASKED, reasoning_effort="low")
    said = chat.choices[0].message
    body: Any = {"model": NAME, "input": MESSAGES, "temperature": 0, "reasoning": {"effort": "low"}}
    if is_streamed:
        *_, last = openai_client.responses.create(**body, stream=True)
        assert last.type == "response.completed"
        answer = last.response
    else:
        answer = openai_client.responses.create(**body)
    thought, message = answer.output
    assert (thought.type, message.type) == ("reasoning", "message")
    texts = [one.text for one in thought.content or ()]
    assert texts == [said.reasoning_content]  # type: ignore[attr-defined]
    assert answer.output_text == said.content
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == spent(chat)


def test_seconds_are_a_budget(openai_client: openai.OpenAI) -> None:
    extra = {"max_thinking_seconds": 1e-9}
    answer = openai_client.chat.completions.create(**ASKED, extra_body=extra)
    assert 0 < spent(answer) < LONG
    assert answer.choices[0].message.content


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_template_is_told(
    server: Running, opened_server: Running, other: Running, is_enabled: bool
) -> None:
    extra: Any = {"chat_template_kwargs": {"enable_thinking": is_enabled}}
    for one in (server, opened_server, other):
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="none")
        answer = client.chat.completions.create(**ASKED, max_tokens=300, extra_body=extra)
        assert (spent(answer) > 0) == (is_enabled and one is not other)
        assert answer.choices[0].message.content
        assert "think>" not in answer.choices[0].message.content


@pytest.mark.parametrize(
    ("change", "param", "told"),
    [
        ({"reasoning_effort": "extreme"}, "reasoning_effort", "'none', 'minimal'"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens", "greater"),
        ({"max_thinking_tokens": "9"}, "max_thinking_tokens", "integer"),
        ({"max_thinking_seconds": -0.5}, "max_thinking_seconds", "greater"),
        ({"reasoning_effort": "low", "max_thinking_tokens": 9}, "reasoning_effort", "give one"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize", "extra"),
        (
            {"chat_template_kwargs": {"enable_thinking": "yes"}},
            "chat_template_kwargs.enable_thinking",
            "boolean",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
            "chat_template_kwargs.enable_thinking",
            "no room",
        ),
        ({"thinking_token_budget": 9}, "thinking_token_budget", "not supported"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "not supported"),
    ],
)
def test_what_is_no_budget_is_refused(
    server: Running, change: dict[str, Any], param: str, told: str
) -> None:
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json={**ASKED, **change})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert told in error["message"]


@pytest.mark.parametrize("name", ["reasoning_effort", "max_thinking_tokens", "think", "thinking"])
def test_a_plain_text_has_no_thought_to_bound(server: Running, name: str) -> None:
    body = {"model": NAME, "prompt": "a", "max_tokens": 2, name: "low"}
    answer = httpx2.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize("budget", [1, 16, 64, 256])
def test_anthropic_within_a_budget(anthropic_client: anthropic.Anthropic, budget: int) -> None:
    body: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 400}
    body["thinking"] = {"type": "enabled", "budget_tokens": budget}
    answer = anthropic_client.messages.create(**body, extra_body={"temperature": 0})
    kinds = [block.type for block in answer.content]
    assert kinds == (["text"] if budget == 1 else ["thinking", "text"])
    assert answer.stop_reason == "end_turn"
    details = answer.usage.output_tokens_details
    assert details is not None
    assert details.thinking_tokens <= budget
    stream = anthropic_client.messages.create(**body, stream=True, extra_body={"temperature": 0})
    texts = {"thinking_delta": "", "text_delta": ""}
    for event in stream:
        if isinstance(event, RawContentBlockDeltaEvent):
            delta = event.delta
            if delta.type == "thinking_delta":
                texts[delta.type] += delta.thinking
            elif delta.type == "text_delta":
                texts[delta.type] += delta.text
        elif isinstance(event, RawMessageDeltaEvent):
            assert event.usage.output_tokens == answer.usage.output_tokens
            assert event.usage.output_tokens_details == details
    whole = {"thinking_delta": "", "text_delta": ""}
    for block in answer.content:
        if block.type == "thinking":
            whole["thinking_delta"] = block.thinking
        elif block.type == "text":
            whole["text_delta"] = block.text
    assert texts == whole


@pytest.mark.parametrize(
    ("thinking", "kinds"),
    [
        ({"type": "disabled"}, ["text"]),
        ({"type": "adaptive"}, ["thinking", "text"]),
        ({"type": "adaptive", "display": "summarized"}, ["thinking", "text"]),
    ],
)
def test_anthropic_with_and_without(
    server: Running, anthropic_client: anthropic.Anthropic, thinking: Any, kinds: list[str]
) -> None:
    body: Any = {"model": NAME, "messages": MESSAGES, "thinking": thinking}
    answer = anthropic_client.messages.create(max_tokens=400, **body)
    assert [block.type for block in answer.content] == kinds
    count = anthropic_client.messages.count_tokens(**body).input_tokens
    assert count == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    ("thinking", "told"),
    [
        ({"type": "enabled"}, "budget_tokens"),
        ({"type": "enabled", "budget_tokens": 0}, "budget_tokens"),
        ({"type": "enabled", "budget_tokens": 400}, "max_tokens must be greater"),
        ({"type": "between_tools"}, "thinking"),
        ({"type": "adaptive", "display": "omitted"}, "display"),
        ({"type": "disabled", "budget_tokens": 5}, "budget_tokens"),
        ("on", "thinking"),
    ],
)
def test_what_is_no_thinking_of_anthropics_is_refused(
    server: Running, thinking: Any, told: str
) -> None:
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 400, "thinking": thinking}
    answer = httpx2.post(f"{server.url}/v1/messages", json=body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("think", "is_thinking"), [(True, True), (False, False), ("low", True), ("high", True)]
)
def test_ollama_with_and_without(
    ollama_client: ollama.Client, think: Any, is_thinking: bool
) -> None:
    options: Any = {"temperature": 0}
    whole = ollama_client.chat(NAME, MESSAGES, think=think, options=options)
    assert bool(whole.message.thinking) == is_thinking
    assert whole.message.content
    assert whole.done_reason == "stop"
    parts = list(ollama_client.chat(NAME, MESSAGES, think=think, options=options, stream=True))
    thought = "".join(part.message.thinking or "" for part in parts)
    assert thought == (whole.message.thinking or "")
    made = ollama_client.generate(NAME, EXAMPLE.prompt, think=think, options=options)
    assert (made.response, made.thinking) == (whole.message.content, whole.message.thinking)


def test_ollamas_levels_are_budgets(
    ollama_client: ollama.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = ollama_client.chat(NAME, MESSAGES, think="low", options={"temperature": 0})
    monkeypatch.setitem(EFFORTS, "low", 20)
    bound = ollama_client.chat(NAME, MESSAGES, think="low", options={"temperature": 0})
    assert free.message.thinking is not None
    assert bound.message.thinking
    assert free.message.thinking.startswith(bound.message.thinking)
    assert len(bound.message.thinking) < 20


def test_ollama_tells_who_thinks(server: Running, other: Running) -> None:
    capabilities = ollama.Client(server.url).show(NAME).capabilities
    assert capabilities == ["completion", "tools", "thinking"]
    client = ollama.Client(other.url)
    assert client.show(NAME).capabilities == ["completion", "tools"]
    with pytest.raises(ollama.ResponseError, match="not known to think"):
        client.chat(NAME, MESSAGES, think=True)
    answer = client.chat(NAME, MESSAGES, think=False, options={"num_predict": 8})
    assert answer.eval_count == 8


@pytest.mark.parametrize("think", ["extreme", 1, {}])
def test_what_is_no_thinking_of_ollamas_is_refused(server: Running, think: Any) -> None:
    body = {"model": NAME, "messages": MESSAGES, "think": think}
    answer = httpx2.post(f"{server.url}/api/chat", json=body)
    assert answer.status_code == 400
    assert "think" in answer.json()["error"]


def test_a_raw_prompt_of_ollamas_has_no_thought(ollama_client: ollama.Client) -> None:
    options: Any = {"num_predict": 4}
    assert ollama_client.generate(NAME, "a", raw=True, think=False, options=options).response
    with pytest.raises(ollama.ResponseError, match="not raw"):
        ollama_client.generate(NAME, "a", raw=True, think=True)
