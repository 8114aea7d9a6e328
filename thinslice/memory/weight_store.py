"""The matrices of a model, slice by slice: pinned in memory, or read in at each use.

The decoder walks its matrices in a fixed order, and the slice reader reads ahead in that order,
across layers and tokens. What is pinned and how large a slice is, the plan says.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.pack_rows import pack_rows
from thinslice.checkpoint.reader import CheckpointReader, decode_rows
from thinslice.closing import Closing
from thinslice.kernels.buffers import empty_bytes
from thinslice.kernels.dtypes import FLOAT_DTYPES
from thinslice.kernels.packed import PackedWeight, unpack_rows
from thinslice.kernels.torch_ops import Rows
from thinslice.memory.held_slices import HeldSlices
from thinslice.memory.slice_reader import ReadStats, SliceReader
from thinslice.memory.slice_rows import (
    PlacedSlice,
    read_packed_row,
    read_slice,
    rows_in,
    rows_of_tokens,
    slice_on_disk,
    stored_name,
    table_dtype,
)
from thinslice.model.decoder import Decoder, Embedding, Linear
from thinslice.plan.memory_plan import StreamingPlan
from thinslice.plan.packed_format import ALIGNMENT
from thinslice.plan.weight_layout import Matrix, WeightLayout, WeightSlice

Progress = Callable[[int, int], None]


class WeightStore(Closing):
    """Gives a decoder its matrices; a context manager.

    One thread at a time runs the decoder. Call ``begin_sweep`` before each forward pass.

    Args:
        streaming: None keeps every matrix whole and in memory.
        dtype: of the numbers that embedding rows become.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: WeightLayout,
        streaming: StreamingPlan | None,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        self.streaming = streaming
        self.dtype = dtype
        self._rows = CheckpointReader(checkpoint)
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
        for one in (*slices, *prediction):
            self._placed.setdefault(one.matrix.name, []).append(PlacedSlice(one, rows_of.get(one)))
        if streamed and streaming is not None:
            converted = [one.kept_bytes for one in streamed if _is_packed_on_the_way(one.matrix)]
            self._converted = empty_bytes(max(converted, default=0))
            self._reader = SliceReader.open(
                [slice_on_disk(self.checkpoint, one) for one in streamed],
                buffer_bytes=streaming.buffer_bytes,
                num_buffers=streaming.num_buffers,
            )
            if streaming.layer_rows is not None:
                self._held = HeldSlices(self._most_held(streamed))

    def attach(self, decoder: Decoder) -> None:
        """Let every matrix of the decoder come from here."""
        if self.streaming is not None:
            decoder.layer_rows = self.streaming.layer_rows
            decoder.hold_layer = self._hold_layer
        for name, module in decoder.named_modules():
            if isinstance(module, Linear):
                module.slices = partial(
                    self._slices_of, stored_name(f"{name}.weight", self._placed)
                )
            elif isinstance(module, Embedding):
                module.read_rows = partial(self._embedding_rows, f"{name}.weight")

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
        return ReadStats(0, 0.0, 0.0) if self._reader is None else self._reader.stats()

    def resident(self, name: str) -> PackedWeight | None:
        """A packed matrix that lies in memory as a whole, else None."""
        placed = self._placed[stored_name(name, self._placed)]
        rows = placed[0].rows if len(placed) == 1 else None
        return rows if isinstance(rows, PackedWeight) else None

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
                rows = self._hold(one) if rows is None else rows
            if rows is not None:
                yield one.start, one.stop, rows
                continue
            assert self._reader is not None, "a streamed slice without a reader"
            with self._reader.next() as raw:
                yield one.start, one.stop, self._streamed_rows(one, raw)

    @contextmanager
    def _hold_layer(self) -> Iterator[None]:
        """Keep each slice that is read until the block ends, so that it is read once."""
        self._is_holding = True
        try:
            yield
        finally:
            self._is_holding = False
            self._held.clear()

    def _hold(self, one: WeightSlice) -> Rows:
        """The next slice, moved to where it is held; its buffer is read into again at once."""
        assert self._reader is not None, "a streamed slice without a reader"
        entry = self.checkpoint.tensors[one.matrix.name]
        target = rows_in(self._held.place(one), one)
        with self._reader.next() as raw:
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

    def _embedding_rows(self, name: str, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table: from memory where they are pinned, else from disk."""
        read_rows = partial(self._rows.read_scattered, name)
        dtype = table_dtype(self.layout, self.dtype)
        if name in self._placed and self._placed[name][0].one.matrix.is_packed:
            if (table := self.resident(name)) is not None:
                return unpack_rows(table, token_ids_T).to(self.dtype)
            read_rows, dtype = partial(self._packed_rows, self._placed[name]), self.dtype
        columns = self.checkpoint.tensors[name].shape[1]
        return rows_of_tokens(token_ids_T, read_rows, columns, dtype).to(self.dtype)

    def _packed_rows(
        self, placed: Sequence[PlacedSlice], rows: Sequence[int], out: torch.Tensor
    ) -> None:
        """Rows of a table that is the head as well, of which some slices may be pinned."""
        for index, row in enumerate(rows):
            place = placed[bisect_right(placed, row, key=lambda one: one.one.start) - 1]
            one, pinned = place.one, place.rows
            if pinned is None:
                out[index] = read_packed_row(self._rows, one.matrix, row)
            else:
                assert isinstance(pinned, PackedWeight), "a packed matrix of numbers"
                out[index] = unpack_rows(pinned, torch.tensor([row - one.start]))[0]


def _is_packed_on_the_way(matrix: Matrix) -> bool:
    return matrix.is_packed and matrix.is_converted
