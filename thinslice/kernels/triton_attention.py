"""Attention of single rows over the paged KV cache on a GPU, split over positions.

A row's positions are cut at fixed places, each part is attended to by a program of its own, and a
second kernel puts the parts together in their order: a row's bits depend on nothing but its own
sequence.
Source: flash-decoding (Dao et al., 2023), over the online softmax of arXiv 1805.02867.
"""

import torch
import triton
import triton.language as tl

from thinslice.kernels.paged_kv import PagedKv, SingleRows
from thinslice.kernels.triton_numbers import dot, rounded
from thinslice.plan.kernel_limits import ATTENTION_SPLIT as SPLIT

# Positions that a program looks at together.
TILE = 32
_WARPS = 4
# The fewest rows that tensor cores multiply: query heads of one KV head are filled up to it.
_FEWEST_HEADS = 16


@triton.jit
def attend_split(
    q_ptr,
    k_ptr,
    v_ptr,
    part_ptr,
    top_ptr,
    total_ptr,
    rows_ptr,
    sequences_ptr,
    lengths_ptr,
    tables_ptr,
    table_stride,
    num_splits,
    window,
    scale,
    NUM_KV: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One part of the positions, for one row and the query heads of one KV head.

    Leaves the part's weighted sum of values, its greatest score, and its sum of weights.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    if split * SPLIT_SIZE < length:
        heads, dims = tl.arange(0, HEADS), tl.arange(0, DIMS)
        q_row = tl.load(rows_ptr + row) * NUM_KV * HEADS_PER_KV + kv_head * HEADS_PER_KV
        is_q = (heads < HEADS_PER_KV)[:, None] & (dims < HEAD_DIM)[None, :]
        q_at = q_ptr + (q_row + heads[:, None]) * HEAD_DIM + dims[None, :]
        q = rounded(tl.load(q_at, mask=is_q, other=0.0).to(tl.float32), k_ptr.dtype.element_ty)
        table_ptr = tables_ptr + tl.load(sequences_ptr + row) * table_stride
        top = tl.full((HEADS,), -1e30, tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        sums = tl.zeros((HEADS, DIMS), tl.float32)
        stop = tl.minimum(split * SPLIT_SIZE + SPLIT_SIZE, length)
        for start in range(split * SPLIT_SIZE, stop, TILE):
            positions = start + tl.arange(0, TILE)
            is_seen = (positions < length) & (positions >= length - window)
            block = tl.load(table_ptr + positions // BLOCK_SIZE, mask=is_seen, other=0)
            slot = (block.to(tl.int64) * NUM_KV + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE
            kv_at = slot[:, None] * HEAD_DIM + dims[None, :]
            is_kv = is_seen[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(k_ptr + kv_at, mask=is_kv, other=0.0)
            v = tl.load(v_ptr + kv_at, mask=is_kv, other=0.0)
            scores = tl.where(is_seen[None, :], dot(q, tl.trans(k)) * scale, -1e30)
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.where(is_seen[None, :], tl.exp(scores - new_top[:, None]), 0.0)
            fade = tl.exp(top - new_top)
            total = total * fade + tl.sum(weights, axis=1)
            sums = sums * fade[:, None] + dot(rounded(weights, v.dtype), v)
            top = new_top
        is_head = heads < HEADS_PER_KV
        part = ((row * NUM_KV + kv_head) * HEADS_PER_KV + heads) * num_splits + split
        tl.store(top_ptr + part, top, mask=is_head)
        tl.store(total_ptr + part, total, mask=is_head)
        tl.store(part_ptr + part[:, None] * HEAD_DIM + dims[None, :], sums, mask=is_q)


@triton.jit
def join_splits(
    part_ptr,
    top_ptr,
    total_ptr,
    out_ptr,
    rows_ptr,
    lengths_ptr,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
):
    """Put together what ``attend_split`` left, for one row and one query head."""
    row, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, DIMS)
    mask = dims < HEAD_DIM
    first = (row * NUM_HEADS + head) * num_splits
    top, total = -1e30, 0.0
    sums = tl.zeros((DIMS,), tl.float32)
    for part in range(first, first + tl.cdiv(tl.load(lengths_ptr + row), SPLIT_SIZE)):
        part_top = tl.load(top_ptr + part)
        new_top = tl.maximum(top, part_top)
        fade, weight = tl.exp(top - new_top), tl.exp(part_top - new_top)
        part_sums = tl.load(part_ptr + part * HEAD_DIM + dims, mask=mask, other=0.0)
        sums = sums * fade + part_sums * weight
        total = total * fade + tl.load(total_ptr + part) * weight
        top = new_top
    out_at = out_ptr + (tl.load(rows_ptr + row) * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(out_at, rounded(sums / total, out_ptr.dtype.element_ty), mask=mask)


def attend_rows_(
    out_TNH: torch.Tensor,
    q_TNH: torch.Tensor,
    cache: PagedKv,
    places: SingleRows,
    seen: tuple[torch.Tensor, int | None],
) -> None:
    """Attention of the rows at ``places``, into their places in ``out``.

    q and, where the cache is not float32, the weights of the values are rounded to its type.

    Args:
        q_TNH, out_TNH: contiguous.
        seen: block tables, int32 [B, most blocks], and how many positions a row sees.

    Extra memory: R N S / SPLIT (H + 2) float32.
    """
    tables, window = seen
    num_heads, head_dim = q_TNH.shape[1:]
    num_kv, block_size = cache.k.shape[1:3]
    num_rows, num_splits = len(places.rows), triton.cdiv(places.longest, SPLIT)
    parts = q_TNH.new_empty(num_rows, num_heads, num_splits, head_dim, dtype=torch.float32)
    tops, totals = parts.new_empty(2, num_rows, num_heads, num_splits)
    dims = triton.next_power_of_2(head_dim)
    heads_per_kv = num_heads // num_kv
    attend_split[(num_rows, num_kv, num_splits)](
        q_TNH,
        cache.k,
        cache.v,
        parts,
        tops,
        totals,
        places.rows,
        places.sequences,
        places.lengths,
        tables,
        tables.stride(0),
        num_splits,
        places.longest if window is None else window,
        head_dim**-0.5,
        NUM_KV=num_kv,
        HEADS_PER_KV=heads_per_kv,
        HEADS=max(triton.next_power_of_2(heads_per_kv), _FEWEST_HEADS),
        HEAD_DIM=head_dim,
        DIMS=dims,
        BLOCK_SIZE=block_size,
        SPLIT_SIZE=SPLIT,
        TILE=TILE,
        num_warps=_WARPS,
    )
    join_splits[(num_rows, num_heads)](
        parts,
        tops,
        totals,
        out_TNH,
        places.rows,
        places.lengths,
        num_splits,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIMS=dims,
        SPLIT_SIZE=SPLIT,
        num_warps=1,
    )
