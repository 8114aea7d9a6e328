"""Weights that are not all resident: pinned slices in memory, the others read in at each use.

The decoder walks its matrices in a fixed order, and the slice reader reads ahead in that order,
across layers and tokens. What is pinned and how large a slice is, the plan says.
"""

from collections.abc import Iterator
from functools import partial
from types import TracebackType

import torch

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader, decode_rows
from thinslice.memory.slice_reader import ReadStats, SliceReader
from thinslice.memory.slice_schedule import Slice
from thinslice.model.decoder import Decoder, Embedding, Linear
from thinslice.plan.memory_plan import StreamingPlan
from thinslice.plan.weight_slices import WeightSlice, sweep_slices


class WeightStore:
    """Gives a decoder its matrices slice by slice; a context manager.

    One thread at a time runs the decoder. Call ``begin_sweep`` before each forward pass.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, streaming: StreamingPlan
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.streaming = streaming
        self._rows = CheckpointReader(checkpoint)
        self._slices: dict[str, list[tuple[WeightSlice, torch.Tensor | None]]] = {}
        self._reader: SliceReader | None = None

    def __enter__(self) -> "WeightStore":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Read the pinned slices and begin to read ahead.

        Memory: the pinned slices, and the ring, as planned.
        Errors: CheckpointError.
        """
        streamed: list[Slice] = []
        shape, streaming = self.checkpoint.shape, self.streaming
        pinned_places = frozenset(streaming.pinned())
        for index, one in enumerate(sweep_slices(shape, streaming.slice_weights)):
            pinned = None
            if index in pinned_places:
                pinned = torch.empty(one.stop - one.start, one.columns, dtype=self.dtype)
                self._rows.read_rows(one.name, one.start, one.stop, pinned)
            else:
                streamed.append(self._on_disk(one))
            self._slices.setdefault(one.name, []).append((one, pinned))
        if streamed:
            self._reader = SliceReader.open(
                streamed, buffer_bytes=streaming.buffer_bytes, num_buffers=streaming.num_buffers
            )

    def attach(self, decoder: Decoder) -> None:
        """Let every matrix of the decoder come from here."""
        for name, module in decoder.named_modules():
            if isinstance(module, Linear):
                module.slices = partial(self._rows_of, self._stored_name(f"{name}.weight"))
            elif isinstance(module, Embedding):
                module.read_rows = partial(self._embedding_rows, f"{name}.weight")

    def begin_sweep(self) -> None:
        """Go to the first slice, also after a sweep that was broken off."""
        if self._reader is not None:
            self._reader.restart()

    def read_stats(self) -> ReadStats:
        """What was read since the store was opened; the pinned slices are not counted."""
        return ReadStats(0, 0.0, 0.0) if self._reader is None else self._reader.stats()

    def close(self) -> None:
        """Stop reading and close the files."""
        self._rows.close()
        if self._reader is not None:
            self._reader.close()

    def _rows_of(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and rows of each slice of a matrix, in the order they are read."""
        for one, pinned in self._slices[name]:
            if pinned is not None:
                yield one.start, pinned
                continue
            assert self._reader is not None, "a streamed slice without a reader"
            with self._reader.next() as raw:
                entry = self.checkpoint.tensors[one.name]
                yield one.start, decode_rows(entry, one.start, raw).to(self.dtype)

    def _embedding_rows(self, name: str, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table, each read once."""
        token_ids = token_ids_T.tolist()
        row_of = {token_id: row for row, token_id in enumerate(dict.fromkeys(token_ids))}
        rows = torch.empty(len(row_of), self.checkpoint.tensors[name].shape[1], dtype=self.dtype)
        for token_id, row in row_of.items():
            self._rows.read_rows(name, token_id, token_id + 1, rows[row : row + 1])
        return rows[[row_of[token_id] for token_id in token_ids]]

    def _on_disk(self, one: WeightSlice) -> Slice:
        entry = self.checkpoint.tensors[one.name]
        row_bytes = entry.num_bytes // entry.shape[0]
        num_bytes = (one.stop - one.start) * row_bytes
        return Slice(entry.path, entry.offset + one.start * row_bytes, num_bytes)

    def _stored_name(self, name: str) -> str:
        """The name a matrix is stored under: a tied head is the embedding table."""
        return name if name in self._slices else "model.embed_tokens.weight"
