"""The operators of a dense decoder in compiled code: the same functions as torch_ops.

Sums are fp32 in one fixed order and results are rounded once, so they differ from torch_ops in the
last bits; a row's bits do not depend on the rows beside it. Norm weights and biases are float32.
"""

import torch

from thinslice.kernels import native, native_attention, torch_ops
from thinslice.kernels.ops import Rows
from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row of the last dimension to unit root mean square, then by ``weight_D``."""
    rows = x_TD.reshape(-1, x_TD.shape[-1])
    return native.rms_norm(rows, weight_D, eps).view(x_TD.shape)


def apply_rotary(x_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate each head by its position, in place."""
    return native.rope_(x_TNH, torch.arange(x_TNH.shape[0]), cos_TR, sin_TR)


def product(
    x_TD: torch.Tensor,
    rows: Rows,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ rows.T + bias + residual``; a packed matrix by the kernels, numbers by torch."""
    if isinstance(rows, PackedWeight):
        return native.linear(x_TD, rows, bias=bias, residual=residual, out=out)
    return torch_ops.product(x_TD, rows, bias, residual, out)


def swiglu_(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` in the place of ``gate``."""
    return native.silu_mul(gate_TF, up_TF, out=gate_TF)


def attend(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: PagedKv,
    slots_T: torch.Tensor,
    sequences: SequenceBatch,
    window: int | None = None,
) -> torch.Tensor:
    """Put a packed batch's K and V into the cache, and attend over it; see torch_ops.attend."""
    q_TNH, k_TKH, v_TKH = qkv
    native_attention.write_kv(k_TKH, v_TKH, cache, slots_T)
    scale = q_TNH.shape[2] ** -0.5
    return native_attention.attention(q_TNH, cache, sequences, scale=scale, window=window or 0)
