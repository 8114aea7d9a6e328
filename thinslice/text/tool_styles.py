"""How a model writes calls of tools, as its chat template shows it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Opens and closes the arguments of a call whose name stands before them.
FENCE, FENCE_END = "```json", "```"


@dataclass(frozen=True)
class CallStyle:
    """One way of writing calls.

    A call is a JSON object with the keys ``name`` and ``arguments``; or, where the style has an
    ``opening``, a name, and in the next lines its arguments in a fence of Markdown.

    Attributes:
        begin: stands before a call or a list of them. Where it is empty, an answer that begins with
            such an object is a call.
        end: stands behind it; perhaps nothing does.
        arguments: the key of the arguments.
        is_list: whether calls stand in one list, as a grammar has it. A list is read in any style.
        opening, closing: stand before and behind each call that is no JSON object.
    """

    begin: str
    end: str
    arguments: str = "arguments"
    is_list: bool = False
    opening: str = ""
    closing: str = ""

    def around_arguments(self, name: str) -> tuple[str, str]:
        """What stands before and behind the arguments of one call."""
        if self.opening:
            return f"{self.opening}{name}\n{FENCE}\n", f"\n{FENCE_END}{self.closing}"
        return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{self.arguments}": ', "}"

    def written(self, calls: Iterable[Mapping[str, Any]]) -> str:
        """Calls, each with ``name`` and ``arguments``, in one text, where all have tags."""
        parts = []
        for call in calls:
            before, behind = self.around_arguments(call["name"])
            parts.append(before + json.dumps(call["arguments"], ensure_ascii=False) + behind)
        if self.opening:
            return self.begin + "\n".join(parts) + self.end
        return "\n".join(f"{self.begin}\n{part}\n{self.end}" for part in parts)


HERMES = CallStyle("<tool_call>", "</tool_call>")
LLAMA = CallStyle("", "", arguments="parameters")
MISTRAL = CallStyle("[TOOL_CALLS]", "", is_list=True)
_BEGIN, _END, _CALL_BEGIN, _CALL_END, _SEP = (
    f"<\uff5c{name}\uff5c>"
    for name in (
        *("tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end"),
        "tool▁sep",
    )
)
DEEPSEEK = CallStyle(_BEGIN, _END, opening=f"{_CALL_BEGIN}function{_SEP}", closing=_CALL_END)
# Each may be one token.
TAGS = (
    *(HERMES.begin, HERMES.end, MISTRAL.begin, "<|python_tag|>"),
    *(_BEGIN, _END, _CALL_BEGIN, _CALL_END, _SEP),
)


def style_of(template: str) -> CallStyle:
    """The style of a template that shows tools; Hermes's, which Qwen has too, where it is unknown.

    Source: the templates of Qwen2.5-Instruct, Llama-3.1-Instruct, Mistral-7B-Instruct-v0.3 and
    DeepSeek-R1-0528.
    """
    for style in (HERMES, MISTRAL, DEEPSEEK):
        if style.begin in template:
            return style
    return LLAMA if '"parameters":' in template or "<|python_tag|>" in template else HERMES
