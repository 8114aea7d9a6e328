"""Typed access to the untrusted key-value pairs of a config.json or a GGUF header."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinslice.errors import CheckpointError

# Beyond any size, frequency or factor a model has; also keeps every value inside float32.
_LARGEST_NUMBER = 1e30


@dataclass(frozen=True)
class HeaderFields:
    """The pairs, and the name of their source for error messages.

    A key whose value is null counts as absent.

    Attributes:
        prefix: what stands before each key in ``values``.
    """

    source: str
    values: Mapping[str, Any]
    prefix: str = ""

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number. Errors: CheckpointError if absent without a default, or another type."""
        value = self._value(key, default)
        if type(value) is not int:
            raise self._error(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Errors: as ``integer``."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not abs(value) <= _LARGEST_NUMBER:
            raise self._error(key, "a number")
        return float(value)

    def short_number(self, key: str, default: float | None = None) -> float:
        """A finite number; one kept as float32 comes back as its shortest decimal, 1e-05 say."""
        value = self.number(key, default)
        for digits in (6, 7, 8):
            short = float(f"{value:.{digits}g}")
            if struct.unpack("<f", struct.pack("<f", short))[0] == value:
                return short
        return value

    def layer_integer(self, key: str, default: int | None = None) -> int:
        """A whole number that a GGUF may also give once per layer; all must be equal."""
        value = self._value(key, default)
        if isinstance(value, Sequence) and len(value) and all(one == value[0] for one in value):
            value = value[0]
        if type(value) is not int:
            raise self._error(key, "one whole number for all layers")
        return value

    def text(self, key: str, default: str) -> str:
        """A string. Errors: CheckpointError for another type."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._error(key, "a string")
        return value

    def flag(self, key: str) -> bool:
        """True or false; false if absent. Errors: CheckpointError for another type."""
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise self._error(key, "true or false")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """One whole number or a list of them; none if absent. Errors: as ``flag``."""
        value = self._value(key, [])
        values = value if isinstance(value, list) else [value]
        if not all(type(one) is int for one in values):
            raise self._error(key, "a whole number or a list of them")
        return tuple(values)

    def optional_integer(self, key: str) -> int | None:
        """A whole number, or None if absent. Errors: CheckpointError for another type."""
        return None if self.get(key) is None else self.integer(key)

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None if absent. Errors: CheckpointError for another type."""
        return None if self.get(key) is None else self.number(key)

    def get(self, key: str) -> Any:
        """The value as it stands, or None."""
        return self.values.get(self.prefix + key)

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        return default if value is None else value

    def _error(self, key: str, expected: str) -> CheckpointError:
        shown = f"{self.get(key)!r:.80}" if self.prefix + key in self.values else "missing"
        return CheckpointError(f"{self.source}: {key} is {shown}; expected {expected}")
