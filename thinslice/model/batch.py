"""ForwardBatch: everything one forward pass needs to know of the sequences it serves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise

import numpy as np
import torch

from thinslice.kernels.paged_kv import SequenceBatch


@dataclass(frozen=True)
class SequenceSpan:
    """One sequence's rows in a batch.

    Attributes:
        start, stop: its rows among the packed tokens.
        num_positions: positions in its KV cache once these rows are written.
        block_table: the blocks that hold them, int64.
    """

    start: int
    stop: int
    num_positions: int
    block_table: torch.Tensor


@dataclass(frozen=True)
class TokenRun:
    """Tokens of one sequence that go through the model at once.

    Attributes:
        token_ids: at least one.
        first: the position of the first of them.
        blocks: the sequence's block table; it may be longer than needed.
    """

    token_ids: Sequence[int]
    first: int
    blocks: Sequence[int]

    @property
    def stop(self) -> int:
        """The position after the last of them."""
        return self.first + len(self.token_ids)


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """Packed tokens of several sequences, prompt chunks and single tokens side by side.

    Attributes:
        token_ids_T, positions_T: int64.
        slots_T: where each token's key and value go: block * block_size + offset; int64.
        query_starts: [B + 1] int32, the row at which each sequence's tokens start, and T.
        context_lens: [B] int32, positions in each KV cache once these rows are written.
        block_tables: [B, most blocks] int32; a shorter table is filled up with block 0.
        block_size: KV positions in a block.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    block_size: int

    def to(self, place: torch.device) -> "ForwardBatch":
        """The same on a device. The token ids stay: rows of the embedding table are read here."""
        if place.type == "cpu":
            return self
        return replace(
            self,
            positions_T=self.positions_T.to(place),
            slots_T=self.slots_T.to(place),
            query_starts=self.query_starts.to(place),
            context_lens=self.context_lens.to(place),
            block_tables=self.block_tables.to(place),
        )

    def parts(self, max_rows: int) -> "list[tuple[slice, ForwardBatch]]":
        """Runs of at most ``max_rows`` of its rows, in order, each a batch of its own.

        A sequence may be cut between two. Its K and V of the first part must be in the cache before
        the second part attends.
        """
        num_rows = len(self.token_ids_T)
        if num_rows <= max_rows:
            return [(slice(0, num_rows), self)]
        cuts = [*range(0, num_rows, max_rows), num_rows]
        return [(slice(*cut), self._part(*cut)) for cut in pairwise(cuts)]

    def _part(self, start: int, stop: int) -> "ForwardBatch":
        first = int(torch.searchsorted(self.query_starts, start, right=True)) - 1
        last = int(torch.searchsorted(self.query_starts, stop))
        starts = self.query_starts[first : last + 1]
        rows = slice(start, stop)
        return ForwardBatch(
            token_ids_T=self.token_ids_T[rows],
            positions_T=self.positions_T[rows],
            slots_T=self.slots_T[rows],
            query_starts=starts.clamp(start, stop) - start,
            # What comes after the part is not written yet.
            context_lens=self.context_lens[first:last] - (starts[1:] - stop).clamp(min=0),
            block_tables=self.block_tables[first:last],
            block_size=self.block_size,
        )

    @cached_property
    def sequences(self) -> SequenceBatch:
        """What attention takes."""
        return SequenceBatch(self.query_starts, self.context_lens, self.block_tables)

    @cached_property
    def spans(self) -> list[SequenceSpan]:
        """The same sequences one by one, in the order of their rows."""
        starts, lengths = self.query_starts.tolist(), self.context_lens.tolist()
        tables = self.block_tables.long()
        return [
            SequenceSpan(start, stop, length, table[: -(-length // self.block_size)])
            for start, stop, length, table in zip(
                starts[:-1], starts[1:], lengths, tables, strict=True
            )
        ]


def pack(runs: Sequence[TokenRun], block_size: int) -> ForwardBatch:
    """The batch of these runs, in their order.

    Numbers are put together in lists: of one token, a tensor operation for each step would take
    four times as long, and as long as three fused layers of a small model.
    """
    positions = [range(run.first, run.stop) for run in runs]
    slots = [
        run.blocks[position // block_size] * block_size + position % block_size
        for run, own in zip(runs, positions, strict=True)
        for position in own
    ]
    starts = [0, *accumulate(len(run.token_ids) for run in runs)]
    return ForwardBatch(
        token_ids_T=_tensor([*chain.from_iterable(run.token_ids for run in runs)], np.int64),
        positions_T=_tensor([*chain.from_iterable(positions)], np.int64),
        slots_T=_tensor(slots, np.int64),
        query_starts=_tensor(starts, np.int32),
        context_lens=_tensor([run.stop for run in runs], np.int32),
        block_tables=_block_tables(runs, block_size),
        block_size=block_size,
    )


def _tensor(values: list[int] | list[list[int]], dtype: type[np.integer]) -> torch.Tensor:
    """By way of NumPy, which takes a third of the time for a few numbers."""
    return torch.from_numpy(np.array(values, dtype=dtype))


def _block_tables(runs: Sequence[TokenRun], block_size: int) -> torch.Tensor:
    counts = [-(-run.stop // block_size) for run in runs]
    most = max(counts)
    rows = [
        [*run.blocks[:count], *[0] * (most - count)]
        for run, count in zip(runs, counts, strict=True)
    ]
    return _tensor(rows, np.int32)
