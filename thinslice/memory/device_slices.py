"""Slices that an accelerator computes with, in three places.

Slices lie on the device; or in page-locked host memory, read once; or on disk, read at each use
into page-locked buffers. The last two are copied into a ring of buffers on the device ahead of
their use. The plan says which are where.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.kernels.arrays import Array
from thinslice.kernels.ops import Rows
from thinslice.memory.device import Device
from thinslice.memory.device_copies import DeviceCopies, Source
from thinslice.memory.resident import Progress
from thinslice.memory.slice_reader import ReaderOptions, SliceReader
from thinslice.memory.slice_rows import SliceLoader, rows_in, slice_on_disk, starts_of
from thinslice.memory.slice_schedule import Slice
from thinslice.model.weights import ReadStats
from thinslice.plan.kernel_limits import DEVICE_ALIGNMENT, PIECE_BYTES
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.weight_layout import WeightSlice


class DeviceSlices:
    """An accelerator's memory; a ``SlicePlace``.

    Args:
        plan: one for a device.
    """

    layer_rows: int | None = None
    reads_pinned = False

    def __init__(self, checkpoint: Checkpoint, plan: MemoryPlan, device: Device) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._device = device
        self._locked: list[NDArray[np.uint8]] = []
        self._reader: SliceReader | None = None
        self._copies: DeviceCopies | None = None
        self._pid = os.getpid()

    @property
    def streams(self) -> bool:
        """Whether slices are copied in at each use."""
        return self._copies is not None

    def open(
        self,
        reader: CheckpointReader,
        pinned: Sequence[WeightSlice],
        streamed: Sequence[WeightSlice],
        progress: Progress | None,
    ) -> list[Rows]:
        """Read what lies on the device and in host memory, and begin to copy ahead.

        Memory: as planned.
        Errors: CheckpointError.
        """
        host = self._plan.device
        assert host is not None, "a plan for no device"
        locked = [streamed[idx] for idx in host.locked([*range(len(streamed))])]
        count = _Count(sum(one.kept_bytes for one in (*pinned, *locked)), progress)
        rows = self._place(reader, pinned, count)
        if streamed:
            bytes_of = dict(zip(locked, self._lock(reader, locked, count), strict=True))
            self._stream(streamed, bytes_of)
        return rows

    @contextmanager
    def next(self, one: WeightSlice) -> Iterator[Rows]:
        """The rows of a streamed slice on the device, which must be the one that comes next."""
        assert self._copies is not None, "a streamed slice without copies"
        with self._copies.next(one) as data:
            yield self._rows(data, one)

    def hold(self) -> AbstractContextManager[None]:
        """Layers take all rows at once."""
        return nullcontext()

    def moved(self, data: NDArray[np.generic]) -> Array:
        """The same numbers on the device."""
        return self._device.moved(data)

    def begin_sweep(self) -> None:
        """Go to the first slice, also after a sweep that was broken off."""
        if self._copies is not None:
            self._copies.restart()

    def read_stats(self) -> ReadStats:
        """What was read from disk since it was opened; the waiting is that for copies."""
        stats = ReadStats() if self._reader is None else self._reader.stats()
        wait_s = 0.0 if self._copies is None else self._copies.wait_s
        return ReadStats(stats.num_bytes, wait_s, stats.io_s)

    def close(self) -> None:
        """Stop copying and reading, and let host memory go; nothing in a child of a fork, which may
        not use the device."""
        if self._pid != os.getpid():
            return
        with ExitStack() as stack:
            while self._locked:
                stack.callback(self._device.unlock, self._locked.pop())
            for one in (self._reader, self._copies):
                if one is not None:
                    stack.callback(one.close)

    def _page_locked(self, num_bytes: int) -> NDArray[np.uint8]:
        buffer = self._device.page_locked(num_bytes)
        self._locked.append(buffer)
        return buffer

    def _place(
        self, reader: CheckpointReader, slices: Sequence[WeightSlice], count: "_Count"
    ) -> list[Rows]:
        """Put slices onto the device: one piece of its memory, filled through a buffer here."""
        starts, end = starts_of(slices, DEVICE_ALIGNMENT)
        arena = self._device.empty((end,), "uint8")
        placed, loader = [], SliceLoader(reader)
        pieces = [_pieces_of(one) for one in slices]
        buffer = self._device.page_locked(
            max((p.kept_bytes for all in pieces for p in all), default=0)
        )
        try:
            for one, start, parts in zip(slices, starts, pieces, strict=True):
                at = start
                for piece in parts:
                    data = buffer[: piece.kept_bytes]
                    loader.read(piece, rows_in(data, piece))
                    target = arena[at : at + piece.kept_bytes]
                    self._device.finish(self._device.copy(target, data, self._device.mark()))
                    at += piece.kept_bytes
                    count.add(piece.kept_bytes)
                placed.append(self._rows(arena[start:at], one))
        finally:
            self._device.unlock(buffer)
        return placed

    def _lock(
        self, reader: CheckpointReader, slices: Sequence[WeightSlice], count: "_Count"
    ) -> list[NDArray[np.uint8]]:
        """Read slices into page-locked memory."""
        starts, end = starts_of(slices, DEVICE_ALIGNMENT)
        arena, loader = self._page_locked(end), SliceLoader(reader)
        locked = []
        for one, start in zip(slices, starts, strict=True):
            data = arena[start : start + one.kept_bytes]
            loader.read(one, rows_in(data, one))
            locked.append(data)
            count.add(one.kept_bytes)
        return locked

    def _stream(
        self, slices: Sequence[WeightSlice], bytes_of: dict[WeightSlice, NDArray[np.uint8]]
    ) -> None:
        """Begin to copy: ``bytes_of`` those in host memory, the others from disk."""
        streaming, host = self._plan.streaming, self._plan.device
        assert streaming is not None, "nothing is streamed"
        assert host is not None, "a plan for no device"
        sources = [
            Source(one, bytes_of[one] if one in bytes_of else self._on_disk(one)) for one in slices
        ]
        on_disk = [source.place for source in sources if isinstance(source.place, Slice)]
        if on_disk:
            self._reader = SliceReader.open(
                on_disk,
                buffer_bytes=host.staging_bytes,
                num_buffers=host.num_staging,
                options=ReaderOptions(allocate=self._page_locked),
            )
        num_bytes, num_buffers = streaming.buffer_bytes, streaming.num_buffers
        ring = self._device.empty((num_buffers, num_bytes), "uint8")
        self._copies = DeviceCopies(self._device, sources, [*ring], self._reader)
        self._copies.start()

    def _rows(self, data: Array, one: WeightSlice) -> Rows:
        """The bytes of a slice on the device as rows of what it is kept as."""
        matrix = one.matrix
        if matrix.is_packed:
            return rows_in(data, one)
        return self._device.numbers_of(data, matrix.kept).reshape(-1, matrix.columns)

    def _on_disk(self, one: WeightSlice) -> Slice:
        assert not one.matrix.is_converted, "a slice that is converted cannot be copied from disk"
        return slice_on_disk(self._checkpoint, one)


class _Count:
    """Reports bytes placed so far."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.progress = progress
        self.done = 0

    def add(self, num_bytes: int) -> None:
        self.done += num_bytes
        if self.progress is not None:
            self.progress(self.done, self.total)


def _pieces_of(one: WeightSlice) -> list[WeightSlice]:
    """A slice as slices of at most PIECE_BYTES: what is read at a time."""
    ranges = one.matrix.ranges(PIECE_BYTES)
    pairs = [(max(start, one.start), min(stop, one.stop)) for start, stop in ranges]
    return [WeightSlice(one.matrix, start, stop) for start, stop in pairs if start < stop]
