"""The border to the compiled attention: writing to the paged KV cache, attending over it.

Like `native.py`, whose rules hold here too.
"""

import torch

from thinslice.kernels.native import DTYPE_CODES, check_heads, check_indices, library
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch


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
