"""The matrices of a model, slice by slice: pinned in memory, or read in at each use.

The decoder walks its matrices in a fixed order, and the slice reader reads ahead in that order,
across layers and tokens. What is pinned and how large a slice is, the plan says.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.pack_rows import pack_rows
from thinslice.checkpoint.reader import CheckpointReader, decode_rows
from thinslice.closing import Closing
from thinslice.kernels.buffers import empty_bytes
from thinslice.kernels.dtypes import FLOAT_DTYPES
from thinslice.kernels.ops import Linear, Rows
from thinslice.kernels.packed import PackedWeight
from thinslice.memory.embedding_rows import EmbeddingRows
from thinslice.memory.held_slices import HeldSlices
from thinslice.memory.slice_reader import SliceReader
from thinslice.memory.slice_rows import PlacedSlice, read_slice, rows_in, slice_on_disk
from thinslice.model.weights import ReadStats
from thinslice.plan.memory_plan import StreamingPlan
from thinslice.plan.packed_format import ALIGNMENT
from thinslice.plan.tensors import EMBEDDING
from thinslice.plan.weight_layout import Matrix, WeightLayout, WeightSlice

Progress = Callable[[int, int], None]


class WeightStore(Closing):
    """Gives a decoder its weights, a ``WeightSource``; a context manager.

    One thread at a time runs the decoder. Call ``begin_sweep`` before each forward pass.

    Args:
        vectors: norms and biases, by their names.
        streaming: None keeps every matrix whole and in memory.
        dtype: of the numbers that embedding rows become.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: WeightLayout,
        vectors: Mapping[str, torch.Tensor],
        streaming: StreamingPlan | None,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        self.streaming = streaming
        self.layer_rows = None if streaming is None else streaming.layer_rows
        self.dtype = dtype
        self._vectors = vectors
        self._rows = CheckpointReader(checkpoint)
        weakref.finalize(self, self._rows.close)
        self._embedding = EmbeddingRows(self._rows, EMBEDDING, layout, dtype)
        self._placed: dict[str, list[PlacedSlice]] = {}
        self._reader: SliceReader | None = None
        self._converted = torch.empty(0, dtype=torch.uint8)
        self._held = HeldSlices(0)
        self._is_holding = False

    def open(self, progress: Progress | None = None) -> None:
        """Read the pinned slices, and a prediction layer whole, and begin to read ahead.

        ``progress`` is called with bytes placed so far and in all.
        Memory: the pinned slices, and the ring, as planned.
        Errors: CheckpointError.
        """
        streaming = self.streaming
        if streaming is None:
            slices = tuple(WeightSlice(one, 0, one.rows) for one in self.layout.sweep)
            pinned_places = frozenset(range(len(slices)))
        else:
            slices = self.layout.slices(streaming.slice_bytes)
            pinned_places = frozenset(streaming.pinned())
        prediction = tuple(WeightSlice(one, 0, one.rows) for one in self.layout.prediction)
        pinned = [one for index, one in enumerate(slices) if index in pinned_places]
        pinned += prediction
        rows_of = dict(zip(pinned, self._pin(pinned, progress), strict=True))
        streamed = [one for index, one in enumerate(slices) if index not in pinned_places]
        on_disk = {one: slice_on_disk(self.checkpoint, one) for one in streamed}
        for one in (*slices, *prediction):
            placed = PlacedSlice(one, rows_of.get(one), on_disk.get(one))
            self._placed.setdefault(one.matrix.name, []).append(placed)
        table = self._placed.get(EMBEDDING, ())
        self._embedding = EmbeddingRows(self._rows, EMBEDDING, self.layout, self.dtype, table)
        if streamed and streaming is not None:
            converted = [one.kept_bytes for one in streamed if _is_packed_on_the_way(one.matrix)]
            self._converted = empty_bytes(max(converted, default=0))
            self._reader = SliceReader.open(
                [on_disk[one] for one in streamed],
                buffer_bytes=streaming.buffer_bytes,
                num_buffers=streaming.num_buffers,
            )
            # The reader's threads hold the reader and would hold all of it for ever.
            weakref.finalize(self, self._reader.close)
            if streaming.layer_rows is not None:
                self._held = HeldSlices(self._most_held(streamed))

    def vector(self, name: str) -> torch.Tensor:
        """A norm or a bias."""
        return self._vectors[name]

    def linear(self, name: str, bias: torch.Tensor | None) -> Linear:
        """A matrix, whose slices come from here in the order of reading."""
        placed = self._placed[name]
        whole = placed[0].rows if len(placed) == 1 else None
        return Linear(placed[-1].one.stop, partial(self._slices_of, name), bias, whole)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table, [T, D]."""
        return self._embedding(token_ids_T)

    @property
    def streams(self) -> bool:
        """Whether slices are read in at each use."""
        return self._reader is not None

    def begin_sweep(self) -> None:
        """Go to the first slice, also after a sweep that was broken off."""
        if self._reader is not None:
            self._reader.restart()

    def read_stats(self) -> ReadStats:
        """What was read since the store was opened; the pinned slices are not counted."""
        return ReadStats() if self._reader is None else self._reader.stats()

    def close(self) -> None:
        """Stop reading and close the files."""
        self._rows.close()
        if self._reader is not None:
            self._reader.close()

    def _pin(self, slices: Sequence[WeightSlice], progress: Progress | None) -> list[Rows]:
        """Read slices into one piece of memory, so that small matrices share large pages."""
        starts, end = [], 0
        for one in slices:
            starts.append(end)
            end += -(-one.kept_bytes // ALIGNMENT) * ALIGNMENT
        arena = empty_bytes(end)
        pinned = []
        for one, start in zip(slices, starts, strict=True):
            target = rows_in(arena[start : start + one.kept_bytes], one)
            read_slice(self._rows, one, target)
            pinned.append(target)
            if progress is not None:
                progress(start + one.kept_bytes, end)
        return pinned

    def _slices_of(self, name: str) -> Iterator[tuple[int, int, Rows]]:
        """First and last row and the rows of each slice of a matrix, in the order of reading."""
        for placed in self._placed[name]:
            one, rows = placed.one, placed.rows
            if rows is None and self._is_holding:
                rows = self._held.get(one)
                rows = self._hold(placed) if rows is None else rows
            if rows is not None:
                yield one.start, one.stop, rows
                continue
            with self._next(placed) as raw:
                yield one.start, one.stop, self._streamed_rows(one, raw)

    def _next(self, placed: PlacedSlice) -> AbstractContextManager[torch.Tensor]:
        """The stored bytes of a streamed slice, which must be the one that is read next."""
        assert self._reader is not None, "a streamed slice without a reader"
        assert placed.on_disk is not None, f"{placed.one} is not streamed"
        return self._reader.next(placed.on_disk)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep each slice that is read until the block ends, so that it is read once."""
        self._is_holding = True
        try:
            yield
        finally:
            self._is_holding = False
            self._held.clear()

    def _hold(self, placed: PlacedSlice) -> Rows:
        """The next slice, moved to where it is held; its buffer is read into again at once."""
        one = placed.one
        entry = self.checkpoint.tensors[one.matrix.name]
        target = rows_in(self._held.place(one), one)
        with self._next(placed) as raw:
            if isinstance(target, torch.Tensor):
                target.copy_(decode_rows(entry, one.start, raw))
            elif _is_packed_on_the_way(one.matrix):
                pack_rows(entry, one.start, raw, target)
            else:
                target.data.copy_(raw)
        self._held.add(one, target)
        return target

    def _most_held(self, streamed: Sequence[WeightSlice]) -> int:
        """Bytes of the slices of the layer that streams most."""
        streamed_of = Counter[str]()
        for one in streamed:
            streamed_of[one.matrix.name] += HeldSlices.bytes_of(one)
        return max(sum(streamed_of[m.name] for m in layer) for layer in self.layout.layers)

    def _streamed_rows(self, one: WeightSlice, raw: torch.Tensor) -> Rows:
        matrix, entry = one.matrix, self.checkpoint.tensors[one.matrix.name]
        if _is_packed_on_the_way(matrix):
            target = rows_in(self._converted[: one.kept_bytes], one)
            assert isinstance(target, PackedWeight)
            pack_rows(entry, one.start, raw, target)
            return target
        if matrix.is_packed:
            return rows_in(raw, one)
        return decode_rows(entry, one.start, raw).to(FLOAT_DTYPES[matrix.kept])


def _is_packed_on_the_way(matrix: Matrix) -> bool:
    return matrix.is_packed and matrix.is_converted
