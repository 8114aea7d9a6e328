"""The matrices of a model in the order of use, and the slices they are worked on in.

A slice is a range of rows of one matrix. Vectors (norms and biases) are not sliced: they are small
and stay resident. The embedding table is read by rows and is no part of a sweep, unless it is the
head as well.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

from thinslice.errors import ConfigError
from thinslice.forks import cached_property
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import (
    GROUP,
    PANEL_ROWS,
    PackedFormat,
    is_packable,
    keeps_codes,
    packed_format_of,
    panel_bytes,
)
from thinslice.plan.packing import Packing, packing_for
from thinslice.plan.sweep_bytes import SweepBytes
from thinslice.plan.tensors import Role, Room, Tensor, tensors_of

FLOAT_BYTES = {"float32": 4, "bfloat16": 2}
STORED_FLOAT_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_STORED_AS = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Matrix:
    """One matrix, as it lies on disk and as it is kept in memory.

    Attributes:
        stored: type on disk: BF16, F16, F32, a ggml block type or a PackedFormat.
        stored_row_bytes: bytes of a row there.
        kept: the type it has in memory: bfloat16, float32 or a PackedFormat.
    """

    tensor: Tensor
    stored: str
    stored_row_bytes: int
    kept: str

    @property
    def name(self) -> str:
        """The name of the tensor in the checkpoint."""
        return self.tensor.name

    @property
    def rows(self) -> int:
        """Outputs of a product."""
        return self.tensor.shape[0]

    @property
    def columns(self) -> int:
        """Inputs of a product."""
        return self.tensor.shape[1]

    @property
    def is_packed(self) -> bool:
        """Whether the matrix is multiplied in a packed format."""
        return self.kept not in FLOAT_BYTES

    @property
    def is_requantized(self) -> bool:
        """Whether the numbers must be quantised at each use, which is slow."""
        return self.is_packed and self.is_converted and not keeps_codes(self.stored, self.kept)

    @property
    def is_converted(self) -> bool:
        """Whether what is read is not what is kept."""
        return self.stored != _STORED_AS.get(self.kept, self.kept)

    def stored_bytes(self, rows: int) -> int:
        """Bytes of so many rows on disk; packed rows come in whole panels."""
        return self._whole(rows, self.stored in set(PackedFormat)) * self.stored_row_bytes

    def kept_bytes(self, rows: int) -> int:
        """Bytes of so many rows in memory."""
        if not self.is_packed:
            return rows * self.columns * FLOAT_BYTES[self.kept]
        row_bytes = panel_bytes(PackedFormat(self.kept), self.columns) // PANEL_ROWS
        return self._whole(rows, True) * row_bytes

    def ranges(self, max_bytes: int) -> list[tuple[int, int]]:
        """First and last row of each slice of at most ``max_bytes`` (but at least one grain)."""
        grain = self.tensor.grain
        step = math.lcm(grain, PANEL_ROWS) if self.is_packed else grain
        step_bytes = max(self.stored_bytes(step), self.kept_bytes(step))
        rows = max(max_bytes // step_bytes, 1) * step
        return [(start, min(start + rows, self.rows)) for start in range(0, self.rows, rows)]

    @staticmethod
    def _whole(rows: int, has_panels: bool) -> int:
        return -(-rows // PANEL_ROWS) * PANEL_ROWS if has_panels else rows

    @property
    def _signature(self) -> tuple[object, ...]:
        """All but the name: equal matrices of other layers are cut alike."""
        tensor = self.tensor
        return (tensor.shape, tensor.grain, self.stored, self.stored_row_bytes, self.kept)


@dataclass(frozen=True)
class WeightSlice:
    """Rows ``start`` to ``stop`` of a matrix."""

    matrix: Matrix
    start: int
    stop: int

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk."""
        return self.matrix.stored_bytes(self.stop - self.start)

    @property
    def kept_bytes(self) -> int:
        """Bytes in memory."""
        return self.matrix.kept_bytes(self.stop - self.start)


@dataclass(frozen=True)
class WeightLayout:
    """All matrices of a model.

    Attributes:
        layers: each layer's, in the order of use.
        head: the matrix that makes logits.
        embedding: an embedding table that is kept whole; None where the head is it, or where its
            rows are read from disk as they are needed.
        vector_bytes: of norms and biases, at most: the compiled kernels take float32.
        prediction: the matrices of the prediction layers, in the order of use; resident where they
            draft, and no part of a sweep.
        prediction_vector_bytes: of their norms and biases.
    """

    layers: tuple[tuple[Matrix, ...], ...]
    head: Matrix
    embedding: Matrix | None
    vector_bytes: int
    prediction: tuple[Matrix, ...] = ()
    prediction_vector_bytes: int = 0

    @property
    def sweep(self) -> tuple[Matrix, ...]:
        """Every matrix of one forward pass, in the order of use."""
        return (*(matrix for layer in self.layers for matrix in layer), self.head)

    @cached_property
    def kept_bytes(self) -> int:
        """Bytes of all weights in memory, without a prediction layer's."""
        total = self.vector_bytes + sum(m.kept_bytes(m.rows) for m in self.sweep)
        if self.embedding is not None:
            total += self.embedding.kept_bytes(self.embedding.rows)
        return total

    @cached_property
    def prediction_bytes(self) -> int:
        """Bytes of the prediction layers in memory."""
        matrices = sum(matrix.kept_bytes(matrix.rows) for matrix in self.prediction)
        return matrices + self.prediction_vector_bytes

    def without_prediction(self) -> "WeightLayout":
        """Return the layout without the prediction layers."""
        return replace(self, prediction=(), prediction_vector_bytes=0)

    def converted_to(self, shape: ModelShape, dtype: str) -> "WeightLayout":
        """The layout of the same model with other weights: packed, or as the file has them.

        Errors: ConfigError for rows that do not divide into groups.
        """
        if dtype not in FLOAT_BYTES:
            return packed_layout(shape, dtype)
        tables = () if self.embedding is None else (self.embedding,)
        matrices = (*self.sweep, *tables, *self.prediction)
        stored = {m.name: StoredMatrix(m.stored, m.stored_row_bytes) for m in matrices}
        return layout_of(shape, stored, dtype)

    def slices(self, max_bytes: int) -> tuple[WeightSlice, ...]:
        """All slices of one sweep."""
        return tuple(
            WeightSlice(matrix, start, stop)
            for matrix in self.sweep
            for start, stop in matrix.ranges(max_bytes)
        )

    def sweep_bytes(self, max_bytes: int) -> SweepBytes:
        """The sizes of ``slices`` without making them, kept: a plan asks often."""
        if max_bytes not in self._sweeps:
            self._sweeps[max_bytes] = self._cut_sweep(max_bytes)
        return self._sweeps[max_bytes]

    @cached_property
    def _sweeps(self) -> dict[int, SweepBytes]:
        return {}

    def _cut_sweep(self, max_bytes: int) -> SweepBytes:
        cut = [_cut(matrix, max_bytes) for matrix in _named_alike(self.sweep)]
        counts = iter([len(kept) for kept, _, _ in cut])
        return SweepBytes(
            kept=[num_bytes for kept, _, _ in cut for num_bytes in kept],
            stored=[num_bytes for _, stored, _ in cut for num_bytes in stored],
            largest_stored=max(stored[0] for _, stored, _ in cut),
            converting=max(converting for _, _, converting in cut),
            layer_counts=[sum(islice(counts, len(layer))) for layer in self.layers],
        )


# Converting a slice to other numbers holds float32 values and working copies of them; where codes
# are only put into another order, a copy of the slice whose rows llama.cpp has reordered.
_DEQUANTIZING_BYTES_PER_WEIGHT = 16


@lru_cache(maxsize=256)
def _cut(matrix: Matrix, max_bytes: int) -> tuple[list[int], list[int], int]:
    """Bytes kept and stored of each slice of a matrix, and what converting one holds."""
    counts = [stop - start for start, stop in matrix.ranges(max_bytes)]
    kept = [matrix.kept_bytes(rows) for rows in counts]
    stored = [matrix.stored_bytes(rows) for rows in counts]
    converting = 0
    if matrix.is_converted:
        if keeps_codes(matrix.stored, matrix.kept):
            converting = kept[0] + stored[0]
        else:
            converting = kept[0] + counts[0] * matrix.columns * _DEQUANTIZING_BYTES_PER_WEIGHT
    return kept, stored, converting


def _named_alike(matrices: tuple[Matrix, ...]) -> list[Matrix]:
    """Return the matrices, with one object for all that are equal apart from their names."""
    known: dict[tuple[object, ...], Matrix] = {}
    return [known.setdefault(matrix._signature, matrix) for matrix in matrices]


@dataclass(frozen=True)
class StoredMatrix:
    """How one tensor lies on disk: its type and the bytes of a row."""

    dtype: str
    row_bytes: int


Stored = dict[str, StoredMatrix]


def layout_of(
    shape: ModelShape, stored: Stored, dtype: str, packing: Packing | None = None
) -> WeightLayout:
    """Return the layout of a checkpoint that runs in ``dtype``.

    Args:
        stored: every matrix of the checkpoint, by tensor name.
        dtype: bfloat16 or float32; int4 or int8 keep each matrix in the packed format its type on
            disk goes into without visible loss.
        packing: of a packed checkpoint.
    """

    matrices = []
    for tensor in tensors_of(shape, packing):
        if tensor.is_matrix:
            entry = stored[tensor.name]
            kept = _kept(entry.dtype, tensor.shape[1], dtype)
            matrices.append(Matrix(tensor, entry.dtype, entry.row_bytes, kept))
    layers: list[list[Matrix]] = [[] for _ in range(shape.num_hidden_layers)]
    for matrix in matrices:
        if matrix.tensor.room is Room.LAYERS:
            layers[matrix.tensor.index].append(matrix)
    tables = {one.tensor.role: one for one in matrices if one.tensor.room is Room.TABLES}
    is_read_by_rows = dtype not in FLOAT_BYTES
    return WeightLayout(
        layers=tuple(map(tuple, layers)),
        head=tables[Role.HEAD],
        embedding=None if is_read_by_rows else tables.get(Role.EMBEDDING),
        vector_bytes=_vector_bytes(shape, (Room.TABLES, Room.LAYERS)),
        prediction=tuple(one for one in matrices if one.tensor.room is Room.PREDICTION),
        prediction_vector_bytes=_vector_bytes(shape, (Room.PREDICTION,)),
    )


def stored_as(shape: ModelShape, dtype: str) -> Stored:
    """A checkpoint whose matrices are all of one float type (BF16, F16, F32), known by shape."""
    itemsize = STORED_FLOAT_BYTES[dtype]
    return {
        tensor.name: StoredMatrix(dtype, tensor.shape[1] * itemsize)
        for tensor in tensors_of(shape)
        if tensor.is_matrix
    }


def packed_as(
    shape: ModelShape, packing: Packing, formats: Mapping[str, PackedFormat] | None = None
) -> Stored:
    """What packing a model of this shape gives.

    Args:
        formats: of the source's matrices, by name, where they are not all the packing's.
    """
    stored = {}
    for tensor in tensors_of(shape, packing):
        fmt = tensor.format_in(packing)
        if fmt is not None:
            fmt = fmt if formats is None else formats[tensor.origin.name]
            row_bytes = panel_bytes(fmt, tensor.shape[1]) // PANEL_ROWS
            stored[tensor.name] = StoredMatrix(fmt, row_bytes)
        elif tensor.is_matrix:
            stored[tensor.name] = StoredMatrix("BF16", 2 * tensor.shape[1])
    return stored


def packed_layout(shape: ModelShape, dtype: str) -> WeightLayout:
    """The layout of a model that was packed, known by shape alone.

    Errors: ConfigError for rows that do not divide into groups.
    """
    for size in (shape.hidden_size, shape.q_size, shape.intermediate_size):
        if not is_packable(size):
            raise ConfigError(
                f"--dtype {dtype}: rows of {size} weights do not divide into groups of {GROUP}"
            )
    packing = packing_for(shape, PackedFormat(dtype))
    return layout_of(shape, packed_as(shape, packing), dtype, packing)


def _vector_bytes(shape: ModelShape, rooms: Collection[Room]) -> int:
    """Norms and biases in float32, at most: they are never streamed."""
    vectors = (tensor for tensor in tensors_of(shape) if not tensor.is_matrix)
    return sum(4 * tensor.numel for tensor in vectors if tensor.room in rooms)


def _kept(stored: str, columns: int, dtype: str) -> str:
    if dtype in FLOAT_BYTES:
        return dtype
    if not is_packable(columns):
        return "float32"
    # A float matrix among packed ones, such as an embedding table, loses nothing visible in int8.
    return packed_format_of(stored) or PackedFormat.INT8
