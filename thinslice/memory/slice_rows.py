"""Slices of matrices: where they lie on disk, and their rows read into what they are kept as."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader, pack_rows
from thinslice.kernels.arrays import FLOAT_DTYPES, empty_bytes
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


class SliceLoader:
    """Fills rows from disk, converted where they are kept as something else.

    Extra memory: the reader's scratch, or a MiB of rows and what converting them takes. It is kept
    from one slice to the next: pages that are new each time take as long as reading into them.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._raw = empty_bytes(0)

    def read(self, one: WeightSlice, target: Rows) -> None:
        """Fill the rows of a slice. Errors: CheckpointError."""
        matrix = one.matrix
        if not isinstance(target, PackedWeight):
            self._reader.read_rows(matrix.name, one.start, one.stop, target)
        elif matrix.is_converted:
            self._pack(one, target)
        else:
            self._reader.read_bytes(matrix.name, one.start, one.stop, target.data)

    def _pack(self, one: WeightSlice, target: PackedWeight) -> None:
        matrix, entry = one.matrix, self._reader.checkpoint.tensors[one.matrix.name]
        for start, stop in matrix.ranges(_CONVERTED_AT_ONCE):
            first, last = max(start, one.start), min(stop, one.stop)
            if first < last:
                raw = self._scratch(matrix.stored_bytes(last - first))
                self._reader.read_bytes(matrix.name, first, last, raw)
                pack_rows(entry, first, raw, target.rows(first - one.start, last - one.start))

    def _scratch(self, num_bytes: int) -> NDArray[np.uint8]:
        if self._raw.size < num_bytes:
            self._raw = empty_bytes(num_bytes)
        return self._raw[:num_bytes]
