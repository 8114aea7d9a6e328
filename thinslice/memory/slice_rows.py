"""Slices of matrices: where they lie on disk, and their rows read into what they are kept as."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.pack_rows import pack_rows
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.kernels.buffers import empty_bytes
from thinslice.kernels.dtypes import FLOAT_DTYPES
from thinslice.kernels.ops import Rows
from thinslice.kernels.packed import PackedWeight
from thinslice.memory.slice_schedule import Slice
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.tensors import Role
from thinslice.plan.weight_layout import WeightSlice
from thinslice.units import MIB

_MAKE_KV = (Role.KEY, Role.VALUE)
# What is converted at a time while slices are read that stay in memory.
_CONVERTED_AT_ONCE = MIB


def slice_on_disk(checkpoint: Checkpoint, one: WeightSlice) -> Slice:
    """Return the place of a slice's stored bytes."""
    entry = checkpoint.tensors[one.matrix.name]
    offset = entry.offset + one.matrix.stored_bytes(one.start)
    return Slice(entry.path, offset, one.stored_bytes)


def starts_of(slices: Sequence[WeightSlice], alignment: int) -> tuple[list[int], int]:
    """The start of each slice in one buffer, and the end of the last, at multiples of a number."""
    starts, end = [], 0
    for one in slices:
        starts.append(end)
        end += -(-one.kept_bytes // alignment) * alignment
    return starts, end


def rows_in(data: NDArray[np.uint8], one: WeightSlice) -> Rows:
    """The bytes of a slice as rows of what it is kept as."""
    matrix, count = one.matrix, one.stop - one.start
    if matrix.is_packed:
        makes_kv = matrix.tensor.role in _MAKE_KV
        return PackedWeight(data, PackedFormat(matrix.kept), count, matrix.columns, makes_kv)
    return data.view(FLOAT_DTYPES[matrix.kept]).reshape(count, matrix.columns)


def read_slice(reader: CheckpointReader, one: WeightSlice, target: Rows) -> None:
    """Fill rows from disk, converted where they are kept as something else.

    Extra memory: the reader's scratch, or a MiB of rows and what converting them takes.
    Errors: CheckpointError.
    """
    matrix = one.matrix
    if not isinstance(target, PackedWeight):
        reader.read_rows(matrix.name, one.start, one.stop, target)
        return
    if not matrix.is_converted:
        reader.read_bytes(matrix.name, one.start, one.stop, target.data)
        return
    entry = reader.checkpoint.tensors[matrix.name]
    for start, stop in matrix.ranges(_CONVERTED_AT_ONCE):
        first, last = max(start, one.start), min(stop, one.stop)
        if first < last:
            raw = empty_bytes(matrix.stored_bytes(last - first))
            reader.read_bytes(matrix.name, first, last, raw)
            pack_rows(entry, first, raw, target.rows(first - one.start, last - one.start))
