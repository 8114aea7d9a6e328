"""Calls of tools in a stream of text: the same however the text is cut."""

import codecs
import json
import sys
import tracemalloc
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.text import tool_calls
from thinslice.text.reasoning import ReasoningSplitter
from thinslice.text.tool_calls import CallSplitter, Piece
from thinslice.text.tool_styles import DEEPSEEK, HERMES, LLAMA, MISTRAL, CallStyle, style_of

NAMES = ("get", "put", "?")

TWO = (
    '<tool_call>\n{"name": "get", "arguments": {"a": "x}\\"{", "b": [1, {"c": 2}]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "put", "arguments": {}}\n</tool_call>'
)
GET, PUT = ("call", "get"), ("call", "put")
BEGIN, END = DEEPSEEK.begin, DEEPSEEK.end


def fenced(name: str, arguments: str) -> str:
    """A call as DeepSeek writes it."""
    bar = "\uff5c"
    before = f"<{bar}tool▁call▁begin{bar}>function<{bar}tool▁sep{bar}>"
    return f"{before}{name}\n```json\n{arguments}\n```<{bar}tool▁call▁end{bar}>"


RM, PUT_CALL, PUT_DEEP = fenced("rm", "{}"), fenced("put", "{}"), fenced("put", '{"b": {}}')
GET_CALL, GET_FENCE, GET_LIST = (fenced("get", one) for one in ("{}", '{"a": "```"}', "[1]"))
REMOVE = fenced("remove", "{}")
PUT_TAGGED = '<tool_call>\n{"name": "put", "arguments": {}}\n</tool_call>'
UNKNOWN = '{"name": "rm", "arguments": {"a": "<tool_call>{}"}}'
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
    (
        DEEPSEEK,
        f"So: é☃.\n{BEGIN}{GET_FENCE}{END} ",
        [
            ("answer", "So: é☃."),
            GET,
            ("arguments", '{"a": "```"}'),
        ],
    ),
    (
        DEEPSEEK,
        f"{BEGIN}{GET_CALL}\n{PUT_DEEP}{END}\n\ndone",
        [GET, ("arguments", "{}"), PUT, ("arguments", '{"b": {}}'), ("answer", "done")],
    ),
    # Without a fence, and without what ends calls.
    (
        DEEPSEEK,
        f"{BEGIN}\n{DEEPSEEK.opening}get\n{{}}{DEEPSEEK.closing}\nNow",
        [GET, ("arguments", "{}"), ("answer", "Now")],
    ),
    (
        DEEPSEEK,
        f"{BEGIN}{DEEPSEEK.opening}get\n```js",
        [
            ("answer", f"{BEGIN}{DEEPSEEK.opening}get\n```js"),
        ],
    ),
    (DEEPSEEK, f"{BEGIN}{GET_LIST}", [("answer", f"{BEGIN}{GET_LIST}")]),
    (
        DEEPSEEK,
        f"{BEGIN}{BEGIN}{GET_CALL}",
        [
            ("answer", BEGIN),
            GET,
            ("arguments", "{}"),
        ],
    ),
    (DEEPSEEK, f"{BEGIN}<\uff5ctool▁call▁ x", [("answer", f"{BEGIN}<\uff5ctool▁call▁ x")]),
    # A function that is none of the request's: its client cannot call it.
    (
        HERMES,
        f"a <tool_call>\n{UNKNOWN}\n</tool_call>\nb",
        [
            ("answer", f"a <tool_call>\n{UNKNOWN}\n</tool_call>\nb"),
        ],
    ),
    (
        HERMES,
        f"<tool_call>{UNKNOWN}</tool_call>{TWO}",
        [
            ("answer", f"<tool_call>{UNKNOWN}</tool_call>"),
            *(GET, ("arguments", '{"a": "x}\\"{", "b": [1, {"c": 2}]}'), PUT, ("arguments", "{}")),
        ],
    ),
    (
        HERMES,
        '<tool_call>{"arguments": {}, "name": "rm"}</tool_call>',
        [
            ("answer", '<tool_call>{"arguments": {}, "name": "rm"}</tool_call>'),
        ],
    ),
    (
        HERMES,
        '<tool_call>{"name": "ge", "arguments": {}} </tool_ca',
        [
            ("answer", '<tool_call>{"name": "ge", "arguments": {}} </tool_ca'),
        ],
    ),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "rm", "arguments": {}}, {"name": "put", "arguments": {}}]',
        [
            ("answer", '[TOOL_CALLS][{"name": "rm", "arguments": {}}'),
            PUT,
            ("arguments", "{}"),
        ],
    ),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "put", "arguments": {}}, {"name": "rm", "arguments": {}}]',
        [
            PUT,
            ("arguments", "{}"),
            ("answer", ', {"name": "rm", "arguments": {}}]'),
        ],
    ),
    (
        LLAMA,
        '{"name": "Ada", "parameters": {"born": 1815}}\n',
        [
            ("answer", '{"name": "Ada", "parameters": {"born": 1815}}\n'),
        ],
    ),
    (
        DEEPSEEK,
        f"{BEGIN}{RM}\n{PUT_CALL}{END}",
        [
            ("answer", f"{BEGIN}{RM}"),
            PUT,
            ("arguments", "{}"),
        ],
    ),
    (
        DEEPSEEK,
        f"{BEGIN}{REMOVE}{END}",
        [
            ("answer", f"{BEGIN}{REMOVE}{END}"),
        ],
    ),
    # Calls that small models write, with a brace too few, and text where no call is.
    (
        HERMES,
        '<tool_call>\n{"name": "get", "arguments": {"a": 1}\n</tool_call>\n' + PUT_TAGGED,
        [
            GET,
            ("arguments", '{"a": 1}'),
            PUT,
            ("arguments", "{}"),
        ],
    ),
    (
        HERMES,
        '<tool_call>{"a": [<tool_call>{}]}</tool_call>',
        [
            ("answer", '<tool_call>{"a": [<tool_call>{}]}</tool_call>'),
        ],
    ),
    (
        HERMES,
        '<tool_call>{"name": "put", "arguments": {}}</tool_response>',
        [
            PUT,
            ("arguments", "{}"),
            ("answer", "</tool_response>"),
        ],
    ),
    (HERMES, "<<tool_call>{", [("answer", "<<tool_call>{")]),
    (LLAMA, '<|python_tag|>print({"a": 1})', [("answer", '<|python_tag|>print({"a": 1})')]),
    (
        LLAMA,
        '{"type": "function", "name": "get", "parameters": {"a": 1}}',
        [
            GET,
            ("arguments", '{"a": 1}'),
        ],
    ),
]


def split(style: CallStyle, parts: list[str]) -> list[Piece]:
    """All pieces; those of one kind in a row as one, but for names."""
    splitter, joined = CallSplitter(style, NAMES), list[Piece]()
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
    splitter = CallSplitter(HERMES, NAMES)
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
    assert style_of(f"{{ '{BEGIN}' + tool['type'] }}") == DEEPSEEK
    assert style_of("{% if tools %}") == HERMES


STYLES = [HERMES, LLAMA, MISTRAL, DEEPSEEK]
ARGUMENTS = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text('"\\\\{}[]<`é☃ |', max_size=6),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
CALLS = st.lists(st.tuples(st.sampled_from(["get", "put"]), ARGUMENTS), min_size=1, max_size=3)
# What is no call, whatever stands beside it.
TEXT = st.sampled_from(["", "Hello é☃ there", "1 < 2 [a]", 'so {"name": "get"', "<tool_", "```"])


def as_written(style: CallStyle, calls: list[tuple[str, Any]]) -> tuple[str, list[Piece]]:
    parts, told = [], list[Piece]()
    for name, arguments in calls:
        before, behind = style.around_arguments(name)
        written = json.dumps(arguments, ensure_ascii=False)
        parts.append(before + written + behind)
        told += [("call", name), ("arguments", written)]
    if style is HERMES:
        return "\n".join(f"{style.begin}\n{one}\n{style.end}" for one in parts), told
    if style is MISTRAL:
        return f"{style.begin}[{', '.join(parts)}]", told
    return style.begin + ("; " if style is LLAMA else "\n").join(parts) + style.end, told


def cut(data: st.DataObject, text: str) -> list[str]:
    """The text in pieces; a character can come in several, as it comes of a tokenizer's bytes."""
    decoder, raw = codecs.getincrementaldecoder("utf-8")(), text.encode()
    places = data.draw(st.lists(st.integers(0, len(raw)), max_size=8).map(sorted))
    ends = [*places, len(raw)]
    return [decoder.decode(raw[start:end]) for start, end in zip([0, *places], ends, strict=True)]


@given(st.data(), st.sampled_from(STYLES), CALLS, TEXT, TEXT)
def test_calls_are_found_between_text_and_behind_thoughts(
    data: st.DataObject, style: CallStyle, calls: Any, before: str, behind: str
) -> None:
    written, told = as_written(style, calls)
    before = before if style.begin else ""
    thoughts, joined = ReasoningSplitter("<think>\n"), list[Piece]()
    splitter = CallSplitter(style, NAMES)

    def take(pieces: list[Piece]) -> list[Piece]:
        return [
            new
            for kind, text in pieces
            for new in (splitter.push(text) if kind == "answer" else [(kind, text)])
        ]

    found: list[Piece] = []
    for part in cut(data, f"I think {written}\n</think>\n\n{before} {written}\n{behind}"):
        found += take(thoughts.push(part))
    for kind, text in [*found, *take(thoughts.finish()), *splitter.finish()]:
        if joined and joined[-1][0] == kind != "call":
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    spoken = [[("answer", text)] if text else [] for text in (before, behind)]
    assert joined == [("reasoning", f"I think {written}"), *spoken[0], *told, *spoken[1]]


HOSTILE = st.lists(
    st.sampled_from(
        (
            *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[", "]", "{", "}"),
            *(BEGIN, END, DEEPSEEK.opening, DEEPSEEK.closing, "get\n", "rm\n", "```json\n"),
            *('{"name": "get", ', '{"name": "rm", ', '"arguments": {', '"parameters": {}', "```"),
            *('"a": "', '"', "\\", "\n", " ", ", ", "é☃", "<", "<tool", "</"),
            '{"arguments": {}, "name": "put"}',
        )
    ),
    max_size=30,
).map("".join)


@given(st.data(), st.sampled_from(STYLES), HOSTILE)
def test_nothing_is_lost_of_what_is_no_call(
    data: st.DataObject, style: CallStyle, text: str
) -> None:
    whole = split(style, [text])
    assert split(style, [one for one in cut(data, text) if one]) == whole
    assert split(style, list(text)) == whole
    assert [kind for kind, _ in whole].count("arguments") == [kind for kind, _ in whole].count(
        "call"
    )
    if not any(kind == "call" for kind, _ in whole):
        assert "".join(said for _, said in whole) == text
    nobody = CallSplitter(style, ())
    assert "".join(said for _, said in [*nobody.push(text), *nobody.finish()]) == text


def num_examined(style: CallStyle, text: str) -> int:
    """Characters that lie before a function of the splitter whenever it calls another one, while
    the text comes one by one, in its variables and in its object's; and those that one returns."""
    splitter, count = CallSplitter(style, NAMES), 0

    def look(frame: FrameType, event: str, returned: object) -> None:
        nonlocal count
        if frame.f_code.co_filename != tool_calls.__file__:
            return
        if event == "return" and isinstance(returned, str):
            count += len(returned)
        if event in ("call", "c_call"):
            seen = [*frame.f_locals.values(), *vars(splitter).values()]
            count += sum(len(one) for one in seen if isinstance(one, str))

    sys.setprofile(look)
    try:
        for sign in text:
            splitter.push(sign)
        splitter.finish()
    finally:
        sys.setprofile(None)
    return count


ENDLESS = [
    (HERMES, '<tool_call>{"name": "', "a"),
    (HERMES, '<tool_call>{"name": "', '\\"'),
    (HERMES, '<tool_call>{"name": "get", "arguments": "', "a"),
    (HERMES, '<tool_call>{"name": "get", "arguments": {"a": "', "a"),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {"a": "', "a"),
    (HERMES, '<tool_call>{"name": "get", "arguments": {}}', " ,"),
    (HERMES, "a", " "),
    (HERMES, "", "<tool_call>{"),
    (HERMES, "", "<tool_call>{}"),
    (HERMES, '<tool_call>{"a": ', "{}, "),
    (LLAMA, "", " "),
    (LLAMA, "", '{"name": "rm", "parameters": {}};'),
    (MISTRAL, "[TOOL_CALLS][", "\n"),
    (MISTRAL, "[TOOL_CALLS][", '{"name": "rm", "arguments": {}}, '),
    (DEEPSEEK, f"{BEGIN}{DEEPSEEK.opening}", "a"),
    (DEEPSEEK, f"{BEGIN}{DEEPSEEK.opening}get\n", " "),
    (DEEPSEEK, BEGIN, fenced("rm", "{}")),
]


@pytest.mark.parametrize(("style", "begin", "more"), ENDLESS)
def test_what_a_model_writes_without_an_end_is_looked_at_in_proportion(
    style: CallStyle, begin: str, more: str
) -> None:
    short, long = (
        num_examined(style, begin + more * (length // len(more))) for length in (1000, 4000)
    )
    assert long < 5 * short


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity"])
def test_an_object_with_a_number_that_json_does_not_have_is_text(number: str) -> None:
    splitter = CallSplitter(HERMES, ["f"])
    text = f'<tool_call>{{"arguments": {{"a": {number}}}, "name": "f"}}</tool_call>'
    pieces = [*splitter.push(text), *splitter.finish()]
    assert {kind for kind, _ in pieces} == {"answer"}
    assert "".join(piece for _, piece in pieces) == text


@pytest.mark.parametrize(
    ("style", "text", "answer"),
    [
        (LLAMA, '{"name": "f", "parameters": {"a":1}\n\nThe weather.', "The weather."),
        (LLAMA, '{"name": "f", "parameters": {"a":1}, more', ", more"),
        (LLAMA, '{"name": "f", "parameters": {"a":1}, "b": 2, and', ', "b": 2, and'),
        (LLAMA, '{"name": "f", "parameters": {"a":1}};\n', ""),
        (
            LLAMA,
            '{"name": "f", "parameters": {"a":1}, "so" it is: {1} or }. 4.',
            ', "so" it is: {1} or }. 4.',
        ),
        (HERMES, '<tool_call>{"name":"f","arguments":{"a":1}, "so\n</tool_call> It is 4.', None),
        (HERMES, '<tool_call>{"name":"f","arguments":{"a":1}, "id" : [2]}\n</tool_call>', ""),
        (HERMES, '<tool_call>{"name":"f","arguments":{"a":1} "x.\n</tool_call> It is 4.', None),
        (HERMES, '<tool_call>{"name":"f","arguments":{"a":1}, "id": 2}\n</tool_call>', ""),
        (HERMES, '<tool_call>{"name":"f","arguments":{"a":1}\n</tool_call>\nIt is 4.', "It is 4."),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_what_follows_on_a_call_without_its_last_brace_is_not_lost(
    style: CallStyle, text: str, answer: str | None, step: int
) -> None:
    splitter = CallSplitter(style, ["f"])
    pieces = [p for at in range(0, len(text), step) for p in splitter.push(text[at : at + step])]
    pieces += splitter.finish()
    told = {kind: "".join(one for k, one in pieces if k == kind) for kind, _ in pieces}
    assert (told["call"], told["arguments"]) == ("f", '{"a":1}')
    if answer is None:
        assert told["answer"].endswith("It is 4.")
    else:
        assert told.get("answer", "") == answer


@pytest.mark.parametrize(
    ("style", "call", "end"),
    [
        (LLAMA, '{"name": "put", "parameters": {}}', ""),
        (MISTRAL, '[TOOL_CALLS][{"name": "put", "arguments": {}}', "]"),
        (DEEPSEEK, f"{DEEPSEEK.begin}{DEEPSEEK.opening}put\n```json\n{{}}", "\n```"),
    ],
)
@pytest.mark.parametrize("text", ["; ] and more", ",more", "]] twice", "``` fenced", ", ; ,"])
def test_text_behind_a_call_is_whole(style: CallStyle, call: str, end: str, text: str) -> None:
    """What ends a call is none of it, and what separates calls is where no call follows."""
    told = split(style, [*call, *end, " ", *text, " end"])
    assert told == [("call", "put"), ("arguments", "{}"), ("answer", f"{text} end")]


def test_what_is_held_back_takes_a_few_bytes_a_character() -> None:
    text = '<tool_call>{"x": "' + "\N{CJK UNIFIED IDEOGRAPH-4E00}\N{DEVANAGARI LETTER KA}" * 10_000
    splitter = CallSplitter(HERMES, ["f"])
    tracemalloc.start()
    try:
        for at in range(0, len(text), 2):
            assert splitter.push(text[at : at + 2]) == []
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held <= 12 * len(text)
    assert splitter.held_bytes >= 8 * len(text)
    splitter.push('", <tool_call>')
    splitter.finish()
    assert splitter.held_bytes < 100


def test_a_line_in_a_key_that_never_ended_does_not_hide_the_next_call() -> None:
    splitter = CallSplitter(HERMES, ["f"])
    call = '<tool_call>{"name":"f","arguments":{}'
    pieces = splitter.push(f'{call}, "so\n</tool_call>\n{call}}}</tool_call> 4.')
    assert [text for kind, text in pieces if kind == "call"] == ["f", "f"]


@pytest.mark.parametrize("written", ['{"a":1]}', '{"a":[1}'])
def test_braces_alone_close_an_object(written: str) -> None:
    splitter = CallSplitter(HERMES, ["f"])
    text = f'<tool_call>{{"name":"f","arguments":{written}}}</tool_call> 4.'
    pieces = [*splitter.push(text), *splitter.finish()]
    assert ("".join(t for k, t in pieces if k == "arguments"), pieces[-1]) == (
        written,
        ("answer", "4."),
    )
