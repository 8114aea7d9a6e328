"""How long a model may think, from the fields of each interface."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from thinslice.serve.errors import ApiError

# Tokens of a thought for each effort; None is as long as the model thinks. They hold for every
# model and context, so that an answer does not hang on the server's memory. Low and medium are what
# Google's OpenAI-compatible interface takes for them; its high, 24,576 tokens, is more than compact
# models here are given.
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 8192,
    "high": None,
    "xhigh": None,
    "max": None,
}
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
MaxTokens = Annotated[int, Field(ge=0, le=1 << 31)]
MaxSeconds = Annotated[float, Field(ge=0, le=1e9)]


class TemplateKwargs(BaseModel):
    """``chat_template_kwargs``: what a request may say to the chat template, and nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True)

    enable_thinking: bool | None = None


class ThinkingEnabled(BaseModel):
    """Anthropic's thinking with a budget. What a thought says is never left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=1, le=1 << 31)]
    display: Literal["summarized"] | None = None


class ThinkingAdaptive(BaseModel):
    """Anthropic's thinking for as long as the model thinks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["adaptive"]
    display: Literal["summarized"] | None = None


class ThinkingDisabled(BaseModel):
    """No thinking."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["disabled"]


AnthropicThinking = Annotated[
    ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled, Field(discriminator="type")
]
_ANTHROPIC_EFFORTS = ("low", "medium", "high", "xhigh", "max")
OllamaThink = bool | Literal["low", "medium", "high", "max"]


@dataclass(frozen=True)
class Thinking:
    """What a request says of thinking.

    Attributes:
        is_enabled: what the template is told; None leaves it to the template.
    """

    max_tokens: int | None = None
    max_seconds: float | None = None
    is_enabled: bool | None = None

    @property
    def params(self) -> dict[str, Any]:
        """As SamplingParams has it."""
        most = 0 if self.is_enabled is False else self.max_tokens
        return {"max_thinking_tokens": most, "max_thinking_seconds": self.max_seconds}


def of_openai(
    effort: Effort | None,
    max_tokens: int | None,
    max_seconds: float | None,
    kwargs: TemplateKwargs | None,
) -> Thinking:
    """Errors: ApiError 400 for fields that contradict each other."""
    if effort is not None:
        if max_tokens is not None:
            told = "reasoning_effort and max_thinking_tokens both bound the thought; give one"
            raise ApiError(400, told, "reasoning_effort")
        max_tokens = EFFORTS[effort]
    is_enabled = None if kwargs is None else kwargs.enable_thinking
    if is_enabled and 0 in (max_tokens, max_seconds):
        told = "enable_thinking is true, and the budget has no room for a thought"
        raise ApiError(400, told, "chat_template_kwargs.enable_thinking")
    return Thinking(max_tokens, max_seconds, is_enabled)


def of_anthropic(
    asked: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None,
    max_tokens: int | None,
    effort: object = None,
) -> Thinking:
    """What a request says of thinking.

    Args:
        effort: of ``output_config``; it bounds a thought that has no budget of its own.

    Errors: ApiError 400 for an effort that is none, and for a budget that leaves no token for the
    answer, as at Anthropic's.
    """
    if effort is not None and effort not in _ANTHROPIC_EFFORTS:
        told = f"the effort is {effort!r:.60}; one of {', '.join(_ANTHROPIC_EFFORTS)}"
        raise ApiError(400, f"output_config: {told}", "output_config.effort")
    most = None if effort is None else EFFORTS[str(effort)]
    if asked is None:
        return Thinking(most)
    if isinstance(asked, ThinkingDisabled):
        return Thinking(is_enabled=False)
    if isinstance(asked, ThinkingAdaptive):
        return Thinking(most, is_enabled=True)
    if max_tokens is not None and max_tokens <= asked.budget_tokens:
        told = (
            f"max_tokens is {max_tokens} and thinking.budget_tokens {asked.budget_tokens}; "
            "max_tokens must be greater, as thoughts count in it"
        )
        raise ApiError(400, told, "max_tokens")
    return Thinking(asked.budget_tokens, is_enabled=True)


def of_ollama(asked: OllamaThink | None) -> Thinking:
    """``think``: whether the model is to think, or how much."""
    if asked is None or isinstance(asked, bool):
        return Thinking(is_enabled=asked)
    return Thinking(EFFORTS[asked], is_enabled=True)
