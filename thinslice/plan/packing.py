"""Packing: how a packed checkpoint cuts and stores a model's matrices.

The feed-forward of a layer is cut into blocks: rows of gate and up with the matching columns of
down, so that its intermediate never exists whole. Blocks are part of the format, not of a plan: the
order of sums, and so the bits, are the same for every budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thinslice.errors import CheckpointError
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import PackedFormat, packed_format_of
from thinslice.units import MIB

QUANT_METHOD = "thinslice"
VERSION = 1
# Weights in a block's gate: 6 MiB at int4, large enough to read and to multiply at full speed.
_BLOCK_WEIGHTS = 12 * MIB
# Columns of down come in whole pairs of groups.
_BLOCK_STEP = 64


@dataclass(frozen=True)
class Packing:
    """What config.json says of a packed checkpoint under ``quantization_config``.

    Attributes:
        weights: of the decoder's matrices, ``int4`` or ``int8``; see ``matrix_format``.
        head: of the head, of an embedding table that is the head, and of prediction layers; see
            ``head_format``.
        ffn_block: rows of gate and up, and columns of down, in a block; the last may have fewer.
    """

    weights: PackedFormat
    head: PackedFormat
    ffn_block: int

    def blocks(self, intermediate_size: int) -> list[tuple[int, int]]:
        """First and last row of each block of a feed-forward."""
        starts = range(0, intermediate_size, self.ffn_block)
        return [(start, min(start + self.ffn_block, intermediate_size)) for start in starts]

    def to_dict(self) -> dict[str, object]:
        """As config.json keeps it."""
        return {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "weights": str(self.weights),
            "head": str(self.head),
            "ffn_block": self.ffn_block,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Packing | None":
        """What a config.json says; None where the model is not packed by thinslice.

        Errors: CheckpointError for values this version does not know.
        """
        section = config.get("quantization_config")
        if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
            return None
        if section.get("version") != VERSION:
            raise CheckpointError(
                f"packed by another version of thinslice ({section.get('version')!r:.40}, this one "
                f"reads {VERSION}); pack it again"
            )
        block = section.get("ffn_block")
        if type(block) is not int or block <= 0 or block % _BLOCK_STEP:
            raise CheckpointError(f"ffn_block is {block!r:.40}; expected a multiple of 64")
        return cls(_format(section, "weights"), _format(section, "head"), block)


def packing_for(shape: ModelShape, weights: PackedFormat) -> Packing:
    """How a model of this shape is packed: head and prediction layers in int8."""
    size, inner = shape.hidden_size, shape.intermediate_size
    num_blocks = -(-size * inner // _BLOCK_WEIGHTS)
    block = -(-inner // num_blocks)
    return Packing(weights, PackedFormat.INT8, -(-block // _BLOCK_STEP) * _BLOCK_STEP)


def matrix_format(stored: str, packing: Packing, most: PackedFormat | None) -> PackedFormat:
    """What a matrix of a layer is packed in.

    Args:
        most: what most of the model's layers have the size of, None for floats. Packed in that,
            a model keeps every matrix in the format it has in memory, so that it gives the same
            bits: codes of four bits, and in int8 whatever has more (Q6_K among Q4_K).
    """
    own = packed_format_of(stored)
    if is_own_size(packing, most):
        return own or PackedFormat.INT8
    # A minimum is worth its half bit to codes that were chosen with it.
    is_int4m = packing.weights is PackedFormat.INT4 and own is PackedFormat.INT4M
    return PackedFormat.INT4M if is_int4m else packing.weights


def head_format(stored: str, packing: Packing, most: PackedFormat | None) -> PackedFormat:
    """What a head, or a matrix of a prediction layer, is packed in."""
    own = packed_format_of(stored) if is_own_size(packing, most) else None
    return own or packing.head


def is_own_size(packing: Packing, most: PackedFormat | None) -> bool:
    """Whether a model is packed in about the bits that it has."""
    is_int8 = most is PackedFormat.INT8
    return most is not None and is_int8 == (packing.weights is PackedFormat.INT8)


def _format(section: Mapping[str, Any], key: str) -> PackedFormat:
    value = section.get(key)
    if value not in (PackedFormat.INT4, PackedFormat.INT8):
        raise CheckpointError(f"quantization_config.{key} is {value!r:.40}; expected int4 or int8")
    return PackedFormat(value)
