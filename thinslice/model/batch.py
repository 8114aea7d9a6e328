"""ForwardBatch: everything one forward pass needs to know of the sequences it serves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.arrays import Array
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

    token_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    slots_T: Array
    sequences: SequenceBatch
    block_size: int

    def to(self, moved: Callable[[NDArray[np.generic]], Array]) -> "ForwardBatch":
        """Return a copy on a device. Token ids stay on the host, where embedding rows are read, and
        so do positions, of which rotary tables are made."""
        return replace(self, slots_T=moved(self.slots_T), sequences=self.sequences.to(moved))

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
        first = int(np.searchsorted(whole.query_starts, start, side="right")) - 1
        last = int(np.searchsorted(whole.query_starts, stop))
        starts = whole.query_starts[first : last + 1]
        rows = slice(start, stop)
        return ForwardBatch(
            token_ids_T=self.token_ids_T[rows],
            positions_T=self.positions_T[rows],
            slots_T=self.slots_T[rows],
            sequences=SequenceBatch(
                starts.clip(start, stop) - np.int32(start),
                # What comes after the part is not written yet.
                whole.context_lens[first:last] - (starts[1:] - np.int32(stop)).clip(0),
                whole.block_tables[first:last],
            ),
            block_size=self.block_size,
        )


def pack(runs: Sequence[TokenRun], block_size: int) -> ForwardBatch:
    """The batch of these runs, in their order.

    Numbers are put together in lists: of one token, an operation on arrays for each step would take
    longer.
    """
    positions = [range(run.first, run.stop) for run in runs]
    slots = [
        run.blocks[position // block_size] * block_size + position % block_size
        for run, own in zip(runs, positions, strict=True)
        for position in own
    ]
    starts = [0, *accumulate(len(run.token_ids) for run in runs)]
    return ForwardBatch(
        token_ids_T=np.array([*chain.from_iterable(run.token_ids for run in runs)], np.int64),
        positions_T=np.array([*chain.from_iterable(positions)], np.int64),
        slots_T=np.array(slots, np.int64),
        sequences=SequenceBatch(
            np.array(starts, np.int32),
            np.array([run.stop for run in runs], np.int32),
            _block_tables(runs, block_size),
        ),
        block_size=block_size,
    )


def _block_tables(runs: Sequence[TokenRun], block_size: int) -> NDArray[np.int32]:
    counts = [-(-run.stop // block_size) for run in runs]
    most = max(counts)
    rows = [
        [*run.blocks[:count], *[0] * (most - count)]
        for run, count in zip(runs, counts, strict=True)
    ]
    return np.array(rows, np.int32)
