"""Prompts as the engine takes them: the tokens of a text, or of a conversation."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from thinslice.config import SamplingParams
from thinslice.engine.grammar import Grammar, Grammars
from thinslice.engine.processors import LogitsProcessor
from thinslice.engine.thought_budget import Allowance, ThoughtBudget, ThoughtTokens
from thinslice.errors import CheckpointError, ContextError, RequestError
from thinslice.forks import cached_property
from thinslice.text.chat_template import ChatTemplate
from thinslice.text.lark import grammar_of
from thinslice.text.messages import Conversation, Message, for_template
from thinslice.text.reasoning import CLOSE, OPEN, Beginning, Phase, Thought, beginning_behind
from thinslice.text.tokenizer import Tokenizer
from thinslice.text.tool_use import ToolUse, for_tools, tool_use

Asked = str | Sequence[Message] | Conversation


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the engine.

    Attributes:
        rendered: the text of a conversation's; None of a plain text.
        is_thoughtless: whether the answer is to come without a thought.
        grammar: what its constraint and its tools make of the answer.
        tools: the calls that the answer may have; None where there are none.
        is_held_whole: whether the grammar holds the answer from its first token on: tags of a
            thought in it are the form's, and it has no thought.
    """

    token_ids: list[int]
    rendered: str | None
    is_thoughtless: bool = False
    grammar: Grammar | None = None
    tools: ToolUse | None = None
    is_held_whole: bool = False

    @property
    def thought(self) -> Thought:
        """Where its answer begins."""
        return Thought.behind(None if self.is_held_whole else self.rendered)


class Prompts:
    """Makes the prompts of one model. Safe in any thread.

    Args:
        context: of the plan, in tokens.
        longest_context: that the model was made for.
        grammars: None where no answer of a given form is given.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: int, longest_context: int, grammars: Grammars | None
    ) -> None:
        self._tokenizer = tokenizer
        self._context = context
        self._longest_context = longest_context
        self._grammars = grammars

    def close(self) -> None:
        """Let the grammars go."""
        if self._grammars is not None:
            self._grammars.let_go()

    def prompt(self, asked: Asked, params: SamplingParams) -> Prompt:
        """As ``LLM.prepare``."""
        if isinstance(asked, str):
            return self.of_tokens(self._of_text(asked), params)
        asked = for_template(asked)
        tools = tool_use(asked, self.template)
        token_ids, rendered, is_thoughtless = self._rendered(asked, params)
        is_free = params.constraint is None and not (tools is not None and tools.is_required)
        if is_free:
            return Prompt(token_ids, rendered, is_thoughtless, None, tools)
        beginning = "none" if is_thoughtless else beginning_behind(rendered, self.thinks)
        grammar = self._grammar(params, tools, beginning)
        return Prompt(
            token_ids, rendered, is_thoughtless, grammar, tools, is_held_whole=beginning == "none"
        )

    def of_tokens(self, token_ids: list[int], params: SamplingParams) -> Prompt:
        """As ``LLM.prepare_tokens``."""
        params.check_plain()
        is_free = params.constraint is None
        return Prompt(token_ids, None, grammar=None if is_free else self._grammar(params))

    def count(self, asked: Asked, params: SamplingParams) -> int:
        """As ``LLM.count_tokens``."""
        if isinstance(asked, str):
            return len(self._of_text(asked))
        return len(self._rendered(for_template(asked), params)[0])

    def rendered(self, conversation: Conversation, *, add_generation_prompt: bool) -> str:
        """As ``LLM.rendered``."""
        template = self.template
        shown = for_tools(conversation, template)
        return template.render(
            shown.messages, tools=shown.tools, add_generation_prompt=add_generation_prompt
        )

    def processors(
        self, prompt: Prompt, params: SamplingParams, clock: Callable[[], float]
    ) -> Callable[[], tuple[LogitsProcessor, ...]]:
        """What makes the processors of one completion: what follows its grammar, then the budget of
        its thought, where it has them. So no bias makes a token possible that neither allows."""
        makers: list[Callable[[], LogitsProcessor]] = []
        if prompt.grammar is not None:
            makers.append(prompt.grammar.follower)
        most, seconds = params.most_thinking_tokens, params.max_thinking_seconds
        if prompt.is_thoughtless:
            most = 0
        is_bounded = most is not None or seconds is not None
        if is_bounded and not prompt.is_held_whole:
            allowance = Allowance(most, seconds, clock)
            makers.append(partial(ThoughtBudget, self._tags, prompt.thought, allowance))
        return lambda: tuple(make() for make in makers)

    @cached_property
    def thinks(self) -> bool:
        """Whether the model is known to think: by its chat template, or by tokens for the tags. Not
        where the template cannot be used."""
        template = self._tokenizer.chat_template
        with suppress(CheckpointError):
            return template is not None and (template.writes_thoughts or self._tags.are_tokens)
        return False

    @property
    def template(self) -> ChatTemplate:
        """The model's chat template. Errors: RequestError where there is none."""
        template = self._tokenizer.chat_template
        if template is None:
            raise RequestError(
                "this model has no (or an empty) chat template; give it a plain prompt instead "
                "(run --raw)"
            )
        return template

    @cached_property
    def _tags(self) -> ThoughtTokens:
        return ThoughtTokens(self._tokenizer)

    def _of_text(self, text: str) -> list[int]:
        if not text:
            raise RequestError("the prompt is empty")
        return self._encode(text, is_plain=True)

    def _rendered(self, asked: Conversation, params: SamplingParams) -> tuple[list[int], str, bool]:
        """The tokens of a conversation, their text, and whether no thought is to follow."""
        template = self.template
        shown_to_it, most = for_tools(asked, template), params.most_thinking_tokens
        rendered, is_thoughtless = render(template, shown_to_it, most, lambda: self._tags)
        return self._encode(rendered, is_plain=False), rendered, is_thoughtless

    def _grammar(
        self, params: SamplingParams, tools: ToolUse | None = None, beginning: Beginning = "none"
    ) -> Grammar:
        """What an answer has to be of."""
        if self._grammars is None:
            raise RequestError(
                "no answer of a given form, and no call of a tool that is required, is given here: "
                "the model was loaded with forms off"
            )
        if params.ignore_eos:
            raise RequestError("ignore_eos goes on past the end, and required calls end the answer")
        return self._grammars.compiled(grammar_of(params.constraint, tools, beginning))

    def _encode(self, text: str, is_plain: bool) -> list[int]:
        """Tokens of a prompt, no further than one past the context."""
        context = self._context
        # A chat template writes the special tokens itself.
        ids = self._tokenizer.encode(text, add_special_tokens=is_plain, limit=context)
        if len(ids) > context:
            templated = "" if is_plain else " with its chat template"
            more = f"; a context of up to {self._longest_context} is possible"
            raise ContextError(
                f"the prompt has {len(text)} characters{templated}, which are more than {context} "
                f"tokens, and the context is {context}; at most {context - 1} leave room for an "
                f"answer{more * (self._longest_context > context)}"
            )
        return ids


def render(
    template: ChatTemplate, asked: Conversation, most: int | None, tags: Callable[[], ThoughtTokens]
) -> tuple[str, bool]:
    """The text of a conversation, and whether no thought is to follow it.

    None follows where the conversation says so, or where the budget has no room for one. Then the
    template is told so; and where that leaves the thought open, or the template cannot be told but
    the model is known to think, the text ends in a thought that is closed and empty, as Qwen3's
    template writes it (arXiv 2504.09858: models go on to answer).

    Args:
        most: tokens of a thought; None is without a bound.
        tags: asked where they are needed.

    Errors: as ``ChatTemplate.render``.
    """
    template = template.used_for(asked.tools)
    messages, tools, is_thinking = asked.messages, asked.tools, asked.enable_thinking
    if is_thinking is not False:
        text = template.render(messages, tools=tools, enable_thinking=is_thinking)
        if most is None or most >= tags().least(Thought.behind(text)):
            return text, False
    text = template.render(messages, tools=tools, enable_thinking=False)
    if Thought.behind(text).phase is Phase.INSIDE:
        return f"{text.rstrip()}\n\n{CLOSE}\n\n", True
    if not template.takes_enable_thinking and (template.writes_thoughts or tags().are_tokens):
        return f"{text}{OPEN}\n\n{CLOSE}\n\n", True
    return text, True
