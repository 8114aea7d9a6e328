"""The grammar of an answer: a thought that is free, then calls of tools or what a constraint says.

Written for llguidance: a list of grammars, of which the first is the whole, in its variant of Lark.
Source: docs/syntax.md of guidance-ai/llguidance at 1.9.
"""

import json
from typing import Any

from thinslice.constraint import Constraint
from thinslice.errors import RequestError
from thinslice.text.json_schema import Schema, check_together, for_grammar
from thinslice.text.reasoning import OPEN, Beginning
from thinslice.text.tool_use import Function, ToolUse

_ANSWER = "answer"
# Nothing is forced: a text is tokens that the model chose, and the tokenizer is not asked.
_HEAD = '%llguidance {"no_forcing": true}\n'
# Any bytes up to the first tag, parts of characters too; then the newlines that models write.
_THOUGHT = r"""
thought: thought_text /\n{0,2}/
thought_text[suffix="</think>"]: ANY
ANY: ~(/a/ & /b/)
"""
_OPENED = r"opened: /[ \n]{0,4}<think>/ thought"
# A model that calls on and on comes to an end.
_MAX_CALLS = 8


def grammar_of(constraint: Constraint | None, tools: ToolUse | None, beginning: Beginning) -> str:
    """The grammars as JSON.

    Errors: RequestError for a schema of which none can be made, and for a constraint beside tools
    whose calls cannot be told from it by their beginning.
    """
    rules, grammars = "", list[dict[str, Any]]()
    bodies: list[str] = []
    if tools is not None:
        bodies.append("calls")
        rules += _calls(tools)
        schemas = [*map(_arguments, tools.functions)]
        check_together(schemas)
        names = [f"arguments_{number}" for number in range(len(schemas))]
        grammars += [
            {"name": name, "json_schema": one} for name, one in zip(names, schemas, strict=True)
        ]
    if constraint is not None and not (tools is not None and tools.is_required):
        if tools is not None and not tools.style.begin:
            raise RequestError(
                "this model's calls of tools begin as an answer may: set tool_choice to none or "
                "required, or leave the form of the answer open"
            )
        if beginning == "possible" and constraint.kind != "json_schema" and OPEN in constraint.text:
            raise RequestError(
                f"the form of the answer has {OPEN} in it, with which this model begins its "
                "thoughts: leave it out, or leave the thought out (max_thinking_tokens 0)"
            )
        bodies.append(f"@{_ANSWER}")
        grammars.append({"name": _ANSWER, **_answer(constraint)})
    start = {"open": "thought body", "possible": "opened? body", "none": "body"}[beginning]
    head = f"{_HEAD}start: {start}\nbody: {' | '.join(bodies)}\n"
    if beginning != "none":
        head += _THOUGHT
    if beginning == "possible":
        head += f"{_OPENED}\n"
    return json.dumps({"grammars": [{"lark_grammar": head + rules}, *grammars]})


def _answer(constraint: Constraint) -> dict[str, Any]:
    if constraint.kind == "json_object":
        return {"json_schema": for_grammar({"type": "object"})}
    if constraint.kind == "json_schema":
        return {"json_schema": for_grammar(json.loads(constraint.text))}
    if constraint.kind == "regex":
        return {"lark_grammar": f"start: /{_in_slashes(constraint.text)}/"}
    if constraint.kind == "choice":
        choices = " | ".join(map(_quoted, json.loads(constraint.text)))
        return {"lark_grammar": f"start: CHOICE\nCHOICE: {choices}"}
    return {"lark_grammar": constraint.text}


def _calls(tools: ToolUse) -> str:
    """Rules of one call or several, as the model's template writes them."""
    style, names = tools.style, [f"call_{number}" for number in range(len(tools.functions))]
    rules = [f"call: {' | '.join(names)}"]
    for number, (name, function) in enumerate(zip(names, tools.functions, strict=True)):
        before, behind = style.around_arguments(function["name"])
        rules.append(f"{name}: {_quoted(before)} @arguments_{number} {_quoted(behind)}")

    def several(first: str, more: str) -> str:
        return f"{first} ({more}){{0,{_MAX_CALLS - 1}}}" if tools.is_parallel else first

    if style.is_list:
        calls = " ".join([_quoted(f"{style.begin}["), several("call", '", " call'), '"]"'])
    elif style.opening:
        calls = f"{_quoted(style.begin)} {several('call', 'NEWLINE call')} {_quoted(style.end)}"
        rules.append(r"NEWLINE: /\n/")
    elif style.begin:
        rules.append(f"tagged: {_quoted(style.begin)} NEWLINE call NEWLINE {_quoted(style.end)}")
        rules.append(r"NEWLINE: /\n/")
        calls = several("tagged", "NEWLINE tagged")
    else:
        calls = "call"
    return "\n".join([f"calls: {calls}", *rules, ""])


def _arguments(function: Function) -> Schema:
    """The schema of a function's arguments: an object, whatever is left open."""
    return for_grammar({**(function.get("parameters") or {}), "type": "object"})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _in_slashes(pattern: str) -> str:
    """A regex as it stands between slashes; a digit is one of ten, as in a JSON schema."""
    written, is_escaped = list[str](), False
    for sign in pattern:
        if is_escaped and sign in "dD":
            written[-1] = "[0-9]" if sign == "d" else "[^0-9]"
        elif sign == "\n":
            written.append("n" if is_escaped else r"\n")
        elif sign == "/" and not is_escaped:
            written.append(r"\/")
        else:
            written.append(sign)
        is_escaped = sign == "\\" and not is_escaped
    return "".join(written)
