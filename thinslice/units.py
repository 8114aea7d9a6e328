"""Bytes to text and back; the only file that knows 1024 from 1000."""

import re
from collections.abc import Iterable

from thinslice.errors import ConfigError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": 1024**4,
}
_LONGEST_NUMBER = 18
# A number without a unit is taken to mean no more than so many GiB, or else MiB, or else bytes.
_LARGEST_GIB = 256
_LARGEST_MIB = 10_000_000
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(text: str) -> int:
    """Read a size such as ``4GiB`` (1024-based) or ``4GB`` (1000-based) as a number of bytes.

    Errors: ConfigError for anything else; ``8G``, ``8Gb`` and ``8`` are ambiguous and refused.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write for example 4GiB or 4GB")
    number, unit = match.groups()
    if unit not in _UNITS and float(number) > 0:
        prefix = unit[:1].upper()
        if not unit and float(number) > _LARGEST_MIB:
            raise ConfigError(f"{text!r} is not a size: write {number}B for bytes")
        likely = "G" if float(number) < _LARGEST_GIB else "M"
        letter = prefix if prefix in ("K", "M", "G", "T") else likely
        raise ConfigError(
            f"{text!r} is not a size: write {number}{letter}iB (1024-based) "
            f"or {number}{letter}B (1000-based)"
        )
    if len(number) > _LONGEST_NUMBER:
        raise ConfigError(f"{text!r:.60} is more memory than there is")
    num_bytes = int(float(number) * _UNITS.get(unit, 1))
    if num_bytes <= 0:
        raise ConfigError(f"{text!r} is no bytes at all; write for example 4GiB or 4GB")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """Write a number of bytes for a person: two decimals, 1024-based units."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def size_option(num_bytes: int) -> str:
    """Write a size exactly, as an option takes it: ``4GiB``, ``1500MiB`` or ``123B``."""
    for unit in ("GiB", "MiB", "KiB"):
        if num_bytes % _UNITS[unit] == 0:
            return f"{num_bytes // _UNITS[unit]}{unit}"
    return f"{num_bytes}B"


def describe_need(parts: Iterable[tuple[str, int]]) -> str:
    """What something takes, and of what it is the sum: ``needs 0.69 GiB: runtime 317.00 MiB, ...``.

    Parts of no bytes are left out.
    """
    named = [(name, num_bytes) for name, num_bytes in parts if num_bytes]
    shown = ", ".join(f"{name} {format_bytes(num_bytes)}" for name, num_bytes in named)
    return f"needs {format_bytes(sum(num_bytes for _, num_bytes in named))}: {shown}"


def counted(count: int, noun: str) -> str:
    """A number of things: ``1 token``, ``2 tokens``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def gib(num_bytes: float) -> str:
    """Write a number of bytes in GiB with two decimals and no unit, for columns."""
    return f"{num_bytes / GIB:.2f}"
