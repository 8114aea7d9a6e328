"""Rotary frequencies and their tables, with the scalings the dense family uses.

Sources: arXiv 2104.09864 (rotary), arXiv 2309.00071 (YaRN); llama3 scaling as in Meta's
llama-models repository.
"""

import math

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.arrays import Floats
from thinslice.plan.model_shape import ModelShape, RopeScaling


class Rotary:
    """The rotary tables of a model, for the positions of a batch."""

    def __init__(self, shape: ModelShape) -> None:
        self.inv_freq = inverse_frequencies(shape)
        self.factor = np.float32(attention_factor(shape.rope_scaling))

    def tables(self, positions_T: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Cosine and sine of each position and frequency, [T, H / 2] each.

        An angle is a float32, as where models are trained; its cosine is computed in float64 and
        rounded once, so that it is the same on every machine.
        """
        angles = np.outer(positions_T.astype(np.float32), self.inv_freq).astype(np.float64)
        cos_TR, sin_TR = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        if self.factor == 1.0:
            return cos_TR, sin_TR
        return cos_TR * self.factor, sin_TR * self.factor


def inverse_frequencies(shape: ModelShape) -> Floats:
    """The H/2 rotary frequencies of a model, scaled as its shape says."""
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float32) / np.float32(shape.head_dim)
    powers = np.power(shape.rope_theta, exponents, dtype=np.float64).astype(np.float32)
    inv_freq = np.float32(1.0) / powers
    scaling = shape.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / np.float32(scaling.factor)
    if scaling.rope_type == "factors":
        return inv_freq / np.array(scaling.freq_factors, np.float32)
    if scaling.rope_type == "llama3":
        return _llama3(inv_freq, scaling)
    return _yarn(inv_freq, shape, scaling)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies cosine and sine by; 1 for every other scaling."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        top = _yarn_mscale(scaling.factor, scaling.mscale)
        return top / _yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return _yarn_mscale(scaling.factor, 1.0)


def _llama3(inv_freq: Floats, scaling: RopeScaling) -> Floats:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    original = _original_positions(scaling)
    low_wavelength = original / scaling.low_freq_factor
    high_wavelength = original / scaling.high_freq_factor
    wavelength = np.float32(2 * math.pi) / inv_freq
    stretched = np.where(
        wavelength > low_wavelength, inv_freq / np.float32(scaling.factor), inv_freq
    )
    span = np.float32(scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = (np.float32(original) / wavelength - np.float32(scaling.low_freq_factor)) / span
    blended = (1 - smooth) * stretched / np.float32(scaling.factor) + smooth * stretched
    is_between = ~(wavelength < high_wavelength) & ~(wavelength > low_wavelength)
    return np.where(is_between, blended, stretched)


def _yarn(inv_freq: Floats, shape: ModelShape, scaling: RopeScaling) -> Floats:
    """Dimensions that turn often keep their frequency, slow ones are stretched by the factor."""
    original = _original_positions(scaling)

    def dimension_of(num_rotations: float) -> float:
        turns = math.log(original / (num_rotations * 2 * math.pi))
        return shape.head_dim * turns / (2 * math.log(shape.rope_theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.head_dim - 1)
    if low == high:
        high += 0.001  # the ramp's slope stays finite
    index = np.arange(shape.head_dim // 2, dtype=np.float32)
    kept = 1 - ((index - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    return inv_freq / np.float32(scaling.factor) * (1 - kept) + inv_freq * kept


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _original_positions(scaling: RopeScaling) -> int:
    original = scaling.original_max_position_embeddings
    assert original is not None, f"{scaling.rope_type} scaling without its original context"
    return original
