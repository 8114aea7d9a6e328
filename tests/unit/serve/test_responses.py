"""OpenAI's ``/v1/responses``, by OpenAI's own client."""

import json
import time
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.asking import ask, client_fixture, openai_of, post, server_fixture, slow_steps
from tests.servers import NAME, Running, running
from thinslice.engine.engine import Engine
from thinslice.engine.request import Request, TextChunk
from thinslice.errors import CheckpointError

# A template that shows tools, calls and results, and one whose prompt opens a thought.
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}<tool_call>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
THINKING = f"{TEMPLATE}<think>\n"
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rom"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "name": "get", "parameters": SCHEMA, "strict": True}]
ASKED: Any = {"model": NAME, "input": "the moon", "temperature": 0, "max_output_tokens": 24}
CALLING: Any = {
    **ASKED,
    "tools": TOOLS,
    "tool_choice": {"type": "function", "name": "get"},
    "max_output_tokens": 240,
}
FORM: Any = {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}
SAID = (
    *(TextChunk("reasoning", "hm"), TextChunk("answer", "A."), TextChunk("call", "get")),
    *(TextChunk("arguments", '{"city":'), TextChunk("arguments", ' "Rom"}')),
    TextChunk("answer", "B"),
)
LONG: Any = {**ASKED, "max_output_tokens": 400}


server = server_fixture(template=TEMPLATE)


client = client_fixture(openai_of)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model neither thinks nor calls by itself: it is made to, a sign a token."""

    def advance(self: Request) -> list[Any]:
        place = getattr(self, "_place", 0)
        self._num_seen = len(self.sequence.completion_token_ids)
        self._place = self._num_seen  # type: ignore[attr-defined]
        self.is_told = self.is_finished
        return [*SAID[place : self._place]]

    monkeypatch.setattr(Request, "_new_text", advance)


def respond(server: Running, **change: Any) -> httpx2.Response:
    return post(server, "/v1/responses", {**ASKED, **change})


def raw_events(server: Running, body: Any) -> list[Any]:
    """Each event, whose name is its type and whose place its number; it fits OpenAI's types."""
    answer = post(server, "/v1/responses", {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *frames, end = answer.text.split("\n\n")
    assert end == ""
    events = []
    for number, frame in enumerate(frames):
        name, _, data = frame.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", number)
        TypeAdapter(ResponseStreamEvent).validate_python(event)
        events.append(event)
    return events


def kinds(events: list[Any]) -> list[str]:
    """Their types, pieces of one text as one."""
    found: list[str] = []
    for one in events:
        kind = one["type"].removeprefix("response.")
        if not (found and kind.endswith(".delta") and found[-1] == kind):
            found.append(kind)
    return found


def of_text(kind: str) -> list[str]:
    parts = [f"{kind}.delta", f"{kind}.done"]
    if kind == "function_call_arguments":
        return ["output_item.added", *parts, "output_item.done"]
    return [
        *("output_item.added", "content_part.added"),
        *parts,
        *("content_part.done", "output_item.done"),
    ]


def without_names(items: list[Any]) -> list[Any]:
    dumped = [one if isinstance(one, dict) else one.model_dump() for one in items]
    return [{k: v for k, v in one.items() if k not in ("id", "call_id")} for one in dumped]


def num_tokens(server: Running, messages: Any) -> int:
    return len(server.served.engine.llm.prepare(messages).token_ids)


def test_an_answer(server: Running, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "the moon"}],
        temperature=0,
        max_tokens=24,
    )
    answer = client.responses.create(**ASKED, metadata={"a": "b"}, store=False)
    assert answer.output_text == chat.choices[0].message.content
    (message,) = answer.output
    assert (message.type, message.status) == ("message", "incomplete")
    assert message.content[0].annotations == message.content[0].logprobs == []  # type: ignore
    assert (answer.status, answer.model, answer.metadata) == ("incomplete", NAME, {"a": "b"})
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    prompt = num_tokens(server, [{"role": "user", "content": "the moon"}])
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (prompt, 24)
    assert answer.usage.total_tokens == prompt + 24
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert answer.id.startswith("resp_")
    assert json.loads(answer.model_dump_json())["store"] is False


def test_what_the_cache_had_is_told(client: openai.OpenAI) -> None:
    asked = {**ASKED, "input": "c" * 100}
    first, again = (client.responses.create(**asked).usage for _ in range(2))
    assert first is not None
    assert again is not None
    assert first.input_tokens_details.cached_tokens == 0
    assert again.input_tokens_details.cached_tokens > 0
    assert again.input_tokens == first.input_tokens


def test_a_stream_is_the_whole_answer_piece_by_piece(
    server: Running, client: openai.OpenAI
) -> None:
    whole = client.responses.create(**ASKED)
    text = ""
    for event in client.responses.create(**ASKED, stream=True):
        if event.type == "response.output_text.delta":
            text += event.delta
    assert event.type == "response.incomplete"
    assert text == whole.output_text == event.response.output_text
    assert without_names(event.response.output) == without_names(whole.output)
    assert event.response.usage is not None
    assert event.response.usage.output_tokens == 24
    events = raw_events(server, ASKED)
    expected = ["created", "in_progress", *of_text("output_text"), "incomplete"]
    assert kinds(events) == expected
    assert len({one["response"]["id"] for one in events if "response" in one}) == 1
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []


def test_the_clients_own_accumulation(client: openai.OpenAI) -> None:
    with client.responses.stream(**ASKED) as stream:
        events = list(stream)
    *_, done, last = events
    assert last.type == "response.incomplete"
    assert done.type == "response.output_item.done"
    snapshots = [one.snapshot for one in events if one.type == "response.output_text.delta"]
    assert snapshots[-1] == last.response.output_text


@pytest.mark.usefixtures("says")
def test_a_thought_a_text_and_a_call_are_items(server: Running, client: openai.OpenAI) -> None:
    asked = {**ASKED, "tools": TOOLS}
    whole = client.responses.create(**asked)
    thought, message, call, more = whole.output
    assert thought.type == "reasoning"
    assert thought.summary == []
    assert [(one.type, one.text) for one in thought.content or ()] == [("reasoning_text", "hm")]
    assert message.type == more.type == "message"
    assert whole.output_text == "A.B"
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.status) == ("get", '{"city": "Rom"}', "completed")
    events = raw_events(server, asked)
    assert kinds(events) == [
        *("created", "in_progress"),
        *of_text("reasoning_text"),
        *of_text("output_text"),
        *of_text("function_call_arguments"),
        *of_text("output_text"),
        "incomplete",
    ]
    response = events[-1]["response"]
    told = [one["item"] for one in events if one["type"] == "response.output_item.done"]
    assert told == response["output"]
    assert without_names(Response.model_validate(response).output) == without_names(whole.output)
    for one in events:
        if "item_id" in one:
            assert one["item_id"] == response["output"][one["output_index"]]["id"]


def test_a_call_and_its_result_go_back(server: Running, client: openai.OpenAI) -> None:
    first = client.responses.create(**CALLING)
    assert first.status == "completed"
    (call,) = first.output
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    turns: Any = [{"role": "user", "content": "the moon"}, *first.output]
    turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "20"})
    again = client.responses.create(**{**ASKED, "input": turns, "instructions": "be brief"})
    function = {"name": "get", "arguments": call.arguments}
    same = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the moon"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "20", "tool_call_id": "a"},
    ]
    assert again.usage is not None
    assert again.usage.input_tokens == num_tokens(server, same)
    events = raw_events(server, CALLING)
    assert kinds(events)[2:] == [*of_text("function_call_arguments"), "completed"]
    last = events[-1]["response"]["output"][0]
    jsonschema.validate(json.loads(last["arguments"]), SCHEMA)


def test_items_of_one_turn_are_one_message(server: Running) -> None:
    call = {"type": "function_call", "call_id": "a", "name": "get", "arguments": "{}"}
    said = {"type": "message", "role": "assistant", "id": "m", "status": "completed"}
    items = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "input_text", "text": one} for one in "ab"]},
        {"type": "reasoning", "id": "r", "summary": [], "content": []},
        {**said, "content": [{"type": "output_text", "text": "A.", "annotations": []}]},
        call,
        {**call, "call_id": "b"},
        {**said, "content": "B."},
        {
            "type": "function_call_output",
            "call_id": "a",
            "output": [{"type": "input_text", "text": "1"}],
        },
        {"type": "function_call_output", "call_id": "b", "output": "2"},
    ]
    function = {"name": "get", "arguments": "{}"}
    same = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "A.B.", "tool_calls": [{"function": function}] * 2},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    answer = respond(server, input=items).json()
    assert answer["usage"]["input_tokens"] == num_tokens(server, same)


def test_a_call_that_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(**{**CALLING, "max_output_tokens": 50})
    assert (answer.status, answer.output[-1].status) == ("incomplete",) * 2  # type: ignore


def test_a_thought_that_is_cut_and_one_that_is_not_wanted(tmp_path: Path) -> None:
    with running(tmp_path, template=THINKING) as server, openai_of(server) as client:
        answer = client.responses.create(**ASKED)
        effort: Any = {"effort": "none", "summary": "auto"}
        without = client.responses.create(**ASKED, reasoning=effort)
    (thought,) = answer.output
    assert (answer.status, thought.type) == ("incomplete", "reasoning")
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == 24
    assert {one.type for one in without.output} == {"message"}
    assert without.reasoning is not None
    assert without.reasoning.effort == "none"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_form_of_an_answer(client: openai.OpenAI, is_streamed: bool) -> None:
    asked: Any = {**CALLING, "text": {"format": FORM, "verbosity": "low"}, "tools": []}
    del asked["tool_choice"]
    if is_streamed:
        *_, last = client.responses.create(**asked, stream=True)
        assert last.type == "response.completed"
        answer = last.response
    else:
        answer = client.responses.create(**asked)
    jsonschema.validate(json.loads(answer.output_text), SCHEMA)
    assert answer.status == "completed"
    assert answer.completed_at is not None


def test_any_object_and_plain_text(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_object"}}
    assert client.responses.create(**ASKED, text=form).output_text.lstrip()[0] == "{"
    plain: Any = {"format": {"type": "text"}}
    told = client.responses.create(**ASKED, text=plain).output_text
    assert told == client.responses.create(**ASKED).output_text


@pytest.mark.parametrize(
    ("change", "param", "told"),
    [
        ({"input": []}, "input", "valid"),
        ({"input": 1}, "input", "valid"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input.0", "item_reference"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input.0", "one of user"),
        ({"input": [{"role": "user"}]}, "input.0.content", "expected text"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content",
            "input_image",
        ),
        ({"input": [{"type": "function_call"}]}, "input.0.call_id", "call_id"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"store": True}, "store", "false"),
        ({"background": True}, "background", "not supported"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"prompt": {"id": "a"}}, "prompt", "none"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "at most 0"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"include": ["message.output_text.logprobs"]}, "include.0", "encrypted"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "functions are"),
        ({"tools": TOOLS * 129}, "tools", "at most 128"),
        ({"tool_choice": "required"}, None, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "tool_choice", "expected function"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "input should be"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", "the name is None"),
        ({"text": {"format": {**FORM, "schema": 3}}}, "text.format.schema", "no JSON schema"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_cannot_be_answered_is_refused(
    server: Running, change: Any, param: str | None, told: str, is_streamed: bool
) -> None:
    answer = respond(server, **change, stream=is_streamed)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert told in error["message"]


def test_errors_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.responses.create(**{**ASKED, "model": "other"})
    with pytest.raises(openai.BadRequestError, match="the context is 512") as caught:
        client.responses.create(**{**ASKED, "input": "a" * 600})
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_who_goes_away_frees_the_place(
    server: Running, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    blocks = server.served.engine.llm.engine.scheduler.blocks
    num_free = blocks.num_free
    began = slow_steps(monkeypatch)
    with ask(server, {**LONG, "stream": is_streamed}, "/v1/responses"):
        while len(began) < 5:
            time.sleep(0.002)
    left = time.monotonic()
    server.wait_until_idle()
    # The step that was under way, and the one that its end is seen in.
    assert sum(at > left for at in began) <= 3
    assert blocks.num_free == num_free


def test_an_error_under_way_is_told_and_the_next_request_is_answered(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def failing(self: Engine) -> None:
        if any(len(one.completion_token_ids) > 3 for one in self.scheduler.running):
            raise CheckpointError("the disk is gone")
        step(self)

    monkeypatch.setattr(Engine, "step", failing)
    with pytest.raises(openai.InternalServerError, match="the disk is gone"):
        client.responses.create(**ASKED)
    *_, last = raw_events(server, ASKED)
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "the disk is gone"}
    monkeypatch.undo()
    assert client.responses.create(**ASKED).output_text


def test_what_is_under_way_fails_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(monkeypatch)
    with running(tmp_path) as server:
        connection = ask(server, {**LONG, "stream": True}, "/v1/responses")
        while not server.num_running():
            time.sleep(0.001)
    with connection, connection.makefile() as lines:
        text = lines.read()
    assert "event: response.failed" in text
    assert "shutting down" in text
