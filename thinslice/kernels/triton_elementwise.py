"""Norm and rotary embedding on a GPU, each one launch where torch takes six."""

import torch
import triton
import triton.language as tl

from thinslice.kernels.triton_numbers import rounded


@triton.jit
def norm_rows(x_ptr, weight_ptr, out_ptr, size, eps, SIZE: tl.constexpr):
    """One program for each row."""
    at = tl.program_id(0).to(tl.int64) * size
    idx = tl.arange(0, SIZE)
    mask = idx < size
    stored = tl.load(x_ptr + at + idx, mask=mask, other=0.0)
    x = stored.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    x = rounded(x, stored.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + idx, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at + idx, rounded(weight * x, stored.dtype), mask=mask)


@triton.jit
def rotate_heads(x_ptr, cos_ptr, sin_ptr, num_heads, HALF: tl.constexpr, IDX: tl.constexpr):
    """One program for each head of each row, in place."""
    head = tl.program_id(0).to(tl.int64)
    idx = tl.arange(0, IDX)
    mask = idx < HALF
    table_at = head // num_heads * HALF + idx
    cos = tl.load(cos_ptr + table_at, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + table_at, mask=mask, other=0.0)
    first_at = x_ptr + head * 2 * HALF + idx
    first = tl.load(first_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_at + HALF, mask=mask, other=0.0).to(tl.float32)
    kind = x_ptr.dtype.element_ty
    tl.store(first_at, rounded(first * cos - second * sin, kind), mask=mask)
    tl.store(first_at + HALF, rounded(second * cos + first * sin, kind), mask=mask)


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """torch_ops.rms_norm; x and weight of one type. Extra memory: the output."""
    x = x.contiguous()
    size = x.shape[-1]
    out = torch.empty_like(x)
    width = triton.next_power_of_2(size)
    norm_rows[(x.numel() // size,)](x, weight_D, out, size, eps, SIZE=width)
    return out


def apply_rotary(x_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """torch_ops.apply_rotary, in the place of a contiguous ``x``."""
    assert x_TNH.is_contiguous(), "heads that do not lie together"
    num_rows, num_heads, head_dim = x_TNH.shape
    half = head_dim // 2
    width = triton.next_power_of_2(half)
    grid = (num_rows * num_heads,)
    rotate_heads[grid](x_TNH, cos_TR, sin_TR, num_heads, HALF=half, IDX=width, num_warps=1)
    return x_TNH
