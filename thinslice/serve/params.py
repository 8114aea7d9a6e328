"""From a body's fields to the engine's parameters."""

from typing import Any

from thinslice.config import SamplingParams
from thinslice.errors import RequestError
from thinslice.serve.bodies import ChatBody, CompletionBody
from thinslice.serve.constraints import constraint_of
from thinslice.serve.errors import ApiError

# Fields that go by as they are; None stands for the model's own advice, or the default.
_SAME = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "n",
    "ignore_eos",
)


def sampling_params(body: ChatBody | CompletionBody, logprobs: int | None) -> SamplingParams:
    """Errors: ApiError 400."""
    given: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        given["max_tokens"] = body.max_completion_tokens
    if body.top_k is not None:
        given["top_k"] = max(body.top_k, 0)  # -1 keeps all tokens, as in vLLM
    given["seed"] = body.seed
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.logit_bias is not None:
        given["logit_bias"] = _bias(body.logit_bias)
    if isinstance(body, ChatBody):
        given |= body.thinking.params
    form = body.response_format if isinstance(body, ChatBody) else None
    constraint = constraint_of(form, body.structured_outputs)
    return given_params(**given, logprobs=logprobs, constraint=constraint)


def given_params(**given: Any) -> SamplingParams:
    """The parameters of fields that may be None, which then are the model's advice or a default.

    Errors: ApiError 400.
    """
    known = {name: value for name, value in given.items() if value is not None}
    if "seed" in known:
        known["seed"] %= 1 << 63  # seeds are signed in the interfaces that are served
    try:
        return SamplingParams(**known)
    except RequestError as error:
        raise ApiError(400, str(error), error.setting) from error


def _bias(given: dict[str, float]) -> dict[int, float]:
    for token_id in given:
        if not (token_id.isascii() and token_id.isdigit()) or len(token_id) > 10:
            told = f"logit_bias has the key {token_id!r:.60}; expected the id of a token"
            raise ApiError(400, told, "logit_bias")
    return {int(token_id): bias for token_id, bias in given.items()}
