"""JSON schemas as a grammar is made of them: what says nothing left out, what costs too much told.

Building an automaton is not interrupted, so what would take long is told by the schema: regexes
that are intersected, and numbers that are multiples of another. Measured in docs/grammar.md.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from thinslice.constraint import check_depth
from thinslice.errors import RequestError, shown
from thinslice.text.exclusive import Exclusion, is_index
from thinslice.units import KIB

Schema = dict[str, Any]
# Keywords whose value is a schema, a list of schemas, and schemas by name.
_ONE = (
    *("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not"),
    *("if", "then", "else", "unevaluatedProperties", "unevaluatedItems"),
)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# What says nothing of a document.
_NOTES = frozenset(
    (
        *("title", "description", "default", "examples", "example", "$comment", "$schema"),
        *("deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType"),
        *("discriminator", "strict", "nullable", "xml", "externalDocs", "x-guidance"),
    )
)
# Others are notes as well, as the standard has it.
_FORMATS = frozenset(
    (
        *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6"),
        *("uuid", "uri"),
    )
)
_JOINING = frozenset(("anyOf", "oneOf", "$ref"))
_MAX_BYTES = 128 * KIB
_MAX_PATTERN_PROPERTIES = 16
_MAX_JOINED_PATTERNS = 8
_MAX_PATTERN = 1024
_MAX_MULTIPLE = 100_000
# RFC 3339's, with no more digits of a second than any clock has.
_TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
    r"([Zz]|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_DATE = (
    r"[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    r"|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_AS_PATTERNS = {"time": f"^{_TIME}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}
# Integers that every reader of JSON has (RFC 8259, section 6), and digits behind a point.
_LARGEST_INTEGER = (1 << 53) - 1
_SMALLEST_FRACTION = 1e-9
_LOW, _HIGH = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
# White space between two signs: as models write it, and no more than a model can come out of.
_SPACE = {"whitespace_pattern": r"\n? {0,32}"}


def for_grammar(given: object) -> Schema:
    """The schema that a grammar is made of.

    It is narrower where a small model would not come to an end, so that what is written is of the
    schema all the same. Objects that name their properties take no others where the schema does not
    speak of others. Integers have at most 53 bits, and numbers with bounds nine digits behind the
    point; those of a second are as many.
    Errors: RequestError for what is no schema, and for one whose automaton may become too large.
    """
    check_depth(given)
    if given is True:
        given = {}
    if not isinstance(given, Mapping):
        raise RequestError(f"the schema is {shown(given)}; expected a JSON object")
    schema = _without_notes(given)
    every = list(_schemas(schema))
    for one in every:
        _check_place(one.get("$ref", "#"))
        if "$id" in one and one is not schema:
            raise RequestError(
                f"the schema has $id {shown(one['$id'])} within it, from where $ref would be "
                "looked up; leave it out"
            )
    _check_patterns(every)
    _check_multiples(every)
    for one in every:
        _bound_digits(one)
    if not any(_joins(one) or "patternProperties" in one for one in every):
        for one in every:
            _close(one)
    return {"x-guidance": {**_SPACE, "coerce_one_of": _are_exclusive(schema, every)}, **schema}


def _are_exclusive(schema: Schema, every: Sequence[Schema]) -> bool:
    """Whether oneOf says what anyOf says, wherever it stands."""
    exclusion = Exclusion(schema)
    return all(exclusion.is_shown(one["oneOf"]) for one in every if "oneOf" in one)


def check_together(schemas: Sequence[Schema]) -> None:
    """Errors: RequestError for schemas of one grammar, as ``for_grammar`` gives them, whose
    automata may become too large together."""
    num_bytes = sum(len(json.dumps(one)) for one in schemas)
    if num_bytes > _MAX_BYTES:
        raise RequestError(
            f"the functions' schemas have {num_bytes} bytes together, without what only describes; "
            f"at most {_MAX_BYTES} are turned into a grammar"
        )
    of_each = [list(_schemas(one)) for one in schemas]
    named = sum(len(one.get("patternProperties", ())) for every in of_each for one in every)
    joined = sum(_num_patterns(every) for every in of_each if any(map(_joins, every)))
    multiples = sum(_numerator(one) for every in of_each for one in every if "multipleOf" in one)
    for count, most, what in (
        (named, _MAX_PATTERN_PROPERTIES, "patternProperties"),
        (joined, 4 * _MAX_JOINED_PATTERNS, "patterns and formats in joined schemas"),
        (multiples, _MAX_MULTIPLE, "as the sum of their values of multipleOf"),
    ):
        if count > most:
            raise RequestError(
                f"the functions' schemas have {count} {what}; at most {most} are turned into a "
                "grammar"
            )


def _without_notes(given: Mapping[str, Any]) -> Schema:
    """Errors: RequestError for keywords whose value is of another kind than theirs."""
    schema: Schema = {}
    for key, value in given.items():
        _check_kind(key, value)
        if key in _NOTES or (key == "format" and value not in _FORMATS):
            continue
        if key in _LISTS or (key in _ONE and isinstance(value, list)):
            value = [_inner(one) for one in value]
        elif key in _NAMED:
            value = {name: _inner(one) for name, one in value.items()}
        elif key in _ONE:
            value = _inner(value)
        schema[key] = value
    return schema


def _check_kind(key: str, value: object) -> None:
    """Errors: RequestError."""
    if key in _LISTS and not isinstance(value, list):
        expected = "a list of schemas"
    elif key in _NAMED and not isinstance(value, Mapping):
        expected = "schemas by name"
    elif key == "format" and not isinstance(value, str):
        expected = "a text"
    elif key == "required" and not _are_texts(value):
        expected = "a list of texts"
    else:
        return
    raise RequestError(f"the schema has {key} {shown(value)}; expected {expected}")


def _check_place(ref: object) -> None:
    """Errors: RequestError for a reference to what need not be a schema by its place, or to another
    document: nothing bounds what stands there."""
    path = unquote(ref) if isinstance(ref, str) else ""
    # A name with a slash in it might be read as two.
    if isinstance(ref, str) and path[:2] in ("#", "#/") and path.count("/") == ref.count("/"):
        keys = iter(path.split("/")[1:])
        if all(
            key in _ONE
            or (key in _NAMED and next(keys, None) is not None)
            or (key in _LISTS and is_index(next(keys, "")))
            for key in keys
        ):
            return
    raise RequestError(
        f"the schema has $ref {shown(ref)}; expected the place of a schema in the same document, "
        "such as #/$defs/NAME"
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _inner(value: Any) -> Any:
    return _without_notes(value) if isinstance(value, Mapping) else value


def _schemas(schema: Schema) -> Iterator[Schema]:
    """A schema and all in it."""
    yield schema
    inner: list[Any] = []
    for key in (*_ONE, *_LISTS, *_NAMED):
        found = schema.get(key, ())
        if key in _NAMED and found:
            inner += found.values()
        else:  # older drafts have a list of items
            inner += found if isinstance(found, list) else [found]
    for one in inner:
        if isinstance(one, dict):
            yield from _schemas(one)


def _check_patterns(every: list[Schema]) -> None:
    patterns = [one["pattern"] for one in every if "pattern" in one]
    named = [name for one in every for name in one.get("patternProperties", ())]
    for pattern in (*patterns, *named):
        if not isinstance(pattern, str) or len(pattern) > _MAX_PATTERN:
            raise RequestError(f"the schema has a pattern {shown(pattern)}; expected a short text")
    if len(named) > _MAX_PATTERN_PROPERTIES:
        raise RequestError(
            f"the schema has {len(named)} patternProperties; at most {_MAX_PATTERN_PROPERTIES} are "
            "turned into a grammar, as each is held against each"
        )
    count = _num_patterns(every)
    if count > _MAX_JOINED_PATTERNS and any(_joins(one) for one in every):
        raise RequestError(
            f"the schema has {count} patterns and formats beside allOf, or $ref, anyOf or oneOf "
            f"that stand beside further keywords; at most {_MAX_JOINED_PATTERNS} are turned into a "
            "grammar then, as they may have to hold together"
        )


def _num_patterns(every: list[Schema]) -> int:
    return sum(
        len(one.get("patternProperties", ())) + len(one.keys() & {"pattern", "format"})
        for one in every
    )


def _joins(schema: Schema) -> bool:
    """Whether a value has to be of several schemas at once."""
    kept = schema.keys() - {"$defs", "definitions", "$id", "type"}
    return "allOf" in schema or (bool(kept & _JOINING) and len(kept) > 1)


def _check_multiples(every: list[Schema]) -> None:
    found: set[int] = set()
    total = 0
    for one in every:
        if "multipleOf" not in one:
            continue
        number = one["multipleOf"]
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 0 < number < math.inf:
            raise RequestError(f"the schema has multipleOf {shown(number)}; expected a number")
        numerator = _numerator(one)
        found.add(numerator)
        total += numerator
    if max(total, math.prod(found)) > _MAX_MULTIPLE:
        raise RequestError(
            f"the schema's values of multipleOf, {json.dumps(sorted(found))[:60]}, are too large "
            f"for a grammar; their product and their sum are at most {_MAX_MULTIPLE}"
        )


def _numerator(schema: Schema) -> int:
    return Fraction(str(schema["multipleOf"])).numerator


def _bound_digits(schema: Schema) -> None:
    if "pattern" not in schema and schema.get("format") in _AS_PATTERNS:
        schema["pattern"] = _AS_PATTERNS[schema.pop("format")]
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if schema.keys() & {"enum", "const"}:
        return
    if "integer" in kinds and "number" not in kinds:
        if not schema.keys() & set(_LOW):
            schema["minimum"] = -_LARGEST_INTEGER
        if not schema.keys() & set(_HIGH):
            schema["maximum"] = _LARGEST_INTEGER
    elif "number" in kinds and schema.keys() & {*_LOW, *_HIGH}:
        schema.setdefault("multipleOf", _SMALLEST_FRACTION)


def _close(schema: Schema) -> None:
    properties = schema.get("properties")
    is_alone = not schema.keys() & {*_JOINING, "additionalProperties", "unevaluatedProperties"}
    has_more = "minProperties" in schema or "maxProperties" in schema
    if not properties or not is_alone or has_more:
        return
    if all(name in properties for name in schema.get("required", [])):
        schema["additionalProperties"] = False
