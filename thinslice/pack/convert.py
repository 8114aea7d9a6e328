"""One slice of the source: read, converted, and cut to its places in the packed file."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.reader import SCRATCH_BYTES, STORED_DTYPES, CheckpointReader, pack_rows
from thinslice.kernels import arrays
from thinslice.kernels.packed import PackedWeight, empty
from thinslice.pack.layout import PackedLayout, Target, Work, packed_size
from thinslice.plan.packed_format import GROUP, PANEL_ROWS, PackedFormat, keeps_codes, num_panels
from thinslice.units import MIB

# Small things around one slice.
_MORE_BYTES = MIB
# float32 values of block types and the working copies of gguf.quants.
_DECODING_BYTES_PER_WEIGHT = 16


def convert(
    reader: CheckpointReader, work: Work, start: int, stop: int
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The bytes that rows ``start`` to ``stop`` become: each one's offset in the file, uint8.

    Peak extra memory: see ``scratch_bytes``.
    Errors: CheckpointError for rows that cannot be read or quantised.
    """
    entry = work.entry
    targets = [one for one in work.targets if one.rows[0] <= start and stop <= one.rows[1]]
    if work.format is None:
        numbers = arrays.empty((stop - start, *entry.shape[1:]), STORED_DTYPES[work.dtype])
        reader.read_rows(entry.name, start, stop, numbers)
        for target in targets:
            row_bytes = target.num_bytes // (target.rows[1] - target.rows[0])
            yield (
                target.offset + (start - target.rows[0]) * row_bytes,
                numbers.reshape(-1).view(np.uint8),
            )
        return
    raw = arrays.empty_bytes((stop - start) * entry.row_bytes)
    reader.read_bytes(entry.name, start, stop, raw)
    packed = empty(work.format, stop - start, entry.shape[1])
    pack_rows(entry, start, raw, packed)
    for target in targets:
        part = _columns(packed, target)
        panel_bytes = part.size // num_panels(stop - start)
        yield target.offset + (start - target.rows[0]) // PANEL_ROWS * panel_bytes, part


def scratch_bytes(layout: PackedLayout) -> int:
    """The most that converting one slice of any tensor takes."""
    return max(_scratch(work) for work in layout.work)


def _scratch(work: Work) -> int:
    entry = work.entry
    rows = max(stop - start for start, stop in work.ranges())
    weights = rows * math.prod(entry.shape[1:])
    raw = rows * entry.row_bytes
    if work.format is None:
        return 4 * weights + 4 * SCRATCH_BYTES
    # The bytes, their copy in another order, the packed rows, and a copy of some columns of them.
    held = (2 if entry.rotary_heads else 1) * raw + 2 * packed_size(work, rows)
    if keeps_codes(entry.dtype, work.format):
        return held + _MORE_BYTES
    decoding = 0 if entry.dtype in STORED_DTYPES else _DECODING_BYTES_PER_WEIGHT * weights
    return held + decoding + _MORE_BYTES


def _columns(packed: PackedWeight, target: Target) -> NDArray[Any]:
    """Some columns of packed rows: groups, or pairs of them, keep their bytes."""
    first, last = target.columns
    if (first, last) == (0, packed.in_features):
        data: NDArray[Any] = packed.data
        return data
    unit = GROUP if packed.format is PackedFormat.INT4M else 2 * GROUP
    units = -(-packed.in_features // unit)
    body: NDArray[Any] = packed.data.reshape(num_panels(packed.out_features), units, -1)
    return body[:, first // unit : -(-last // unit)].reshape(-1)
