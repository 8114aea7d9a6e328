"""Sizes as text: every unit, the ambiguous spellings refused, and both directions together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.errors import ConfigError
from thinslice.units import GIB, KIB, MIB, format_bytes, gib, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1B", 1),
        ("512KiB", 512 * 1024),
        ("512KB", 512_000),
        ("4MiB", 4 * 1024**2),
        ("4MB", 4_000_000),
        ("4GiB", 4 * 1024**3),
        ("4GB", 4_000_000_000),
        ("2TiB", 2 * 1024**4),
        ("2TB", 2 * 10**12),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("  4 GiB ", 4 * 1024**3),
        ("0.1KB", 100),
    ],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "both"),
    [
        ("8G", "8GiB (1024-based) or 8GB (1000-based)"),
        ("8Gb", "8GiB (1024-based) or 8GB (1000-based)"),
        ("8g", "8GiB (1024-based) or 8GB (1000-based)"),
        ("8gib", "8GiB (1024-based) or 8GB (1000-based)"),
        ("8", "8GiB (1024-based) or 8GB (1000-based)"),
        ("1.5M", "1.5MiB (1024-based) or 1.5MB (1000-based)"),
        ("3 k", "3KiB (1024-based) or 3KB (1000-based)"),
        ("7x", "7GiB (1024-based) or 7GB (1000-based)"),
        ("1024", "1024MiB (1024-based) or 1024MB (1000-based)"),
        ("20000000k", "20000000KiB (1024-based) or 20000000KB (1000-based)"),
        ("1073741824", "1073741824B for bytes"),
    ],
)
def test_ambiguous_sizes_show_both_spellings(text: str, both: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert str(caught.value) == f"{text!r} is not a size: write {both}"


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1e9B", "4,5GiB", "4 GiB of it", "٤GiB", "inf"]
)
def test_other_text_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write for example 4GiB or 4GB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0GiB", "0.4B", "0"])
def test_nothing_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="no bytes at all"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (MIB, "1.00 MiB"),
        (5 * GIB + GIB // 4, "5.25 GiB"),
        (3 * 1024 * GIB, "3.00 TiB"),
        (5000 * 1024 * GIB, "5000.00 TiB"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_gib() -> None:
    assert gib(5 * GIB + GIB // 4) == "5.25"


@given(st.integers(min_value=1, max_value=2**50))
def test_what_is_written_reads_back_within_its_two_decimals(num_bytes: int) -> None:
    text = format_bytes(num_bytes)
    unit = parse_bytes("1" + text.split()[1])
    assert abs(parse_bytes(text) - num_bytes) <= 0.005 * unit + 1
