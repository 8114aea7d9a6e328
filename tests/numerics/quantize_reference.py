"""The quantisers' arithmetic in NumPy: what the compiled ones must give but for near-ties.

Sums are in float64, so two candidates that are equal but for rounding may change places.
"""

import numpy as np
from numpy.typing import NDArray

from tests.packer import pack
from thinslice.kernels.packed import PackedWeight
from thinslice.plan.packed_format import GROUP, PackedFormat

Floats = NDArray[np.floating]


def reference_quantize(weight: NDArray[np.float32], fmt: PackedFormat) -> PackedWeight:
    """A packed matrix of float32 weights [N, K]."""
    groups = weight.reshape(len(weight), -1, GROUP)
    search = {
        PackedFormat.INT4: search_int4,
        PackedFormat.INT4M: search_int4m,
        PackedFormat.INT8: search_int8,
    }[fmt]
    codes, scales, mins = search(groups)
    return pack(fmt, codes.astype(np.uint8).reshape(weight.shape), scales, mins)


def ratio(a: Floats, b: Floats) -> Floats:
    """a / b, zero where b is zero."""
    return np.where(b == 0, np.float32(0), a / np.where(b == 0, np.float32(1), b))


def levels_of(x: Floats, scales: Floats, low: int, high: int) -> Floats:
    inverse = ratio(np.float32(1), scales.astype(np.float32))
    return np.clip(np.round(x * inverse[..., None]), low, high)


def half(x: Floats) -> NDArray[np.float32]:
    return x.astype(np.float16).astype(np.float32)


def half_above(x: NDArray[np.float32]) -> NDArray[np.float32]:
    nearest = x.astype(np.float16)
    above = np.nextafter(nearest, np.float16(np.inf))
    return np.where(nearest < x, above, nearest).astype(np.float32)


def search_int4(x: NDArray[np.float32]) -> tuple[Floats, Floats, None]:
    squares = x.astype(np.float64) ** 2
    importance = np.sqrt(squares + squares.mean((1, 2), keepdims=True))
    at = np.abs(x).argmax(-1)[..., None]
    largest = np.take_along_axis(x, at, -1)[..., 0]
    best_gain, best = np.zeros(largest.shape), np.zeros(largest.shape)
    for divisor in (7.1, 7.4, 7.7, 8.0, 8.3, 8.6, 8.9):
        levels = levels_of(x, largest / np.float32(-divisor), -8, 7).astype(np.float64)
        product = (importance * x * levels).sum(-1)
        scales = ratio(product, (importance * levels**2).sum(-1))
        is_better = product * scales > best_gain
        best_gain = np.where(is_better, product * scales, best_gain)
        best = np.where(is_better, scales, best)
    scales = half(best.astype(np.float32))
    return levels_of(x, scales, -8, 7) + 8, scales, None


def search_int4m(x: NDArray[np.float32]) -> tuple[Floats, Floats, Floats]:
    low, high = x.min(-1), x.max(-1)
    best_error = np.full(low.shape, np.inf)
    best, best_mins = np.zeros_like(low), half(low)
    for divisor in (12.5, 13.0, 13.5, 14.0, 14.5, 15.0, 15.5):
        levels = levels_of(x - low[..., None], (high - low) / np.float32(divisor), 0, 15)
        centred = levels - levels.mean(-1, keepdims=True, dtype=np.float64)
        mean = x.mean(-1, keepdims=True, dtype=np.float64)
        slope = ratio((centred * (x - mean)).sum(-1), (centred**2).sum(-1))
        mins = half(mean[..., 0] - slope * levels.mean(-1, dtype=np.float64))
        scales = half(slope)
        levels = levels_of(x - mins[..., None], scales, 0, 15)
        fitted = mins[..., None].astype(np.float64) + levels * scales[..., None]
        error = ((x - fitted) ** 2).sum(-1)
        is_better = error < best_error
        best_error = np.where(is_better, error, best_error)
        best, best_mins = np.where(is_better, scales, best), np.where(is_better, mins, best_mins)
    return levels_of(x - best_mins[..., None], best, 0, 15), best, best_mins


def search_int8(x: NDArray[np.float32]) -> tuple[Floats, Floats, None]:
    largest = np.abs(x).max(-1)
    best_error, best = np.full(largest.shape, np.inf), np.zeros_like(largest)
    for divisor in range(127, 120, -1):
        scales = half_above(largest / np.float32(divisor))
        fitted = levels_of(x, scales, -127, 127).astype(np.float64) * scales[..., None]
        error = ((fitted - x) ** 2).sum(-1)
        is_better = error < best_error
        best_error = np.where(is_better, error, best_error)
        best = np.where(is_better, scales, best)
    return levels_of(x, best, -127, 127) + 128, best, None
