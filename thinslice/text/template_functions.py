"""What chat templates may call: functions and a tag that need no meter.

Source: transformers, utils/chat_template_utils.py (_cached_compile_jinja_template).
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace

from thinslice.errors import plain
from thinslice.text.template_meter import TooCostlyError

MAX_INDENT = 64
# Python asks the C library for up to 256 times the pattern's length.
_MAX_DATE_PATTERN = 256


class RaisedByTemplateError(TemplateError):
    """A template called raise_exception."""


class GenerationTag(Extension):
    """``{% generation %}`` marks what training learns from; in a prompt it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateNamespace(Namespace):
    """Jinja's namespace, without names that mean something to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As Jinja declares it, so that an attribute may be called self.
        instance, *rest = args
        Namespace.__init__(instance, _checked_names(dict(*rest, **kwargs)))

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace.__setitem__(self, name, _checked_names({name: value})[name])


def _checked_names(attributes: dict[str, Any]) -> dict[str, Any]:
    for name in attributes:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"{name!r:.60} as the name of a namespace's attribute")
    return attributes


def checked_round(round_filter: Callable[..., float]) -> Callable[..., float]:
    """Jinja's round, to a bounded number of digits."""

    @wraps(round_filter)
    def checked(value: float, precision: int = 0, method: Any = "common") -> float:
        if not isinstance(precision, int) or abs(precision) > MAX_INDENT:
            raise TooCostlyError(f"rounds to more than {MAX_INDENT} digits")
        return round_filter(value, precision, method)

    return checked


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    width = len(indent) if isinstance(indent, str) else indent or 0
    if width > MAX_INDENT or any(len(one) > MAX_INDENT for one in separators or ()):
        raise TooCostlyError(f"indents by more than {MAX_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """``dict``, but a function: a template has no use for the type."""
    return dict(*args, **kwargs)


def raise_exception(message: Any) -> None:
    """Refuse the messages. Errors: RaisedByTemplateError."""
    if isinstance(message, Namespace):
        raise SecurityError("a namespace given to raise_exception")
    raise RaisedByTemplateError(plain(message, 500))


def strftime_now(pattern: str) -> str:
    """The local time. Errors: TooCostlyError for a long pattern."""
    if len(pattern) > _MAX_DATE_PATTERN:
        raise TooCostlyError(f"asks for a date in over {_MAX_DATE_PATTERN} characters")
    return datetime.now().strftime(pattern)
