"""ForwardBatch: everything one forward pass needs to know of the sequences it serves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

import numpy as np
import torch

from thinslice.kernels.paged_kv import SequenceBatch


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
        sequences: which rows are whose; a block table that is shorter than another is filled up
            with block 0.
        block_size: KV positions in a block.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    sequences: SequenceBatch
    block_size: int

    def to(self, place: torch.device) -> "ForwardBatch":
        """Return a copy on a device. Token ids stay on the host, where embedding rows are read."""
        if place.type == "cpu":
            return self
        return replace(
            self,
            positions_T=self.positions_T.to(place),
            slots_T=self.slots_T.to(place),
            sequences=self.sequences.to(place),
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
        whole = self.sequences
        first = int(torch.searchsorted(whole.query_starts, start, right=True)) - 1
        last = int(torch.searchsorted(whole.query_starts, stop))
        starts = whole.query_starts[first : last + 1]
        rows = slice(start, stop)
        return ForwardBatch(
            token_ids_T=self.token_ids_T[rows],
            positions_T=self.positions_T[rows],
            slots_T=self.slots_T[rows],
            sequences=SequenceBatch(
                starts.clamp(start, stop) - start,
                # What comes after the part is not written yet.
                whole.context_lens[first:last] - (starts[1:] - stop).clamp(min=0),
                whole.block_tables[first:last],
            ),
            block_size=self.block_size,
        )


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
        sequences=SequenceBatch(
            _tensor(starts, np.int32),
            _tensor([run.stop for run in runs], np.int32),
            _block_tables(runs, block_size),
        ),
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
