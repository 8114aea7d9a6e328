"""How a model writes calls of tools, as its chat template shows it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CallStyle:
    """One way of writing calls.

    A call is a JSON object with the keys ``name`` and ``arguments``.

    Attributes:
        begin: stands before a call or a list of them. Where it is empty, an answer that begins with
            such an object is a call.
        end: stands behind it; perhaps nothing does.
        arguments: the key of the arguments.
        is_list: whether calls stand in one list, as a grammar has it. A list is read in any style.
    """

    begin: str
    end: str
    arguments: str = "arguments"
    is_list: bool = False


HERMES = CallStyle("<tool_call>", "</tool_call>")
LLAMA = CallStyle("", "", arguments="parameters")
MISTRAL = CallStyle("[TOOL_CALLS]", "", is_list=True)


def style_of(template: str) -> CallStyle:
    """The style of a template that shows tools; Hermes's, which Qwen has too, where it is unknown.

    Source: the templates of Qwen2.5-Instruct, Llama-3.1-Instruct and Mistral-7B-Instruct-v0.3.
    """
    if HERMES.begin in template:
        return HERMES
    if MISTRAL.begin in template:
        return MISTRAL
    return LLAMA if '"parameters":' in template or "<|python_tag|>" in template else HERMES
