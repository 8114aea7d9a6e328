"""SmolLM2 writes documents of given schemas, and calls functions where it has to.

Twenty-two schemas in each run, and 200 that are drawn with ``--long``: each gives a document that
an independent validator takes, or a line that says why it cannot be followed; few are cut.
"""

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.tiny_llm import beside
from thinslice import LLM, Conversation, SamplingParams
from thinslice.constraint import Constraint
from thinslice.errors import RequestError
from thinslice.memory.meter import anonymous_bytes
from thinslice.units import GIB

ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string", "maxLength": 30}, "zip": {"pattern": "^[0-9]{5}$"}},
    "required": ["street", "zip"],
}
ADDRESS["properties"]["zip"]["type"] = "string"  # type: ignore[index]
NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 9},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
}
WORD = {"type": "string", "maxLength": 12}
COLOUR = {"enum": ["red", "green", 3, None, True]}


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


SCHEMAS: list[Any] = [
    record(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 120}),
    record(colour=COLOUR),
    {"type": "array", "items": COLOUR, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": record(x={"type": "number", "minimum": -1, "maximum": 1})}
    | {"maxItems": 3},
    {"$defs": {"address": ADDRESS}, **record(home={"$ref": "#/$defs/address"})},
    {"anyOf": [record(a={"const": 1}), record(b={"const": 2})]},
    {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    record(when={"type": "string", "format": "date"}),
    record(when={"type": "string", "format": "date-time"}),
    record(id={"type": "string", "format": "uuid"}),
    record(kind={"const": "circle"}, radius={"type": "integer", "multipleOf": 5, "maximum": 100}),
    {"prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "type": "array"}
    | {"minItems": 2},
    record(inner=record(inner=record(inner={"type": "boolean"}))),
    {"allOf": [record(a={"type": "boolean"}), record(b={"type": "null"})]}
    | {"unevaluatedProperties": True},
    record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}),
    {"type": ["integer", "null"], "minimum": 1, "maximum": 10},
    record(tags={"type": "array", "items": WORD, "maxItems": 3}, note={"type": ["null"]}),
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 1},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"allOf": [{"type": "string", "minLength": 3}, {"type": "string", "maxLength": 8}]},
    {"const": {"a": [1, 2.5, "x"], "b": {}}},
    record(flag={"type": "boolean", "title": "Flag", "description": "x", "default": False}),
]
# What is said of those that no grammar is made of.
UNKNOWN = ("Unimplemented keys", "not supported")
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": told,
            "parameters": record(city=WORD, unit={"enum": ["C", "F"]}),
        },
    }
    for name, told in (("get_weather", "The weather of a city."), ("get_forecast", "Tomorrow's."))
]
CITIES = ("Paris", "Oslo", "Lima", "Rome", "Delhi", "Cairo", "Quito", "Bonn", "Bern", "Perth")


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_path), memory=beside(GIB), context=1024) as found:
        yield found


def drawn(rng: random.Random, depth: int = 0) -> Any:
    """A schema whose documents come to an end."""
    kinds = ["integer", "string", "enum", "number", "boolean", "format"]
    kinds += [] if depth > 2 else ["object", "array", "union", "object"]
    kind = rng.choice(kinds) if depth else "object"
    if kind == "object":
        names = rng.sample(["a", "b", "name", "value", "size", "title", "type"], rng.randint(1, 3))
        found = record(**{name: drawn(rng, depth + 1) for name in names})
        found["required"] = [one for one in names if rng.random() < 0.7]
        return found
    if kind == "array":
        return {"type": "array", "items": drawn(rng, depth + 1), "maxItems": rng.randint(1, 3)}
    if kind == "union":
        return {"anyOf": [drawn(rng, depth + 1), drawn(rng, depth + 1)]}
    if kind in ("integer", "number"):
        low = rng.randint(-50, 50)
        return {"type": kind, "minimum": low, "maximum": low + rng.randint(0, 1000)}
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 12)}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "time", "ipv4", "int64"])}
    return {"type": "boolean"} if kind == "boolean" else {"enum": rng.sample(["x", "y", 1, 2], 2)}


def schemas(is_long: bool) -> list[Any]:
    if not is_long:
        return SCHEMAS
    rng = random.Random(11)
    return [*SCHEMAS, *(drawn(rng) for _ in range(200))]


def test_documents_are_of_their_schemas(llm: LLM, is_long: bool) -> None:
    messages = [{"role": "user", "content": "Write a JSON document as an example."}]
    params, refused = list[SamplingParams](), list[str]()
    for number, schema in enumerate(schemas(is_long)):
        constraint = Constraint.json_schema(schema)
        try:
            llm.prepare(messages, SamplingParams(constraint=constraint))
        except RequestError as error:
            refused.append(str(error))
            continue
        more = {"temperature": 0.0} if number % 2 else {"temperature": 1.0}
        params.append(SamplingParams(max_tokens=300, seed=number, constraint=constraint, **more))
    completions = llm.generate([messages] * len(params), params)
    num_cut = 0
    for completion, one in zip(completions, params, strict=True):
        assert one.constraint is not None
        assert completion.finish_reason in ("stop", "length"), completion.error
        if completion.finish_reason == "length":
            num_cut += 1
        else:
            jsonschema.validate(json.loads(completion.text), json.loads(one.constraint.text))
    assert len(refused) <= 2
    assert all(any(one in told for one in UNKNOWN) for told in refused), refused
    assert num_cut <= 0.05 * len(completions), num_cut


@dataclass
class Followed:
    completion_token_ids: list[int]


def regexes(number: int) -> str:
    """Of few letters, with as many states as there are texts."""
    several = "|".join(f"[ab]*a[ab]{{{count}}}" for count in range(900, 1000 + number))
    return rf"([a-c]{{1,60}}a){{30}}b{number}" if number % 2 else several


def test_automata_of_many_states_keep_to_what_is_promised_to_them(llm: LLM) -> None:
    row, rng = np.zeros(llm.tokenizer.vocab_size, np.float32), random.Random(1)
    results = llm.engine.results

    def follow(regex: str) -> None:
        params = SamplingParams(constraint=Constraint.regex(regex))
        grammar = llm.prepare("x", params).grammar
        assert grammar is not None
        follower, token_ids = grammar.follower(), list[int]()
        free = sorted(set(range(len(row))) - grammar.ends)
        with suppress(RequestError):  # where there are too many states
            while len(token_ids) < 500:
                allowed = np.isfinite(follower(row, Followed(token_ids), []))[free]
                if not allowed.any():
                    return
                token_ids.append(free[rng.choice(np.flatnonzero(allowed))])

    llm._prompts.close()  # what is kept of other tests has its room already
    follow("abc|abd")
    before, left = anonymous_bytes(), results.left_bytes
    for number in range(12):
        follow(regexes(number))
    assert anonymous_bytes() - before <= left - results.left_bytes


def test_what_has_to_be_called_is_called(llm: LLM, is_long: bool) -> None:
    """Its template has no place for tools: they stand in the system prompt."""
    asked = [
        Conversation(
            [{"role": "user", "content": f"How warm is it in {CITIES[number % 10]}?"}],
            TOOLS,
            "required",
            parallel_tool_calls=False,
        )
        for number in range(200 if is_long else 10)
    ]
    params = [
        SamplingParams(max_tokens=120, seed=seed, temperature=1.0) for seed in range(len(asked))
    ]
    for completion in llm.generate(asked, params):
        assert completion.finish_reason == "stop"
        (call,) = completion.tool_calls
        assert call.name in ("get_weather", "get_forecast")
        jsonschema.validate(json.loads(call.arguments), TOOLS[0]["function"]["parameters"])
