"""RMSNorm, RoPE and SwiGLU against fp64, on every instruction set with the same bits."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from thinslice.kernels import native
from thinslice.kernels.arrays import BF16

Floats = NDArray[np.float32]
pytestmark = pytest.mark.usefixtures("kernels")

HEAD_DIMS = [8, 16, 20, 64, 80, 100, 128]


def noise(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def same_on_every_isa(run: Callable[[], Floats]) -> Floats:
    results = []
    for isa in native.available_isas():
        native.set_isa(isa)
        results.append(run())
    for result in results[1:]:
        assert np.array_equal(result, results[0])
    return results[0]


def assert_rounded(out: Floats, exact: NDArray[np.float64], roundings: float) -> None:
    """Within that many fp32 roundings of each value."""
    ulps = roundings * 2.0**-24
    assert (np.abs(out.astype(np.float64) - exact) <= ulps * np.abs(exact) + 1e-38).all()


@pytest.mark.parametrize("dim", [*HEAD_DIMS, 40, 576, 4096])
def test_rms_norm(dim: int) -> None:
    x, weight = noise(5, dim), noise(dim, seed=1)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt(np.square(wide).mean(1, keepdims=True) + 1e-6) * weight
    out = same_on_every_isa(lambda: native.rms_norm(x, weight, 1e-6))
    # A lane adds dim / 64 squares, then six sums; half of that error stays under the root.
    assert_rounded(out, exact, 6 + (dim / 64 + 6) / 2)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_rms_norm_rows_do_not_meet(dim: int) -> None:
    """In any company, and in place."""
    x, weight = noise(300, dim), noise(dim)
    whole = native.rms_norm(x, weight, 1e-6)
    parts = [native.rms_norm(x[at : at + 7], weight, 1e-6) for at in range(0, 300, 7)]
    assert np.array_equal(np.concatenate(parts), whole)

    def run() -> Floats:
        used = x.copy()
        return native.rms_norm(used, weight, 1e-6, out=used)

    assert np.array_equal(same_on_every_isa(run), whole)


def heads_of(room: Floats, dim: int) -> Floats:
    """Three heads at the start of each row, where they lie."""
    heads = np.lib.stride_tricks.sliding_window_view(room, dim, axis=1, writeable=True)
    return heads[:, : 3 * dim : dim]


@pytest.mark.parametrize(("dim", "rotary"), [*((dim, dim) for dim in HEAD_DIMS), (80, 40)])
def test_rope(dim: int, rotary: int) -> None:
    room = noise(6, 5 * dim + 8)
    start = heads_of(room, dim)
    half = rotary // 2
    angles = np.arange(40)[:, None] / 10000 ** (np.arange(half) / half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = np.array([0, 39, 3, 4, 5, 17])
    parts = (start, cos[positions, None], sin[positions, None])
    wide, c, s = (one.astype(np.float64) for one in parts)
    first, second = wide[..., :half], wide[..., half:rotary]
    turned = [first * c - second * s, second * c + first * s, wide[..., rotary:]]
    exact = np.concatenate(turned, axis=2)

    def run() -> Floats:
        used = room.copy()
        native.rope_(heads_of(used, dim), positions, cos, sin)
        assert np.array_equal(used[:, 3 * dim :], room[:, 3 * dim :])
        return heads_of(used, dim)

    out = same_on_every_isa(run)
    largest = np.abs(wide[..., :rotary]).max(2, keepdims=True)
    assert (np.abs(out.astype(np.float64) - exact) <= 2 * 2.0**-23 * largest).all()
    assert np.array_equal(out[..., rotary:], start[..., rotary:])


def test_silu_mul() -> None:
    ends = np.tile(np.array([-200, -88, 0, 88, 200], np.float32), (4, 1))
    gate, up = np.concatenate([noise(4, 500) * 8, ends], axis=1), noise(4, 505, seed=3)
    wide = gate.astype(np.float64)
    exact = wide / (1 + np.exp(-wide)) * up.astype(np.float64)
    out = same_on_every_isa(lambda: native.silu_mul(gate, up))
    # exp is within 2 roundings; far below zero the clamped exponent leaves less than 1e-36.
    error = np.abs(out.astype(np.float64) - exact)
    assert (error <= 8 * 2.0**-24 * np.abs(exact) + 1e-35).all()


def test_refusals() -> None:
    x, table = np.zeros((4, 2, 64), np.float32), np.zeros((8, 32), np.float32)
    row, bits = np.zeros((1, 64), np.float32), np.zeros((1, 64), BF16)
    with pytest.raises(ValueError, match=r"position 8 is outside 0\.\.7"):
        native.rope_(x, np.array([0, 1, 8, 2]), table, table)
    with pytest.raises(TypeError, match="int64"):
        native.rope_(x, np.zeros(4, np.int32), table, table)
    wide = np.zeros((8, 64), np.float32)
    with pytest.raises(ValueError, match="rotate 128 of 64"):
        native.rope_(x, np.zeros(4, np.int64), wide, wide)
    with pytest.raises(TypeError, match="x must be float32"):
        native.rms_norm(bits, np.ones(64, np.float32), 1e-6)
    with pytest.raises(TypeError, match="weight must be float32"):
        native.rms_norm(row, np.ones(64, BF16), 1e-6)
    with pytest.raises(TypeError, match="x must be float32"):
        native.rope_(x.astype(BF16), np.zeros(4, np.int64), table, table)
    with pytest.raises(TypeError, match="up must be float32"):
        native.silu_mul(row, bits)
