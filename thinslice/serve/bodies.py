"""The bodies of requests, under OpenAI's names.

A field that would change the answer and is not honoured here is refused; those that change nothing
are accepted without effect. What no API has is named in the log, once, and passed over.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from thinslice.config import MAX_BIASES, MAX_LOGPROBS, MAX_SAMPLES, MAX_STOP_LENGTH

MAX_MESSAGES = 4096
# Of OpenAI's API, and of engines that have more than it.
REFUSED = frozenset(
    (
        *("audio", "best_of", "echo", "function_call", "functions", "grammar", "guided_json"),
        *("guided_regex", "modalities", "moderation", "reasoning_effort", "response_format"),
        *("suffix", "tool_choice", "tools", "web_search_options", "chat_template"),
        *("chat_template_kwargs", "max_thinking_tokens", "min_tokens", "stop_token_ids"),
    )
)
# More than the API's own bound of four; what the engine allows.
MAX_STOPS = 64
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
# Seeds are signed in OpenAI's API.
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(BaseModel):
    """What a stream has beside text."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool = False


class _Body(BaseModel):
    """The fields that completions and chats share."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    # Not of OpenAI's API; the names are those of vLLM, llama.cpp and SGLang.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None

    # Accepted without effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatBody(_Body):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    verbosity: str | None = None


class CompletionBody(_Body):
    """The body of ``/v1/completions``."""

    prompt: str
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
