"""/v1/messages: Anthropic's conversations."""

import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from thinslice.config import SamplingParams
from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.request import Completion, TextChunk
from thinslice.serve.answers import deltas, whole
from thinslice.serve.bodies import MessagesBody
from thinslice.serve.errors import ApiError
from thinslice.serve.events import Events, anthropic_events, until_gone
from thinslice.serve.params import given_params
from thinslice.serve.served import Served, TheServed, scheduling_of
from thinslice.serve.thinking import Thinking, of_anthropic
from thinslice.text.messages import Conversation, Message

router = APIRouter()
_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}
# A block's type, and those of its pieces, for each kind of text.
_BLOCKS = {"answer": ("text", "text_delta"), "reasoning": ("thinking", "thinking_delta")}


@router.post("/v1/messages")
async def messages(body: MessagesBody, request: Request, served: TheServed) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    _check(body, served)
    if body.max_tokens is None:
        raise ApiError(400, "max_tokens is missing", "max_tokens")
    asked = _conversation(body)
    stream = await served.engine.submit(asked, _params(body), scheduling_of(request))
    if body.stream:
        return anthropic_events(_Events(served.name, stream).events())
    completion = (await until_gone(request.receive, whole(stream)))[0]
    return JSONResponse(_message(served.name, completion))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: MessagesBody, served: TheServed) -> dict[str, int]:
    """How many tokens a conversation has, with the model's template around it."""
    _check(body, served)
    prompt = await served.engine.prepare(_conversation(body), _params(body))
    return {"input_tokens": len(prompt.token_ids)}


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
        **_thinking(body).params,
    )


def _thinking(body: MessagesBody) -> Thinking:
    return of_anthropic(body.thinking, body.max_tokens)


def _conversation(body: MessagesBody) -> Conversation:
    """The same messages in OpenAI's form, with the system prompt before them."""
    found: list[Message] = []
    if body.system is not None:
        found.append({"role": "system", "content": _text(body.system, "system")})
    for number, message in enumerate(body.messages):
        where = f"messages.{number}"
        role = message.get("role")
        if role not in ("user", "assistant"):
            told = f"{where}: the role is {role!r:.60}; one of user, assistant"
            raise ApiError(400, told, where)
        found.append({"role": role, "content": _text(message.get("content"), where)})
    return Conversation(found, enable_thinking=_thinking(body).is_enabled)


def _text(content: object, where: str) -> str:
    """The text of blocks. Thoughts of earlier answers are left out, as templates leave them out."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: the content is no text and no list of blocks", where)
    texts = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in ("thinking", "redacted_thinking"):
            continue
        if kind != "text" or not isinstance(block.get("text"), str):
            told = f"{where}: blocks of type {kind!r:.60} are not supported; text is"
            raise ApiError(400, told, where)
        texts.append(block["text"])
    return "\n".join(texts)


def _message(name: str, completion: Completion) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    if completion.reasoning:
        blocks.append({"type": "thinking", "thinking": completion.reasoning, "signature": ""})
    if completion.text or not blocks:
        blocks.append({"type": "text", "text": completion.text})
    usage = {**_input(completion), **_output(completion)}
    return {**_head(name, blocks, usage), **_stopped(completion)}


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
            for event in self._begin("answer"):
                yield event
        for event in self._end():
            yield event
        completion = self._stream.completions[0]
        usage = _output(completion)
        yield {"type": "message_delta", "delta": _stopped(completion), "usage": usage}
        yield {"type": "message_stop"}

    def _of(self, chunk: TextChunk) -> list[dict[str, Any]]:
        events = []
        if chunk.kind != self._kind:
            events += self._end()
            events += self._begin(chunk.kind)
        field, kind = _BLOCKS[chunk.kind]
        return [*events, self._piece({"type": kind, field: chunk.text})]

    def _begin(self, kind: str) -> list[dict[str, Any]]:
        self._kind = kind
        self._index += 1
        field = _BLOCKS[kind][0]
        block = {"type": field, field: ""}
        if kind == "reasoning":
            block["signature"] = ""
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
