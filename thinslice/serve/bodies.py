"""The bodies of requests, under the names of OpenAI, of Anthropic and of Ollama.

A field that would change the answer and is not honoured here is refused; those that change nothing
are accepted without effect. What no API has is named in the log, once, and passed over.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from thinslice.config import (
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_SAMPLES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
)
from thinslice.serve.thinking import (
    AnthropicThinking,
    Effort,
    MaxSeconds,
    MaxTokens,
    OllamaThink,
    TemplateKwargs,
    Thinking,
    of_openai,
)

MAX_MESSAGES = 4096
MAX_PROMPTS = 256
MAX_TOOLS = 128
# How other engines call what structured_outputs has here.
FORMS_ELSEWHERE = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("grammar", "regex", "json_schema", "ebnf"),
)
# Fields that would change the answer, of the three interfaces and of engines that have more than
# those. With each the values, beside none at all, that ask for nothing. A body that names one of
# them itself honours it.
_REFUSED_WHOLE = (
    *FORMS_ELSEWHERE,
    *("audio", "function_call", "functions"),
    *("moderation", "reasoning_effort", "suffix", "tools", "web_search_options"),
    *("chat_template", "chat_template_kwargs", "max_thinking_tokens", "stop_token_ids"),
    *("max_thinking_seconds", "reasoning", "reasoning_budget", "reasoning_budget_tokens"),
    *("thinking_budget", "thinking_budget_tokens", "thinking_token_budget"),
    *("thinking", "output_config", "container", "mcp_servers"),
    *("conversation", "previous_response_id"),
    *("think", "format", "template", "images", "context", "typical_p", "tfs_z"),
)
REFUSED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(_REFUSED_WHOLE, ()),
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),  # of no tools
}
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
# Seeds are signed in OpenAI's API.
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Tools = Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)]
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
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    # Not of OpenAI's API; the names are those of vLLM, llama.cpp and SGLang.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: dict[str, Any] | None = None

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
    response_format: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    verbosity: str | None = None
    reasoning_effort: Effort | None = None
    # Not of OpenAI's API.
    max_thinking_tokens: MaxTokens | None = None
    max_thinking_seconds: MaxSeconds | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    @property
    def thinking(self) -> Thinking:
        """How long the model may think. Errors: ApiError 400."""
        return of_openai(
            self.reasoning_effort,
            self.max_thinking_tokens,
            self.max_thinking_seconds,
            self.chat_template_kwargs,
        )


class CompletionBody(_Body):
    """The body of ``/v1/completions``.

    Attributes:
        prompt: one or several, as texts or as token ids.
        max_tokens: 0 goes with ``echo``: nothing is written, and the prompt's own log-probabilities
            are told.
        echo: whether the prompt comes back before its completion.
    """

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class ResponsesReasoning(BaseModel):
    """How much the model thinks. A thought is given whole, and has no summary."""

    model_config = ConfigDict(extra="forbid", strict=True)

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesText(BaseModel):
    """The form of the answer. How wordy it is to be has no effect."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesBody(BaseModel):
    """The body of ``/v1/responses``.

    Attributes:
        input: what the user says, or a list of items: messages, calls and their outputs; thoughts
            are passed over.
        prompt: none is stored here that could be named.
        store: no answer is stored, also where this is left out.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    context_management: Annotated[list[Any], Field(max_length=0)] | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    prompt: None = None
    reasoning: ResponsesReasoning | None = None
    store: Literal[False] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    text: ResponsesText | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: Tools | None = None
    top_logprobs: Literal[0] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    truncation: Literal["disabled"] | None = None

    # Accepted without effect. Thoughts are never encrypted, and tools run at the client's alone.
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    max_tool_calls: int | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None

    @property
    def thinking(self) -> Thinking:
        """How long the model may think."""
        effort = None if self.reasoning is None else self.reasoning.effort
        return of_openai(effort, None, None, None)


class TokenizeBody(BaseModel):
    """The body of ``/tokenize``: a text or a conversation.

    Attributes:
        add_special_tokens: begin with what the model expects before a plain prompt. Default: for a
            text, and not for a conversation.
        add_generation_prompt: end a conversation with the opening of the assistant's turn.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None
    continue_final_message: Literal[False] | None = None


class DetokenizeBody(BaseModel):
    """The body of ``/detokenize``."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class MessagesBody(BaseModel):
    """The body of Anthropic's ``/v1/messages``, and of ``count_tokens`` without ``max_tokens``."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    thinking: AnthropicThinking | None = None
    output_config: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: dict[str, Any] | None = None

    # Accepted without effect. Nothing but thoughts, which templates leave out, is ever cleared.
    context_management: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    cache_control: dict[str, Any] | None = None
    inference_geo: str | None = None


class OllamaOptions(BaseModel):
    """The ``options`` of Ollama's requests. Those of how it loads a model have no effect here."""

    model_config = ConfigDict(extra="allow", strict=True)

    num_ctx: Annotated[int, Field(ge=1)] | None = None
    num_predict: int | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS)] | None = None


class _OllamaBody(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    stream: bool = True
    options: OllamaOptions | None = None
    think: OllamaThink | None = None
    format: str | dict[str, Any] | None = None
    # Accepted without effect: the model stays.
    keep_alive: str | int | float | None = None


class OllamaChatBody(_OllamaBody):
    """The body of ``/api/chat``."""

    messages: Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)] = []
    tools: Tools | None = None


class OllamaGenerateBody(_OllamaBody):
    """The body of ``/api/generate``."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False


class OllamaShowBody(BaseModel):
    """The body of ``/api/show``; older clients say ``name`` for ``model``."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    name: str | None = None
