"""The forms of answers of Anthropic's interface and of Ollama's, for the interface's document."""

from typing import Any, Literal

from pydantic import BaseModel


class Block(BaseModel):
    """A text, a thought or a call of a tool."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageDetails(BaseModel):
    """Of the output's tokens."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """How many tokens a message took; those that were cached are not among the input tokens."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageDetails


class MessageAnswer(BaseModel):
    """A whole answer in Anthropic's form."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(BaseModel):
    """An event of Anthropic's streams; what else it has depends on its type."""

    type: str


class TokenCount(BaseModel):
    """How many tokens a conversation has."""

    input_tokens: int


class AnthropicDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """An error as Anthropic's clients read it."""

    type: Literal["error"]
    error: AnthropicDetail


class OllamaError(BaseModel):
    """An error as Ollama's clients read it."""

    error: str


class OllamaMessage(BaseModel):
    """What the model says, and what it thought before."""

    role: Literal["assistant"]
    content: str
    thinking: str | None = None


class _OllamaAnswer(BaseModel):
    model: str
    created_at: str
    done: bool
    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaChatAnswer(_OllamaAnswer):
    """A whole answer, or a line of a stream, whose last has counts, and times in nanoseconds."""

    message: OllamaMessage


class OllamaGenerateAnswer(_OllamaAnswer):
    """A whole answer, or a line of a stream, whose last has counts, and times in nanoseconds."""

    response: str
    thinking: str | None = None


class OllamaDetails(BaseModel):
    """What is known of a model's files."""

    parent_model: str
    format: str
    family: str
    families: list[str] | None
    parameter_size: str
    quantization_level: str


class OllamaModel(BaseModel):
    """A model of this server; the last three where it is told as loaded."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str | None = None
    size_vram: int | None = None
    context_length: int | None = None


class OllamaModels(BaseModel):
    """The models of this server."""

    models: list[OllamaModel]


class OllamaShown(BaseModel):
    """What is known of a model."""

    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    template: str


class OllamaVersion(BaseModel):
    """The server's version."""

    version: str
