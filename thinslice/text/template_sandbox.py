"""A Jinja environment for templates from strangers: no code, no files, bounded work and memory.

Jinja's immutable sandbox keeps a template from reaching Python. This adds the meter of
template_meter.py; what could be large is paid before it is made. The bounds hold for templates
that loop without output, double a string, nest lists that share parts, or call macros that call
themselves.

What a template may use is what Hugging Face gives chat templates, less the filters, methods and
globals that chat templates have no use for.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

from jinja2 import Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from thinslice.text.template_functions import (
    MAX_INDENT,
    GenerationTag,
    TemplateNamespace,
    checked_round,
    make_dict,
    raise_exception,
    strftime_now,
    to_json,
)
from thinslice.text.template_meter import (
    ELEMENT_COST,
    JOIN_TEXT,
    MAX_INTEGER_BITS,
    PAY,
    PAY_SLICE,
    PAY_SPREAD,
    STEP,
    Meter,
    Metering,
    TooCostlyError,
)

_FILTERS = frozenset(
    """abs capitalize count d default dictsort e escape first float indent int items join last
    length list lower map max min reject rejectattr replace reverse round safe select selectattr
    sort string title trim unique upper""".split()  # noqa: SIM905
)
_STRING_METHODS = frozenset(
    """capitalize count endswith find format index isalnum isalpha isascii isdecimal isdigit
    islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix
    replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title
    upper""".split()  # noqa: SIM905
)
# These take a string apart, or what says which attribute to look at: characters become objects.
_ITERATING_FILTERS = frozenset(
    """list map max min reject rejectattr select selectattr sort title unique""".split()  # noqa: SIM905
)
# What these hold was paid for when it was made.
_CHOOSING_FILTERS = frozenset(
    """first last list max min reject rejectattr reverse select selectattr sort
    unique""".split()  # noqa: SIM905
)
_CHARACTER_COST = 64
# Text falls apart at blanks or line ends into at most one piece for every two characters.
_SPLITTING_COST = _CHARACTER_COST // 2
# CPython looks for these by comparing, at worst, every character with every character.
_QUADRATIC_METHODS = frozenset(
    {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"}
)
_SEQUENCE_METHODS = frozenset({"count", "index"})
_MAPPING_METHODS = frozenset({"get", "items", "keys", "values"})


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment. Set ``meter`` before each rendering; it renders one template at a time."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # Nothing of a template is to be worked out while it compiles, with no meter running. The
        # optimizer would do so, and so would an output that ``finalize`` can treat without context.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            optimized=False,
            finalize=_finalize,
        )
        self.meter = Meter(0, 0.0)
        self.filters = self._metered_filters()
        self.globals |= {
            "dict": make_dict,
            "namespace": TemplateNamespace,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }
        self.tests = {name: self._stepping(test) for name, test in self.tests.items()}
        for name in ("cycler", "lipsum"):
            del self.globals[name]

    def _metered_filters(self) -> dict[str, Callable[..., Any]]:
        builtin = self.filters
        filters = {
            name: self._metered(
                builtin[name],
                self._pay_slice if name in _CHOOSING_FILTERS else self._pay,
            )
            for name in _FILTERS
        }
        for name in _ITERATING_FILTERS:
            filters[name] = self._charging_strings(filters[name])
        filters["indent"] = self._metered(self._checked_indent(builtin["indent"]))
        filters["join"] = self._metered(self._checked_join(builtin["join"]))
        filters["replace"] = self._metered(self._checked_replace(builtin["replace"]))
        filters["round"] = self._metered(checked_round(builtin["round"]))
        filters["tojson"] = self._metered(to_json)
        filters["trim"] = self._metered(self._trim)
        filters[STEP] = self._step
        filters[PAY] = self._pay
        filters[PAY_SLICE] = self._pay_slice
        filters[PAY_SPREAD] = self._pay_spread
        filters[JOIN_TEXT] = self._join_text
        return filters

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = Metering().visit(super()._parse(source, name, filename))
        return tree

    def concat(self, pieces: Iterable[str]) -> str:
        """Join output, as it comes."""
        parts: list[str] = []
        for piece in pieces:
            self.meter.charge(len(piece))
            parts.append(piece)
        return "".join(parts)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or else an item, for one step."""
        self.meter.charge()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item, or else an attribute, for one step."""
        self.meter.charge()
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Jinja's rule, and of Python's own types only the methods that cannot make much."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        if isinstance(obj, list | tuple):
            return attr in _SEQUENCE_METHODS
        if isinstance(obj, Mapping):
            return attr in _MAPPING_METHODS
        return not isinstance(obj, int | float | bytes | range)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` with fields of bounded width; ``format_map`` is left out."""
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or value.__name__ != "format":
            return None
        return _Formatter(self).bound_to(str(owner))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call something from a template, and pay for the result."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _refuse_namespaces(*args, *kwargs.values())
            args = __self._charge_method(owner, __obj.__name__, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        __self.meter.charge_value(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result can be far larger than what it is given."""
        if operator == "*":
            self._charge_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_INTEGER_BITS:
                raise TooCostlyError("makes too large a number")
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("the % operator on a string; format() does the same")
        elif operator == "+" and type(left) is type(right) is str:
            self.meter.charge(len(left) + len(right))
            return left + right
        result = super().call_binop(context, operator, left, right)
        self.meter.charge_value(result)
        return result

    def _charge_method(
        self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Pay for what a method of a string is about to make; its arguments, read once."""
        if name == "replace":
            self._charge_replace(text, *args[:2])
        elif name == "join":
            (pieces,) = args
            return (self._charge_join(text, pieces),)
        elif name == "splitlines":
            self.meter.charge(_SPLITTING_COST * len(text))
        pattern = args[0] if args else kwargs.get("sep")
        if name in _QUADRATIC_METHODS and isinstance(pattern, str):
            self.meter.charge(len(text) * len(pattern))
        if name in ("split", "rsplit"):
            if isinstance(pattern, str) and pattern:
                self.meter.charge(_CHARACTER_COST * text.count(pattern))
            else:
                self.meter.charge(_SPLITTING_COST * len(text))
        return args

    def _charge_product(self, left: Any, right: Any) -> None:
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                self.meter.charge(len(sequence) * max(count, 0))
        are_integers = isinstance(left, int) and isinstance(right, int)
        if are_integers and left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
            raise TooCostlyError("makes too large a number")

    def _charge_replace(self, text: str, old: Any = None, new: Any = None) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.meter.charge(len(text) + text.count(old) * len(new))

    def _charge_join(self, separator: str, pieces: Any) -> list[Any]:
        items = self._drained(pieces)
        self.meter.charge_value(items)
        self.meter.charge(len(separator) * len(items))
        return items

    def _drained(self, items: Iterable[Any]) -> list[Any]:
        result: list[Any] = []
        for item in items:
            self.meter.charge(ELEMENT_COST)
            result.append(item)
        return result

    def _metered(
        self, function: Callable[..., Any], pay: Callable[[Any], Any] | None = None
    ) -> Callable[..., Any]:
        """A filter that pays for its result; a result that is made lazily is made at once.

        It stays an iterator: true though it may be empty, and gone through once.
        """
        pay = pay or self._pay

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.charge()
            _refuse_namespaces(*args, *kwargs.values())
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                return iter(pay(self._drained(result)))
            return pay(result)

        return metered

    def _charging_strings(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def charging(*args: Any, **kwargs: Any) -> Any:
            texts = [one for one in (*args, *kwargs.values()) if isinstance(one, str)]
            self.meter.charge(_CHARACTER_COST * sum(map(len, texts)))
            return function(*args, **kwargs)

        return charging

    def _stepping(self, test: Any) -> Callable[..., Any]:
        @wraps(test)
        def stepping(*args: Any, **kwargs: Any) -> Any:
            self.meter.charge()
            return test(*args, **kwargs)

        return stepping

    def _checked_indent(self, indent: Callable[..., str]) -> Callable[..., str]:
        @wraps(indent)
        def checked(text: Any, width: Any = 4, *args: Any, **kwargs: Any) -> str:
            columns = len(width) if isinstance(width, str) else width
            if not isinstance(columns, int) or columns > MAX_INDENT:
                raise TooCostlyError(f"indents by more than {MAX_INDENT}")
            text = str(text)
            self.meter.charge(_SPLITTING_COST * len(text))
            self.meter.charge((len(text.splitlines()) + 1) * max(columns, 0))
            return indent(text, width, *args, **kwargs)

        return checked

    def _checked_join(self, join: Callable[..., str]) -> Callable[..., str]:
        @wraps(join)
        def checked(
            context: Any, value: Any, d: Any = "", attribute: str | int | None = None
        ) -> str:
            self.meter.charge(_CHARACTER_COST * len(str(attribute)))
            return join(context, self._charge_join(str(d), value), d, attribute)

        return checked

    def _checked_replace(self, replace: Callable[..., str]) -> Callable[..., str]:
        @wraps(replace)
        def checked(context: Any, s: Any, old: Any, new: Any, count: Any = None) -> str:
            s, old, new = str(s), str(old), str(new)
            self._charge_replace(s, old, new)
            return replace(context, s, old, new, count)

        return checked

    def _trim(self, value: Any, chars: str | None = None) -> str:
        text = str(value)
        self.meter.charge(len(text) * len(chars or ""))
        return text.strip(chars)

    def _step(self, value: Any) -> Any:
        self.meter.charge()
        return value

    def _pay(self, value: Any) -> Any:
        self.meter.charge_value(value)
        return value

    def _pay_slice(self, value: Any) -> Any:
        """What a slice holds was paid for when it was made."""
        if isinstance(value, str):
            self.meter.charge(len(value))
        elif isinstance(value, list | tuple):
            self.meter.charge(ELEMENT_COST * len(value))
        return value

    def _pay_spread(self, value: Any) -> Any:
        """What becomes arguments one by one."""
        if isinstance(value, Iterator):
            return self._drained(value)
        self.meter.charge(_CHARACTER_COST * len(value))
        return value

    def _join_text(self, values: tuple[Any, ...]) -> str:
        """The ``~`` operator."""
        self.meter.charge_value(values)
        return "".join(map(str, values))


class _Formatter(SandboxedFormatter):
    """``str.format`` that pays for each field and refuses wide ones."""

    def __init__(self, environment: TemplateSandbox) -> None:
        super().__init__(environment)
        self._sandbox = environment

    def bound_to(self, text: str) -> Callable[..., str]:
        """The method ``text.format``."""

        def formatted(*args: Any, **kwargs: Any) -> str:
            self._sandbox.meter.charge(_CHARACTER_COST * (text.count("{") + text.count("}")))
            return self.vformat(text, args, kwargs)

        return formatted

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """``!s`` and ``!r``, and what every field goes through."""
        _refuse_namespaces(value)
        self._sandbox.meter.charge_value(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        """One field. Errors: TooCostlyError for a width or a precision over three digits."""
        if re.search(r"\d{4}", format_spec):
            raise TooCostlyError(f"asks for the format {format_spec!r:.40}")
        text: str = super().format_field(value, format_spec)
        self._sandbox.meter.charge(len(text))
        return text


def _refuse_namespaces(*values: Any) -> None:
    """Nothing makes text of a namespace: what it holds, perhaps itself, was never paid for."""
    if any(isinstance(value, Namespace) for value in values):
        raise SecurityError("a namespace used as a value")


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    _refuse_namespaces(value)
    if not isinstance(value, str | Undefined):
        sandbox = context.environment
        assert isinstance(sandbox, TemplateSandbox), "rendered by another environment"
        sandbox.meter.charge_value(value)
    return value
