"""ForwardBatch: everything one forward pass needs to know of the sequences it serves."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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
class ForwardBatch:
    """Packed tokens of several sequences, prompt chunks and single tokens side by side.

    Attributes:
        token_ids_T, positions_T: int64.
        slots_T: where each token's key and value go: block * block_size + offset; int64.
        spans: the sequences, in the order of their rows.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    spans: Sequence[SequenceSpan]
