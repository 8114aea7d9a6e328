"""The operators of a dense decoder on a GPU: the same functions as torch_ops.

Packed matrices, norms, rotary embedding, and attention of sequences with up to 16 rows in a batch
run as Triton kernels; matrices of numbers, and attention of longer prompts, on torch. In batches of
up to 16 rows a packed model's rows have the same bits whatever stands beside them. Longer batches
run other kernels, whose sums differ in the last bits; torch's products promise nothing.
"""

from dataclasses import replace

import torch

from thinslice.kernels import torch_ops, triton_elementwise, triton_linear
from thinslice.kernels.ops import Rows
from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch
from thinslice.kernels.triton_attention import attend_rows_
from thinslice.plan.kernel_limits import MOST_SINGLE_ROWS


def product(
    x_TD: torch.Tensor,
    rows: Rows,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ rows.T + bias + residual``; a packed matrix by the kernels, numbers by torch."""
    if isinstance(rows, PackedWeight):
        return triton_linear.linear(x_TD, rows, bias, residual, out)
    return torch_ops.product(x_TD, rows, bias, residual, out)


def attend(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: PagedKv,
    slots_T: torch.Tensor,
    sequences: SequenceBatch,
    window: int | None = None,
) -> torch.Tensor:
    """Put a packed batch's K and V into the cache, and attend over it; see torch_ops.attend."""
    q_TNH, k_TKH, v_TKH = qkv
    torch_ops.write_kv(cache.k, k_TKH, slots_T)
    torch_ops.write_kv(cache.v, v_TKH, slots_T)
    q_TNH = q_TNH.contiguous()
    out_TNH = torch.empty_like(q_TNH)
    for span in sequences.spans:
        if span.num_rows > MOST_SINGLE_ROWS:
            table = sequences.block_tables[span.sequence]
            rows = slice(span.start, span.stop)
            out_TNH[rows] = torch_ops.attend_rows(
                q_TNH[rows], cache, table, span.num_positions, window
            )
    if sequences.single_rows is not None:
        tables = sequences.block_tables
        attend_rows_(out_TNH, q_TNH, cache, sequences.single_rows, (tables, window))
    return out_TNH


CUDA = replace(
    torch_ops.TORCH,
    rms_norm=triton_elementwise.rms_norm,
    apply_rotary=triton_elementwise.apply_rotary,
    product=product,
    attend=attend,
)
