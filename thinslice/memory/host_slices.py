"""Slices in main memory: pinned there, or read into a ring of buffers ahead of each use."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader, decode_rows, pack_rows
from thinslice.kernels.arrays import FLOAT_DTYPES, empty_bytes
from thinslice.kernels.native_pack import converted, copy_into
from thinslice.kernels.ops import Rows
from thinslice.kernels.packed import PackedWeight
from thinslice.memory.resident import Progress
from thinslice.memory.slice_reader import SliceReader
from thinslice.memory.slice_rows import SliceLoader, rows_in, slice_on_disk, starts_of
from thinslice.memory.slice_schedule import Slice
from thinslice.model.weights import ReadStats
from thinslice.plan.memory_plan import StreamingPlan
from thinslice.plan.packed_format import ALIGNMENT
from thinslice.plan.tensors import Room
from thinslice.plan.weight_layout import Matrix, WeightSlice


class HostSlices:
    """Main memory; a ``SlicePlace``.

    Memory: the pinned slices; the ring, what a slice is converted to on the way, and where a layer
    takes its rows in several parts what it streams.
    """

    reads_pinned = True

    def __init__(self, checkpoint: Checkpoint, streaming: StreamingPlan | None) -> None:
        self._checkpoint = checkpoint
        self._streaming = streaming
        self.layer_rows = None if streaming is None else streaming.layer_rows
        self.reader: SliceReader | None = None
        self._on_disk: dict[WeightSlice, Slice] = {}
        self._converted = empty_bytes(0)
        self._held = _HeldSlices(0)
        self._is_holding = False

    @property
    def streams(self) -> bool:
        """Whether slices are read at each use."""
        return self.reader is not None

    def open(
        self,
        reader: CheckpointReader,
        pinned: Sequence[WeightSlice],
        streamed: Sequence[WeightSlice],
        progress: Progress | None,
    ) -> list[Rows]:
        """Read the pinned slices, and begin to read ahead. Errors: CheckpointError."""
        rows, streaming = _pin(reader, pinned, progress), self._streaming
        if streamed and streaming is not None:
            self._on_disk = {one: slice_on_disk(self._checkpoint, one) for one in streamed}
            converted = [one.kept_bytes for one in streamed if _is_packed_on_the_way(one.matrix)]
            self._converted = empty_bytes(max(converted, default=0))
            self.reader = SliceReader.open(
                [*self._on_disk.values()],
                buffer_bytes=streaming.buffer_bytes,
                num_buffers=streaming.num_buffers,
            )
            if streaming.layer_rows is not None:
                self._held = _HeldSlices(_most_held(streamed))
        return rows

    @contextmanager
    def next(self, one: WeightSlice) -> Iterator[Rows]:
        """The rows of a streamed slice, which must be the one that is read next."""
        if self._is_holding:
            held = self._held.get(one)
            yield self._hold(one) if held is None else held
            return
        with self._raw(one) as raw:
            yield self._streamed_rows(one, raw)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep each slice that is read until the block ends, so that it is read once."""
        self._is_holding = True
        try:
            yield
        finally:
            self._is_holding = False
            self._held.clear()

    def moved(self, data: NDArray[np.generic]) -> NDArray[np.generic]:
        """The numbers, which are here."""
        return data

    def begin_sweep(self) -> None:
        """Go to the first slice, also after a sweep that was broken off."""
        if self.reader is not None:
            self.reader.restart()

    def read_stats(self) -> ReadStats:
        """What was read since it was opened; the pinned slices are not counted."""
        return ReadStats() if self.reader is None else self.reader.stats()

    def close(self) -> None:
        """Stop reading."""
        if self.reader is not None:
            self.reader.close()

    def _raw(self, one: WeightSlice) -> AbstractContextManager[NDArray[np.uint8]]:
        """The stored bytes of a streamed slice."""
        assert self.reader is not None, "a streamed slice without a reader"
        return self.reader.next(self._on_disk[one])

    def _hold(self, one: WeightSlice) -> Rows:
        """The next slice, moved to where it is held; its buffer is read into again at once."""
        entry = self._checkpoint.tensors[one.matrix.name]
        target = rows_in(self._held.place(one), one)
        with self._raw(one) as raw:
            if not isinstance(target, PackedWeight):
                copy_into(decode_rows(entry, one.start, raw), target)
            elif _is_packed_on_the_way(one.matrix):
                pack_rows(entry, one.start, raw, target)
            else:
                target.data[:] = raw
        self._held.add(one, target)
        return target

    def _streamed_rows(self, one: WeightSlice, raw: NDArray[np.uint8]) -> Rows:
        matrix, entry = one.matrix, self._checkpoint.tensors[one.matrix.name]
        if _is_packed_on_the_way(matrix):
            target = rows_in(self._converted[: one.kept_bytes], one)
            assert isinstance(target, PackedWeight)
            pack_rows(entry, one.start, raw, target)
            return target
        if matrix.is_packed:
            return rows_in(raw, one)
        return converted(decode_rows(entry, one.start, raw), FLOAT_DTYPES[matrix.kept])


class _HeldSlices:
    """The streamed slices of one layer, kept while all rows of a long prompt pass through it.

    They lie in one piece of memory, placed one after the other until it is cleared.

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


def _pin(
    reader: CheckpointReader, slices: Sequence[WeightSlice], progress: Progress | None
) -> list[Rows]:
    """Read slices into one piece of memory, so that small matrices share large pages."""
    starts, end = starts_of(slices, ALIGNMENT)
    arena, loader = empty_bytes(end), SliceLoader(reader)
    pinned = []
    for one, start in zip(slices, starts, strict=True):
        target = rows_in(arena[start : start + one.kept_bytes], one)
        loader.read(one, target)
        pinned.append(target)
        if progress is not None:
            progress(start + one.kept_bytes, end)
    return pinned


def _most_held(streamed: Sequence[WeightSlice]) -> int:
    """Bytes of the slices of the layer that streams most."""
    of_layer = Counter[int]()
    for one in streamed:
        if one.matrix.tensor.room is Room.LAYERS:
            of_layer[one.matrix.tensor.index] += _HeldSlices.bytes_of(one)
    return max(of_layer.values(), default=0)


def _is_packed_on_the_way(matrix: Matrix) -> bool:
    return matrix.is_packed and matrix.is_converted
