"""Whether the branches of ``oneOf`` exclude each other: then it says what ``anyOf`` says.

That is shown by what a value has to be: of other kinds, one of other values, or an object with a
property that has to be there in one of the two and is told apart so itself, as pydantic writes
unions that have a discriminator.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any]
_KINDS = frozenset(("null", "boolean", "string", "array", "object", "integer", "fraction"))
_OF_TYPE = {"number": frozenset(("integer", "fraction"))}
# What is looked at for one document, 0.2 s: pairs of schemas, and values and names of properties;
# and how far into them.
_MOST_LOOKS = 20_000
_MAX_DEPTH = 6
_LONG = ("enum", "required", "properties")
_MOST_DIGITS = 6


@dataclass
class _Facts:
    """What holds of every value of a schema.

    Attributes:
        kinds: it may be of.
        values: that it may be, as (kind, value); None where they are not named.
        required: properties that an object has.
        named: schemas of its properties, where it has them.
        unions: of each, one branch holds at least.
    """

    kinds: frozenset[str] = _KINDS
    values: frozenset[tuple[str, Any]] | None = None
    required: set[str] = field(default_factory=set)
    named: dict[str, list[Any]] = field(default_factory=dict)
    unions: list[list[Any]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How much there is to compare."""
        return len(self.values or ()) + len(self.required) + len(self.named)


class Exclusion:
    """Looks for what shows that schemas of one document exclude each other.

    Args:
        root: the document, as ``json_schema.for_grammar`` checks it.
    """

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._num_left = _MOST_LOOKS
        # By the identity of a schema, all of which the document keeps.
        self._known: dict[int, _Facts] = {}

    def is_shown(self, branches: Iterable[Any]) -> bool:
        """Whether each branch excludes each other one; False also where that takes long."""
        return all(self._exclude(one, other, 0) for one, other in combinations(branches, 2))

    def _exclude(self, one: Any, other: Any, depth: int) -> bool:
        first, second = self._facts(one), self._facts(other)
        self._num_left -= 1 + min(first.size, second.size)
        if self._num_left < 0 or depth > _MAX_DEPTH:
            return False
        if not first.kinds & second.kinds:
            return True
        if first.values is not None and second.values is not None:
            return not first.values & second.values
        if (first.kinds & second.kinds) == {"object"}:
            both = first.named.keys() & second.named.keys()
            for name in both & (first.required | second.required):
                pairs = ((a, b) for a in first.named[name] for b in second.named[name])
                if any(self._exclude(a, b, depth + 1) for a, b in pairs):
                    return True
        return any(
            all(self._exclude(branch, against, depth + 1) for branch in union)
            for facts, against in ((first, other), (second, one))
            for union in facts.unions
        )

    def _facts(self, schema: Any) -> _Facts:
        """Of a schema, and of those that it refers to: all of them hold.

        Where no more is to be looked at, less is found than holds.
        """
        if id(schema) not in self._known:
            self._known[id(schema)] = self._found(schema)
        return self._known[id(schema)]

    def _found(self, schema: Any) -> _Facts:
        facts = _Facts()
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, Mapping):
                break
            parts = (schema.get(key) for key in _LONG)
            self._num_left -= sum(len(one) for one in parts if isinstance(one, list | Mapping))
            if self._num_left < 0:
                break
            _narrow(facts, schema)
            facts.required.update(schema.get("required", ()))
            for name, one in schema.get("properties", {}).items():
                facts.named.setdefault(name, []).append(one)
            facts.unions += [schema[key] for key in ("anyOf", "oneOf") if key in schema]
            schema = self._at(schema["$ref"]) if "$ref" in schema else None
        return facts

    def _at(self, ref: str) -> Any:
        """What stands at a place; None where nothing does."""
        found: Any = self._root
        for key in unquote(ref).split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                found = found[int(key)] if is_index(key) and int(key) < len(found) else None
            else:
                found = found.get(key) if isinstance(found, Mapping) else None
        return found


def is_index(key: str) -> bool:
    """Whether a part of a reference is a place in a list. Its digits are ASCII's, and few."""
    return key.isascii() and key.isdigit() and len(key) <= _MOST_DIGITS


def _narrow(facts: _Facts, schema: Schema) -> None:
    """Add what a schema says of kinds and values by itself."""
    given = schema.get("type")
    names = given if isinstance(given, list) else [given]
    if given is not None and all(isinstance(name, str) for name in names):
        facts.kinds &= frozenset().union(*(_OF_TYPE.get(str(name), {name}) for name in names))
    named = list(schema["enum"]) if isinstance(schema.get("enum"), list) else None
    if "const" in schema:
        named = [schema["const"]]
    if named is None:
        return
    values = [(_kind(value), value) for value in named]
    facts.kinds &= {kind for kind, _ in values}
    # Lists and objects are not compared.
    if not {"array", "object"} & {kind for kind, _ in values}:
        before = facts.values
        facts.values = frozenset(values) if before is None else before & frozenset(values)


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if value == value // 1 else "fraction"
    kinds = {str: "string", list: "array", type(None): "null"}
    return kinds.get(type(value), "object")
