"""/v1/completions: a text that is gone on with."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from thinslice.engine.async_engine import AsyncStream
from thinslice.serve.answers import Head, deltas, whole
from thinslice.serve.bodies import CompletionBody
from thinslice.serve.events import Events, openai_events, until_gone
from thinslice.serve.logprobs import completion_logprobs
from thinslice.serve.params import sampling_params
from thinslice.serve.served import Served, TheServed, scheduling_of
from thinslice.serve.usage import usage_of

router = APIRouter()


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request, served: TheServed) -> Response:
    """Complete a text, whole or as a stream of events."""
    served.check_model(body.model)
    served.check_others(body.model_extra)
    params = sampling_params(body, body.logprobs)
    stream = await served.engine.submit(body.prompt, params, scheduling_of(request))
    if body.stream:
        return openai_events(_events(served, stream, body))
    found = await until_gone(request.receive, whole(stream))
    head = Head(served.name, "text_completion", "cmpl")
    tokenizer = served.engine.llm.tokenizer
    choices = [
        {
            "index": one.index,
            "text": one.text,
            "logprobs": None
            if body.logprobs is None
            else completion_logprobs(tokenizer, one.token_ids, one.logprobs, 0),
            "finish_reason": one.finish_reason,
        }
        for one in found
    ]
    return JSONResponse(head.with_choices(choices, usage=usage_of(found)))


async def _events(served: Served, stream: AsyncStream, body: CompletionBody) -> Events:
    head = Head(served.name, "text_completion", "cmpl")
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    usage = {"usage": None} if has_usage else {}
    offsets: dict[int, int] = {}
    async for delta in deltas(stream):
        text = "".join(one.text for one in delta.chunks)
        logprobs = None
        if body.logprobs is not None:
            offset = offsets.get(delta.index, 0)
            tokenizer = served.engine.llm.tokenizer
            logprobs = completion_logprobs(tokenizer, delta.token_ids, delta.logprobs, offset)
            offsets[delta.index] = offset + sum(map(len, logprobs["tokens"]))
        choice = {
            "index": delta.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        yield head.with_choices([choice], **usage)
    if has_usage:
        yield head.with_choices([], usage=usage_of(stream.completions))
