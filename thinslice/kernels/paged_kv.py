"""What attention works on: one layer's paged KV cache, and which sequences a batch is made of."""

from dataclasses import dataclass
from functools import cached_property

import torch

from thinslice.plan.kernel_limits import MOST_SINGLE_ROWS

CACHE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@dataclass(frozen=True, eq=False)
class PagedKv:
    """K and V of one layer, [num_blocks, K, block_size, H] in fp32, bf16 or int8.

    int8 takes fp16 scales [num_blocks, K, block_size]: one for each position and head.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.k.dtype not in CACHE_DTYPES or self.v.dtype != self.k.dtype:
            raise TypeError(f"a KV cache is fp32, bf16 or int8, got {self.k.dtype}, {self.v.dtype}")
        if self.k.dim() != 4 or self.k.shape != self.v.shape:
            raise ValueError(
                "K and V must be [num_blocks, K, block_size, H], "
                f"got {list(self.k.shape)} and {list(self.v.shape)}"
            )
        if not (self.k.is_contiguous() and self.v.is_contiguous()):
            raise ValueError("a KV cache must be contiguous")
        for scale in (self.k_scale, self.v_scale):
            self._check_scale(scale)

    def _check_scale(self, scale: torch.Tensor | None) -> None:
        if (scale is None) == (self.k.dtype == torch.int8):
            raise ValueError("an int8 KV cache needs scales, others have none")
        if scale is None:
            return
        if scale.dtype != torch.float16 or scale.shape != self.k.shape[:3]:
            raise ValueError(
                f"KV scales must be fp16 {list(self.k.shape[:3])}, "
                f"got {scale.dtype} {list(scale.shape)}"
            )
        if not scale.is_contiguous():
            raise ValueError("KV scales must be contiguous")

    @property
    def block_size(self) -> int:
        """Positions in a block."""
        return self.k.shape[2]

    @cached_property
    def addresses(self) -> "CacheAddresses":
        """What the compiled kernels take; ValueError for a head dim they have no code for."""
        num_blocks, num_kv_heads, block_size, head_dim = self.k.shape
        if head_dim % 16:
            raise ValueError(f"the kernels need a head dim that is a multiple of 16: {head_dim}")
        return CacheAddresses(
            dtype=CACHE_DTYPES[self.k.dtype],
            num_blocks=num_blocks,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            head_dim=head_dim,
            k=self.k.data_ptr(),
            v=self.v.data_ptr(),
            k_scale=0 if self.k_scale is None else self.k_scale.data_ptr(),
            v_scale=0 if self.v_scale is None else self.v_scale.data_ptr(),
        )


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

    rows: torch.Tensor
    sequences: torch.Tensor
    lengths: torch.Tensor
    longest: int

    def to(self, place: torch.device) -> "SingleRows":
        """Return a copy on a device."""
        tensors = (self.rows.to(place), self.sequences.to(place), self.lengths.to(place))
        return SingleRows(*tensors, self.longest)


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """Which tokens belong to which sequence, and where its blocks are; all int32, contiguous.

    query_starts [B + 1] counts the packed new tokens; context_lens [B] counts every cached position
    of a sequence, its new tokens included; block_tables is [B, most blocks].
    """

    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor

    def __post_init__(self) -> None:
        num_sequences, most = self.context_lens.shape[0], self.block_tables.shape[-1]
        for tensor, shape in (
            (self.query_starts, (num_sequences + 1,)),
            (self.context_lens, (num_sequences,)),
            (self.block_tables, (num_sequences, most)),
        ):
            if tensor.dtype != torch.int32:
                raise TypeError(f"a batch's tensors must be int32, got {tensor.dtype}")
            if tuple(tensor.shape) != shape or not tensor.is_contiguous():
                raise ValueError(f"expected a contiguous {shape}, got {tuple(tensor.shape)}")

    def to(self, place: torch.device) -> "SequenceBatch":
        """Return a copy on a device that keeps the sizes known here, so that it is not queried."""
        moved = SequenceBatch(
            self.query_starts.to(place), self.context_lens.to(place), self.block_tables.to(place)
        )
        single = self.single_rows and self.single_rows.to(place)
        vars(moved).update(spans=self.spans, single_rows=single)
        return moved

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
            rows=torch.tensor([row for row, _ in places]),
            sequences=torch.tensor([span.sequence for _, span in places], dtype=torch.int32),
            lengths=torch.tensor(lengths, dtype=torch.int32),
            longest=max(lengths),
        ).to(self.context_lens.device)
