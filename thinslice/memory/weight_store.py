"""The weights of a model, slice by slice: those that stay in a place, and those that pass by it.

The decoder walks its matrices in a fixed order, and those that are streamed come in that order,
across layers and tokens. What is pinned and how large a slice is, the plan says; where slices lie
and how they come, a place: host_slices.py or device_slices.py.
"""

import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.reader import CheckpointReader
from thinslice.closing import Closing
from thinslice.kernels.arrays import BF16, Array, empty, empty_bytes
from thinslice.kernels.native_pack import converted
from thinslice.kernels.ops import Linear, Rows
from thinslice.kernels.packed import PackedWeight, unpack_rows
from thinslice.memory.resident import LoadedDtypes, Progress, load_vectors
from thinslice.memory.slice_rows import SliceLoader, rows_in
from thinslice.model.weights import ReadStats
from thinslice.plan.memory_plan import StreamingPlan
from thinslice.plan.packed_format import PANEL_ROWS
from thinslice.plan.tensors import EMBEDDING
from thinslice.plan.weight_layout import Matrix, WeightLayout, WeightSlice


class SlicePlace(Protocol):
    """Where slices are computed with.

    Attributes:
        layer_rows: the most rows that a layer takes at a time; None takes all.
        reads_pinned: the host may read what is pinned.
    """

    layer_rows: int | None
    reads_pinned: bool

    @property
    def streams(self) -> bool:
        """Whether any slice passes by."""

    def open(
        self,
        reader: CheckpointReader,
        pinned: Sequence[WeightSlice],
        streamed: Sequence[WeightSlice],
        progress: Progress | None,
    ) -> list[Rows]:
        """Read the slices that stay, whose rows it returns, and begin to fetch those that pass by.

        ``streamed`` is in the order of use.
        """

    def next(self, one: WeightSlice) -> AbstractContextManager[Rows]:
        """The rows of a streamed slice, which must be the one that comes next."""

    def hold(self) -> AbstractContextManager[None]:
        """In this context streamed slices may be asked for several times."""

    def moved(self, data: NDArray[np.generic]) -> Array:
        """The same numbers in this place."""

    def begin_sweep(self) -> None:
        """Go to the first slice, also after a sweep that was broken off."""

    def read_stats(self) -> ReadStats:
        """What was read since it was opened; pinned slices are not counted."""

    def close(self) -> None:
        """Stop fetching, and let go of what is held."""


class WeightStore(Closing):
    """Gives a decoder its weights, a ``WeightSource``; a context manager.

    One thread at a time runs the decoder. Call ``begin_sweep`` before each forward pass. Rows of
    the embedding table are read as they are needed, and the table lies nowhere as a whole unless it
    is the head too.

    Args:
        streaming: None keeps every matrix whole and in place.
        dtypes: of norms, biases and embedding rows, and what the numbers of matrices become.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        layout: WeightLayout,
        streaming: StreamingPlan | None,
        dtypes: LoadedDtypes,
        place: SlicePlace,
    ) -> None:
        self.layout = layout
        self.streaming = streaming
        self.place = place
        self._dtypes = dtypes
        self._reader = reader
        weakref.finalize(self, reader.close)
        weakref.finalize(self, place.close)
        self._embedding: _EmbeddingRows
        self._vectors: dict[str, Array] = {}
        # Of each matrix its slices, with the rows of those that are pinned.
        self._slices: dict[str, list[tuple[WeightSlice, Rows | None]]] = {}

    def open(self, progress: Progress | None = None) -> None:
        """Read what stays, and begin to fetch what does not.

        ``progress`` is called with bytes placed so far and in all.
        Memory: as planned.
        Errors: CheckpointError.
        """
        has_predictions = bool(self.layout.prediction)
        vectors = load_vectors(self._reader, self._dtypes, has_predictions)
        self._vectors = {name: self.place.moved(one) for name, one in vectors.items()}
        every = self._every_slice()
        pinned = _pinned(every, self.streaming)
        prediction = [WeightSlice(one, 0, one.rows) for one in self.layout.prediction]
        stay = [one for idx, one in enumerate(every) if idx in pinned] + prediction
        pass_by = [one for idx, one in enumerate(every) if idx not in pinned]
        rows = self.place.open(self._reader, stay, pass_by, progress)
        rows_of = dict(zip(stay, rows, strict=True))
        for one in (*every, *prediction):
            self._slices.setdefault(one.matrix.name, []).append((one, rows_of.get(one)))
        table = self._slices.get(EMBEDDING, ()) if self.place.reads_pinned else ()
        self._embedding = _EmbeddingRows(self._reader, EMBEDDING, self.layout, self._dtypes, table)

    def _every_slice(self) -> Sequence[WeightSlice]:
        if self.streaming is None:
            return [WeightSlice(one, 0, one.rows) for one in self.layout.sweep]
        return self.layout.slices(self.streaming.slice_bytes)

    @property
    def layer_rows(self) -> int | None:
        """The most rows that a layer takes at a time; None takes all."""
        return self.place.layer_rows

    @property
    def streams(self) -> bool:
        """Whether slices are fetched at each use."""
        return self.place.streams

    def vector(self, name: str) -> Array:
        """A norm or a bias."""
        return self._vectors[name]

    def linear(self, name: str, bias: Array | None) -> Linear:
        """A matrix, whose slices come from here in the order of use."""
        slices = self._slices[name]
        whole = slices[0][1] if len(slices) == 1 else None
        return Linear(slices[-1][0].stop, partial(self._slices_of, name), bias, whole)

    def embed(self, token_ids_T: NDArray[np.int64]) -> Array:
        """Rows of the embedding table, [T, D]."""
        return self.place.moved(self._embedding(token_ids_T))

    def hold(self) -> AbstractContextManager[None]:
        """In this context matrices may be walked several times."""
        return self.place.hold()

    def begin_sweep(self) -> None:
        """Go to the first slice, also after a sweep that was broken off."""
        self.place.begin_sweep()

    def read_stats(self) -> ReadStats:
        """What was read since the store was opened; pinned slices are not counted."""
        return self.place.read_stats()

    def close(self) -> None:
        """Stop fetching, and close the files."""
        try:
            self.place.close()
        finally:
            self._reader.close()

    def _slices_of(self, name: str) -> Iterator[tuple[int, int, Rows]]:
        """First and last row and the rows of each slice of a matrix, in the order of use."""
        for one, pinned in self._slices[name]:
            if pinned is not None:
                yield one.start, one.stop, pinned
                continue
            with self.place.next(one) as rows:
                yield one.start, one.stop, rows


class _EmbeddingRows:
    """Rows of the embedding table, by token: read from disk, or from what of a packed table is
    here. Each row that is read is read once.

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


def _pinned(slices: Sequence[WeightSlice], streaming: StreamingPlan | None) -> frozenset[int]:
    """The places of those that stay."""
    return frozenset(range(len(slices)) if streaming is None else streaming.pinned())
