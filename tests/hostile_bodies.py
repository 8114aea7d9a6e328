"""Bodies that mean harm, or that a broken client sends: mutations of good ones."""

import json
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Good:
    """A body that is taken.

    Attributes:
        fields: names of all that its path knows.
    """

    path: str
    example: dict[str, Any]
    fields: Sequence[str]


def nested(depth: int, inner: Any = None) -> Any:
    """Lists and objects in each other."""
    for place in range(depth):
        inner = [inner] if place % 2 else {"a": inner}
    return inner


_SCHEMAS: list[Any] = [
    {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
    {"type": "string", "pattern": "(a*)*(b|a)*$"},
    {"type": "string", "pattern": "[" * 300},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1 << 40},
    {"enum": [1, "a", None, 1.5, [], {}]},
    {"anyOf": [{"type": "integer"}] * 2000},
    nested(60, {"type": "object"}),
]
_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 1 << 63, -(1 << 63) - 1, 10**400, 1e308, -0.0, 5e-324),
    *(float("nan"), float("inf"), "", " ", "a", "none", "auto", "a" * 20_000, "\0", "\ud800"),
    *("\udfff\ud800", "\u202e\ufeff", "\U0001f600" * 50, "e\u0301" * 500, "<|im_start|>system"),
    *("data:image/png;base64,AAAA", "{{ 7 * 7 }}", "../../etc/passwd", "</think>", "<think>"),
    *([], {}, [[]], [None] * 500, [""], [1] * 500, [1 << 70], {"": {}}, {"a" * 5000: 1}),
    *({"role": "user"}, {"role": "user", "content": None}, {"role": 5, "content": {}}),
    *([{"role": "user", "content": "a"}] * 50, [{"role": "tool", "content": "x"}]),
    *([{"type": "text", "text": "\ud83d"}], [{"type": "image_url", "image_url": {"url": "x"}}]),
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
    *(nested(40), nested(400), nested(40, "x")),
    *({"type": "json_schema", "json_schema": {"name": "x", "schema": one}} for one in _SCHEMAS),
    *({"type": "function", "function": {"name": "f", "parameters": one}} for one in _SCHEMAS),
    *([{"type": "function", "function": {"name": "f", "parameters": one}}] for one in _SCHEMAS),
    *([{"name": "f", "input_schema": one}] for one in _SCHEMAS),
    *({"json": one} for one in _SCHEMAS),
    *({"regex": "(a|b)*c"}, {"regex": "(" * 200}, {"regex": "a{1,99999}"}, {"choice": ["a", ""]}),
    *({"type": "enabled", "budget_tokens": 10**30}, {"type": "json_object"}, {"type": "tool"}),
]
_BYTES = [
    b"\0",
    b"\xff\xfe",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"NaN",
    b"-",
    b"1e999",
    b"\\ud800",
    b'"',
]


def mutated(draws: random.Random, good: Good) -> bytes:
    """A body made of a good one by some mutations; perhaps it is still good."""
    body = json.loads(json.dumps(good.example))
    for _ in range(draws.choice((1, 1, 1, 2, 3))):
        _mutate(draws, body, good.fields)
    content = json.dumps(body).encode()
    return _broken(draws, content) if draws.random() < 0.35 else content


def _mutate(draws: random.Random, body: dict[str, Any], fields: Sequence[str]) -> None:
    value = deepcopy(draws.choice(_VALUES))
    kind = draws.randrange(4)
    if kind == 0:
        body[draws.choice(fields)] = value
        return
    if kind == 1:
        name = "x" * draws.choice((1, 100, 30_000)) + str(draws.random())
        body[name] = value
        return
    holder: Any = body
    while True:
        keys = [*holder] if isinstance(holder, dict) else [*range(len(holder))]
        if len(keys) > 1 and draws.random() < 0.8:
            keys = [key for key in keys if key != "model"]  # nothing else is looked at then
        key = draws.choice(keys)
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or draws.random() < 0.4:
            break
        holder = inner
    if kind == 2 and len(holder) > 1:
        del holder[key]
    else:
        holder[key] = value


def _broken(draws: random.Random, content: bytes) -> bytes:
    """The text of a body with something wrong in it."""
    place = draws.randrange(len(content) + 1)
    text = content.decode()
    return draws.choice(
        (
            lambda: content[:place],
            lambda: content[:place] + draws.choice(_BYTES) + content[place:],
            lambda: content[:place] + draws.randbytes(8) + content[place + 8 :],
            lambda: text.encode(
                draws.choice(("utf-16", "utf-32", "utf-16-le", "utf-8-sig", "cp037"))
            ),
            lambda: b"[" * draws.choice((100, 5000, 90_000)),
            lambda: b'{"a":' * draws.choice((100, 20_000)),
            lambda: b"1" * draws.choice((10, 5000, 200_000)),
            lambda: content[:-1] + b"," + content[1:],  # all keys twice
            lambda: content + content,
            lambda: content + b" " * 300_000,
            lambda: b"",
        )
    )()
