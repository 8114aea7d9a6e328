"""Calls of tools in a stream of text: the same however the text is cut."""

import pytest

from thinslice.text.tool_calls import CallSplitter, Piece
from thinslice.text.tool_styles import HERMES, LLAMA, MISTRAL, CallStyle, style_of

TWO = (
    '<tool_call>\n{"name": "get", "arguments": {"a": "x}\\"{", "b": [1, {"c": 2}]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "put", "arguments": {}}\n</tool_call>'
)
GET, PUT = ("call", "get"), ("call", "put")
TEXTS: list[tuple[CallStyle, str, list[Piece]]] = [
    (
        HERMES,
        f"Let me see: é☃.\n{TWO}",
        [
            ("answer", "Let me see: é☃."),
            *(GET, ("arguments", '{"a": "x}\\"{", "b": [1, {"c": 2}]}')),
            *(PUT, ("arguments", "{}")),
        ],
    ),
    (HERMES, "a <tool_call>no</tool_call> b", [("answer", "a <tool_call>no</tool_call> b")]),
    (HERMES, '<tool_call>{"x": 1}</tool_call>', [("answer", '<tool_call>{"x": 1}</tool_call>')]),
    (
        HERMES,
        '<tool_call>[{"name":"get","arguments":{"a":1}}, '
        '{"arguments":"{\\"b\\":2}","name":"put"}]</tool_call> done\n',
        [
            *(GET, ("arguments", '{"a":1}')),
            *(PUT, ("arguments", '{"b": 2}'), ("answer", "done")),
        ],
    ),
    (HERMES, '<tool_call>{"name":"get"}</tool_call>', [GET, ("arguments", "{}")]),
    (
        HERMES,
        'no <tool_call> but <tool_call>{"name": "get", "arguments": {}}</tool_call>',
        [("answer", "no <tool_call> but"), GET, ("arguments", "{}")],
    ),
    # Halves of characters can stand in JSON, and not in what is sent.
    (
        HERMES,
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'
        '<tool_call>{"arguments": {"a": "\\ud800é"}, "name": "\\udc00"}</tool_call>',
        [("call", "?"), ("arguments", "{}"), ("call", "?"), ("arguments", '{"a": "?é"}')],
    ),
    (HERMES, "x < y <tool", [("answer", "x < y <tool")]),
    (HERMES, " \n", [("answer", " \n")]),
    (HERMES, '<tool_call>{"name": "get", "arg', [("answer", '<tool_call>{"name": "get", "arg')]),
    (HERMES, '<tool_call>{"name": "get", "arguments": {"a": 1', [GET, ("arguments", '{"a": 1')]),
    (HERMES, '<tool_call>{"name": "get", "arguments": {}}\n</t', [GET, ("arguments", "{}")]),
    (LLAMA, '{"name": "get", "parameters": {"a": 1}}', [GET, ("arguments", '{"a": 1}')]),
    (
        LLAMA,
        '<|python_tag|>{"name": "get", "parameters": {"a": 1}}; {"name": "put", "parameters": {}}',
        [GET, ("arguments", '{"a": 1}'), PUT, ("arguments", "{}")],
    ),
    (LLAMA, '{"a": 1} is JSON', [("answer", '{"a": 1} is JSON')]),
    (
        LLAMA,
        'So {"name": "get", "parameters": {}}',
        [("answer", 'So {"name": "get", "parameters": {}}')],
    ),
    (LLAMA, "<|python", [("answer", "<|python")]),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "get", "arguments": {"a": [1, 2]}}, '
        '{"name": "put", "arguments": {}, "id": "x}"}]',
        [GET, ("arguments", '{"a": [1, 2]}'), PUT, ("arguments", "{}")],
    ),
    (MISTRAL, "[TOOL] [1]", [("answer", "[TOOL] [1]")]),
]


def split(style: CallStyle, parts: list[str]) -> list[Piece]:
    """All pieces; those of one kind in a row as one, but for names."""
    splitter, joined = CallSplitter(style), list[Piece]()
    pieces = [piece for part in parts for piece in splitter.push(part)]
    for kind, text in [*pieces, *splitter.finish()]:
        assert text
        if joined and joined[-1][0] == kind != "call":
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


@pytest.mark.parametrize(("style", "text", "expected"), TEXTS)
def test_calls_are_told_from_text_wherever_it_is_cut(
    style: CallStyle, text: str, expected: list[Piece]
) -> None:
    assert split(style, [text]) == expected
    assert split(style, list(text)) == expected
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1, 5):
            parts = [text[:first], text[first:second], text[second:]]
            assert split(style, parts) == expected, parts


def test_pieces_come_as_soon_as_they_are_sure() -> None:
    splitter = CallSplitter(HERMES)
    assert splitter.push("Hello <") == [("answer", "Hello")]
    assert splitter.push("b> ") == [("answer", " <b>")]
    assert splitter.push('<tool_call>{"name": "get", "arguments": {') == [GET, ("arguments", "{")]
    assert splitter.push('"a": 1') == [("arguments", '"a": 1')]
    assert splitter.push("}}</tool_call>") == [("arguments", "}")]
    assert splitter.finish() == []


def test_a_template_tells_its_style() -> None:
    assert style_of("{{ '<tool_call>' }} \"parameters\": x") == HERMES
    assert style_of("[AVAILABLE_TOOLS] [TOOL_CALLS]") == MISTRAL
    assert style_of('{"name": function name, "parameters": dictionary}') == LLAMA
    assert style_of("{% if tools %}") == HERMES
