"""Anthropic's interface, by Anthropic's own client."""

import json
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.asking import anthropic_of, client_fixture, post, server_fixture
from tests.servers import NAME, Running, running
from tests.tiny_llm import TEMPLATE
from thinslice.serve.thinking import (
    Thinking,
    ThinkingAdaptive,
    ThinkingDisabled,
    ThinkingEnabled,
    of_anthropic,
)

MESSAGES: Any = [{"role": "user", "content": "the moon"}]
ASKED: Any = {"model": NAME, "max_tokens": 24, "messages": MESSAGES}
GREEDY: Any = {**ASKED, "extra_body": {"temperature": 0}}
# The prompt opens the thought, which 24 tokens do not end.
THINKING = TEMPLATE.replace("assistant\n", "assistant\n<think>\n")


server = server_fixture()


client = client_fixture(anthropic_of)


def raw_events(server: Running, body: Any) -> list[Any]:
    """Each event, whose name is its type."""
    text = post(server, "/v1/messages", {**body, "stream": True}).text
    events = []
    for frame in text.split("\n\n")[:-1]:
        name, _, data = frame.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        TypeAdapter(RawMessageStreamEvent).validate_python(event)
        events.append(event)
    return events


def test_a_message(server: Running, client: anthropic.Anthropic) -> None:
    answer = client.messages.create(**GREEDY)
    assert (answer.role, answer.model, answer.stop_reason) == ("assistant", NAME, "max_tokens")
    assert [block.type for block in answer.content] == ["text"]
    assert answer.usage.output_tokens == 24
    prompt = server.served.engine.llm.prepare(MESSAGES)
    read = answer.usage.cache_read_input_tokens
    assert read is not None
    assert answer.usage.input_tokens + read == len(prompt.token_ids)


def test_what_the_cache_had_is_not_among_the_input(client: anthropic.Anthropic) -> None:
    asked = {**GREEDY, "messages": [{"role": "user", "content": "b" * 100}]}
    first, again = (client.messages.create(**asked).usage for _ in range(2))
    assert first.cache_read_input_tokens == 0
    assert again.cache_read_input_tokens
    assert again.input_tokens + again.cache_read_input_tokens == first.input_tokens


def test_a_stream_is_the_whole_message_piece_by_piece(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**GREEDY)
    with client.messages.stream(**GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert [block.type for block in final.content] == ["text"]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == 24


def test_the_order_of_events(server: Running) -> None:
    events = raw_events(server, {**ASKED, "temperature": 0})
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert events[0]["message"]["usage"]["output_tokens"] == 0


def test_a_stop_sequence_is_told(client: anthropic.Anthropic) -> None:
    block = client.messages.create(**GREEDY).content[0]
    assert block.type == "text"
    stop = block.text[5:8]
    answer = client.messages.create(**GREEDY, stop_sequences=["never this one", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_thought_is_a_block_of_its_own(tmp_path: Path, is_streamed: bool) -> None:
    with running(tmp_path, template=THINKING) as server, anthropic_of(server) as client:
        if is_streamed:
            with client.messages.stream(**GREEDY) as stream:
                answer = stream.get_final_message()
        else:
            answer = client.messages.create(**GREEDY)
        assert [block.type for block in answer.content] == ["thinking"]
        assert answer.stop_reason == "max_tokens"


def test_blocks_and_a_system_prompt(server: Running, client: anthropic.Anthropic) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "c"},
            ],
        },
        {"role": "user", "content": "d"},
    ]
    count = client.messages.count_tokens(model=NAME, messages=messages, system="be brief")
    same = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    assert count.input_tokens == len(server.served.engine.llm.prepare(same).token_ids)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0},
        {"max_tokens": None},
        {"messages": []},
        {"messages": [{"role": "system", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "user"}]},
        {"messages": [*MESSAGES, {"role": "system", "content": "a", "clear_at": "now"}]},
        {"messages": [*MESSAGES, {"role": "system", "content": "a", "output_config": {"a": 1}}]},
        {"output_config": {"effort": "none"}},
        {"tools": [{"name": "a"}]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"temperature": "a"},
    ],
)
def test_what_cannot_be_answered_is_refused(server: Running, change: dict[str, Any]) -> None:
    answer = post(server, "/v1/messages", {**ASKED, **change})
    assert answer.status_code == 400
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["error"]["message"]


def test_what_claude_code_sends(server: Running, client: anthropic.Anthropic) -> None:
    edits = [{"type": "clear_thinking_20251015", "keep": "all"}]
    messages: Any = [*MESSAGES, {"role": "system", "content": "be brief"}]
    answer = client.messages.create(
        model=NAME,
        max_tokens=24,
        messages=messages,
        thinking={"type": "adaptive"},
        output_config={"effort": "high"},
        extra_body={"context_management": {"edits": edits}},
    )
    read = answer.usage.cache_read_input_tokens or 0
    count = len(server.served.engine.llm.prepare(messages).token_ids)
    assert answer.usage.input_tokens + read == count


def test_effort_bounds_a_thought_without_a_budget() -> None:
    for asked, enabled in ((None, None), (ThinkingAdaptive(type="adaptive"), True)):
        assert of_anthropic(asked, 4000, "low") == Thinking(1024, is_enabled=enabled)
        assert of_anthropic(asked, 4000, "max") == Thinking(None, is_enabled=enabled)
    budget = ThinkingEnabled(type="enabled", budget_tokens=9)
    assert of_anthropic(budget, 4000, "low").max_tokens == 9
    assert of_anthropic(ThinkingDisabled(type="disabled"), 4000, "low").is_enabled is False


def test_another_model_is_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.create(**{**GREEDY, "model": "other"})
