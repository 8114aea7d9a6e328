"""Constraint: the form that an answer must have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from thinslice.errors import RequestError, shown
from thinslice.units import KIB

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
# Of text, as far as it is measured in docs/grammar.md. Building takes up to 0.5 s and 50 MiB at
# the first, of its worst schemas; a regex's automaton grows with the square of its length.
_MOST_BYTES = {"json_schema": 128 * KIB, "choice": 64 * KIB, "regex": 4 * KIB, "grammar": 64 * KIB}
_MAX_CHOICES = 4096
# Levels of objects and lists in a schema; OpenAI's API takes 10 levels of objects.
MAX_DEPTH = 64


@dataclass(frozen=True)
class Constraint:
    """The form that an answer must have; a thought before it is free.

    Made by ``json_object``, ``json_schema``, ``regex``, ``choice`` and ``grammar``.

    Attributes:
        kind: what ``text`` is.
        text: a JSON schema, a regex in the syntax of Rust's ``regex`` without assertions, a JSON
            list of texts, or a grammar in llguidance's variant of Lark; nothing for json_object.

    Errors: RequestError for what is no such text, or too large.
    """

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise RequestError(f"a constraint of kind {shown(self.kind)}; one of {kinds}")
        if not isinstance(self.text, str) or (self.kind == "json_object") != (not self.text):
            raise RequestError(f"the text of a constraint is {shown(self.text)}")
        num_bytes, most = len(self.text.encode(errors="replace")), _MOST_BYTES.get(self.kind, 0)
        if num_bytes > most:
            raise RequestError(
                f"the {self.kind} has {num_bytes} bytes; at most {most} are turned into a grammar"
            )

    @classmethod
    def json_object(cls) -> "Constraint":
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def json_schema(cls, schema: Mapping[str, object] | bool | str) -> "Constraint":
        """A JSON document of a schema, which may be given as text.

        Errors: RequestError for what is no JSON, or nested too deeply.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"the schema is no JSON: {error}") from None
        if not isinstance(schema, dict | bool):
            raise RequestError(f"the schema is {shown(schema)}; expected a JSON object")
        check_depth(schema)
        return cls("json_schema", _written(schema, "the schema"))

    @classmethod
    def regex(cls, pattern: str) -> "Constraint":
        """A text that a regex matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Constraint":
        """One of some texts. Errors: RequestError for what is no list of them."""
        is_list = isinstance(texts, list | tuple) and 0 < len(texts) <= _MAX_CHOICES
        if not is_list or not all(isinstance(one, str) and one for one in texts):
            raise RequestError(
                f"choice is {shown(texts)}; expected a list of 1 to {_MAX_CHOICES} texts"
            )
        return cls("choice", _written(list(texts), "choice"))

    @classmethod
    def grammar(cls, lark: str) -> "Constraint":
        """A text of a grammar, whose rule ``start`` is the whole.

        Work for each token is not bounded in a grammar that is ambiguous: not for strangers'.
        """
        return cls("grammar", lark)


def check_depth(value: object) -> None:
    """Errors: RequestError for a JSON value nested more deeply than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (
            one.values() if isinstance(one, dict) else one
            for one in level
            if isinstance(one, dict | list)
        )
        level = [value for values in inner for value in values]
        if not level:
            return
    raise RequestError(f"the schema is nested more than {MAX_DEPTH} levels deep")


def _written(value: object, what: str) -> str:
    """Errors: RequestError for what JSON cannot say."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{what} is no JSON: {error}") from None
