"""The linear kernels against exact emulation, and against themselves in other company."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.numerics import oracle
from thinslice.kernels import native
from thinslice.kernels.packed import PackedWeight, unpack
from thinslice.plan.packed_format import PackedFormat

pytestmark = pytest.mark.usefixtures("kernels")

FORMATS = list(PackedFormat)
SHAPES = [(16, 32), (50, 96), (96, 576), (40, 1536)]


def rows(count: int, k: int, seed: int = 0) -> torch.Tensor:
    """Activations with outliers, zeros and one group of zeros."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, k, generator=rng) * torch.rand(count, 1, generator=rng).exp()
    x[:, ::7] *= 30.0
    x[0, :32] = 0.0
    return x


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_isa_equals_exact_emulation(fmt: PackedFormat, n: int, k: int) -> None:
    weight = oracle.random_packed(fmt, n, k, seed=n)
    for count in (1, 2, 3, 4, 5, 8, 9, 16, 21, 33):
        x = rows(count, k, seed=count)
        expected = oracle.linear(x, weight)
        for isa in native.available_isas():
            native.set_isa(isa)
            assert torch.equal(native.linear(x, weight), expected), (isa, count)


@pytest.mark.parametrize("fmt", FORMATS)
def test_emulation_is_the_matrix_product(fmt: PackedFormat) -> None:
    """The emulation itself: within the rounding of activations to 8 bits of the fp64 product."""
    weight = oracle.random_packed(fmt, 64, 1024, seed=1)
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(2))
    dense = unpack(weight).to(torch.float64)
    exact = x.to(torch.float64) @ dense.T
    codes, scales = oracle.quantize_rows(x)
    rounded = (codes * scales.unsqueeze(2)).flatten(1).to(torch.float64)
    half_steps = (scales / 2).repeat_interleave(32, dim=1).to(torch.float64)
    assert ((rounded - x).abs() <= half_steps * (1 + 1e-5)).all()
    bound = half_steps @ dense.abs().T * (1 + 1e-4)
    assert ((oracle.linear(x, weight) - exact).abs() <= bound + 1e-4).all()


def moved_scale(weight: PackedWeight) -> PackedWeight:
    data = weight.data.clone()
    data[weight.format.code_bytes * (1 if weight.format is PackedFormat.INT4M else 2) + 1] ^= 1
    return PackedWeight(data, weight.format, weight.out_features, weight.in_features)


def swapped_codes(weight: PackedWeight) -> PackedWeight:
    data = weight.data.clone()
    data[:4] = data[:4].flip(0)
    return PackedWeight(data, weight.format, weight.out_features, weight.in_features)


@pytest.mark.parametrize("fault", [moved_scale, swapped_codes])
@pytest.mark.parametrize("fmt", FORMATS)
def test_planted_fault_is_seen(fmt: PackedFormat, fault: object) -> None:
    weight = oracle.random_packed(fmt, 32, 128, seed=3)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(4))
    assert callable(fault)
    assert not torch.equal(native.linear(x, fault(weight)), oracle.linear(x, weight))


@settings(max_examples=40, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    count=st.integers(2, 64),
    first=st.integers(0, 63),
    threads=st.integers(1, 3),
    isa=st.sampled_from(["first", "last"]),
    seed=st.integers(0, 3),
)
def test_row_does_not_depend_on_its_company(
    fmt: PackedFormat, count: int, first: int, threads: int, isa: str, seed: int
) -> None:
    """A row alone, and among others, elsewhere in the batch, on other threads: the same bits."""
    weight = oracle.random_packed(fmt, 208, 416, seed)
    x = rows(count, 416, seed)
    names = [name for name in native.available_isas() if name != "portable"] or ["portable"]
    native.set_isa(names[0] if isa == "first" else names[-1])
    native.set_num_threads(threads)
    row = first % count
    alone = native.linear(x[row : row + 1], weight)
    assert torch.equal(native.linear(x, weight)[row : row + 1], alone)


@pytest.mark.parametrize("chunk", [16, 48, 100, 512])
def test_chunks_of_a_prompt(chunk: int) -> None:
    """More rows than are quantised or cached at one time, in chunks, on one thread or two."""
    weight = oracle.random_packed(PackedFormat.INT4, 64, 4096, seed=7)
    x = rows(600, 4096)
    native.set_num_threads(2)
    whole = native.linear(x, weight)
    native.set_num_threads(1)
    parts = [native.linear(part, weight) for part in x.split(chunk)]
    assert torch.equal(torch.cat(parts), whole)


def test_fused_calls_equal_single_ones() -> None:
    fmts = [PackedFormat.INT4, PackedFormat.INT8, PackedFormat.INT4M]
    weights = [oracle.random_packed(f, n, 256, n) for f, n in zip(fmts, (96, 32, 40), strict=True)]
    biases = [torch.randn(96), None, torch.randn(40)]
    x = rows(19, 256)
    fused = native.linears(x, weights, biases=biases)
    for weight, bias, out in zip(weights, biases, fused, strict=True):
        plain = oracle.linear(x, weight)
        assert torch.equal(out, plain if bias is None else plain + bias)


def test_residual_and_bias_and_strided_out() -> None:
    weight = oracle.random_packed(PackedFormat.INT4, 50, 128, seed=5)
    x, bias = rows(7, 128), torch.randn(50)
    room = torch.randn(7, 80)
    expected = (oracle.linear(x, weight) + bias) + room[:, :50]
    rest = room[:, 50:].clone()
    native.linear(x, weight, bias=bias, residual=room[:, :50], out=room[:, :50])
    assert torch.equal(room[:, :50], expected)
    assert torch.equal(room[:, 50:], rest)


def test_bf16_in_and_out() -> None:
    weight = oracle.random_packed(PackedFormat.INT8, 48, 96, seed=6)
    x = rows(5, 96).to(torch.bfloat16)
    out = native.linear(x, weight)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, oracle.linear(x.float(), weight).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    gate = oracle.random_packed(PackedFormat.INT4, 48, 128, seed=8)
    up = oracle.random_packed(PackedFormat.INT4, 48, 128, seed=9)
    x = (rows(20, 128) / 30).to(dtype)
    g, u = (oracle.linear(x.float(), w).to(torch.float64) for w in (gate, up))
    exact = g / (1 + torch.exp(-g)) * u
    out = native.gate_up_swiglu(x, gate, up)
    # exp, the sum, the quotient and the product round once each, exp's polynomial within 2 ulp.
    ulps = 6 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps * (dtype != torch.float32)
    assert ((out.to(torch.float64) - exact).abs() <= ulps * exact.abs() + 1e-30).all()
    sliced = [
        native.gate_up_swiglu(x, gate.rows(a, a + 16), up.rows(a, a + 16)) for a in (0, 16, 32)
    ]
    assert torch.equal(torch.cat(sliced, dim=1), out)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_input_gives_nan_in_its_row_only(bad: float) -> None:
    weight = oracle.random_packed(PackedFormat.INT4, 32, 64, seed=10)
    x = rows(20, 64)
    clean = native.linear(x, weight)
    x[17, 40] = bad
    for isa in native.available_isas():
        native.set_isa(isa)
        out = native.linear(x, weight)
        assert out[17].isnan().all()
        assert torch.equal(out[:17], clean[:17])
        assert torch.equal(out[18:], clean[18:])


def test_border_refuses_what_the_kernels_cannot_read() -> None:
    weight = oracle.random_packed(PackedFormat.INT4, 32, 64, seed=11)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        native.linear(torch.zeros(1, 64, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match=r"\[rows, 64\]"):
        native.linear(torch.zeros(1, 32), weight)
    with pytest.raises(ValueError, match="contiguous"):
        native.linear(torch.zeros(64, 2).T, weight)
    with pytest.raises(ValueError, match="out must have 2 rows"):
        native.linear(torch.zeros(2, 64), weight, out=torch.zeros(1, 32))
    with pytest.raises(TypeError, match="bias must be float32"):
        native.linear(torch.zeros(2, 64), weight, bias=torch.zeros(32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="avx9"):
        native.set_isa("avx9")
