"""/v1/responses: OpenAI's answers of items, of which nothing is stored."""

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from thinslice.config import SamplingParams
from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.contained import Contained
from thinslice.serve.answers import deltas
from thinslice.serve.bodies import ResponsesBody
from thinslice.serve.constraints import responses_constraint
from thinslice.serve.errors import ApiError, told
from thinslice.serve.events import Events, responses_events, until_gone
from thinslice.serve.lazy_json import json_answer
from thinslice.serve.params import given_params
from thinslice.serve.response_input import conversation_of
from thinslice.serve.response_output import Output
from thinslice.serve.served import TheServed, scheduling_of
from thinslice.serve.usage import responses_usage

router = APIRouter()
_OF_TOOLS = ("type", "name", "description", "parameters", "strict")


@router.post("/v1/responses")
async def responses(body: ResponsesBody, request: Request, served: TheServed) -> Response:
    """Answer a conversation of items, whole or as a stream of events. Nothing is stored."""
    served.check_model(body.model)
    served.check_others(body.model_extra)
    asked, params = conversation_of(body), _params(body)
    stream = await served.engine.submit(asked, params, scheduling_of(request))
    answer = _Answer(body, stream)
    if body.stream:
        return responses_events(answer.events())
    return json_answer(await until_gone(request.receive, answer.whole()))


def _params(body: ResponsesBody) -> SamplingParams:
    return given_params(
        temperature=body.temperature,
        top_p=body.top_p,
        max_tokens=body.max_output_tokens,
        constraint=responses_constraint(None if body.text is None else body.text.format),
        **body.thinking.params,
    )


class _Answer:
    """One answer. Whole and streamed it is made in one way, so both have the same items."""

    def __init__(self, body: ResponsesBody, stream: AsyncStream) -> None:
        self._body = body
        self._stream = stream
        self._output = Output()
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            **_asked(body),
        }

    async def whole(self) -> dict[str, Any]:
        """The answer, once it has ended. Errors: what went wrong in it."""
        async for _ in self._pieces():
            pass
        return self._ended()

    async def events(self) -> Events:
        """All events, in order and numbered; of what goes wrong the last one tells."""
        number = 0
        async with self._stream:
            async for event in self._all():
                yield {**event, "sequence_number": number}
                number += 1

    async def _all(self) -> Events:
        for kind in ("created", "in_progress"):
            yield _event(kind, self._response("in_progress"))
        with Contained() as trouble:
            async for event in self._pieces():
                yield event
        if trouble.error is None:
            response = self._ended()
        else:
            response = self._response("failed", error=_failure(told(trouble.error)))
        yield _event(response["status"], response)

    async def _pieces(self) -> Events:
        async for delta in deltas(self._stream):
            for chunk in delta.chunks:
                for event in self._output.add(chunk):
                    yield event
        for event in self._output.end(self._status()):
            yield event

    def _status(self) -> str:
        is_whole = self._stream.completions[0].finish_reason == "stop"
        return "completed" if is_whole else "incomplete"

    def _ended(self) -> dict[str, Any]:
        status, usage = self._status(), responses_usage(self._stream.completions[0])
        if status == "incomplete":
            cut = {"reason": "max_output_tokens"}
            return self._response(status, usage=usage, incomplete_details=cut)
        return self._response(status, usage=usage, completed_at=int(time.time()))

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        nothing = dict.fromkeys(("completed_at", "error", "incomplete_details", "usage"))
        return {
            **self._head,
            "status": status,
            "output": [*self._output.items],
            **nothing,
            **more,
        }


def _event(kind: str, response: dict[str, Any]) -> dict[str, Any]:
    return {"type": f"response.{kind}", "response": response}


def _failure(error: ApiError) -> dict[str, str]:
    """An error under one of the names that OpenAI's clients know."""
    if error.status == 429:
        code = "rate_limit_exceeded"
    else:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
    return {"code": code, "message": error.message}


def _asked(body: ResponsesBody) -> dict[str, Any]:
    """What was asked for, as an answer tells it; null where the model's own advice holds."""
    text = body.text
    verbosity = {} if text is None or text.verbosity is None else {"verbosity": text.verbosity}
    form = text.format if text is not None and text.format is not None else {"type": "text"}
    effort = None if body.reasoning is None else body.reasoning.effort
    tools = [{key: one[key] for key in _OF_TOOLS if key in one} for one in body.tools or ()]
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": {"format": form, **verbosity},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": tools,
        "top_p": body.top_p,
        "truncation": "disabled",
    }
