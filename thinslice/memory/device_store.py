"""The matrices of a model that an accelerator computes with, in three places.

Slices lie on the device; or in page-locked host memory, read once; or on disk, read at each use
into page-locked buffers. The last two are copied into a ring of buffers on the device ahead of
their use. The plan says which are where. Rows of the embedding table are read from disk as they are
needed and never lie on the device as a table.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

import torch

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.kernels.ops import Linear, Rows
from thinslice.memory.device import Device
from thinslice.memory.device_copies import DeviceCopies, Source
from thinslice.memory.embedding_rows import EmbeddingRows
from thinslice.memory.slice_reader import ReaderOptions, SliceReader
from thinslice.memory.slice_rows import PlacedSlice, read_slice, rows_in, slice_on_disk
from thinslice.memory.slice_schedule import Slice
from thinslice.model.weights import ReadStats
from thinslice.plan.device_plan import DEVICE_ALIGNMENT, PIECE_BYTES
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.tensors import EMBEDDING
from thinslice.plan.weight_layout import WeightLayout, WeightSlice

Progress = Callable[[int, int], None]


class DeviceStore:
    """Gives a decoder its weights on a device, a ``WeightSource``.

    ``open`` places them, ``close`` lets them go. One thread at a time runs the decoder. Call
    ``begin_sweep`` before each forward pass.

    Args:
        plan: one for a device.
        vectors: norms and biases by their names, in the type that embedding rows get too.
    """

    layer_rows = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: WeightLayout,
        plan: MemoryPlan,
        device: Device,
        vectors: Mapping[str, torch.Tensor],
    ) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        self.plan = plan
        self.device = device
        self._vectors = vectors
        self._rows = CheckpointReader(checkpoint)
        dtype = next(iter(vectors.values())).dtype
        self._embedding = EmbeddingRows(self._rows, EMBEDDING, layout, dtype)
        weakref.finalize(self, self._rows.close)
        self._placed: dict[str, list[PlacedSlice]] = {}
        self._locked: list[torch.Tensor] = []
        self._reader: SliceReader | None = None
        self._copies: DeviceCopies | None = None

    def open(self, progress: Progress | None = None) -> None:
        """Read what lies on the device and in host memory, and begin to copy ahead.

        ``progress`` is called with bytes placed so far and in all.
        Memory: as planned.
        Errors: CheckpointError.
        """
        streaming, host = self.plan.streaming, self.plan.device
        assert host is not None, "a plan for no device"
        if streaming is None:
            slices = tuple(WeightSlice(one, 0, one.rows) for one in self.layout.sweep)
            pinned = frozenset(range(len(slices)))
        else:
            slices = self.layout.slices(streaming.slice_bytes)
            pinned = frozenset(streaming.pinned())
        streamed = [index for index in range(len(slices)) if index not in pinned]
        locked = frozenset(host.locked(streamed))
        resident = [slices[index] for index in range(len(slices)) if index in pinned]
        kept = [slices[index] for index in streamed if index in locked]
        count = _Count(sum(one.kept_bytes for one in (*resident, *kept)), progress)
        rows_of = dict(zip(resident, self._place(resident, count), strict=True))
        for one in slices:
            self._placed.setdefault(one.matrix.name, []).append(PlacedSlice(one, rows_of.get(one)))
        self._vectors = {name: one.to(self.device.place) for name, one in self._vectors.items()}
        if streamed:
            bytes_of = dict(zip(kept, self._lock(kept, count), strict=True))
            self._stream([slices[index] for index in streamed], bytes_of)

    def vector(self, name: str) -> torch.Tensor:
        """A norm or a bias."""
        return self._vectors[name]

    def linear(self, name: str, bias: torch.Tensor | None) -> Linear:
        """A matrix, whose slices come from here in the order of use."""
        placed = self._placed[name]
        whole = placed[0].rows if len(placed) == 1 else None
        return Linear(placed[-1].one.stop, partial(self._slices_of, name), bias, whole)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table on the device, [T, D]."""
        return self._embedding(token_ids_T).to(self.device.place)

    def hold(self) -> AbstractContextManager[None]:
        """Layers take all rows at once."""
        return nullcontext()

    @property
    def streams(self) -> bool:
        """Whether slices are copied in at each use."""
        return self._copies is not None

    def begin_sweep(self) -> None:
        """Go to the first slice, also after a sweep that was broken off."""
        if self._copies is not None:
            self._copies.restart()

    def read_stats(self) -> ReadStats:
        """What was read from disk since the store was opened; the waiting is that for copies."""
        stats = ReadStats() if self._reader is None else self._reader.stats()
        wait_s = 0.0 if self._copies is None else self._copies.wait_s
        return ReadStats(stats.num_bytes, wait_s, stats.io_s)

    def close(self) -> None:
        """Stop copying and reading, close the files, let host memory go."""
        with ExitStack() as stack:
            while self._locked:
                stack.callback(self.device.unlock, self._locked.pop())
            for one in (self._reader, self._copies):
                if one is not None:
                    stack.callback(one.close)
            self._rows.close()

    def _page_locked(self, num_bytes: int) -> torch.Tensor:
        buffer = self.device.page_locked(num_bytes)
        self._locked.append(buffer)
        return buffer

    def _place(self, slices: Sequence[WeightSlice], count: "_Count") -> list[Rows]:
        """Put slices onto the device: one piece of its memory, filled through a buffer here."""
        starts, end = _starts_of(slices)
        arena = torch.empty(end, dtype=torch.uint8, device=self.device.place)
        placed = []
        pieces = [_pieces_of(one) for one in slices]
        buffer = self.device.page_locked(
            max((p.kept_bytes for all in pieces for p in all), default=0)
        )
        try:
            for one, start, parts in zip(slices, starts, pieces, strict=True):
                at = start
                for piece in parts:
                    data = buffer[: piece.kept_bytes]
                    read_slice(self._rows, piece, rows_in(data, piece))
                    target = arena[at : at + piece.kept_bytes]
                    self.device.finish(self.device.copy(target, data, self.device.mark()))
                    at += piece.kept_bytes
                    count.add(piece.kept_bytes)
                placed.append(rows_in(arena[start:at], one))
        finally:
            self.device.unlock(buffer)
        return placed

    def _lock(self, slices: Sequence[WeightSlice], count: "_Count") -> list[torch.Tensor]:
        """Read slices into page-locked memory."""
        starts, end = _starts_of(slices)
        arena = self._page_locked(end)
        locked = []
        for one, start in zip(slices, starts, strict=True):
            data = arena[start : start + one.kept_bytes]
            read_slice(self._rows, one, rows_in(data, one))
            locked.append(data)
            count.add(one.kept_bytes)
        return locked

    def _stream(
        self, slices: Sequence[WeightSlice], bytes_of: dict[WeightSlice, torch.Tensor]
    ) -> None:
        """Begin to copy: ``bytes_of`` those in host memory, the others from disk."""
        streaming, host = self.plan.streaming, self.plan.device
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
            weakref.finalize(self, self._reader.close)
        num_bytes, num_buffers = streaming.buffer_bytes, streaming.num_buffers
        ring = torch.empty(num_buffers * num_bytes, dtype=torch.uint8, device=self.device.place)
        self._copies = DeviceCopies(
            self.device, sources, ring.view(num_buffers, num_bytes).unbind(), self._reader
        )
        self._copies.start()
        # Its thread holds the copies and would hold all of them for ever; as does the reader's.
        weakref.finalize(self, self._copies.close)

    def _slices_of(self, name: str) -> Iterator[tuple[int, int, Rows]]:
        """First and last row and the rows of each slice of a matrix, in the order of use."""
        for placed in self._placed[name]:
            one = placed.one
            if placed.rows is not None:
                yield one.start, one.stop, placed.rows
                continue
            assert self._copies is not None, "a streamed slice without copies"
            with self._copies.next(one) as data:
                yield one.start, one.stop, rows_in(data, one)

    def _on_disk(self, one: WeightSlice) -> Slice:
        assert not one.matrix.is_converted, "a slice that is converted cannot be copied from disk"
        return slice_on_disk(self.checkpoint, one)


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


def _starts_of(slices: Sequence[WeightSlice]) -> tuple[list[int], int]:
    """Return the start of each slice in one buffer, and the end of the last."""
    starts, end = [], 0
    for one in slices:
        starts.append(end)
        end += -(-one.kept_bytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
    return starts, end
