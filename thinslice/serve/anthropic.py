"""/v1/messages: Anthropic's conversations."""

import uuid
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from thinslice.config import SamplingParams
from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.request import Completion, TextChunk
from thinslice.serve.answers import deltas, whole
from thinslice.serve.anthropic_messages import conversation_of
from thinslice.serve.bodies import MessagesBody
from thinslice.serve.calls import arguments_of, new_call_id
from thinslice.serve.constraints import anthropic_constraint
from thinslice.serve.errors import ApiError
from thinslice.serve.events import Events, anthropic_events, until_gone
from thinslice.serve.params import given_params
from thinslice.serve.served import Served, TheServed, scheduling_of
from thinslice.serve.thinking import Thinking, of_anthropic
from thinslice.text.messages import Conversation

router = APIRouter()
_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}
# A block's type, and those of its pieces, for each kind of text.
_BLOCKS = {"answer": ("text", "text_delta"), "reasoning": ("thinking", "thinking_delta")}
# The blocks of each as they begin.
_BEGUN: dict[str, dict[str, Any]] = {
    "answer": {"type": "text", "text": ""},
    "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
}


@router.post("/v1/messages")
async def messages(body: MessagesBody, request: Request, served: TheServed) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    _check(body, served)
    if body.max_tokens is None:
        raise ApiError(400, "max_tokens is missing", "max_tokens")
    asked, params = _conversation(body), _params(body)
    stream = await served.engine.submit(asked, params, scheduling_of(request))
    if body.stream:
        return anthropic_events(_Events(served.name, stream).events())
    completion = (await until_gone(request.receive, whole(stream)))[0]
    return JSONResponse(_message(served.name, completion))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: MessagesBody, served: TheServed) -> dict[str, int]:
    """How many tokens a conversation has, with the model's template around it."""
    _check(body, served)
    llm, asked, params = served.engine.llm, _conversation(body), _params(body)
    return {"input_tokens": await served.engine.apart(llm.count_tokens, asked, params)}


def _check(body: MessagesBody, served: Served) -> None:
    served.check_model(body.model)
    served.check_others(body.model_extra)


def _params(body: MessagesBody) -> SamplingParams:
    return given_params(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        max_tokens=body.max_tokens,
        stop=None if body.stop_sequences is None else tuple(body.stop_sequences),
        constraint=anthropic_constraint(body.output_config),
        **_thinking(body).params,
    )


def _thinking(body: MessagesBody) -> Thinking:
    return of_anthropic(body.thinking, body.max_tokens, (body.output_config or {}).get("effort"))


def _conversation(body: MessagesBody) -> Conversation:
    return replace(conversation_of(body), enable_thinking=_thinking(body).is_enabled)


def _message(name: str, completion: Completion) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    if completion.reasoning:
        blocks.append({"type": "thinking", "thinking": completion.reasoning, "signature": ""})
    if completion.text or not (blocks or completion.tool_calls):
        blocks.append({"type": "text", "text": completion.text})
    for call in completion.tool_calls:
        blocks.append({**_tool_use(call.name), "input": arguments_of(call)})
    usage = {**_input(completion), **_output(completion)}
    return {**_head(name, blocks, usage), **_stopped(completion)}


def _tool_use(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_call_id(), "name": name, "input": {}}


def _head(name: str, blocks: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": name,
        "content": blocks,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _stopped(completion: Completion) -> dict[str, Any]:
    assert completion.finish_reason is not None, "the answer has ended"
    reason = _STOP_REASONS.get(completion.finish_reason, completion.finish_reason)
    if completion.finish_reason == "stop" and completion.tool_calls:
        reason = "tool_use"
    if completion.stop_string is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": completion.stop_string}


def _input(completion: Completion) -> dict[str, int]:
    """Of the prompt: what the prefix cache had is not among its input tokens."""
    cached = completion.num_cached
    return {
        "input_tokens": len(completion.prompt_token_ids) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
    }


def _output(completion: Completion) -> dict[str, Any]:
    details = {"thinking_tokens": completion.num_reasoning}
    return {"output_tokens": len(completion.token_ids), "output_tokens_details": details}


class _Events:
    """The events of one stream: the message, each block from its start to its stop, its end."""

    def __init__(self, name: str, stream: AsyncStream) -> None:
        self._name = name
        self._stream = stream
        self._kind: str | None = None  # of the block that is open
        self._index = -1

    async def events(self) -> Events:
        """All of them, in order."""
        is_begun = False
        async for delta in deltas(self._stream):
            if not is_begun:
                is_begun = True
                usage = {**_input(self._stream.completions[0]), "output_tokens": 0}
                yield {"type": "message_start", "message": _head(self._name, [], usage)}
            for chunk in delta.chunks:
                for event in self._of(chunk):
                    yield event
        if self._index < 0:  # no text came
            for event in self._begin("answer", _BEGUN["answer"]):
                yield event
        for event in self._end():
            yield event
        completion = self._stream.completions[0]
        usage = _output(completion)
        yield {"type": "message_delta", "delta": _stopped(completion), "usage": usage}
        yield {"type": "message_stop"}

    def _of(self, chunk: TextChunk) -> list[dict[str, Any]]:
        if chunk.kind == "call":
            return [*self._end(), *self._begin("call", _tool_use(chunk.text))]
        if chunk.kind == "arguments":
            return [self._piece({"type": "input_json_delta", "partial_json": chunk.text})]
        events = []
        if chunk.kind != self._kind:
            events += self._end()
            events += self._begin(chunk.kind, _BEGUN[chunk.kind])
        field, kind = _BLOCKS[chunk.kind]
        return [*events, self._piece({"type": kind, field: chunk.text})]

    def _begin(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        self._kind = kind
        self._index += 1
        return [{"type": "content_block_start", "index": self._index, "content_block": block}]

    def _end(self) -> list[dict[str, Any]]:
        kind, self._kind = self._kind, None
        if kind is None:
            return []
        signed = [self._piece({"type": "signature_delta", "signature": ""})]
        end = {"type": "content_block_stop", "index": self._index}
        return [*signed, end] if kind == "reasoning" else [end]

    def _piece(self, delta: dict[str, str]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
