"""The streamed slices of one layer, kept while all rows of a long prompt pass through it."""

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.arrays import empty_bytes
from thinslice.kernels.ops import Rows
from thinslice.plan.packed_format import ALIGNMENT
from thinslice.plan.weight_layout import WeightSlice


class HeldSlices:
    """Slices in one piece of memory, placed one after the other until it is cleared.

    Memory: num_bytes; pages count only once they are written.
    """

    def __init__(self, num_bytes: int) -> None:
        self._memory = empty_bytes(num_bytes)
        self._end = 0
        self._rows: dict[tuple[str, int], Rows] = {}

    @staticmethod
    def bytes_of(one: WeightSlice) -> int:
        """What a slice takes here."""
        return -(-one.kept_bytes // ALIGNMENT) * ALIGNMENT

    def place(self, one: WeightSlice) -> NDArray[np.uint8]:
        """Room for a slice, uint8 [kept_bytes]."""
        start, self._end = self._end, self._end + self.bytes_of(one)
        assert self._end <= len(self._memory), "more slices than one layer has"
        return self._memory[start : start + one.kept_bytes]

    def add(self, one: WeightSlice, rows: Rows) -> None:
        """Note a slice, now that its place is filled."""
        self._rows[one.matrix.name, one.start] = rows

    def get(self, one: WeightSlice) -> Rows | None:
        """A slice that is here."""
        return self._rows.get((one.matrix.name, one.start))

    def clear(self) -> None:
        """Release all slices."""
        self._rows.clear()
        self._end = 0
