"""oneOf is taken where its branches exclude each other, and refused where two may hold at once."""

import json
from typing import Annotated, Any, Literal

import pytest
from llguidance import LLMatcher
from pydantic import BaseModel, Field

from thinslice.constraint import Constraint
from thinslice.errors import RequestError
from thinslice.text import exclusive
from thinslice.text.exclusive import Exclusion
from thinslice.text.json_schema import for_grammar
from thinslice.text.lark import grammar_of


class Wheels(BaseModel):
    kind: Literal["wheels"]
    count: int


class Legs(BaseModel):
    kind: Literal["legs", "feet"]
    count: int


class Wings(BaseModel):
    kind: Literal["wings"]
    colour: Literal["red", "blue"]
    folded: bool


class Walking(BaseModel):
    """A union within a branch."""

    by: Annotated[Wheels | Legs, Field(discriminator="kind")]


class Moving(BaseModel):
    by: Annotated[Wheels | Legs | Wings, Field(discriminator="kind")]
    before: list[Annotated[Legs | Wings, Field(discriminator="kind")]]


def told(schema: Any) -> str:
    """What the library has against a schema's grammar."""
    return LLMatcher.validate_grammar(grammar_of(Constraint.json_schema(schema), None, "none"))


@pytest.mark.parametrize("model", [Moving, Walking])
def test_a_discriminated_union_of_pydantic_is_taken(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    assert "oneOf" in json.dumps(schema)
    assert told(schema) == ""


def tagged(tag: Any, **more: Any) -> dict[str, Any]:
    found = {"type": "object", "properties": {"tag": tag}, "required": ["tag"]}
    return {**found, **more}


LEFT, RIGHT = tagged({"const": "a"}), tagged({"enum": ["b", "c"]})
SHOWN: list[list[Any]] = [
    [{"type": "string"}, {"type": ["integer", "null"]}],
    [{"const": 1}, {"const": 2}, {"const": "1"}, {"const": True}],
    [{"enum": [1, 2]}, {"enum": [3, "a"]}, {"type": "array"}],
    [LEFT, RIGHT],
    [LEFT, tagged({"type": "integer"})],
    [LEFT, tagged({"const": "b"}, type=["object", "null"])],
    [{"anyOf": [LEFT, RIGHT]}, tagged({"const": "d"})],
    [{"const": 0.5}, {"type": "integer"}],
    [LEFT, {**RIGHT, "required": []}],
]
NOT_SHOWN: list[list[Any]] = [
    [{"type": "integer"}, {"type": "number"}],
    [{"const": 1}, {"const": 1.0}],
    [{"enum": [1, 2]}, {"enum": [2, 3]}],
    [LEFT, tagged({"enum": ["b", "a"]})],
    [{**one, "required": []} for one in (LEFT, RIGHT)],
    [{**LEFT, "type": ["object", "null"]}, {**RIGHT, "type": ["object", "null"]}],
    [{key: one[key] for key in ("properties", "required")} for one in (LEFT, RIGHT)],
    [{"anyOf": [LEFT, RIGHT]}, RIGHT],
    [{"const": [1]}, {"const": [2]}],
    [{}, {"type": "string"}],
]


@pytest.mark.parametrize("branches", SHOWN)
def test_exclusion_is_shown(branches: list[Any]) -> None:
    assert Exclusion({}).is_shown(branches)
    schema = {
        "$defs": {f"d{number}": one for number, one in enumerate(branches)},
        "properties": {"x": {"oneOf": [{"$ref": f"#/$defs/d{n}"} for n in range(len(branches))]}},
    }
    assert Exclusion(schema).is_shown(schema["properties"]["x"]["oneOf"])  # type: ignore[index]
    assert told(schema) == ""


@pytest.mark.parametrize("branches", NOT_SHOWN)
def test_exclusion_is_not_shown(branches: list[Any]) -> None:
    assert not Exclusion({}).is_shown(branches)
    assert "oneOf constraints are not supported" in told({"oneOf": branches})


def test_schemas_that_refer_to_themselves_come_to_an_end() -> None:
    node = {
        "type": "object",
        "properties": {name: {"$ref": "#/$defs/node"} for name in "abcd"},
        "required": [*"abcd"],
    }
    loop = {"$ref": "#/$defs/loop"}
    found = Exclusion({"$defs": {"node": node, "loop": loop}})
    assert not found.is_shown([{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/node"}])
    assert not found.is_shown([loop, {"$ref": "#/$defs/missing"}])


def test_what_would_take_long_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    branches = [{"const": number} for number in range(50)]
    assert Exclusion({}).is_shown(branches)
    monkeypatch.setattr(exclusive, "_MOST_LOOKS", 1000)
    assert not Exclusion({}).is_shown(branches)


@pytest.mark.parametrize("long", [{"enum": [*range(5000)]}, {"required": [*map(str, range(5000))]}])
def test_a_long_list_is_looked_at_a_few_times_at_most(
    long: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many schemas refer to it, and round whatever circle."""
    num_looked = 0
    narrow = exclusive._narrow

    def counted(facts: Any, schema: Any) -> None:
        nonlocal num_looked
        num_looked += len(schema.get("enum", ())) + len(schema.get("required", ()))
        narrow(facts, schema)

    monkeypatch.setattr(exclusive, "_narrow", counted)
    ref = {"$ref": "#/$defs/long"}
    branches = [{"const": number, **ref} for number in range(190)]
    assert not Exclusion({"$defs": {"long": {**long, **ref}}}).is_shown(branches)
    assert num_looked <= exclusive._MOST_LOOKS


@pytest.mark.parametrize("index", ["\N{SUPERSCRIPT TWO}", "0" * 5000, "9" * 20])
def test_a_place_in_a_list_is_a_few_digits(index: str) -> None:
    with pytest.raises(RequestError, match="expected the place of a schema"):
        for_grammar({"oneOf": [{"type": "string"}, {"$ref": f"#/oneOf/{index}"}]})


def test_references_are_looked_up_from_the_document_alone() -> None:
    inner = {"$id": "http://x/y", "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}
    schema = {
        "$id": "http://x",
        "$defs": {"a": {"type": "string"}, "b": {"type": "integer"}},
        "properties": {"x": inner},
    }
    with pytest.raises(RequestError, match=r"has \$id 'http://x/y' within it"):
        for_grammar(schema)
    del inner["$id"]
    assert for_grammar(schema)["x-guidance"]["coerce_one_of"]
