"""The border to the compiled attention: the paged KV cache, writing to it, attending over it.

Like `native.py`, whose rules hold here too.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from thinslice.kernels.native import DTYPE_CODES, check_heads, check_indices, library

_CACHE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@dataclass(frozen=True, eq=False)
class PagedKv:
    """K and V of one layer, [num_blocks, K, block_size, H] in fp32, bf16 or int8.

    int8 takes fp16 scales [num_blocks, K, block_size]. H must be a multiple of 16.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.k.dtype not in _CACHE_DTYPES or self.v.dtype != self.k.dtype:
            raise TypeError(f"a KV cache is fp32, bf16 or int8, got {self.k.dtype}, {self.v.dtype}")
        if self.k.dim() != 4 or self.k.shape != self.v.shape or self.k.shape[3] % 16:
            raise ValueError(
                "K and V must be [num_blocks, K, block_size, H] with H a multiple of 16, "
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

    @cached_property
    def addresses(self) -> "_CacheAddresses":
        num_blocks, num_kv_heads, block_size, head_dim = self.k.shape
        return _CacheAddresses(
            dtype=_CACHE_DTYPES[self.k.dtype],
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
class _CacheAddresses:
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
        num_sequences = self.context_lens.shape[0]
        check_indices(self.query_starts, torch.int32, [num_sequences + 1], "query_starts")
        check_indices(self.context_lens, torch.int32, [num_sequences], "context_lens")
        most = self.block_tables.shape[-1]
        check_indices(self.block_tables, torch.int32, [num_sequences, most], "block_tables")


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: PagedKv, slots: torch.Tensor) -> None:
    """Put k, v [T, K, H] (fp32 or bf16) where slots [T] int64 say: block * block_size + offset.

    Errors: ValueError for a slot outside the cache.
    """
    heads, dim = cache.k.shape[1], cache.k.shape[3]
    check_heads(k, heads, dim, "k")
    check_heads(v, heads, dim, "v")
    if k.dtype != v.dtype or k.shape[0] != v.shape[0]:
        raise ValueError("k and v must have one dtype and one number of tokens")
    check_indices(slots, torch.int64, [k.shape[0]], "slots")
    library().write_kv(
        cache.addresses,
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        DTYPE_CODES[k.dtype],
        slots.data_ptr(),
        k.shape[0],
    )


def attention(
    q: torch.Tensor,
    cache: PagedKv,
    batch: SequenceBatch,
    *,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention of q [T, N, H] over the cached positions, the new tokens' included.

    N is a multiple of the cache's heads. A token sees the last `window` positions, its own among
    them, or all of them for 0.
    Peak extra memory: the result; on each thread 4 * (32 * N / K * (2 * H + 66) + 192 * H) bytes.
    Errors: ValueError for a batch whose lengths or blocks do not fit the cache.
    Source: online softmax, Milakov and Gimelshein 2018; slices of 64 positions.
    """
    heads, dim = cache.k.shape[1], cache.k.shape[3]
    check_heads(q, q.shape[1], dim, "q")
    if q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads cannot share {heads} KV heads")
    if window < 0:
        raise ValueError(f"a window is 0 or more positions, got {window}")
    out = torch.empty(q.shape, dtype=q.dtype)
    queries = (
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        out.stride(0),
        DTYPE_CODES[q.dtype],
        q.shape[0],
        q.shape[1],
    )
    sequences = (
        batch.block_tables.data_ptr(),
        batch.block_tables.shape[1],
        batch.query_starts.data_ptr(),
        batch.context_lens.data_ptr(),
        batch.context_lens.shape[0],
    )
    library().attention(cache.addresses, queries, sequences, scale, window)
    return out
