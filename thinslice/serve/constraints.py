"""The form that a request asks of its answer, as each interface writes it."""

import re
from typing import Any, TypeGuard

from thinslice.constraint import Constraint
from thinslice.errors import RequestError
from thinslice.serve.errors import ApiError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def constraint_of(response_format: object, structured_outputs: object = None) -> Constraint | None:
    """OpenAI's ``response_format``, or vLLM's ``structured_outputs``. Errors: ApiError 400."""
    if structured_outputs is not None:
        if response_format is not None and _kind(response_format) != "text":
            told = "response_format and structured_outputs both name a form; give one of them"
            raise ApiError(400, told, "structured_outputs")
        return _structured(structured_outputs)
    where = "response_format"
    if _is_schema(response_format, where):
        return _named_schema(response_format.get("json_schema"), f"{where}.json_schema")
    return _without_schema(response_format)


def responses_constraint(form: dict[str, Any] | None) -> Constraint | None:
    """The ``text.format`` of ``/v1/responses``. Errors: ApiError 400."""
    where = "text.format"
    return _named_schema(form, where) if _is_schema(form, where) else _without_schema(form)


def schema_constraint(schema: object, where: str) -> Constraint:
    """Errors: ApiError 400 for what is no schema."""
    if not isinstance(schema, dict | bool):
        raise ApiError(400, f"{where}: {schema!r:.60} is no JSON schema", where)
    return _made(Constraint.json_schema, schema, where)


def anthropic_constraint(output_config: dict[str, Any] | None) -> Constraint | None:
    """Anthropic's ``output_config``, but for its effort. Errors: ApiError 400."""
    config = {key: value for key, value in (output_config or {}).items() if value is not None}
    more = ", ".join(sorted(config.keys() - {"effort", "format"}))
    if more:
        raise ApiError(400, f"output_config.{more} is not supported here", f"output_config.{more}")
    if "format" not in config:
        return None
    form, where = config["format"], "output_config.format"
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        raise ApiError(400, f"{where}: the type is not json_schema", where)
    return schema_constraint(form.get("schema"), f"{where}.schema")


def ollama_constraint(form: object) -> Constraint | None:
    """Ollama's ``format``: nothing, "json" or a schema. Errors: ApiError 400."""
    if form is None or form == "":
        return None
    return Constraint.json_object() if form == "json" else schema_constraint(form, "format")


def _kind(form: object) -> object:
    return form.get("type") if isinstance(form, dict) else None


def _is_schema(form: object, where: str) -> TypeGuard[dict[str, Any]]:
    """Whether a form that OpenAI's API names has a schema. Errors: ApiError 400 for another."""
    kind = _kind(form)
    if form is not None and kind not in ("text", "json_object", "json_schema"):
        told = f"the type is {kind!r:.60}; one of text, json_object, json_schema"
        raise ApiError(400, f"{where}: {told}", f"{where}.type")
    return kind == "json_schema"


def _without_schema(form: object) -> Constraint | None:
    return Constraint.json_object() if _kind(form) == "json_object" else None


def _named_schema(given: object, where: str) -> Constraint:
    if not isinstance(given, dict):
        raise ApiError(400, f"{where} is missing", where)
    name = given.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        told = "expected up to 64 letters, digits, _ and -"
        raise ApiError(400, f"{where}: the name is {name!r:.60}; {told}", f"{where}.name")
    if not isinstance(given.get("strict", False), bool | None):
        raise ApiError(400, f"{where}: strict is neither true nor false", f"{where}.strict")
    return schema_constraint(given.get("schema"), f"{where}.schema")


def _structured(given: object) -> Constraint:
    where = "structured_outputs"
    makers = {"regex": Constraint.regex, "choice": Constraint.choice, "json": None}
    known = {} if not isinstance(given, dict) else {k: v for k, v in given.items() if v is not None}
    if len(known) != 1 or not known.keys() <= makers.keys():
        told = f"{where} is {given!r:.60}; expected one of json, regex and choice"
        raise ApiError(400, told, where)
    ((key, value),) = known.items()
    maker = makers[key]
    if maker is None:
        return schema_constraint(value, f"{where}.json")
    return _made(maker, value, f"{where}.{key}")


def _made(maker: Any, value: object, where: str) -> Constraint:
    try:
        made: Constraint = maker(value)
    except RequestError as error:
        raise ApiError(400, f"{where}: {error}", where) from error
    return made
