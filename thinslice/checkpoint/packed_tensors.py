"""The tensors of a packed checkpoint: what each one's bytes in the file stand for.

A packed matrix is a tensor of bytes, one row of the tensor for each panel of 16 rows: [panels,
bytes] for int4 and int8, and [panels, groups, bytes] for int4m, so that the shape alone tells the
format. Tensors in between only fill up to the next multiple of 4096 bytes.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from thinslice.checkpoint.index import TensorEntry
from thinslice.checkpoint.names import check_names
from thinslice.checkpoint.safetensors_header import MAX_TENSORS
from thinslice.errors import CheckpointError
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import (
    GROUP,
    PackedFormat,
    is_packable,
    num_panels,
    packed_bytes,
    panel_bytes,
)
from thinslice.plan.packing import Packing
from thinslice.plan.tensors import tensors_of

# What direct I/O wants: a matrix can be read without its neighbours.
FILE_ALIGNMENT = 4096
BYTES_DTYPE = "U8"
PADDING = "thinslice.padding."
_PADDING_NAME = re.compile(re.escape(PADDING) + r"\d{1,6}", re.ASCII)
_FLOAT_DTYPES = ("BF16", "F16", "F32")


def stored_shape(fmt: PackedFormat, rows: int, columns: int) -> tuple[int, ...]:
    """The shape a packed matrix has in the file."""
    panels, num_bytes = num_panels(rows), panel_bytes(fmt, columns)
    if fmt is PackedFormat.INT4M:
        # As one number, an int4m panel of 9 groups would have the bytes of an int4 panel of 9.
        groups = columns // GROUP
        return (panels, groups, num_bytes // groups)
    return (panels, num_bytes)


def check_packable(shape: ModelShape) -> None:
    """Refuse a model whose rows do not divide into groups (CheckpointError)."""
    for name, size in (
        ("hidden_size", shape.hidden_size),
        ("num_attention_heads * head_dim", shape.q_size),
        ("intermediate_size", shape.intermediate_size),
    ):
        if not is_packable(size):
            raise CheckpointError(
                f"int4 and int8 need rows that are a multiple of {GROUP} weights; {name} is {size}"
            )


def check_packed_tensors(
    shape: ModelShape, packing: Packing, tensors: Mapping[str, TensorEntry]
) -> tuple[ModelShape, dict[str, TensorEntry]]:
    """Compare a packed checkpoint with its shape; as ``check_names``, with the logical entries.

    Errors: CheckpointError for tensors that are missing, unexpected, or not as the packing has
    them.
    """
    check_packable(shape)
    num_layers = shape.num_hidden_layers + shape.num_nextn_predict_layers
    num_blocks = -(-shape.intermediate_size // packing.ffn_block)
    if num_layers * num_blocks * 3 > MAX_TENSORS:
        raise CheckpointError(
            f"ffn_block is {packing.ffn_block} for an intermediate_size of "
            f"{shape.intermediate_size}: too many tensors"
        )
    expected = {tensor.name: tensor for tensor in tensors_of(shape, packing)}
    logical = {
        name: _logical(entry, expected[name].shape if name in expected else ())
        for name, entry in tensors.items()
        if not _PADDING_NAME.fullmatch(name)
    }
    shape, found = check_names(shape, logical, packing)
    for name, entry in found.items():
        _check_format(entry, expected[name].format_in(packing))
    return shape, found


def _logical(entry: TensorEntry, size: tuple[int, ...]) -> TensorEntry:
    """The entry with the format and the shape of the matrix that its bytes can be."""
    if entry.dtype != BYTES_DTYPE or len(size) != 2:
        return entry
    for fmt in PackedFormat:
        if entry.shape == stored_shape(fmt, *size):
            assert entry.num_bytes == packed_bytes(fmt, *size)
            return replace(entry, dtype=str(fmt), shape=size)
    return entry


def _check_format(entry: TensorEntry, wanted: PackedFormat | None) -> None:
    allowed = _FLOAT_DTYPES if wanted is None else tuple(str(fmt) for fmt in PackedFormat)
    if entry.dtype not in allowed:
        raise CheckpointError(
            f"{entry.path}: {entry.name} is {entry.dtype}; expected {' or '.join(allowed)}, "
            "as config.json has it"
        )
    if entry.is_packed and entry.offset % FILE_ALIGNMENT:
        raise CheckpointError(
            f"{entry.path}: {entry.name} starts at byte {entry.offset}, no multiple of "
            f"{FILE_ALIGNMENT}; pack the model again"
        )
