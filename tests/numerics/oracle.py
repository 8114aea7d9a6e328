"""The linear kernels' arithmetic, emulated exactly: what each of them must equal bit for bit."""

from dataclasses import replace

import torch

from thinslice.kernels.packed import PackedWeight, pack, unpack_parts
from thinslice.plan.packed_format import GROUP, PackedFormat


def round_of_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The fp32 nearest to the exact sum of two fp64 tensors: one rounding, not two.

    The fp64 sum is rounded to odd with the error of Knuth's two-sum; rounding that to fp32 is then
    the same as rounding the exact sum (Boldo and Melquiond, 2008).
    """
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    bits = total.view(torch.int64)
    towards_larger = (error > 0) == (total > 0)
    odd = torch.where(towards_larger, bits + 1, bits - 1)
    needs_odd = (error != 0) & (bits & 1 == 0)
    return torch.where(needs_odd, odd, bits).view(torch.float64).to(torch.float32)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c in fp32 with one rounding, for products that fp64 holds exactly."""
    return round_of_sum(a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64))


def quantize_rows(x: torch.Tensor, is_wide: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, K / 32, 32] and scales [T, K / 32] of fp32 rows; 16 bits where wide, else 8.

    The 8-bit code is the upper byte of the 16-bit one, rounded.
    """
    groups = x.to(torch.float32).unflatten(1, (-1, GROUP))
    amax = groups.abs().amax(2)
    is_zero = amax < 2.0**-100
    safe = torch.where(is_zero, torch.ones_like(amax), amax)
    codes = torch.round(groups * (torch.full_like(safe, 32512.0) / safe).unsqueeze(2))
    codes[is_zero] = 0.0
    scales = torch.where(is_zero, torch.zeros_like(amax), amax / 127.0)
    high = torch.floor((codes + 128) / 256)
    low = (codes - 256 * high).clamp_min(-127)
    return (256 * high + low, scales) if is_wide else (high, scales)


def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Integer sums per group; groups added in order with one fused multiply-add each; fp32."""
    parts = unpack_parts(weight)
    codes, scales = quantize_rows(x, weight.is_wide)
    unit = 2.0**-8 if weight.is_wide else 1.0
    centred = (parts.codes.to(torch.float64) - weight.format.zero_point).unflatten(1, (-1, GROUP))
    sums = torch.einsum("tgi,ngi->gtn", codes.to(torch.float64), centred)
    scaled_sums = codes.sum(2) * (scales * unit)
    acc = torch.zeros(x.shape[0], weight.out_features)
    for g in range(scales.shape[1]):
        scale = scales[:, g, None] * (parts.scales[None, :, g] * unit)
        acc = fma(sums[g].to(torch.float32), scale, acc)
        if parts.mins is not None:
            acc = fma(scaled_sums[:, g, None], parts.mins[None, :, g], acc)
    return acc


def random_packed(
    fmt: PackedFormat, n: int, k: int, seed: int, *, makes_kv: bool = False
) -> PackedWeight:
    """A packed matrix with every code and plausible scales."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, fmt.largest_code + 1, (n, k), dtype=torch.uint8, generator=rng)
    scales = torch.rand(n, k // GROUP, generator=rng) * 0.02
    mins = torch.randn(n, k // GROUP, generator=rng) * 0.1 if fmt is PackedFormat.INT4M else None
    return replace(pack(fmt, codes, scales, mins), makes_kv=makes_kv)
