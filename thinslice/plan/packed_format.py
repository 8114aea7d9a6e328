"""Group-wise quantised formats: their names and the bytes they take. Arithmetic only.

A packed matrix is panels of 16 output rows, each one contiguous range of bytes; what lies inside a
panel is in kernels/packed.py.
"""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

PANEL_ROWS = 16
GROUP = 32
ALIGNMENT = 64


class PackedFormat(StrEnum):
    """How a weight is stored: 4.5, 5 and 8.5 bits each, scales included."""

    INT4 = "int4"  # scale * (code - 8)
    INT4M = "int4m"  # scale * code + minimum
    INT8 = "int8"  # scale * (code - 128)

    @property
    def zero_point(self) -> int:
        """The code of zero."""
        return {PackedFormat.INT4: 8, PackedFormat.INT4M: 0, PackedFormat.INT8: 128}[self]

    @property
    def code_bytes(self) -> int:
        """Bytes of codes in one group of one panel."""
        return 512 if self is PackedFormat.INT8 else 256


# What the block types of a GGUF become; the first three and Q4_K keep their codes.
_OF_GGML = {
    "Q4_0": PackedFormat.INT4,
    "Q4_1": PackedFormat.INT4M,
    "Q8_0": PackedFormat.INT8,
    "Q4_K": PackedFormat.INT4M,
}
_FLOAT_TYPES = frozenset({"BF16", "F16", "F32"})


def packed_format_of(stored: str) -> PackedFormat | None:
    """The format that keeps a type on disk without visible loss; None for the float types.

    Args:
        stored: BF16, F16, F32, a ggml block type, or a packed format's own name.
    """
    if stored in _FLOAT_TYPES:
        return None
    if stored in set(PackedFormat):
        return PackedFormat(stored)
    return _OF_GGML.get(stored, PackedFormat.INT8)


def keeps_codes(stored: str, fmt: str) -> bool:
    """Whether a type on disk goes into a packed format with the codes it has."""
    return _OF_GGML.get(stored) == fmt


def most_common_format(stored: Iterable[str]) -> PackedFormat | None:
    """The format that most matrices of these types on disk go into; None for a float type."""
    return Counter(packed_format_of(one) for one in stored).most_common(1)[0][0]


def is_packable(in_features: int) -> bool:
    """Whether rows of this length divide into groups."""
    return in_features > 0 and in_features % GROUP == 0


def check_in_features(in_features: int) -> None:
    """Refuse a row length that does not divide into groups (ValueError)."""
    if not is_packable(in_features):
        raise ValueError(
            f"packed formats need a multiple of {GROUP} input features, got {in_features}"
        )


def panel_bytes(fmt: PackedFormat, in_features: int) -> int:
    """Bytes of one panel of 16 output rows."""
    check_in_features(in_features)
    groups = in_features // GROUP
    if fmt is PackedFormat.INT4M:
        return groups * (fmt.code_bytes + ALIGNMENT)
    return (groups + 1) // 2 * (2 * fmt.code_bytes + ALIGNMENT)


def num_panels(out_features: int) -> int:
    """Panels that hold this many output rows; the last one is padded with zero rows."""
    return -(-out_features // PANEL_ROWS)


def packed_bytes(fmt: PackedFormat, out_features: int, in_features: int) -> int:
    """Bytes of a whole packed matrix."""
    return num_panels(out_features) * panel_bytes(fmt, in_features)
