"""/docs: the interface's document as a page, without scripts or anything from elsewhere."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

router = APIRouter()
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h2 { border-top: 1px solid #8886; margin-top: 2rem; padding-top: 1rem; }
h2 b { font-weight: 600; opacity: .7; }
code, h2 { font-family: ui-monospace, monospace; font-size: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #8883; padding: .25rem .75rem .25rem 0; text-align: left;
  vertical-align: top; }
td:first-child { white-space: nowrap; }
"""
_HASH = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
Schema = Mapping[str, Any]


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The page."""
    return HTMLResponse(api_page(request.app.openapi()), headers=_HEADERS)


def api_page(document: Mapping[str, Any]) -> str:
    """A page that tells what an OpenAPI document tells: paths, bodies, answers, errors."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1><p>The same as a document for programs: ",
            '<a href="openapi.json">openapi.json</a>.</p>',
            *_contents(document),
            *_operations(document),
            *_schemas(document),
            "</body></html>",
        )
    )


def _each(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def _contents(document: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            f'<a href="#{escape(one["operationId"])}"><code>{method} {escape(path)}</code></a>',
            escape(one.get("description", "")),
        )
        for path, method, one in _each(document)
    ]
    yield from _table(("Path", "What it does"), rows)


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    for path, method, operation in _each(document):
        mark = escape(operation["operationId"])
        yield f'<h2 id="{mark}"><b>{method}</b> {escape(path)}</h2>'
        yield f"<p>{escape(operation.get('description', ''))}</p>"
        for one in operation.get("parameters", ()):
            yield f"<p>In the path: <code>{escape(one['name'])}</code>.</p>"
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]
            yield f"<p>Body: {_content(content)}.</p>"
            for kind in content.values():
                for one in kind.get("examples", {}).values():
                    yield f"<pre>{escape(json.dumps(one['value'], indent=2))}</pre>"
        rows = [
            (escape(status), escape(one["description"]), _content(one.get("content", {})))
            for status, one in operation["responses"].items()
        ]
        yield from _table(("Status", "Meaning", "Content"), rows)


def _schemas(document: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield f'<h2 id="schema-{escape(name)}">{escape(name)}</h2>'
        yield f"<p>{escape(schema.get('description', ''))}</p>"
        needed = schema.get("required", ())
        rows = [
            (
                f"<code>{escape(field)}</code>",
                _type(one) + _bounds(one),
                "needed" if field in needed else "",
            )
            for field, one in schema.get("properties", {}).items()
        ]
        yield from _table(("Field", "Type", ""), rows)


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        return
    yield f"<table><tr>{''.join(f'<th>{one}</th>' for one in headings)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{one}</td>' for one in row)}</tr>"
    yield "</table>"


def _content(content: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{escape(kind)}: {_type(one['schema'])}"
        + (f". {escape(told)}" if (told := one["schema"].get("description")) else "")
        for kind, one in content.items()
    )


def _type(schema: Schema) -> str:
    """A type in a few words, with links to those that have a section of their own."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_type(one) + _bounds(one) for one in schema[key])
    if "const" in schema:
        return f"<code>{escape(repr(schema['const']))}</code>"
    if "enum" in schema:
        return " or ".join(f"<code>{escape(repr(one))}</code>" for one in schema["enum"])
    kind = escape(str(schema.get("type", "anything")))
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    others = schema.get("additionalProperties")
    if kind == "object" and isinstance(others, dict):
        return f"object of {_type(others)}"
    return kind


def _bounds(schema: Schema) -> str:
    names = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "below",
        "minLength": "of at least",
        "maxLength": "of at most",
        "minItems": "with at least",
        "maxItems": "with at most",
    }
    told = [f"{word} {schema[key]}" for key, word in names.items() if key in schema]
    return f" ({escape(', '.join(told))})" if told else ""
