"""The linear kernels against exact emulation, and against themselves in other company."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.numerics import oracle
from thinslice.kernels import native
from thinslice.kernels.packed import PackedWeight, pack, unpack
from thinslice.plan.packed_format import PackedFormat

pytestmark = pytest.mark.usefixtures("kernels")

FORMATS = list(PackedFormat)
# A format and whether K or V is made: every pair of format and width there is.
PRODUCTS = [
    *((fmt, False) for fmt in FORMATS),
    (PackedFormat.INT4, True),
    (PackedFormat.INT4M, True),
]
SHAPES = [(16, 32), (50, 96), (96, 576), (40, 1536)]


def rows(count: int, k: int, seed: int = 0) -> torch.Tensor:
    """Activations with outliers, zeros and one group of zeros."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, k, generator=rng) * torch.rand(count, 1, generator=rng).exp()
    x[:, ::7] *= 30.0
    x[0, :32] = 0.0
    return x


@pytest.mark.parametrize(("fmt", "makes_kv"), PRODUCTS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_isa_equals_exact_emulation(
    fmt: PackedFormat, makes_kv: bool, n: int, k: int
) -> None:
    weight = oracle.random_packed(fmt, n, k, seed=n, makes_kv=makes_kv)
    for count in (1, 2, 3, 4, 5, 8, 9, 16, 21, 33):
        x = rows(count, k, seed=count)
        expected = oracle.linear(x, weight)
        for isa in native.available_isas():
            native.set_isa(isa)
            assert torch.equal(native.linear(x, weight), expected), (isa, count)


@pytest.mark.parametrize(("fmt", "makes_kv"), PRODUCTS)
def test_emulation_is_the_matrix_product(fmt: PackedFormat, makes_kv: bool) -> None:
    """The emulation itself: within the rounding of activations of the fp64 product."""
    weight = oracle.random_packed(fmt, 64, 1024, seed=1, makes_kv=makes_kv)
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(2))
    dense = unpack(weight).to(torch.float64)
    exact = x.to(torch.float64) @ dense.T
    codes, scales = oracle.quantize_rows(x, weight.is_wide)
    steps = (scales / 256 if weight.is_wide else scales).to(torch.float64).unsqueeze(2)
    rounded = (codes.to(torch.float64) * steps).flatten(1)
    # To 8 bits from 16: half a step and half a wide one. Wide codes that end in -128 end in -127.
    error = steps * torch.where(codes % 256 == 129, 1.5, 0.5) if weight.is_wide else steps * 0.502
    errors = error.expand(codes.shape).flatten(1)
    assert ((rounded - x).abs() <= errors * (1 + 1e-5) + x.abs() * 2.0**-22).all()
    bound = (errors + x.abs() * 2.0**-22) @ dense.abs().T
    assert ((oracle.linear(x, weight) - exact).abs() <= bound + 1e-4).all()


def without_low_plane(x: torch.Tensor) -> torch.Tensor:
    """Activations whose wide codes are multiples of 256."""
    codes, scales = oracle.quantize_rows(x, False)
    return (codes * scales.unsqueeze(2)).flatten(1)


@pytest.mark.parametrize("fmt", FORMATS)
def test_wide_activations_are_finer(fmt: PackedFormat) -> None:
    """Their error is a hundredth of narrow ones'; with the low plane dropped it is not."""
    weight = oracle.random_packed(fmt, 64, 1024, seed=12, makes_kv=True)
    x = rows(8, 1024)
    exact = x.to(torch.float64) @ unpack(weight).to(torch.float64).T
    wide = (native.linear(x, weight) - exact).norm()
    narrow = (native.linear(without_low_plane(x), weight) - exact).norm()
    assert wide < narrow / 100


@settings(max_examples=60, deadline=None)
@given(
    product=st.sampled_from(PRODUCTS),
    codes=st.lists(
        st.sampled_from([-32512, -32385, -32384, -129, -128, -127, -1, 0, 127, 128, 129, 32385])
        | st.integers(-32512, 32512),
        min_size=31,
        max_size=31,
    ),
    extreme=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_code_in_either_plane(
    product: tuple[PackedFormat, bool], codes: list[int], extreme: bool, seed: int
) -> None:
    """Codes at the borders of the planes, against weights at the ends of their range."""
    fmt, makes_kv = product
    weight = oracle.random_packed(fmt, 48, 32, seed, makes_kv=makes_kv)
    if extreme:
        ends = torch.randint(0, 2, (48, 32), generator=torch.Generator().manual_seed(seed))
        mins = torch.full((48, 1), 0.5) if fmt is PackedFormat.INT4M else None
        packed = pack(fmt, (ends * fmt.largest_code).to(torch.uint8), torch.ones(48, 1), mins)
        weight = replace(packed, makes_kv=makes_kv)
    x = torch.tensor([[32512.0, *codes], [-32512.0, *reversed(codes)]])
    expected = oracle.linear(x, weight)
    for isa in native.available_isas():
        native.set_isa(isa)
        assert torch.equal(native.linear(x, weight), expected), isa


def test_low_plane_at_its_ends() -> None:
    """All codes of a group -128 or 127 in the low plane, which is what AVX2's 16 bits hold."""
    for fmt, makes_kv in PRODUCTS:
        for code in (0, fmt.largest_code):
            codes = torch.full((16, 64), code, dtype=torch.uint8)
            mins = torch.ones(16, 2) if fmt is PackedFormat.INT4M else None
            weight = replace(pack(fmt, codes, torch.ones(16, 2), mins), makes_kv=makes_kv)
            for low in (-128, -127, 127):
                x = torch.full((1, 64), 126.0 * 256 + low)
                x[0, ::32] = 32512.0
                for sign in (1, -1):
                    expected = oracle.linear(sign * x, weight)
                    for isa in native.available_isas():
                        native.set_isa(isa)
                        assert torch.equal(native.linear(sign * x, weight), expected), isa


def without_kv(weight: PackedWeight) -> PackedWeight:
    return replace(weight, makes_kv=False)


@pytest.mark.parametrize("fmt", [PackedFormat.INT4, PackedFormat.INT4M])
def test_planted_fault_of_width_is_seen(fmt: PackedFormat) -> None:
    weight = oracle.random_packed(fmt, 32, 128, seed=13, makes_kv=True)
    x = rows(3, 128)
    assert not torch.equal(native.linear(x, without_kv(weight)), oracle.linear(x, weight))
    assert not torch.equal(native.linear(without_low_plane(x), weight), oracle.linear(x, weight))


def moved_scale(weight: PackedWeight) -> PackedWeight:
    data = weight.data.clone()
    data[weight.format.code_bytes * (1 if weight.format is PackedFormat.INT4M else 2) + 1] ^= 1
    return replace(weight, data=data)


def swapped_codes(weight: PackedWeight) -> PackedWeight:
    data = weight.data.clone()
    data[:4] = data[:4].flip(0)
    return replace(weight, data=data)


@pytest.mark.parametrize("fault", [moved_scale, swapped_codes])
@pytest.mark.parametrize(("fmt", "makes_kv"), PRODUCTS)
def test_planted_fault_is_seen(fmt: PackedFormat, makes_kv: bool, fault: object) -> None:
    weight = oracle.random_packed(fmt, 32, 128, seed=3, makes_kv=makes_kv)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(4))
    assert callable(fault)
    assert not torch.equal(native.linear(x, fault(weight)), oracle.linear(x, weight))


@settings(max_examples=40, deadline=None)
@given(
    product=st.sampled_from(PRODUCTS),
    count=st.integers(2, 64),
    first=st.integers(0, 63),
    threads=st.integers(1, 3),
    isa=st.sampled_from(["first", "last"]),
    seed=st.integers(0, 3),
)
def test_row_does_not_depend_on_its_company(
    product: tuple[PackedFormat, bool], count: int, first: int, threads: int, isa: str, seed: int
) -> None:
    """A row alone, and among others, elsewhere in the batch, on other threads: the same bits."""
    fmt, makes_kv = product
    weight = oracle.random_packed(fmt, 208, 416, seed, makes_kv=makes_kv)
    x = rows(count, 416, seed)
    names = [name for name in native.available_isas() if name != "portable"] or ["portable"]
    native.set_isa(names[0] if isa == "first" else names[-1])
    native.set_num_threads(threads)
    row = first % count
    alone = native.linear(x[row : row + 1], weight)
    assert torch.equal(native.linear(x, weight)[row : row + 1], alone)


@pytest.mark.parametrize("chunk", [16, 48, 100, 512])
@pytest.mark.parametrize("makes_kv", [False, True])
def test_chunks_of_a_prompt(chunk: int, makes_kv: bool) -> None:
    """More rows than are quantised or cached at one time, in chunks, on one thread or two."""
    weight = oracle.random_packed(PackedFormat.INT4, 64, 4096, seed=7, makes_kv=makes_kv)
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
