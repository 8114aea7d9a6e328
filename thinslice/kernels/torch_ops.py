"""The operators of a dense decoder in torch: correct on every device, fast where torch is.

Tensors in, tensors out; no state. Letters in names are the dimensions: T packed query tokens,
S cached positions, D hidden size, N query heads, K KV heads, H head dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row to unit root mean square, then by ``weight_D``; the statistics in float32.

    Extra memory: 2 T D float32.
    Source: arXiv 1910.07467.
    """
    x = x_TD.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * x.to(x_TD.dtype)


def apply_rotary(x_TNH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotate each head by its position (half-split order), in float32.

    Extra memory: 3 T N H float32.
    Source: arXiv 2104.09864, in the order of GPT-NeoX.
    """
    x = x_TNH.float()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos_TH[:, None] + rotated * sin_TH[:, None]).to(x_TNH.dtype)


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``. Extra memory: T F. Source: arXiv 2002.05202."""
    return F.silu(gate_TF) * up_TF


def write_kv(cache: torch.Tensor, rows_TKH: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Store one row for each token at its slot (block * block_size + offset).

    ``cache`` is [num_blocks, K, block_size, H].
    """
    block_size = cache.shape[2]
    cache[slots_T // block_size, :, slots_T % block_size] = rows_TKH


def gather_kv(cache: torch.Tensor, block_table: torch.Tensor, num_positions: int) -> torch.Tensor:
    """The first ``num_positions`` cached rows of one sequence, as [K, S, H].

    Extra memory: S K H of the cache's dtype.
    """
    blocks = cache[block_table]
    num_blocks, num_heads, block_size, head_dim = blocks.shape
    rows = blocks.transpose(0, 1).reshape(num_heads, num_blocks * block_size, head_dim)
    return rows[:, :num_positions]


def attention(
    q_TNH: torch.Tensor,
    k_KSH: torch.Tensor,
    v_KSH: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence's last T positions over all its S positions.

    Query heads share KV heads in groups of N / K. ``window`` is how many positions, itself
    included, a query sees. Returns [T, N, H].
    Extra memory: T N H, and T S booleans where T < S or a window holds.
    """
    num_queries, num_positions = q_TNH.shape[0], k_KSH.shape[1]
    is_windowed = window is not None and num_positions > window
    mask = None
    if is_windowed or 1 < num_queries < num_positions:
        mask = _causal_mask(num_queries, num_positions, window if is_windowed else None)
    out = F.scaled_dot_product_attention(
        q_TNH.transpose(0, 1)[None],
        k_KSH[None],
        v_KSH[None],
        attn_mask=None if mask is None else mask.to(q_TNH.device),
        is_causal=mask is None and num_queries > 1,
        enable_gqa=q_TNH.shape[1] != k_KSH.shape[0],
    )
    return out[0].transpose(0, 1)


def _causal_mask(num_queries: int, num_positions: int, window: int | None) -> torch.Tensor:
    positions = torch.arange(num_positions)
    queries = torch.arange(num_positions - num_queries, num_positions)[:, None]
    mask = positions <= queries
    return mask if window is None else mask & (positions > queries - window)


def paged_attention(
    q_TNH: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    sequences: Sequence[tuple[int, int, int, torch.Tensor]],
    window: int | None = None,
) -> torch.Tensor:
    """Attention of a packed batch over a paged KV cache.

    ``sequences`` holds for each sequence the rows ``[start, stop)`` of its queries, the positions
    it has cached (those queries included) and its block table. Returns [T, N, H].
    Extra memory: the largest sequence's 2 S K H and what ``attention`` needs.
    """
    k_cache, v_cache = caches
    out = torch.empty_like(q_TNH)
    for start, stop, num_positions, block_table in sequences:
        k_KSH = gather_kv(k_cache, block_table, num_positions)
        v_KSH = gather_kv(v_cache, block_table, num_positions)
        out[start:stop] = attention(q_TNH[start:stop], k_KSH, v_KSH, window)
    return out
