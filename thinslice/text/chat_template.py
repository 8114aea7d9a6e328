"""ChatTemplate: a conversation to the one text a model was trained to continue.

The template comes with the model and is not trusted; template_sandbox.py bounds what it can do.
"""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError

from thinslice.errors import CheckpointError, RequestError, plain
from thinslice.forks import cached_property, fork_safe
from thinslice.text.messages import arguments_as_text, with_calls
from thinslice.text.reasoning import CLOSE, OPEN
from thinslice.text.template_functions import RaisedByTemplateError
from thinslice.text.template_meter import Meter, TooCostlyError, weight
from thinslice.text.template_sandbox import TemplateSandbox
from thinslice.text.template_source import Source
from thinslice.text.tool_styles import DEEPSEEK, CallStyle, style_of
from thinslice.units import KIB, MIB

# The longest of 60 published templates has 17 KB. At worst, 64 KiB take 1.6 s and 230 MiB
# to compile.
_MAX_SOURCE_CHARACTERS = 64 * KIB
# A million tokens of English have about 5 MB.
_MAX_MESSAGES_WEIGHT = 16 * MIB
_BASE_FUEL = 16 * MIB
# Measured with templates in the manner of Qwen's and Mistral's: 3 to 7 are needed.
_FUEL_PER_MESSAGE_BYTE = 32
# CPU seconds; a rendering takes milliseconds.
_MAX_SECONDS = 2.0

# How the models here write what begins and ends a turn. [INST] and the like are left out: where
# they are written, they are mostly meant to be text. Half of a surrogate pair is in no token.
_MARKER = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s\"'{}\\\ud800-\udfff]{1,60}[|\uff5c]>|<(?:start|end)_of_turn>"
)

# A function's name that no conversation has: whether a template shows calls is seen by it.
_PROBE = "function_called_to_see_whether_calls_are_shown"

# What rendering can raise by what a template does with the messages: type errors and the like.
_MISFITS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError)


def control_markers(source: str) -> list[str]:
    """The control markers that a template writes as they are, such as <|im_start|>, each once.

    One that the template puts together of parts is not found.
    """
    return list(dict.fromkeys(_MARKER.findall("".join(_uncommented(source)))))


def _uncommented(source: str) -> Iterator[str]:
    """What lies outside comments; one that is not closed is none, and nor is any after it.

    Not a regex: from each "{#" that is not closed it would look to the end again.
    """
    start = 0
    while (begin := source.find("{#", start)) >= 0:
        end = source.find("#}", begin + 2)
        if end < 0:
            break
        yield source[start:begin]
        start = end + 2
    yield source[start:]


class ChatTemplate:
    """A compiled chat template.

    Args:
        tokens: the texts of the tokenizer's special tokens by name, such as bos_token. One with
            the name of something else that a template is given stands behind it.
        for_tools: the source of a template that takes this one's place where there are tools; it
            is compiled where there are any.

    Attributes:
        takes_enable_thinking: whether it asks if the model is to think.
        writes_thoughts: whether it knows a tag of thoughts, and its model thus writes them.
        has_place_for_tools: whether it shows tools, calls and results.
        call_style: how it writes calls of tools; None where that is unknown. DeepSeek's templates
            write calls, but have no place for tools.

    Errors: CheckpointError for a template that does not compile.
    """

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str] | None = None,
        for_tools: Source = None,
    ) -> None:
        if len(source) > _MAX_SOURCE_CHARACTERS:
            raise CheckpointError(
                f"the model's chat template has {len(source)} characters; "
                f"at most {_MAX_SOURCE_CHARACTERS} are expected"
            )
        self._tool_source = for_tools
        self.writes_thoughts = OPEN in source or CLOSE in source
        self._sandbox = TemplateSandbox()
        known = self._sandbox.globals
        self._tokens = {name: text for name, text in (tokens or {}).items() if name not in known}
        self.call_style: CallStyle | None = None
        # A signal handler may render in the middle of a rendering.
        self._lock = fork_safe(threading.RLock())
        try:
            tree = self._sandbox.parse(source)
            names = {one.name for one in tree.find_all(nodes.Name)}
            self._takes_tools = "tools" in names
            self.takes_enable_thinking = "enable_thinking" in names
            self._template = self._sandbox.from_string(tree)
            self.has_place_for_tools = isinstance(for_tools, str) or self._takes_tools
            if self.has_place_for_tools:
                self.call_style = style_of(for_tools if isinstance(for_tools, str) else source)
            elif DEEPSEEK.begin in source:
                self.call_style = DEEPSEEK
        except (TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise CheckpointError(
                f"the model's chat template does not compile: {plain(error, 300)}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
    ) -> str:
        """The text of a conversation, up to where the model's answer begins.

        No message is left out; an empty system message is not the same as none. Time for 20
        messages of 1 kB: under 1 ms. Peak extra memory: a few times the text; whatever the
        template does, at most about 9 x (16 MiB + 32 x the messages).

        Args:
            messages, tools: as ``messages.for_template`` gives them.
            add_generation_prompt: end with the opening of the assistant's turn.
            enable_thinking: whether the model is to think, for templates that ask; None is as if
                nobody had said, and the template's own choice holds.

        Errors: RequestError where the template refuses the messages or they do not fit it, and
        where it would leave out tools or calls; CheckpointError where it reaches for what it may
        not, or for too much time or memory.
        """
        template = self.used_for(tools)
        if template is not self:
            return template.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
            )
        if tools and not self._takes_tools:
            raise RequestError("the model's chat template has no place for tools")
        choices = {"tools": tools or None, "add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            choices["enable_thinking"] = enable_thinking
        if not any("tool_calls" in message for message in messages):
            return self._metered(messages, choices)
        try:
            text = self._metered(messages, choices)
        except RequestError:  # some join arguments to text, as DeepSeek's do
            messages = with_calls(messages, arguments_as_text)
            text = self._metered(messages, choices)
        named = with_calls(messages, lambda function: {**function, "name": _PROBE})
        num_calls = sum(len(message.get("tool_calls", ())) for message in messages)
        if self._metered(named, choices).count(_PROBE) < num_calls:
            raise RequestError("the model's chat template leaves calls of tools out")
        return text

    def used_for(self, tools: Sequence[Mapping[str, Any]]) -> "ChatTemplate":
        """This one, or the one that takes its place where there are tools.

        Errors: CheckpointError where that is none.
        """
        return (self._tool_template or self) if tools else self

    @cached_property
    def _tool_template(self) -> "ChatTemplate | None":
        """The one for conversations with tools. Errors: CheckpointError where it is none."""
        if isinstance(self._tool_source, CheckpointError):
            raise self._tool_source
        return None if self._tool_source is None else ChatTemplate(self._tool_source, self._tokens)

    def _metered(
        self,
        messages: Sequence[Mapping[str, Any]],
        choices: Mapping[str, Any],
    ) -> str:
        try:
            size = weight([messages, choices["tools"] or ()], _MAX_MESSAGES_WEIGHT)
        except TooCostlyError as error:
            raise RequestError("the messages are too long for a chat template") from error
        fuel = _BASE_FUEL + _FUEL_PER_MESSAGE_BYTE * size
        variables = {
            **self._tokens,
            **choices,
            "messages": messages,
            "documents": None,
        }
        with self._lock:
            before, self._sandbox.meter = self._sandbox.meter, Meter(fuel, _MAX_SECONDS)
            try:
                return self._render(variables)
            finally:
                self._sandbox.meter = before

    def _render(self, variables: Mapping[str, Any]) -> str:
        try:
            return self._template.render(variables)
        except RaisedByTemplateError as error:
            raise RequestError(f"the chat template refuses the messages: {error}") from error
        except SecurityError as error:
            raise CheckpointError(
                f"the model's chat template reaches for what it may not: {plain(error, 200)}"
            ) from error
        except TooCostlyError as error:
            raise CheckpointError(f"the model's chat template {error}") from error
        except RecursionError as error:
            raise CheckpointError("the model's chat template nests too deeply") from error
        except _MISFITS as error:
            raise RequestError(
                f"the chat template cannot render these messages: {plain(error, 300)}"
            ) from error
