"""Where everything goes in a packed model.safetensors, and from which rows it is made.

Arithmetic only: layout and slices follow from the source and the packing, never from a budget, so
that a packing that was broken off goes on at any budget.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from thinslice.checkpoint.index import Checkpoint, TensorEntry
from thinslice.checkpoint.names import Shapes, expected_tensors
from thinslice.checkpoint.packed_tensors import (
    BYTES_DTYPE,
    FILE_ALIGNMENT,
    PADDING,
    check_packable,
    format_of,
    stored_shape,
)
from thinslice.checkpoint.safetensors_header import MAX_TENSORS
from thinslice.errors import CheckpointError
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import PANEL_ROWS, PackedFormat, most_common_format, packed_bytes
from thinslice.plan.packing import Packing, head_format, matrix_format

# Weights read and packed at a time: two MiB of bfloat16.
_SLICE_WEIGHTS = 1 << 20
_EMBEDDING = "model.embed_tokens.weight"
_BLOCK = re.compile(r"(.+\.mlp)\.blocks\.(\d+)\.((gate|up|down)_proj\.(weight|bias))", re.ASCII)
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
    shape = source.shape
    check_packable(shape)
    expected = expected_tensors(shape, packing)
    formats: dict[str, PackedFormat | None] = {}
    packed = matrix_formats(source, packing)
    file = _File()
    for name in _in_file_order(expected, shape, source, packing):
        origin, _ = _origin(name, shape, packing)
        entry, size = source.tensors[origin], expected[name]
        fmt = packed.get(origin)
        formats[origin] = fmt
        if fmt is not None:
            stored = stored_shape(fmt, *size)
            file.add(name, BYTES_DTYPE, stored, is_aligned=True)
        else:
            file.add(name, _float_dtype(name, entry), size, is_aligned=len(size) == 2)
    header = file.header()
    return PackedLayout(
        header, len(header) + file.end, _work(file, expected, source, (packing, formats))
    )


class _File:
    """Tensors one after the other; offsets count from the end of the header."""

    def __init__(self) -> None:
        self.end = 0
        self.tensors: dict[str, dict[str, object]] = {}
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
        if len(self.tensors) > MAX_TENSORS:
            raise CheckpointError(f"{len(self.tensors)} tensors are too many for one file")
        text = json.dumps(self.tensors, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % FILE_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        stop = self.end + math.prod(shape) * _FLOAT_BYTES.get(dtype, 1)
        offsets = [self.end, stop]
        self.tensors[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        self.end = stop


def _in_file_order(
    expected: Shapes, shape: ModelShape, source: Checkpoint, packing: Packing
) -> Iterable[str]:
    def itemsize(name: str) -> int:
        origin, _ = _origin(name, shape, packing)
        return _FLOAT_BYTES[_float_dtype(name, source.tensors[origin])]

    matrices = [name for name, size in expected.items() if len(size) == 2 and name != _EMBEDDING]
    vectors = [name for name, size in expected.items() if len(size) == 1]
    # Longer numbers first: then none lies at an odd place, which some readers do not take.
    vectors.sort(key=itemsize, reverse=True)
    if not shape.tie_word_embeddings:
        return [_EMBEDDING, *vectors, *matrices]
    layers = [name for name in matrices if name.startswith("model.layers.")]
    return [*vectors, *layers, _EMBEDDING, *matrices[len(layers) :]]


def _work(
    file: _File,
    expected: Shapes,
    source: Checkpoint,
    packed: tuple[Packing, dict[str, PackedFormat | None]],
) -> tuple[Work, ...]:
    """The source's tensors in the order in which the file first needs them.

    Args:
        packed: the packing, and the format of each tensor of the source.
    """
    shape, (packing, formats) = source.shape, packed
    data_start = len(file.header())
    targets: dict[str, list[Target]] = {}
    for name, fields in file.tensors.items():
        if name not in expected:
            continue
        origin, block = _origin(name, shape, packing)
        offsets = fields["data_offsets"]
        assert isinstance(offsets, list)
        rows, columns = _part(name, expected[name], block)
        start, stop = offsets
        target = Target(name, data_start + start, stop - start, rows, columns)
        targets.setdefault(origin, []).append(target)
    return tuple(
        Work(
            source.tensors[origin],
            formats[origin],
            _float_dtype(origin, source.tensors[origin]),
            tuple(parts),
        )
        for origin, parts in targets.items()
    )


def _origin(name: str, shape: ModelShape, packing: Packing) -> tuple[str, tuple[int, int] | None]:
    """The source's tensor that one is made of, and the range of a block of a feed-forward."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name, None
    start = int(match[2]) * packing.ffn_block
    block = (start, min(start + packing.ffn_block, shape.intermediate_size))
    return f"{match[1]}.{match[3]}", block


def _part(
    name: str, size: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of the source: a block is rows of gate and up, and columns of down."""
    rows, columns = (0, size[0]), (0, size[1] if len(size) == 2 else 1)
    if block is None or name.endswith(".down_proj.bias"):
        return rows, columns
    if name.endswith(".down_proj.weight"):
        return rows, block
    return block, columns


def matrix_formats(source: Checkpoint, packing: Packing) -> dict[str, PackedFormat]:
    """What each matrix that is packed is packed in, by its name in the source."""
    matrices = {
        name: entry.dtype
        for name, entry in source.tensors.items()
        if len(entry.shape) == 2 and format_of(name, source.shape, packing) is not None
    }
    of_layers = {name: one for name, one in matrices.items() if name.startswith("model.layers.")}
    most = most_common_format(of_layers.values())
    return {
        name: (matrix_format if name in of_layers else head_format)(dtype, packing, most)
        for name, dtype in matrices.items()
    }


def _float_dtype(name: str, entry: TensorEntry) -> str:
    if name == _EMBEDDING:
        return "BF16"
    return entry.dtype if entry.dtype in _FLOAT_BYTES else "F32"


def packed_size(work: Work, rows: int) -> int:
    """Bytes of so many packed rows of a whole matrix."""
    assert work.format is not None
    return packed_bytes(work.format, rows, work.entry.shape[1])
