"""The linear kernels against exact emulation, and against themselves in other company."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.numerics import oracle
from tests.packer import largest_code, pack
from thinslice.kernels import native
from thinslice.kernels.arrays import BF16
from thinslice.kernels.packed import PackedWeight, empty, unpack
from thinslice.plan.packed_format import PackedFormat

Floats = NDArray[np.float32]
pytestmark = pytest.mark.usefixtures("kernels")

FORMATS = list(PackedFormat)
# A format and whether K or V is made: every pair of format and width there is.
PRODUCTS = [
    *((fmt, False) for fmt in FORMATS),
    (PackedFormat.INT4, True),
    (PackedFormat.INT4M, True),
]
SHAPES = [(16, 32), (50, 96), (96, 576), (40, 1536)]


def rows(count: int, k: int, seed: int = 0) -> Floats:
    """Activations with outliers, zeros and one group of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, k), np.float32) * np.exp(rng.random((count, 1), np.float32))
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
            assert np.array_equal(native.linear(x, weight), expected), (isa, count)


@pytest.mark.parametrize(("fmt", "makes_kv"), PRODUCTS)
def test_emulation_is_the_matrix_product(fmt: PackedFormat, makes_kv: bool) -> None:
    """The emulation itself: within the rounding of activations of the fp64 product."""
    weight = oracle.random_packed(fmt, 64, 1024, seed=1, makes_kv=makes_kv)
    x = np.random.default_rng(2).standard_normal((8, 1024), np.float32)
    dense = unpack(weight).astype(np.float64)
    exact = x.astype(np.float64) @ dense.T
    codes, scales = oracle.quantize_rows(x, weight.is_wide)
    steps = (scales / 256 if weight.is_wide else scales).astype(np.float64)[..., None]
    rounded = (codes.astype(np.float64) * steps).reshape(8, -1)
    # To 8 bits from 16: half a step and half a wide one. Wide codes that end in -128 end in -127.
    error = steps * np.where(codes % 256 == 129, 1.5, 0.5) if weight.is_wide else steps * 0.502
    errors = np.broadcast_to(error, codes.shape).reshape(8, -1)
    assert (np.abs(rounded - x) <= errors * (1 + 1e-5) + np.abs(x) * 2.0**-22).all()
    bound = (errors + np.abs(x) * 2.0**-22) @ np.abs(dense).T
    assert (np.abs(oracle.linear(x, weight) - exact) <= bound + 1e-4).all()


def without_low_plane(x: Floats) -> Floats:
    """Activations whose wide codes are multiples of 256."""
    codes, scales = oracle.quantize_rows(x, False)
    return (codes * scales[..., None]).reshape(x.shape)


@pytest.mark.parametrize("fmt", FORMATS)
def test_wide_activations_are_finer(fmt: PackedFormat) -> None:
    """Their error is a hundredth of narrow ones'; with the low plane dropped it is not."""
    weight = oracle.random_packed(fmt, 64, 1024, seed=12, makes_kv=True)
    x = rows(8, 1024)
    exact = x.astype(np.float64) @ unpack(weight).astype(np.float64).T
    wide = np.linalg.norm(native.linear(x, weight) - exact)
    narrow = np.linalg.norm(native.linear(without_low_plane(x), weight) - exact)
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
        ends = np.random.default_rng(seed).integers(0, 2, (48, 32), dtype=np.uint8)
        mins = np.full((48, 1), 0.5) if fmt is PackedFormat.INT4M else None
        packed = pack(fmt, ends * np.uint8(largest_code(fmt)), np.ones((48, 1)), mins)
        weight = replace(packed, makes_kv=makes_kv)
    x = np.array([[32512, *codes], [-32512, *reversed(codes)]], np.float32)
    expected = oracle.linear(x, weight)
    for isa in native.available_isas():
        native.set_isa(isa)
        assert np.array_equal(native.linear(x, weight), expected), isa


def test_low_plane_at_its_ends() -> None:
    """All codes of a group -128 or 127 in the low plane, which is what AVX2's 16 bits hold."""
    for fmt, makes_kv in PRODUCTS:
        for code in (0, largest_code(fmt)):
            codes = np.full((16, 64), code, np.uint8)
            mins = np.ones((16, 2)) if fmt is PackedFormat.INT4M else None
            weight = replace(pack(fmt, codes, np.ones((16, 2)), mins), makes_kv=makes_kv)
            for low in (-128, -127, 127):
                x = np.full((1, 64), 126 * 256 + low, np.float32)
                x[0, ::32] = 32512.0
                for sign in (1, -1):
                    expected = oracle.linear(sign * x, weight)
                    for isa in native.available_isas():
                        native.set_isa(isa)
                        assert np.array_equal(native.linear(sign * x, weight), expected), isa


def without_kv(weight: PackedWeight) -> PackedWeight:
    return replace(weight, makes_kv=False)


@pytest.mark.parametrize("fmt", [PackedFormat.INT4, PackedFormat.INT4M])
def test_planted_fault_of_width_is_seen(fmt: PackedFormat) -> None:
    weight = oracle.random_packed(fmt, 32, 128, seed=13, makes_kv=True)
    x = rows(3, 128)
    expected = oracle.linear(x, weight)
    assert not np.array_equal(native.linear(x, without_kv(weight)), expected)
    assert not np.array_equal(native.linear(without_low_plane(x), weight), expected)


def copy_of(weight: PackedWeight) -> PackedWeight:
    copy = empty(weight.format, weight.out_features, weight.in_features)
    copy.data[:] = weight.data
    return replace(copy, makes_kv=weight.makes_kv)


def moved_scale(weight: PackedWeight) -> PackedWeight:
    copy = copy_of(weight)
    at = weight.format.code_bytes * (1 if weight.format is PackedFormat.INT4M else 2) + 1
    copy.data[at] ^= 1
    return copy


def swapped_codes(weight: PackedWeight) -> PackedWeight:
    copy = copy_of(weight)
    copy.data[:4] = weight.data[3::-1]
    return copy


@pytest.mark.parametrize("fault", [moved_scale, swapped_codes])
@pytest.mark.parametrize(("fmt", "makes_kv"), PRODUCTS)
def test_planted_fault_is_seen(fmt: PackedFormat, makes_kv: bool, fault: object) -> None:
    weight = oracle.random_packed(fmt, 32, 128, seed=3, makes_kv=makes_kv)
    x = np.random.default_rng(4).standard_normal((2, 128), np.float32)
    assert callable(fault)
    assert not np.array_equal(native.linear(x, fault(weight)), oracle.linear(x, weight))


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
    assert np.array_equal(native.linear(x, weight)[row : row + 1], alone)


@pytest.mark.parametrize("chunk", [16, 48, 100, 512])
@pytest.mark.parametrize("makes_kv", [False, True])
def test_chunks_of_a_prompt(chunk: int, makes_kv: bool) -> None:
    """More rows than are quantised or cached at one time, in chunks, on one thread or two."""
    weight = oracle.random_packed(PackedFormat.INT4, 64, 4096, seed=7, makes_kv=makes_kv)
    x = rows(600, 4096)
    native.set_num_threads(2)
    whole = native.linear(x, weight)
    native.set_num_threads(1)
    parts = [native.linear(x[at : at + chunk], weight) for at in range(0, 600, chunk)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_residual_and_bias_and_strided_out() -> None:
    weight = oracle.random_packed(PackedFormat.INT4, 50, 128, seed=5)
    rng = np.random.default_rng(6)
    x, bias = rows(7, 128), rng.standard_normal(50, np.float32)
    room = rng.standard_normal((7, 80), np.float32)
    expected = (oracle.linear(x, weight) + bias) + room[:, :50]
    rest = room[:, 50:].copy()
    native.linear(x, weight, bias=bias, residual=room[:, :50], out=room[:, :50])
    assert np.array_equal(room[:, :50], expected)
    assert np.array_equal(room[:, 50:], rest)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_input_gives_nan_in_its_row_only(bad: float) -> None:
    weight = oracle.random_packed(PackedFormat.INT4, 32, 64, seed=10)
    x = rows(20, 64)
    clean = native.linear(x, weight)
    x[17, 40] = bad
    for isa in native.available_isas():
        native.set_isa(isa)
        out = native.linear(x, weight)
        assert np.isnan(out[17]).all()
        assert np.array_equal(out[:17], clean[:17])
        assert np.array_equal(out[18:], clean[18:])


def test_border_refuses_what_the_kernels_cannot_read() -> None:
    weight = oracle.random_packed(PackedFormat.INT4, 32, 64, seed=11)

    def zeros(*shape: int) -> Floats:
        return np.zeros(shape, np.float32)

    with pytest.raises(TypeError, match="x must be float32"):
        native.linear(np.zeros((1, 64), BF16), weight)
    with pytest.raises(TypeError, match="out must be float32"):
        native.linear(zeros(1, 64), weight, out=np.zeros((1, 32), BF16))
    with pytest.raises(ValueError, match=r"x must be \[1, 64\]"):
        native.linear(zeros(1, 32), weight)
    with pytest.raises(ValueError, match=r"x must be \[64, 64\]"):
        native.linear(zeros(64), weight)
    with pytest.raises(ValueError, match="contiguous"):
        native.linear(zeros(64, 2).T, weight)
    with pytest.raises(ValueError, match=r"out must be \[2, 32\]"):
        native.linear(zeros(2, 64), weight, out=zeros(1, 32))
    with pytest.raises(ValueError, match=r"residual must be \[2, 32\]"):
        native.linear(zeros(2, 64), weight, residual=zeros(2, 31))
    with pytest.raises(TypeError, match="bias must be float32"):
        native.linear(zeros(2, 64), weight, bias=np.zeros(32, BF16))
    with pytest.raises(ValueError, match=r"bias must be a contiguous \[32\]"):
        native.linear(zeros(2, 64), weight, bias=zeros(31))
    with pytest.raises(ValueError, match="avx9"):
        native.set_isa("avx9")
