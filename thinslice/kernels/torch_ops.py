"""The operators of a dense decoder in torch: correct on every device, fast where torch is.

Tensors in, tensors out; no state. Letters in names are those of kernels/ops.py, and S cached
positions.
"""

import torch
import torch.nn.functional as F

from thinslice.errors import ConfigError
from thinslice.kernels.ops import Rows
from thinslice.kernels.packed import PackedWeight, unpack
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch
from thinslice.plan.cost import padded_rows
from thinslice.plan.packed_format import PANEL_ROWS
from thinslice.units import MIB

# Weights of a packed matrix that are numbers at one time.
_UNPACKED_AT_ONCE = MIB


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row to unit root mean square, then by ``weight_D``; the statistics in float32.

    Extra memory: 2 T D float32.
    Source: arXiv 1910.07467.
    """
    x = x_TD.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * x.to(x_TD.dtype)


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
    """``x @ rows.T + bias + residual``, [T, rows].

    A packed matrix is turned into numbers first: its result is near that of the compiled kernels,
    which quantise ``x`` as well, and not the same. ``out`` may be ``residual``.
    Extra memory: T times rows; for a packed matrix 14 MiB more; in bfloat16 ``x`` once more
    and the rows of the result that ``padded_rows`` adds.
    """
    if isinstance(rows, PackedWeight):
        result = _packed_linear(x_TD, rows)
        if bias is not None:
            result += bias
    else:
        result = _float_linear(x_TD, rows, bias)
    if residual is not None:
        return torch.add(residual, result, out=out)
    return result if out is None else out.copy_(result)


def _float_linear(
    x_TD: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x @ rows.T + bias``, on a processor in bfloat16 with zeros up to ``padded_rows``."""
    num_rows = x_TD.shape[0]
    num_padded = padded_rows(num_rows)
    if x_TD.dtype is not torch.bfloat16 or x_TD.is_cuda or num_padded == num_rows:
        return F.linear(x_TD, rows, bias)
    padded = x_TD.new_zeros(num_padded, x_TD.shape[1])
    padded[:num_rows] = x_TD
    return F.linear(padded, rows, bias)[:num_rows]


def _packed_linear(x_TD: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """``x @ weight.T``, a piece of the rows at a time: as numbers they take many times the room."""
    result = x_TD.new_empty(x_TD.shape[0], weight.out_features)
    step = max(_UNPACKED_AT_ONCE // weight.in_features // PANEL_ROWS, 1) * PANEL_ROWS
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        numbers = unpack(weight.rows(start, stop)).to(x_TD.dtype)
        result[:, start:stop] = F.linear(x_TD, numbers)
    return result


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
