"""RMSNorm, RoPE and SwiGLU against fp64, on every instruction set with the same bits."""

from collections.abc import Callable

import pytest
import torch

from thinslice.kernels import native

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_on_every_isa(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    results = []
    for isa in native.available_isas():
        native.set_isa(isa)
        results.append(run())
    for result in results[1:]:
        assert torch.equal(result, results[0])
    return results[0]


def assert_rounded(out: torch.Tensor, exact: torch.Tensor, fp32_roundings: float) -> None:
    """Within that many fp32 roundings of each value, and one rounding to out's dtype."""
    ulps = fp32_roundings * 2.0**-24
    if out.dtype == torch.bfloat16:
        ulps += 2.0**-8
    assert ((out.to(torch.float64) - exact).abs() <= ulps * exact.abs() + 1e-38).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 40, 576, 4096])
def test_rms_norm(dtype: torch.dtype, dim: int) -> None:
    x, weight = noise(5, dim, dtype=dtype), noise(dim, seed=1)
    wide = x.to(torch.float64)
    exact = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight
    out = same_on_every_isa(lambda: native.rms_norm(x, weight, 1e-6))
    # A lane adds dim / 64 squares, then six sums; half of that error stays under the root.
    assert_rounded(out, exact, 6 + (dim / 64 + 6) / 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_residual(dtype: torch.dtype) -> None:
    x, start, weight = noise(7, 96, dtype=dtype), noise(7, 96, seed=2, dtype=dtype), noise(96)

    def run() -> torch.Tensor:
        residual = start.clone()
        out = native.rms_norm(x, weight, 1e-5, residual=residual)
        assert torch.equal(residual, start + x)
        return out

    assert torch.equal(same_on_every_isa(run), native.rms_norm(start + x, weight, 1e-5))


def test_rms_norm_rows_do_not_meet() -> None:
    x, weight = noise(300, 64), noise(64)
    whole = native.rms_norm(x, weight, 1e-6)
    assert torch.equal(torch.cat([native.rms_norm(row, weight, 1e-6) for row in x.split(7)]), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (128, 128), (80, 40), (16, 16)])
def test_rope(dtype: torch.dtype, dim: int, rotary: int) -> None:
    room = noise(6, 5 * dim + 8, dtype=dtype)
    start = room[:, : 3 * dim].unflatten(1, (3, dim))
    half = rotary // 2
    angles = torch.arange(40)[:, None] / 10000 ** (torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.tensor([0, 39, 3, 4, 5, 17])
    wide, c, s = (t.to(torch.float64) for t in (start, cos[positions, None], sin[positions, None]))
    first, second = wide[..., :half], wide[..., half:rotary]
    exact = torch.cat([first * c - second * s, second * c + first * s, wide[..., rotary:]], dim=2)

    def run() -> torch.Tensor:
        used = room.clone()
        native.rope_(used[:, : 3 * dim].unflatten(1, (3, dim)), positions, cos, sin)
        assert torch.equal(used[:, 3 * dim :], room[:, 3 * dim :])
        return used[:, : 3 * dim].unflatten(1, (3, dim))

    out = same_on_every_isa(run)
    largest = wide[..., :rotary].abs().amax(2, keepdim=True)
    step = 2.0**-23 + (2.0**-8 if dtype == torch.bfloat16 else 0.0)
    assert ((out.to(torch.float64) - exact).abs() <= 2 * step * largest).all()
    assert torch.equal(out[..., rotary:], start[..., rotary:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate = torch.cat([noise(4, 500) * 8, torch.tensor([-200.0, -88, 0, 88, 200]).expand(4, 5)], 1)
    gate, up = gate.to(dtype), noise(4, 505, seed=3, dtype=dtype)
    wide = gate.to(torch.float64)
    exact = wide / (1 + torch.exp(-wide)) * up.to(torch.float64)
    out = same_on_every_isa(lambda: native.silu_mul(gate, up))
    # exp is within 2 roundings; far below zero the clamped exponent leaves less than 1e-36.
    ulps = 8 * 2.0**-24 + (2.0**-8 if dtype == torch.bfloat16 else 0.0)
    assert ((out.to(torch.float64) - exact).abs() <= ulps * exact.abs() + 1e-35).all()


def test_bf16_rounds_as_torch_does() -> None:
    """Sums of any two bit patterns: ties, overflow, infinities and NaN among them."""
    rng = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**15), 2**15, (2, 64, 256), generator=rng).to(torch.int16)
    x, start = bits.view(torch.bfloat16)
    expected = x + start
    for isa in native.available_isas():
        native.set_isa(isa)
        residual = start.clone()
        native.rms_norm(x, torch.ones(256), 1e-6, residual=residual)
        both_nan = residual.isnan() & expected.isnan()
        assert ((residual == expected) | both_nan).all()


def test_refusals() -> None:
    x = torch.zeros(4, 2, 64)
    table = torch.zeros(8, 32)
    with pytest.raises(ValueError, match=r"position 8 is outside 0\.\.7"):
        native.rope_(x, torch.tensor([0, 1, 8, 2]), table, table)
    with pytest.raises(TypeError, match="int64"):
        native.rope_(x, torch.zeros(4, dtype=torch.int32), table, table)
    with pytest.raises(ValueError, match="rotate 128 of 64"):
        native.rope_(x, torch.zeros(4, dtype=torch.int64), torch.zeros(8, 64), torch.zeros(8, 64))
    with pytest.raises(TypeError, match="residual must be"):
        native.rms_norm(
            torch.zeros(1, 64), torch.ones(64), 1e-6, residual=torch.zeros(1, 64).bfloat16()
        )
