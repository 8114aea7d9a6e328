"""/v1/completions: texts that are gone on with, that are scored, or both."""

from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from thinslice.config import Scheduling
from thinslice.errors import ContextError
from thinslice.serve.answers import Head, all_of, merged
from thinslice.serve.bodies import CompletionBody
from thinslice.serve.errors import ApiError
from thinslice.serve.events import Events, openai_events, until_gone
from thinslice.serve.lazy_json import json_answer
from thinslice.serve.params import sampling_params
from thinslice.serve.prompt_work import Asked, AskedPrompt, PromptWork
from thinslice.serve.served import Served, TheServed, scheduling_of
from thinslice.serve.usage import added_up

router = APIRouter()
# Where a request names none, as at OpenAI.
_MAX_TOKENS = 16


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request, served: TheServed) -> Response:
    """Complete texts, whole or as a stream of events."""
    served.check_model(body.model)
    served.check_others(body.model_extra)
    asked = _asked(body, scheduling_of(request), served)
    prompts = [await _prompt(served, one, asked) for one in _each(body)]
    num_tokens = sum(len(one.prepared.token_ids) for one in prompts)
    if num_tokens > (most := served.engine.room.most_of(asked.scheduling.tenant)[1]):
        told = f"the prompts have {num_tokens} tokens; at most {most} at a time"
        raise ApiError(400, told, "prompt")
    if (grammar := prompts[0].prepared.grammar) is not None:  # all have the same one
        grammar.check_count(len(prompts) * asked.params.n)
    works = [PromptWork(served.engine, place, asked, one) for place, one in enumerate(prompts)]
    for work in works:
        await work.begin()
    head = Head(served.name, "text_completion", "cmpl")
    if body.stream:
        return openai_events(_events(head, works, body))
    await until_gone(request.receive, all_of([work.run() for work in works]))
    choices = [choice for work in works for choice in work.choices()]
    usage = added_up([work.usage() for work in works])
    return json_answer(head.with_choices(choices, usage=usage))


def _asked(body: CompletionBody, scheduling: Scheduling, served: Served) -> Asked:
    """Errors: ApiError 400."""
    is_completed = body.max_tokens != 0
    if not is_completed and not body.echo:
        told = "max_tokens is 0, which asks for nothing; with echo it asks for the prompt's own"
        raise ApiError(400, told, "max_tokens")
    most = _MAX_TOKENS if body.max_tokens is None else body.max_tokens or None
    fields = body.model_copy(update={"max_tokens": most})
    params = sampling_params(fields, body.logprobs)
    if not is_completed:
        params = replace(params, constraint=None)
    num, most = len(_each(body)) * params.n, served.engine.room.most_of(scheduling.tenant)[0]
    if num > most:
        told = f"{num} completions are asked for at once; at most {most} may wait here"
        raise ApiError(400, told, "prompt")
    return Asked(params, scheduling, body.logprobs, bool(body.echo), is_completed)


def _each(body: CompletionBody) -> list[Any]:
    """The prompts, each a text or token ids."""
    prompt = body.prompt
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if is_one else [*prompt]


async def _prompt(served: Served, given: str | list[int], asked: Asked) -> AskedPrompt:
    """Errors: RequestError."""
    engine, tokenizer = served.engine, served.engine.llm.tokenizer
    if isinstance(given, str):
        prepared = await engine.prepare(given, asked.params)
        return AskedPrompt(prepared, given, len(tokenizer.special.prompt_prefix_ids))
    if len(given) > engine.llm.plan.context:
        told = f"the prompt has {len(given)} tokens and the context is {engine.llm.plan.context}"
        raise ContextError(told)
    text = ""
    if asked.is_echoed:
        text = await engine.apart(tokenizer.decode, given, skip_special_tokens=False)
    prepared = await engine.apart(engine.llm.prepare_tokens, given, asked.params)
    return AskedPrompt(prepared, text, 0)


async def _events(head: Head, works: list[PromptWork], body: CompletionBody) -> Events:
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    usage = {"usage": None} if has_usage else {}
    async with aclosing(merged([work.pieces() for work in works])) as pieces:
        async for choice in pieces:
            yield head.with_choices([choice], **usage)
    if has_usage:
        yield head.with_choices([], usage=added_up([work.usage() for work in works]))
