"""The operators of a dense decoder in torch, for matrices of numbers, on any device.

Tensors in, tensors out; no state. Letters in names are those of kernels/ops.py, and S cached
positions.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from thinslice.errors import ConfigError
from thinslice.kernels.arrays import BF16
from thinslice.kernels.ops import Ops, Rows
from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch


def tensor_of(array: NDArray[np.generic]) -> torch.Tensor:
    """The same memory as a tensor."""
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def floats_of(tensor: torch.Tensor) -> NDArray[np.float32]:
    """Numbers in float32 on the host."""
    numbers: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return numbers


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row to unit root mean square, then by ``weight_D``; the statistics in float32.

    Extra memory: 2 T D float32.
    Source: arXiv 1910.07467.
    """
    x = x_TD.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * x.to(x_TD.dtype)


def rms_norm_(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The same of rows, in their place. Extra memory: as ``rms_norm``."""
    return x_TD.copy_(rms_norm(x_TD, weight_D, eps))


def apply_rotary(x_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate each head by its position in float32, value i with value i + R where H = 2 R.

    Extra memory: 3 T N H float32.
    Source: arXiv 2104.09864, in the order of GPT-NeoX.
    """
    first, second = x_TNH.float().chunk(2, dim=-1)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_TNH.dtype)


def swiglu_(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` in the place of ``gate``. Source: arXiv 2002.05202."""
    return F.silu(gate_TF, inplace=True).mul_(up_TF)


def product(
    x_TD: torch.Tensor,
    rows: Rows,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ rows.T + bias + residual``, [T, rows]; ``out`` may be ``residual``.

    Extra memory: T times rows.
    """
    assert not isinstance(rows, PackedWeight), "torch multiplies matrices of numbers"
    result = F.linear(x_TD, rows, bias)
    if residual is not None:
        return torch.add(residual, result, out=out)
    return result if out is None else out.copy_(result)


def write_kv(cache: torch.Tensor, rows_TKH: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Store one row for each token at its slot (block * block_size + offset).

    ``cache`` is [num_blocks, K, block_size, H].
    """
    block_size = cache.shape[2]
    cache[slots_T // block_size, :, slots_T % block_size] = rows_TKH.to(cache.dtype)


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


def attend(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: PagedKv,
    slots_T: torch.Tensor,
    sequences: SequenceBatch,
    window: int | None = None,
) -> torch.Tensor:
    """Put a packed batch's K and V [T, K, H] into the cache, and attend with q [T, N, H] over it.

    Returns [T, N, H].
    Extra memory: the largest sequence's 2 S K H and what ``attention`` needs.
    Errors: ConfigError for an int8 cache, which only the compiled kernels have.
    """
    if cache.k.dtype == torch.int8:
        raise ConfigError("an int8 KV cache needs the compiled kernels; see thinslice doctor")
    q_TNH, k_TKH, v_TKH = qkv
    write_kv(cache.k, k_TKH, slots_T)
    write_kv(cache.v, v_TKH, slots_T)
    out = torch.empty_like(q_TNH)
    for span in sequences.spans:
        rows, table = slice(span.start, span.stop), sequences.block_tables[span.sequence]
        out[rows] = attend_rows(q_TNH[rows], cache, table, span.num_positions, window)
    return out


def attend_rows(
    q_TNH: torch.Tensor,
    cache: PagedKv,
    block_table: torch.Tensor,
    num_positions: int,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one sequence's last T positions over what the cache holds of it.

    Extra memory: 2 S K H and what ``attention`` needs.
    """
    blocks = block_table[: -(-num_positions // cache.block_size)].long()
    k_KSH = gather_kv(cache.k, blocks, num_positions).to(q_TNH.dtype)
    v_KSH = gather_kv(cache.v, blocks, num_positions).to(q_TNH.dtype)
    return attention(q_TNH, k_KSH, v_KSH, window)


def _empty_like(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return like.new_empty(shape)


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tuple(parts), dim=-1)


# On another device than the processor, ``placed`` is that device's own.
TORCH = Ops(
    placed=tensor_of,
    to_host=floats_of,
    empty=_empty_like,
    side_by_side=_side_by_side,
    rms_norm=rms_norm,
    rms_norm_=rms_norm_,
    apply_rotary=apply_rotary,
    product=product,
    swiglu_=swiglu_,
    attend=attend,
)
