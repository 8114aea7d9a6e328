"""Rows of an embedding table, by token: read from disk, or from what of a packed table is here."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.reader import CheckpointReader
from thinslice.kernels.arrays import BF16, empty, empty_bytes
from thinslice.kernels.native_pack import converted
from thinslice.kernels.ops import Rows
from thinslice.kernels.packed import PackedWeight, unpack_rows
from thinslice.memory.resident import LoadedDtypes
from thinslice.memory.slice_rows import SliceLoader, rows_in
from thinslice.plan.packed_format import PANEL_ROWS
from thinslice.plan.weight_layout import Matrix, WeightLayout, WeightSlice


class EmbeddingRows:
    """Gives tokens their rows; each row that is read is read once.

    Args:
        name: of the table.
        dtypes: the numbers of the rows are those of matrices, in the type of vectors.
        slices: those of a table that is the head as well, in order, with the rows of those that
            lie in memory; none where they lie out of reach, on a device.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        name: str,
        layout: WeightLayout,
        dtypes: LoadedDtypes,
        slices: Sequence[tuple[WeightSlice, Rows | None]] = (),
    ) -> None:
        self._reader, self._loader = reader, SliceLoader(reader)
        self._name = name
        self._dtype = dtypes.vectors
        self._slices = tuple(slices)
        is_packed_head = layout.head.name == name and layout.head.is_packed
        self._packed = layout.head if is_packed_head else None
        # Packing writes another table in bfloat16; what it is packed from gives the same bits.
        rounds = not is_packed_head and any(matrix.is_packed for matrix in layout.sweep)
        self._read_dtype = BF16 if rounds else dtypes.matrices

    def __call__(self, token_ids_T: NDArray[np.int64]) -> NDArray[np.generic]:
        """Rows [T, D].

        Extra memory: the rows once more, and of a packed table a panel of 16.
        Errors: CheckpointError.
        """
        if self._packed is not None and len(self._slices) == 1:
            whole = self._slices[0][1]
            if isinstance(whole, PackedWeight):
                return converted(unpack_rows(whole, token_ids_T), self._dtype)
        token_ids: list[int] = token_ids_T.tolist()
        row_of = {token_id: row for row, token_id in enumerate(dict.fromkeys(token_ids))}
        columns = self._reader.checkpoint.tensors[self._name].shape[1]
        rows = empty((len(row_of), columns), self._read_dtype)
        if self._packed is None:
            self._reader.read_scattered(self._name, list(row_of), rows)
        else:
            for token_id, row in row_of.items():
                one = self._packed_row(self._packed, token_id)
                rows[row] = converted(one, self._read_dtype)
        if len(row_of) < len(token_ids):
            rows = rows[[row_of[token_id] for token_id in token_ids]]
        return converted(rows, self._dtype)

    def _packed_row(self, matrix: Matrix, row: int) -> NDArray[Any]:
        """The numbers that a row of the packed table stands for."""
        if self._slices:
            index = bisect_right(self._slices, row, key=lambda pair: pair[0].start) - 1
            one, pinned = self._slices[index]
            if isinstance(pinned, PackedWeight):
                return unpack_rows(pinned, np.array([row - one.start])).reshape(-1)
        start = row // PANEL_ROWS * PANEL_ROWS
        panel = WeightSlice(matrix, start, min(start + PANEL_ROWS, matrix.rows))
        rows = rows_in(empty_bytes(panel.kept_bytes), panel)
        assert isinstance(rows, PackedWeight), "a packed matrix of numbers"
        self._loader.read(panel, rows)
        return unpack_rows(rows, np.array([row - start])).reshape(-1)
