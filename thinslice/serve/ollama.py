"""/api: what Ollama's clients ask for, translated."""

from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from thinslice import __version__
from thinslice.config import SamplingParams
from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.request import Completion, ToolCall
from thinslice.serve.answers import deltas, whole
from thinslice.serve.bodies import (
    OllamaChatBody,
    OllamaGenerateBody,
    OllamaOptions,
    OllamaShowBody,
)
from thinslice.serve.calls import arguments_of
from thinslice.serve.constraints import ollama_constraint
from thinslice.serve.errors import ApiError
from thinslice.serve.events import Events, json_lines, until_gone
from thinslice.serve.params import given_params
from thinslice.serve.served import Served, TheServed, scheduling_of
from thinslice.serve.thinking import of_ollama
from thinslice.text.messages import Conversation

router = APIRouter()
_Body = OllamaChatBody | OllamaGenerateBody
_NS = 1_000_000_000
# Ollama shows a model that stays for good as one that leaves in the far future.
_FAR = "2318-09-16T00:00:00Z"


@router.post("/api/chat")
async def chat(body: OllamaChatBody, request: Request, served: TheServed) -> Response:
    """Answer a conversation, as lines of JSON or whole."""
    _check(body, served)
    for number, message in enumerate(body.messages):
        if message.get("images"):
            raise ApiError(400, f"messages.{number} has images; models here take text alone")
    if not body.messages:
        return JSONResponse(_loaded(served, {"message": {"role": "assistant", "content": ""}}))
    thinks = of_ollama(body.think).is_enabled
    asked = Conversation(body.messages, body.tools or (), enable_thinking=thinks)
    return await _answered(served, request, asked, body)


@router.post("/api/generate")
async def generate(body: OllamaGenerateBody, request: Request, served: TheServed) -> Response:
    """Answer one prompt, or go on with it where it is raw."""
    _check(body, served)
    if not body.prompt:
        return JSONResponse(_loaded(served, {"response": ""}))
    if body.raw:
        if body.think:
            raise ApiError(400, "think goes with a prompt that is not raw", "think")
        return await _answered(served, request, body.prompt, body)
    system = [] if body.system is None else [{"role": "system", "content": body.system}]
    messages = [*system, {"role": "user", "content": body.prompt}]
    asked = Conversation(messages, enable_thinking=of_ollama(body.think).is_enabled)
    return await _answered(served, request, asked, body)


@router.get("/api/tags")
async def tags(served: TheServed) -> dict[str, Any]:
    """The models of this server."""
    return {"models": [_model(served)]}


@router.get("/api/ps")
async def running(served: TheServed) -> dict[str, Any]:
    """The models that are loaded: the one of this server."""
    plan = served.engine.llm.plan
    size = dict(plan.parts)["weights"]
    loaded = {"expires_at": _FAR, "size": size, "size_vram": 0, "context_length": plan.context}
    return {"models": [{**_model(served), **loaded}]}


@router.post("/api/show")
async def show(body: OllamaShowBody, served: TheServed) -> dict[str, Any]:
    """What is known of the model."""
    name = body.name if body.model is None else body.model
    if name is None:
        raise ApiError(400, "model is missing", "model")
    served.check_model(_base(name))
    llm = served.engine.llm
    info = {
        "general.architecture": "thinslice",
        "thinslice.context_length": llm.plan.context,
        "thinslice.longest_context": llm.longest_context,
    }
    can = ["completion", "tools", *["thinking"] * llm.thinks]
    return {"details": _details(served), "model_info": info, "capabilities": can, "template": ""}


@router.get("/api/version")
async def version() -> dict[str, str]:
    """Of thinslice."""
    return {"version": __version__}


def _base(name: str) -> str:
    """Clients put Ollama's default tag behind a name."""
    return name.removesuffix(":latest")


def _check(body: _Body, served: Served) -> None:
    """Errors: ApiError for another model, and for what would change the answer and is not here."""
    served.check_model(_base(body.model))
    served.check_others(body.model_extra)
    options = body.options or OllamaOptions()
    served.check_others(options.model_extra)
    context = served.engine.llm.plan.context
    if options.num_ctx is not None and options.num_ctx > context:
        told = f"num_ctx is {options.num_ctx}, and this server has a context of {context}"
        raise ApiError(400, f"{told}; thinslice serve --context sets it", "options.num_ctx")
    if body.think and not served.engine.llm.thinks:
        raise ApiError(400, f"the model {served.name!r} is not known to think", "think")


def _params(body: _Body, *, is_raw: bool) -> SamplingParams:
    options = body.options or OllamaOptions()
    predicted = options.num_predict
    stop = (options.stop,) if isinstance(options.stop, str) else options.stop
    return given_params(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=options.seed,
        stop=None if stop is None else tuple(stop),
        # -1 and -2 stand for as long as there is room.
        max_tokens=None if predicted is None or predicted < 0 else predicted,
        constraint=ollama_constraint(body.format),
        **({} if is_raw else of_ollama(body.think).params),
    )


async def _answered(
    served: Served,
    request: Request,
    asked: str | Conversation,
    body: _Body,
) -> Response:
    is_chat = request.scope["path"] == "/api/chat"
    began = perf_counter()
    params = _params(body, is_raw=isinstance(asked, str))
    stream = await served.engine.submit(asked, params, scheduling_of(request))
    if body.stream:
        return json_lines(_lines(served, stream, is_chat, began))
    completion = (await until_gone(request.receive, whole(stream)))[0]
    text = _text(is_chat, completion.text, completion.reasoning)
    if completion.tool_calls:
        text["message"]["tool_calls"] = [*map(_call, completion.tool_calls)]
    return JSONResponse({**_head(served), **text, **_end(completion, began)})


async def _lines(served: Served, stream: AsyncStream, is_chat: bool, began: float) -> Events:
    async for delta in deltas(stream):
        for one in delta.chunks:
            if one.kind in ("call", "arguments"):  # a call comes whole, behind the text
                continue
            is_thought = one.kind == "reasoning"
            answer, thought = ("", one.text) if is_thought else (one.text, "")
            yield {**_head(served), **_text(is_chat, answer, thought), "done": False}
    completion = stream.completions[0]
    for call in completion.tool_calls:
        message = {"role": "assistant", "content": "", "tool_calls": [_call(call)]}
        yield {**_head(served), "message": message, "done": False}
    yield {**_head(served), **_text(is_chat, "", ""), **_end(completion, began)}


def _head(served: Served) -> dict[str, Any]:
    return {"model": served.name, "created_at": datetime.now(UTC).isoformat()}


def _text(is_chat: bool, answer: str, thought: str) -> dict[str, Any]:
    thinking = {"thinking": thought} if thought else {}
    if is_chat:
        return {"message": {"role": "assistant", "content": answer, **thinking}}
    return {"response": answer, **thinking}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"function": {"name": call.name, "arguments": arguments_of(call)}}


def _end(completion: Completion, began: float) -> dict[str, Any]:
    """The reason, counts, and times in nanoseconds."""
    return {
        "done": True,
        "done_reason": completion.finish_reason,
        "total_duration": int((perf_counter() - began) * _NS),
        "load_duration": 0,
        "prompt_eval_count": len(completion.prompt_token_ids),
        "prompt_eval_duration": int(completion.prefill_s * _NS),
        "eval_count": len(completion.token_ids),
        "eval_duration": int(completion.decode_s * _NS),
    }


def _loaded(served: Served, text: dict[str, Any]) -> dict[str, Any]:
    """What is answered where nothing is asked: that the model is there."""
    return {**_head(served), **text, "done": True, "done_reason": "load"}


def _model(served: Served) -> dict[str, Any]:
    plan = served.engine.llm.plan
    return {
        "name": served.name,
        "model": served.name,
        "modified_at": datetime.fromtimestamp(served.loaded_at, UTC).isoformat(),
        "size": dict(plan.parts)["weights"],
        "digest": "",
        "details": _details(served),
    }


def _details(served: Served) -> dict[str, Any]:
    dtype = served.engine.llm.plan.dtype
    return {
        "parent_model": "",
        "format": "thinslice",
        "family": "",
        "families": None,
        "parameter_size": "",
        "quantization_level": dtype,
    }
