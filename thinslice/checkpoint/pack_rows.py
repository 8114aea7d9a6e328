"""From rows as they lie on disk to a packed matrix."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.index import TensorEntry
from thinslice.checkpoint.reader import decode_rows, restore_rows
from thinslice.kernels import native_pack
from thinslice.kernels.packed import PackedWeight
from thinslice.plan.packed_format import keeps_codes


def pack_rows(entry: TensorEntry, start: int, raw: NDArray[np.uint8], target: PackedWeight) -> None:
    """Fill a packed matrix with rows from ``start`` on.

    Args:
        entry: a matrix that is not packed yet.
        start: the first row; for an entry with ``rotary_heads`` rows are given as whole heads.
        raw: the rows' bytes as they are on disk, uint8 [num_bytes].
        target: as many rows.

    Peak extra memory: none where the codes are kept, but another copy of ``raw`` where llama.cpp
    reordered its rows; of a block type that is quantised anew up to 16 bytes for each weight.
    Errors: CheckpointError for weights that cannot be quantised.
    """
    if not keeps_codes(entry.dtype, target.format):
        native_pack.quantize(decode_rows(entry, start, raw), target)
        return
    rows: NDArray[Any] = restore_rows(entry, start, raw.reshape(-1, entry.row_bytes))
    native_pack.repack(rows, entry.dtype, target)
