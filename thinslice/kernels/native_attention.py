"""The border to the compiled attention: writing to the paged KV cache, attending over it.

Like `native.py`, whose rules hold here too.
"""

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.arrays import Floats, empty
from thinslice.kernels.native import check_array, check_heads, library
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch


def write_kv(k: Floats, v: Floats, cache: PagedKv, slots: NDArray[np.int64]) -> None:
    """Put k, v [T, K, H] where slots [T] say: block * block_size + offset.

    Errors: ValueError for a slot outside the cache.
    """
    heads, dim = cache.k.shape[1], cache.k.shape[3]
    check_heads(k, heads, dim, "k")
    check_heads(v, heads, dim, "v")
    if len(k) != len(v):
        raise ValueError("k and v must have one number of tokens")
    check_array(slots, np.int64, (len(k),), "slots")
    library().write_kv(
        cache.addresses,
        k.ctypes.data,
        k.strides[0] // 4,
        v.ctypes.data,
        v.strides[0] // 4,
        slots.ctypes.data,
        len(k),
    )


def attention(
    q: Floats, cache: PagedKv, batch: SequenceBatch, *, scale: float, window: int = 0
) -> Floats:
    """Causal attention of q [T, N, H] over the cached positions, the new tokens' included.

    N is a multiple of the cache's heads. A token sees the last `window` positions, its own among
    them, or all of them for 0.
    Peak extra memory: the result; on each thread 4 * (32 * N / K * (2 * H + 66) + 192 * H) bytes, H
    up to a multiple of 16.
    Errors: ValueError for a batch whose lengths or blocks do not fit the cache.
    Source: online softmax, Milakov and Gimelshein 2018; slices of 64 positions.
    """
    heads, dim = cache.k.shape[1], cache.k.shape[3]
    check_heads(q, q.shape[1], dim, "q")
    if q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads cannot share {heads} KV heads")
    if window < 0:
        raise ValueError(f"a window is 0 or more positions, got {window}")
    out = empty(q.shape, np.float32)
    queries = (
        q.ctypes.data,
        q.strides[0] // 4,
        out.ctypes.data,
        out.strides[0] // 4,
        len(q),
        q.shape[1],
    )
    library().attention(cache.addresses, queries, batch.addresses, scale, window)
    return out
