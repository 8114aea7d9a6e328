"""The linear kernels' arithmetic, emulated exactly: what each of them must equal bit for bit."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tests.arrays import to_float32
from tests.packer import largest_code, pack
from thinslice.kernels.arrays import BF16
from thinslice.kernels.packed import PackedWeight, unpack_parts
from thinslice.plan.packed_format import GROUP, PackedFormat

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
LANES, STEP = 16, 32


def round_of_sum(a: Doubles, b: Doubles) -> Floats:
    """The fp32 nearest to the exact sum of two fp64 arrays: one rounding, not two.

    The fp64 sum is rounded to odd with the error of Knuth's two-sum; rounding that to fp32 is then
    the same as rounding the exact sum (Boldo and Melquiond, 2008).
    """
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    bits = total.view(np.int64)
    towards_larger = (error > 0) == (total > 0)
    odd = np.where(towards_larger, bits + 1, bits - 1)
    needs_odd = (error != 0) & (bits & 1 == 0)
    return np.where(needs_odd, odd, bits).view(np.float64).astype(np.float32)


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c in fp32 with one rounding, for products that fp64 holds exactly."""
    return round_of_sum(np.multiply(a, b, dtype=np.float64), c.astype(np.float64))


def quantize_rows(x: Floats, is_wide: bool) -> tuple[Floats, Floats]:
    """Codes [T, K / 32, 32] and scales [T, K / 32] of fp32 rows; 16 bits where wide, else 8.

    The 8-bit code is the upper byte of the 16-bit one, rounded.
    """
    groups = x.reshape(len(x), -1, GROUP)
    amax = np.abs(groups).max(2)
    is_zero = amax < 2.0**-100
    safe = np.where(is_zero, np.float32(1), amax)
    codes = np.round(groups * (np.float32(32512) / safe)[..., None])
    codes[is_zero] = 0
    scales = np.where(is_zero, np.float32(0), amax / np.float32(127))
    high = np.floor((codes + 128) / 256)
    low = np.maximum(codes - 256 * high, -127)
    return (256 * high + low, scales) if is_wide else (high, scales)


def linear(x: Floats, weight: PackedWeight) -> Floats:
    """Integer sums per group; groups added in order with one fused multiply-add each; fp32."""
    parts = unpack_parts(weight)
    codes, scales = quantize_rows(x, weight.is_wide)
    unit = np.float32(2.0**-8 if weight.is_wide else 1.0)
    centred = parts.codes.astype(np.float64) - weight.format.zero_point
    groups = centred.reshape(len(centred), -1, GROUP)
    sums = np.einsum("tgi,ngi->gtn", codes.astype(np.float64), groups)
    scaled_sums = codes.sum(2) * (scales * unit)
    acc = np.zeros((len(x), weight.out_features), np.float32)
    for g in range(scales.shape[1]):
        scale = scales[:, g, None] * (parts.scales[None, :, g] * unit)
        acc = fma(sums[g].astype(np.float32), scale, acc)
        if parts.mins is not None:
            acc = fma(scaled_sums[:, g, None], parts.mins[None, :, g], acc)
    return acc


def linear_numbers(x: Floats, weight: NDArray[np.generic]) -> Floats:
    """x [T, K] times rows [N, K] of float32 or bfloat16 numbers: 16 lanes, then their sum; fp32.

    Of each 32 inputs lane l takes l, then 16 + l; of bfloat16 rows 2 l, then 2 l + 1. What is
    missing of the last 32 is zero.
    """
    columns = x.shape[1]
    padding = ((0, 0), (0, -columns % STEP))
    # [rows, steps, halves, lanes]
    halves = (-1, (columns + padding[1][1]) // STEP, 2, LANES)
    x_TSHL, w_NSHL = (
        _in_halves(np.pad(one, padding), weight.dtype == BF16).reshape(halves)
        for one in (x, to_float32(weight))
    )
    acc_TNL = np.zeros((len(x), len(weight), LANES), np.float32)
    for step in range(halves[1]):
        for half in range(2):
            acc_TNL = fma(x_TSHL[:, None, step, half], w_NSHL[None, :, step, half], acc_TNL)
    return sum_of_lanes(acc_TNL)


def _in_halves(rows: Floats, is_paired: bool) -> Floats:
    if not is_paired:
        return rows
    return np.ascontiguousarray(rows.reshape(len(rows), -1, LANES, 2).swapaxes(2, 3))


def sum_of_lanes(lanes: Floats) -> Floats:
    """The last dimension, of 16: l and l + 8 first, then of the sums l and l + 4, and so on."""
    while (count := lanes.shape[-1]) > 1:
        lanes = lanes[..., : count // 2] + lanes[..., count // 2 :]
    return lanes[..., 0]


def random_packed(
    fmt: PackedFormat, n: int, k: int, seed: int, *, makes_kv: bool = False
) -> PackedWeight:
    """A packed matrix with every code and plausible scales."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, largest_code(fmt) + 1, (n, k), dtype=np.uint8)
    scales = rng.random((n, k // GROUP)) * 0.02
    mins = rng.standard_normal((n, k // GROUP)) * 0.1 if fmt is PackedFormat.INT4M else None
    return replace(pack(fmt, codes, scales, mins), makes_kv=makes_kv)
