"""Where everything goes in a packed model.safetensors, and from which rows it is made.

Arithmetic only: layout and slices follow from the source and the packing, never from a budget, so
that a packing that was broken off goes on at any budget.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from thinslice.checkpoint.index import Checkpoint, TensorEntry
from thinslice.checkpoint.packed_tensors import (
    BYTES_DTYPE,
    FILE_ALIGNMENT,
    PADDING,
    check_packable,
    stored_shape,
)
from thinslice.checkpoint.safetensors_header import MAX_TENSORS
from thinslice.errors import CheckpointError
from thinslice.plan.packed_format import PANEL_ROWS, PackedFormat, most_common_format, packed_bytes
from thinslice.plan.packing import Packing, head_format, matrix_format
from thinslice.plan.tensors import Role, Room, Tensor, tensors_of

# Weights read and packed at a time: two MiB of bfloat16.
_SLICE_WEIGHTS = 1 << 20
_FLOAT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Target:
    """One tensor of the packed file, and the part of its source that it is.

    Attributes:
        offset: first byte in the file.
        rows, columns: first and last of the source; columns are those of a matrix.
    """

    name: str
    offset: int
    num_bytes: int
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True)
class Work:
    """One tensor of the source and what becomes of it.

    Attributes:
        format: None where it stays in a float type.
        dtype: that float type, as the header names it.
    """

    entry: TensorEntry
    format: PackedFormat | None
    dtype: str
    targets: tuple[Target, ...]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """First and last row of each slice; none lies across two blocks of rows."""
        step = 1
        if self.format is not None:
            step = math.lcm(PANEL_ROWS, self.entry.row_grain)
        columns = math.prod(self.entry.shape[1:])
        step *= max(_SLICE_WEIGHTS // columns // step, 1)
        for first, last in sorted({target.rows for target in self.targets}):
            for start in range(first, last, step):
                yield start, min(start + step, last)


@dataclass(frozen=True)
class PackedLayout:
    """The whole file: its first bytes, its size, and the work that fills it."""

    header: bytes
    num_bytes: int
    work: tuple[Work, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes that are read."""
        return sum(work.entry.num_bytes for work in self.work)


def layout_of(source: Checkpoint, packing: Packing) -> PackedLayout:
    """Lay out the packed file of a checkpoint.

    The order is that of use: an embedding table that is not the head, all vectors, each layer's
    matrices, the head, the prediction layers.

    Errors: CheckpointError for a model that cannot be packed.
    """
    check_packable(source.shape)
    formats = matrix_formats(source, packing)
    tensors = _in_file_order(tensors_of(source.shape, packing), source)
    file = _File()
    for tensor in tensors:
        entry = source.tensors[tensor.origin.name]
        fmt = formats.get(entry.name)
        if fmt is not None:
            file.add(tensor.name, BYTES_DTYPE, stored_shape(fmt, *tensor.shape), is_aligned=True)
        else:
            dtype = _float_dtype(tensor, entry)
            file.add(tensor.name, dtype, tensor.shape, is_aligned=tensor.is_matrix)
    header = file.header()
    targets: dict[str, list[Target]] = {}
    dtypes = {}
    for tensor in tensors:
        origin = tensor.origin
        start, stop = (len(header) + offset for offset in file.offsets[tensor.name])
        target = Target(tensor.name, start, stop - start, origin.rows, origin.columns)
        targets.setdefault(origin.name, []).append(target)
        dtypes[origin.name] = _float_dtype(tensor, source.tensors[origin.name])
    work = tuple(
        Work(source.tensors[name], formats.get(name), dtypes[name], tuple(parts))
        for name, parts in targets.items()
    )
    return PackedLayout(header, len(header) + file.end, work)


class _File:
    """Tensors one after the other; offsets count from the end of the header."""

    def __init__(self) -> None:
        self.end = 0
        self.offsets: dict[str, tuple[int, int]] = {}
        self._tensors: dict[str, dict[str, object]] = {}
        self._num_paddings = 0
        self._was_aligned = True

    def add(self, name: str, dtype: str, shape: tuple[int, ...], *, is_aligned: bool) -> None:
        """Place a tensor; one that is aligned, and what follows it, start at multiples of 4096."""
        missing = -self.end % FILE_ALIGNMENT
        if missing and (is_aligned or self._was_aligned):
            self._place(f"{PADDING}{self._num_paddings}", BYTES_DTYPE, (missing,))
            self._num_paddings += 1
        self._place(name, dtype, shape)
        self._was_aligned = is_aligned

    def header(self) -> bytes:
        """The length field and the JSON, filled up with spaces."""
        if len(self._tensors) > MAX_TENSORS:
            raise CheckpointError(f"{len(self._tensors)} tensors are too many for one file")
        text = json.dumps(self._tensors, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % FILE_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        stop = self.end + math.prod(shape) * _FLOAT_BYTES.get(dtype, 1)
        self.offsets[name] = (self.end, stop)
        offsets = [self.end, stop]
        self._tensors[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        self.end = stop


def _in_file_order(tensors: Sequence[Tensor], source: Checkpoint) -> list[Tensor]:
    """A table that is read by rows, all vectors, matrices in the order of use."""

    def itemsize(tensor: Tensor) -> int:
        return _FLOAT_BYTES[_float_dtype(tensor, source.tensors[tensor.origin.name])]

    by_rows = [one for one in tensors if one.role is Role.EMBEDDING]
    # Longer numbers first: then none lies at an odd place, which some readers do not take.
    vectors = sorted((one for one in tensors if not one.is_matrix), key=itemsize, reverse=True)
    matrices = [one for one in tensors if one.is_matrix and one.role is not Role.EMBEDDING]
    order = {Room.LAYERS: 0, Room.TABLES: 1, Room.PREDICTION: 2}  # a tied head is listed first
    return [*by_rows, *vectors, *sorted(matrices, key=lambda one: order[one.room])]


def matrix_formats(source: Checkpoint, packing: Packing) -> dict[str, PackedFormat]:
    """What each matrix that is packed is packed in, by its name in the source."""
    tensors = [one for one in tensors_of(source.shape) if one.format_in(packing) is not None]
    dtypes = {one.name: source.tensors[one.name].dtype for one in tensors}
    most = most_common_format(dtypes[one.name] for one in tensors if one.room is Room.LAYERS)
    return {
        one.name: (matrix_format if one.room is Room.LAYERS else head_format)(
            dtypes[one.name], packing, most
        )
        for one in tensors
    }


def _float_dtype(tensor: Tensor, entry: TensorEntry) -> str:
    if tensor.role is Role.EMBEDDING:
        return "BF16"
    return entry.dtype if entry.dtype in _FLOAT_BYTES else "F32"


def packed_size(work: Work, rows: int) -> int:
    """Bytes of so many packed rows of a whole matrix."""
    assert work.format is not None
    return packed_bytes(work.format, rows, work.entry.shape[1])
