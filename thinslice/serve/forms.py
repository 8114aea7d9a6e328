"""The forms of answers, for the interface's document; routes write them without these classes."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Reason = Literal["stop", "length", "tool_calls", "deadline"]


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    """Of the completion's tokens."""

    reasoning_tokens: int


class Usage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TokenEntry(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenEntry):
    """A token of the answer, with the likeliest in its place."""

    top_logprobs: list[TokenEntry]


class ChatLogprobs(BaseModel):
    """Of each token of an answer."""

    content: list[ChosenToken] | None
    refusal: None


class CalledFunction(BaseModel):
    """A function of the request's tools; its name comes with a call's first part alone."""

    name: str | None = None
    arguments: str


class Call(BaseModel):
    """A call of a tool, or of a stream a part of it; all but the first have no id and no type."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class AnswerMessage(BaseModel):
    """What the model says, and what it thought before."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Call] | None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class _Head(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatAnswer(_Head):
    """A whole answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What is new in a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Call] | None = None


class ChatChunkChoice(BaseModel):
    """What is new in one of the answers; the last has a reason."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatChunk(_Head):
    """An event of a stream; usage, where it is asked for, is the last and has no choices."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """Four lists with an entry for each token; the first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the completions; in a stream a piece of one, whose last has a reason."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None


class CompletionAnswer(_Head):
    """Whole completions, or an event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class OutputPart(BaseModel):
    """A text of an item."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class OutputItem(BaseModel):
    """A message, a thought, or a call of a function."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[OutputPart] | None = None
    summary: list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class InputDetails(PromptDetails):
    """Of the input's tokens."""

    cache_write_tokens: int


class ResponseUsage(BaseModel):
    """How many tokens an answer took."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: CompletionDetails
    total_tokens: int


class ResponseError(BaseModel):
    """What went wrong once the answer had begun."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(BaseModel):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"]


class ResponseAnswer(BaseModel):
    """An answer of items, with what was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]


class ResponseEvent(BaseModel):
    """An event of a stream of items; what else it has depends on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class ModelCard(BaseModel):
    """A model of this server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """The models of this server."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(BaseModel):
    """Tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The texts of special tokens."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    model_max_length: int
    vocab_size: int


class State(BaseModel):
    """How the server is."""

    status: Literal["ok", "ready", "closing"]


class PlanAnswer(BaseModel):
    """The memory plan, what the process holds and has held at most, in bytes, and whether the model
    is known to think."""

    model: str
    plan: dict[str, Any]
    rss_bytes: int
    peak_bytes: int
    thinks: bool


class ErrorDetail(BaseModel):
    """What went wrong; ``param`` is the field that it is about, ``code`` a name for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error as OpenAI's clients read it."""

    error: ErrorDetail
