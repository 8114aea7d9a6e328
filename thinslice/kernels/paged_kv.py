"""What attention works on: one layer's paged KV cache, and which sequences a batch is made of."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thinslice.forks import cached_property
from thinslice.kernels.arrays import BF16, Array
from thinslice.plan.kernel_limits import MOST_SINGLE_ROWS

_CACHE_DTYPES = {np.dtype(np.float32): 0, BF16: 1, np.dtype(np.int8): 2}


@dataclass(frozen=True, eq=False)
class PagedKv:
    """K and V of one layer, [num_blocks, K, block_size, H] in fp32, bf16 or int8.

    int8 takes fp16 scales [num_blocks, K, block_size]: one for each position and head.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None

    def __post_init__(self) -> None:
        if self.k.ndim != 4 or self.k.shape != self.v.shape or self.k.dtype != self.v.dtype:
            raise ValueError(
                "K and V must be [num_blocks, K, block_size, H] of one type, "
                f"got {list(self.k.shape)} and {list(self.v.shape)}"
            )

    @property
    def block_size(self) -> int:
        """Positions in a block."""
        return self.k.shape[2]

    @cached_property
    def addresses(self) -> "CacheAddresses":
        """What the compiled kernels take. Errors: TypeError, ValueError for another cache."""
        if self.k.dtype not in _CACHE_DTYPES:
            raise TypeError(f"a KV cache is float32, bfloat16 or int8, got {self.k.dtype}")
        for scale in (self.k_scale, self.v_scale):
            self._check_scale(scale)
        num_blocks, num_kv_heads, block_size, head_dim = self.k.shape
        return CacheAddresses(
            dtype=_CACHE_DTYPES[self.k.dtype],
            num_blocks=num_blocks,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            head_dim=head_dim,
            k=_address(self.k),
            v=_address(self.v),
            k_scale=0 if self.k_scale is None else _address(self.k_scale),
            v_scale=0 if self.v_scale is None else _address(self.v_scale),
        )

    def _check_scale(self, scale: NDArray[np.float16] | None) -> None:
        if (scale is None) == (self.k.dtype == np.int8):
            raise ValueError("an int8 KV cache needs scales, others have none")
        if scale is not None and (scale.dtype != np.float16 or scale.shape != self.k.shape[:3]):
            raise ValueError(
                f"KV scales must be fp16 {list(self.k.shape[:3])}, "
                f"got {scale.dtype} {list(scale.shape)}"
            )


def _address(part: NDArray[np.generic]) -> int:
    if not part.flags.c_contiguous:
        raise ValueError("a KV cache must be contiguous")
    return part.ctypes.data


@dataclass(frozen=True)
class CacheAddresses:
    """What crosses the border of a cache; the names are those that bindings.cpp reads."""

    dtype: int
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    k: int
    v: int
    k_scale: int
    v_scale: int


@dataclass(frozen=True)
class RowSpan:
    """One sequence of a batch: its rows, and positions in its cache once these are written."""

    sequence: int
    start: int
    stop: int
    num_positions: int

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class SingleRows:
    """Rows of a batch that are attended with one by one.

    Attributes:
        rows: their places in the batch, int64 [R].
        sequences: the sequence of each, int32 [R].
        lengths: positions each one sees, itself included, int32 [R].
        longest: the most of those.
    """

    rows: Array
    sequences: Array
    lengths: Array
    longest: int

    def to(self, moved: Callable[[NDArray[np.generic]], Array]) -> "SingleRows":
        """Return a copy on a device."""
        return SingleRows(
            moved(self.rows), moved(self.sequences), moved(self.lengths), self.longest
        )


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """Which tokens belong to which sequence, and where its blocks are; all int32, contiguous.

    query_starts [B + 1] counts the packed new tokens; context_lens [B] counts every cached position
    of a sequence, its new tokens included; block_tables is [B, most blocks].
    """

    query_starts: Array
    context_lens: Array
    block_tables: Array

    def to(self, moved: Callable[[NDArray[np.generic]], Array]) -> "SequenceBatch":
        """Return a copy on a device that keeps the sizes known here, so that it is not queried."""
        there = SequenceBatch(
            moved(self.query_starts), moved(self.context_lens), moved(self.block_tables)
        )
        single = self.single_rows and self.single_rows.to(moved)
        vars(there).update(spans=self.spans, single_rows=single)
        return there

    @cached_property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """What the compiled kernels take. Errors: TypeError, ValueError for another batch."""
        num_sequences, most = len(self.context_lens), self.block_tables.shape[-1]
        for part, shape in (
            (self.query_starts, (num_sequences + 1,)),
            (self.context_lens, (num_sequences,)),
            (self.block_tables, (num_sequences, most)),
        ):
            if part.dtype != np.int32:
                raise TypeError(f"a batch's arrays must be int32, got {part.dtype}")
            if part.shape != shape or not part.flags.c_contiguous:
                raise ValueError(f"expected a contiguous {shape}, got {part.shape}")
        return (
            self.block_tables.ctypes.data,
            most,
            self.query_starts.ctypes.data,
            self.context_lens.ctypes.data,
            num_sequences,
        )

    @cached_property
    def spans(self) -> list[RowSpan]:
        """The sequences one by one."""
        starts, lengths = self.query_starts.tolist(), self.context_lens.tolist()
        return [
            RowSpan(idx, start, stop, length)
            for idx, (start, stop, length) in enumerate(
                zip(starts[:-1], starts[1:], lengths, strict=True)
            )
        ]

    @cached_property
    def single_rows(self) -> SingleRows | None:
        """The rows of sequences that have at most MOST_SINGLE_ROWS of them here."""
        short = [span for span in self.spans if span.num_rows <= MOST_SINGLE_ROWS]
        if not short:
            return None
        places = [(row, span) for span in short for row in range(span.start, span.stop)]
        lengths = [span.num_positions - (span.stop - 1 - row) for row, span in places]
        return SingleRows(
            rows=np.array([row for row, _ in places], np.int64),
            sequences=np.array([span.sequence for _, span in places], np.int32),
            lengths=np.array(lengths, np.int32),
            longest=max(lengths),
        )
