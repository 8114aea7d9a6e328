"""Read tensors of a checkpoint, whole or in row ranges, into given buffers.

Files are read with positioned reads into small pieces of scratch and never mapped: mapped pages
would count against the budget. Quantised tensors become numbers on the way, and rows that
llama.cpp reordered go back to their places.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.files import os_errors_named, read_and_forget
from thinslice.checkpoint.index import Checkpoint, TensorEntry
from thinslice.closing import Closing
from thinslice.forks import fork_safe
from thinslice.kernels import native_pack
from thinslice.kernels.arrays import BF16, Numbers, empty_bytes
from thinslice.kernels.native_pack import converted, copy_into
from thinslice.kernels.packed import PackedWeight
from thinslice.plan.packed_format import PANEL_ROWS, keeps_codes, num_panels
from thinslice.units import MIB

SCRATCH_BYTES = MIB

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": BF16,
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


class CheckpointReader(Closing):
    """Reads a checkpoint's tensors; a context manager that holds its files open.

    Threads may read at the same time, into different buffers. Nothing is cached: each call reads
    the bytes it needs, once, and leaves no more in the system's cache than there was.

    Peak extra memory: SCRATCH_BYTES a call for plain types, at most four times that for block
    types (the blocks, their float32 values, and the working copies of gguf.quants).
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[Path, int] = {}
        self._lock = fork_safe(threading.RLock())

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def read(self, name: str, out: Numbers) -> None:
        """Fill ``out`` with a whole tensor; see ``read_rows``."""
        self.read_rows(name, 0, self.checkpoint.tensors[name].shape[0], out)

    def read_rows(self, name: str, start: int, stop: int, out: Numbers) -> None:
        """Fill ``out`` with rows ``start`` to ``stop`` of a tensor (elements, if it is a vector).

        Args:
            out: [stop - start, *rest], contiguous; float32, bfloat16 or float16.
                Values are rounded to its type where that is not the type on disk.

        Errors: CheckpointError naming the file if it cannot be read or has shrunk.
        """
        entry = self.checkpoint.tensors[name]
        assert not entry.is_packed, f"{name} is packed: read its bytes"
        assert 0 <= start <= stop <= entry.shape[0], f"{name}: rows {start}:{stop}"
        assert out.shape == (stop - start, *entry.shape[1:]), f"{name}: {out.shape}"
        assert out.flags.c_contiguous, f"{name}: not contiguous"
        assert out.dtype in STORED_DTYPES.values(), f"{name}: {out.dtype}"
        if start == stop or out.size == 0:
            return
        if entry.rotary_heads:
            self._read_rotary(entry, start, stop, out)
        elif STORED_DTYPES.get(entry.dtype) == out.dtype:
            self._fill(entry, start, out)
        else:
            for first, piece in self._pieces(entry, start, stop):
                copy_into(piece, out[first - start : first - start + len(piece)])

    def read_scattered(self, name: str, rows: Sequence[int], out: Numbers) -> None:
        """Fill ``out`` [rows, columns] with some rows of a matrix, each read by itself.

        Errors: CheckpointError as ``read_rows``.
        """
        entry = self.checkpoint.tensors[name]
        if entry.rotary_heads or entry.dtype not in STORED_DTYPES:
            for index, row in enumerate(rows):
                self.read_rows(name, row, row + 1, out[index : index + 1])
            return
        assert 0 <= min(rows) <= max(rows) < entry.shape[0], f"{name}: rows {rows}"
        assert out.shape == (len(rows), *entry.shape[1:]), f"{name}: {out.shape}"
        size = entry.row_bytes
        raw = empty_bytes(len(rows) * size)
        view = raw.data
        with os_errors_named(entry.path):
            file = self._file(entry.path)
            for index, row in enumerate(rows):
                offset = entry.offset + row * size
                read_and_forget(file, view[index * size : (index + 1) * size], offset, entry.path)
        copy_into(_values(entry, raw.reshape(len(rows), size)), out)

    def read_bytes(self, name: str, start: int, stop: int, out: Numbers) -> None:
        """Fill ``out`` with the bytes of rows ``start`` to ``stop`` as they lie on disk.

        Args:
            start, stop: of a packed matrix multiples of 16, or its last row; that gives whole
                panels.
            out: flat uint8 of exactly those bytes.

        Errors: CheckpointError as ``read_rows``.
        """
        entry = self.checkpoint.tensors[name]
        assert 0 <= start <= stop <= entry.shape[0], f"{name}: rows {start}:{stop}"
        rows = stop - start
        if entry.is_packed:
            is_whole = start % PANEL_ROWS == 0 and (
                stop % PANEL_ROWS == 0 or stop == entry.shape[0]
            )
            assert is_whole, f"{name}: rows {start}:{stop} are no whole panels"
            rows = num_panels(rows) * PANEL_ROWS
        assert out.dtype == np.uint8, f"{name}: {out.dtype}"
        assert out.shape == (rows * entry.row_bytes,), f"{name}: {out.shape}"
        assert out.flags.c_contiguous, f"{name}: not contiguous"
        self._fill(entry, start, out)

    def _read_rotary(self, entry: TensorEntry, start: int, stop: int, out: Numbers) -> None:
        """Put rows back that llama.cpp reordered within each head.

        With H rows a head, row i * H/2 + j of a head (i = 0, 1) is kept at 2 * j + i.
        Source: LlamaModel.permute in conversion/llama.py, ggml-org/llama.cpp.
        """
        head_rows = entry.row_grain
        for head_start in range(start // head_rows * head_rows, stop, head_rows):
            wanted = np.arange(max(start, head_start), min(stop, head_start + head_rows))
            row = wanted - head_start
            kept = head_start + row % (head_rows // 2) * 2 + row // (head_rows // 2)
            for first, piece in self._pieces(entry, int(kept.min()), int(kept.max()) + 1):
                is_here = (kept >= first) & (kept < first + len(piece))
                rows = piece[kept[is_here] - first]
                out[wanted[is_here] - start] = converted(rows, out.dtype)

    def _pieces(self, entry: TensorEntry, start: int, stop: int) -> Iterator[tuple[int, Numbers]]:
        """Rows as they are kept, some at a time: the first row's index and their values."""
        row_bytes = entry.row_bytes
        value_bytes = 4 * _row_values(entry) if entry.dtype not in STORED_DTYPES else row_bytes
        step = max(SCRATCH_BYTES // value_bytes, 1)
        for first in range(start, stop, step):
            num_rows = min(step, stop - first)
            raw = empty_bytes(num_rows * row_bytes)
            self._fill(entry, first, raw)
            yield first, _values(entry, raw.reshape(num_rows, row_bytes))

    def _fill(self, entry: TensorEntry, start: int, out: Numbers) -> None:
        """Fill ``out``, which has the type on disk, with the bytes of rows from ``start`` on."""
        view = out.reshape(-1).view(np.uint8).data
        offset = entry.offset + start * entry.row_bytes
        with os_errors_named(entry.path):
            file = self._file(entry.path)
            for begin in range(0, len(view), SCRATCH_BYTES):
                piece = view[begin : begin + SCRATCH_BYTES]
                read_and_forget(file, piece, offset + begin, entry.path)

    def _file(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]


def decode_rows(entry: TensorEntry, start: int, raw: NDArray[np.uint8]) -> Numbers:
    """The numbers of rows that were read elsewhere, such as a streamed slice.

    Args:
        start: the first row; for an entry with ``rotary_heads`` rows are given as whole heads.
        raw: the rows' bytes as they are on disk, uint8 [num_bytes].

    Returns [rows, columns] in the type on disk, a view of ``raw`` where no row moved, or float32
    for block types. Peak extra memory: up to 16 bytes for each number of a block type.
    """
    values = _values(entry, raw.reshape(-1, entry.row_bytes))
    return restore_rows(entry, start, values)


def restore_rows(entry: TensorEntry, start: int, rows: Numbers) -> Numbers:
    """Put back rows [rows, anything] that llama.cpp reordered; others are returned as they are.

    Args:
        start: the first row; for an entry with ``rotary_heads`` rows are given as whole heads.
    """
    if not entry.rotary_heads:
        return rows
    head_rows = entry.row_grain
    assert start % head_rows == 0, f"{entry.name}: row {start} is within a head"
    assert len(rows) % head_rows == 0, f"{entry.name}: {len(rows)} rows are no whole heads"
    # [heads, H/2, 2, columns] as it is kept; the pairs' members belong into halves.
    pairs = rows.reshape(-1, head_rows // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


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


def _row_values(entry: TensorEntry) -> int:
    """Numbers in one row."""
    values = 1
    for size in entry.shape[1:]:
        values *= size
    return values


def _values(entry: TensorEntry, raw: NDArray[np.uint8]) -> Numbers:
    """The numbers in the bytes of some rows, in the type on disk, or float32 for block types."""
    shape = (len(raw), *entry.shape[1:])
    dtype = STORED_DTYPES.get(entry.dtype)
    if dtype is not None:
        values = raw.reshape(-1).view(dtype)
        # A header of odd length leaves the numbers after it unaligned.
        return (values if values.flags.aligned else values.copy()).reshape(shape)
    return _dequantized(raw, entry.dtype).reshape(shape)


def _dequantized(blocks: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    """The numbers in rows of blocks of a type, uint8 [N, bytes of a row], by the package of the
    llama.cpp project.

    It is imported by the first that asks, as few models have a type that needs it.
    Peak extra memory: up to 16 bytes for each number.
    """
    kinds = import_module("gguf.constants").GGMLQuantizationType
    dequantize: Callable[..., NDArray[np.float32]] = import_module("gguf.quants").dequantize
    # A block's scale may be any bytes; what it gives then is no number, but no fault either.
    with np.errstate(all="ignore"):
        return dequantize(blocks, kinds[name])
