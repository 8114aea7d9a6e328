"""The interface as an OpenAPI document: FastAPI's, with the answers and errors of each path.

What a path answers stands in one table, as the routes write their answers themselves.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from thinslice.serve import forms, more_forms
from thinslice.serve.guard import PUBLIC

_JSON, _EVENTS, _LINES = "application/json", "text/event-stream", "application/x-ndjson"
_REFERENCE = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Answer:
    """What a path answers.

    Attributes:
        form: of the whole answer; None for text.
        stream: the media type of a stream and the form of an event in it.
        about: what it is.
        example: of a body, without the model's name; None where it takes none.
    """

    form: type[BaseModel] | None
    stream: tuple[str, type[BaseModel]] | None = None
    about: str = "The answer."
    example: Mapping[str, Any] | None = None


_MESSAGES = {"messages": [{"role": "user", "content": "Name three rivers."}]}
_SHORT = {"max_tokens": 64}
_OPTIONS = {"options": {"num_predict": 64}}
ANSWERS: Mapping[str, Answer] = {
    "/v1/chat/completions": Answer(
        forms.ChatAnswer, (_EVENTS, forms.ChatChunk), example={**_MESSAGES, **_SHORT}
    ),
    "/v1/completions": Answer(
        forms.CompletionAnswer,
        (_EVENTS, forms.CompletionAnswer),
        example={"prompt": "Once upon a time", **_SHORT},
    ),
    "/v1/responses": Answer(
        forms.ResponseAnswer,
        (_EVENTS, forms.ResponseEvent),
        example={"input": "Name three rivers.", "max_output_tokens": 64},
    ),
    "/v1/messages": Answer(
        more_forms.MessageAnswer,
        (_EVENTS, more_forms.MessageEvent),
        example={**_MESSAGES, **_SHORT},
    ),
    "/v1/messages/count_tokens": Answer(more_forms.TokenCount, example=_MESSAGES),
    "/api/chat": Answer(
        more_forms.OllamaChatAnswer,
        (_LINES, more_forms.OllamaChatAnswer),
        example={**_MESSAGES, **_OPTIONS},
    ),
    "/api/generate": Answer(
        more_forms.OllamaGenerateAnswer,
        (_LINES, more_forms.OllamaGenerateAnswer),
        example={"prompt": "Name three rivers.", **_OPTIONS},
    ),
    "/api/tags": Answer(more_forms.OllamaModels),
    "/api/ps": Answer(more_forms.OllamaModels),
    "/api/show": Answer(more_forms.OllamaShown, example={}),
    "/api/version": Answer(more_forms.OllamaVersion),
    "/v1/models": Answer(forms.ModelList),
    "/v1/models/{name}": Answer(forms.ModelCard),
    "/tokenize": Answer(forms.Tokenized, example={"prompt": "Once upon a time"}),
    "/detokenize": Answer(forms.Detokenized, example={"tokens": [1, 2, 3]}),
    "/tokenizer_info": Answer(forms.TokenizerInfo),
    "/health": Answer(forms.State),
    "/ready": Answer(forms.State),
    "/plan": Answer(forms.PlanAnswer),
    "/metrics": Answer(None, about="Metrics in Prometheus's text format."),
}
_OF_ALL = {
    "403": "The Host header, or the origin of the page, is not allowed here.",
    "500": "A bug of the server's, or files of the model that cannot be read any more.",
    "503": "The server is shutting down, or has no more memory, threads or connections.",
}
_OF_KEYS = {"401": "The API key is missing or wrong."}
_OF_BODIES = {
    "400": "The body is no JSON, or a field of it cannot be honoured; the message names it.",
    "404": "Another model is served here.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "429": "Too many requests wait, or the plan has no room for the answer: try again later.",
}
_OF_NAMES = {"404": "Another model is served here."}


def document(app: FastAPI, model: str, has_keys: bool) -> dict[str, Any]:
    """The document of an application.

    Args:
        model: that it serves, which the examples name.
        has_keys: whether its requests need an API key.
    """
    found: dict[str, Any] = FastAPI.openapi(app)
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # a misfit is a 400 here
        schemas.pop(name, None)
    schemas.update(_schemas(_forms()))
    if has_keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        }
    for path, methods in found["paths"].items():
        for operation in methods.values():
            needs_key = has_keys and path not in PUBLIC
            operation["responses"] = _responses(path, operation, needs_key)
            example = ANSWERS[path].example
            if example is not None:
                body = operation["requestBody"]["content"][_JSON]
                body["examples"] = {"short": {"value": {"model": model, **example}}}
            for parameter in operation.get("parameters", ()):  # the name of a model
                parameter["example"] = model
            if needs_key:
                operation["security"] = [{"bearer": []}, {"header": []}]
    return found


def error_form(path: str) -> type[BaseModel]:
    """The form of errors that the clients of a path read."""
    if path.startswith("/v1/messages"):
        return more_forms.AnthropicError
    return more_forms.OllamaError if path.startswith("/api/") else forms.Error


def _responses(path: str, operation: Mapping[str, Any], needs_key: bool) -> dict[str, Any]:
    answer = ANSWERS[path]
    content = {"text/plain": {"schema": {"type": "string"}}}
    if answer.form is not None:
        content = {_JSON: {"schema": _reference(answer.form)}}
    if answer.stream is not None:
        kind, form = answer.stream
        told = f"A stream, where that is asked for: each event is a {form.__name__}."
        content[kind] = {"schema": {"type": "string", "description": told}}
    errors = {**_OF_ALL}
    if "requestBody" in operation:
        errors |= _OF_BODIES
    elif "{name}" in path:
        errors |= _OF_NAMES
    if needs_key:
        errors |= _OF_KEYS
    form = error_form(path)
    responses = {
        status: {"description": told, "content": {_JSON: {"schema": _reference(form)}}}
        for status, told in errors.items()
    }
    if path == "/ready":
        closing = {"description": "The server is shutting down.", "content": content}
        responses["503"] = closing
    return {"200": {"description": answer.about, "content": content}, **responses}


def _reference(form: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=form.__name__)}


def _forms() -> Iterable[type[BaseModel]]:
    for path, answer in ANSWERS.items():
        yield error_form(path)
        if answer.form is not None:
            yield answer.form
        if answer.stream is not None:
            yield answer.stream[1]


def _schemas(models: Iterable[type[BaseModel]]) -> dict[str, Any]:
    unique = dict.fromkeys(models)
    _, found = models_json_schema(
        [(one, "serialization") for one in unique], ref_template=_REFERENCE
    )
    schemas: dict[str, Any] = found["$defs"]
    return schemas
