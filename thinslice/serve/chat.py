"""/v1/chat/completions: OpenAI's conversations."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.logprobs import Logprobs
from thinslice.engine.request import Completion, Delta, TextChunk
from thinslice.serve.answers import Head, deltas, whole
from thinslice.serve.bodies import ChatBody
from thinslice.serve.calls import CallDeltas, call_objects, finish_reason
from thinslice.serve.errors import ApiError
from thinslice.serve.events import Events, openai_events, until_gone
from thinslice.serve.lazy_json import Lazily, json_answer
from thinslice.serve.logprobs import chat_logprobs
from thinslice.serve.params import sampling_params
from thinslice.serve.served import Served, TheServed, scheduling_of
from thinslice.serve.usage import usage_of
from thinslice.text.messages import Conversation
from thinslice.text.tokenizer import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request, served: TheServed) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    served.check_model(body.model)
    served.check_others(body.model_extra)
    params = sampling_params(body, _num_logprobs(body))
    asked = Conversation(
        body.messages,
        body.tools or (),
        enable_thinking=body.thinking.is_enabled,
        tool_choice=_choice(body),
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )
    stream = await served.engine.submit(asked, params, scheduling_of(request))
    if body.stream:
        return openai_events(_Chunks(served, stream, body).events())
    completions = await until_gone(request.receive, whole(stream))
    return json_answer(_answer(served, completions, has_logprobs=bool(body.logprobs)))


def _choice(body: ChatBody) -> str | dict[str, Any]:
    """Nothing can be chosen of no tools, which some clients do none the less."""
    choice = body.tool_choice
    if choice is None or (not body.tools and choice in ("auto", "none")):
        return "auto"
    return choice


def _num_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs: true", "top_logprobs")
    return None


def _answer(served: Served, completions: list[Completion], *, has_logprobs: bool) -> dict[str, Any]:
    head = Head(served.name, "chat.completion", "chatcmpl")
    tokenizer = served.engine.llm.tokenizer
    choices = [
        {
            "index": one.index,
            "message": _message(one),
            "logprobs": _logprobs(tokenizer, one.token_ids, one.logprobs) if has_logprobs else None,
            "finish_reason": finish_reason(one),
        }
        for one in completions
    ]
    return head.with_choices(choices, usage=usage_of(completions))


def _message(completion: Completion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
    if completion.tool_calls:
        message["content"] = completion.text or None
        message["tool_calls"] = call_objects(completion.tool_calls)
    return message | _reasoning(completion.reasoning) if completion.reasoning else message


def _reasoning(text: str) -> dict[str, str]:
    """Under both names that clients read."""
    return {"reasoning_content": text, "reasoning": text}


def _logprobs(tokenizer: Tokenizer, token_ids: list[int], logprobs: Logprobs) -> dict[str, Any]:
    content = Lazily(lambda: chat_logprobs(tokenizer, token_ids, logprobs))
    return {"content": content, "refusal": None}


class _Chunks:
    """The chunks of one stream.

    The role comes first and once for each choice; every choice but its last has a finish reason of
    null, and the last an empty delta. Usage, where it is asked for, is the last chunk of all.
    """

    def __init__(self, served: Served, stream: AsyncStream, body: ChatBody) -> None:
        self._tokenizer = served.engine.llm.tokenizer
        self._stream = stream
        self._head = Head(served.name, "chat.completion.chunk", "chatcmpl")
        self._has_logprobs = bool(body.logprobs)
        self._has_usage = body.stream_options is not None and body.stream_options.include_usage
        self._calls: dict[int, CallDeltas] = {}
        # Of each choice the log-probabilities of tokens whose text has not come yet.
        self._unsent: dict[int, list[dict[str, Any]]] = {}

    async def events(self) -> Events:
        """All of them, in order."""
        async for delta in deltas(self._stream):
            for chunk in self._of(delta):
                yield chunk
        if self._has_usage:
            yield self._head.with_choices([], usage=usage_of(self._stream.completions))

    def _of(self, delta: Delta) -> list[dict[str, Any]]:
        chunks = []
        if delta.index not in self._calls:
            self._calls[delta.index] = CallDeltas()
            chunks.append(self._chunk(delta.index, {"role": "assistant", "content": ""}))
        if self._has_logprobs:
            entries = chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs)
            self._unsent.setdefault(delta.index, []).extend(entries)
        calls = self._calls[delta.index]
        for one in delta.chunks:
            is_call = one.kind in ("call", "arguments")
            made = calls.of(one) if is_call else _text_delta(one)
            chunks.append(self._chunk(delta.index, made, logprobs=self._sent(delta)))
        if delta.finish_reason is not None:
            reason, logprobs = calls.finish_reason(delta.finish_reason), self._sent(delta)
            chunks.append(self._chunk(delta.index, {}, reason, logprobs))
        return chunks

    def _sent(self, delta: Delta) -> dict[str, Any] | None:
        """The log-probabilities that go with the next chunk of a choice."""
        entries = self._unsent.pop(delta.index, None)
        return {"content": entries, "refusal": None} if entries else None

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._has_usage else {}
        return self._head.with_choices([choice], **usage)


def _text_delta(chunk: TextChunk) -> dict[str, Any]:
    return _reasoning(chunk.text) if chunk.kind == "reasoning" else {"content": chunk.text}
