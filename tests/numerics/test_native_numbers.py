"""Products with rows of float32 and bfloat16 against exact emulation, and in other company."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.arrays import to_float32
from tests.numerics import oracle
from thinslice.kernels import native
from thinslice.kernels.arrays import BF16, FLOAT_DTYPES
from thinslice.kernels.native_pack import converted

pytestmark = pytest.mark.usefixtures("kernels")

Floats = NDArray[np.float32]
DTYPES = [*FLOAT_DTYPES]
# Rows and columns: none, some and all of the columns fill whole steps of 32, and rows panels of 16.
SHAPES = [(16, 32), (1, 1), (17, 20), (50, 31), (33, 72), (16, 75), (7, 576), (37, 1000), (3, 1536)]
COUNTS = [*range(1, 14), 64, 300]


def matrix(n: int, k: int, dtype: str, seed: int = 0) -> NDArray[np.generic]:
    """Weights of every size, so that the order of their sums shows."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k), np.float32) * np.exp2(rng.integers(-6, 7, (n, k)))
    return converted(weight.astype(np.float32), FLOAT_DTYPES[dtype])


def rows(count: int, k: int, seed: int = 0) -> Floats:
    """Activations with outliers and zeros of either sign."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, k), np.float32)
    x[:, ::7] *= 30.0
    x[:, 3::11] = 0.0
    x[:, 5::11] = -0.0
    return x


def same_bits(a: Floats, b: Floats) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def on_every_isa(x: Floats, weight: NDArray[np.generic], expected: Floats) -> None:
    for isa in native.available_isas():
        native.set_isa(isa)
        assert same_bits(native.linear(x, weight), expected), (isa, x.shape, weight.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_isa_equals_exact_emulation(dtype: str, n: int, k: int) -> None:
    weight = matrix(n, k, dtype, seed=k)
    for count in COUNTS:
        x = rows(count, k, seed=count)
        on_every_isa(x, weight, oracle.linear_numbers(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_emulation_is_the_matrix_product(dtype: str) -> None:
    """The emulation itself: within the roundings of its sums of the fp64 product."""
    weight, x = matrix(64, 1000, dtype), rows(8, 1000)
    dense = to_float32(weight).astype(np.float64)
    exact, sizes = x @ dense.T, np.abs(x) @ np.abs(dense).T
    # 63 roundings in a lane, four of the lanes' sums.
    assert (np.abs(oracle.linear_numbers(x, weight) - exact) <= 67 * 2.0**-24 * sizes).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 1), (2, 18), (15, 31), (8, 64)])
def test_a_swapped_lane_is_found(dtype: str, place: tuple[int, int]) -> None:
    """Two inputs that change places in both factors: the same products in another order."""
    weight, x = matrix(48, 96, dtype), rows(5, 96)
    order = np.arange(96)
    order[[*place]] = order[[*reversed(place)]]
    swapped = native.linear(x[:, order].copy(), weight[:, order].copy())
    assert np.allclose(swapped, oracle.linear_numbers(x, weight), rtol=1e-3, atol=1e-2)
    assert not same_bits(swapped, oracle.linear_numbers(x, weight))


def test_rows_of_one_type_are_not_summed_as_those_of_the_other() -> None:
    """Numbers that both types hold: what is told apart is the order of the sums."""
    x, weight = rows(5, 96), matrix(48, 96, "bfloat16")
    both = oracle.linear_numbers(x, weight), oracle.linear_numbers(x, to_float32(weight))
    assert not same_bits(*both)
    for one, expected in zip((weight, to_float32(weight)), both, strict=True):
        on_every_isa(x, one, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(50, 72), (16, 1000)])
def test_bias_and_residual_and_strided_views(dtype: str, n: int, k: int) -> None:
    """The sum, the bias, then the residual; rows that lie apart, in each of the arrays."""
    rng = np.random.default_rng(6)
    weight, bias = matrix(n, k, dtype), rng.standard_normal(n, np.float32)
    for count in (1, 7, 70):
        wide, room = rows(count, k + 5), rng.standard_normal((count, n + 9), np.float32)
        x, residual = wide[:, 3 : k + 3], rng.standard_normal((count, n + 1), np.float32)[:, 1:]
        plain = oracle.linear_numbers(x, weight)
        for isa in native.available_isas():
            native.set_isa(isa)
            assert same_bits(native.linear(x, weight, bias=bias), plain + bias)
            assert same_bits(native.linear(x, weight, residual=residual), plain + residual)
            used = room.copy()
            out = used[:, 4 : n + 4]
            expected = (plain + bias) + out
            assert native.linear(x, weight, bias=bias, residual=out, out=out) is out
            assert same_bits(out.copy(), expected)
            assert same_bits(used[:, :4].copy(), room[:, :4].copy())
            assert same_bits(used[:, n + 4 :].copy(), room[:, n + 4 :].copy())
            native.linear(x, weight, out=out)
            assert same_bits(out.copy(), plain)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    columns=st.sampled_from([32, 75, 416, 600, 1000]),
    count=st.integers(2, 64),
    first=st.integers(0, 63),
    threads=st.integers(1, 3),
    isa=st.integers(0, 2),
    seed=st.integers(0, 3),
)
def test_row_does_not_depend_on_its_company(
    dtype: str, columns: int, count: int, first: int, threads: int, isa: int, seed: int
) -> None:
    """A row alone, and among others, elsewhere in the batch, on other threads and instructions."""
    weight, x = matrix(88, columns, dtype, seed), rows(count, columns, seed)
    names = native.available_isas()
    native.set_isa(names[0])
    row = first % count
    alone = native.linear(x[row : row + 1], weight)
    native.set_isa(names[isa % len(names)])
    native.set_num_threads(threads)
    assert same_bits(native.linear(x, weight)[row : row + 1], alone)


@pytest.mark.parametrize("chunk", [16, 48, 100, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_a_prompt(chunk: int, dtype: str) -> None:
    """More rows than are put in order at one time, in chunks, on one thread or two."""
    weight, x = matrix(64, 4096, dtype), rows(600, 4096)
    native.set_num_threads(2)
    whole = native.linear(x, weight)
    native.set_num_threads(1)
    parts = [native.linear(x[at : at + chunk], weight) for at in range(0, 600, chunk)]
    assert same_bits(np.concatenate(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_a_matrix(dtype: str) -> None:
    """Any cut gives the columns of the whole, wherever the slice's numbers begin."""
    weight, x = matrix(90, 75, dtype), rows(21, 75)
    whole = native.linear(x, weight)
    for start, stop in ((0, 1), (1, 90), (7, 40), (16, 32), (89, 90)):
        part = native.linear(x, weight[start:stop])
        assert same_bits(part, whole[:, start:stop].copy()), (start, stop)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [4, 20])
def test_what_is_no_number_stays_in_its_row(dtype: str, bad: float, count: int) -> None:
    weight, x = matrix(40, 72, dtype), rows(count, 72)
    clean, row = native.linear(x, weight), count - 2
    for column in (0, 40, 71):
        used = x.copy()
        used[row, column] = bad
        for isa in native.available_isas():
            native.set_isa(isa)
            out = native.linear(used, weight)
            assert not np.isfinite(out[row]).any()
            assert same_bits(np.delete(out, row, 0), np.delete(clean, row, 0))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_no_number_stays_in_its_column(dtype: str, bad: float) -> None:
    """That of the last rows too, beside which a kernel reads the last one again."""
    numbers, x = to_float32(matrix(37, 72, dtype)).copy(), rows(13, 72) + np.float32(0.5)
    clean = native.linear(x, converted(numbers, FLOAT_DTYPES[dtype]))
    for row in (0, 15, 16, 36):
        used = numbers.copy()
        used[row, 71] = bad
        weight = converted(used, FLOAT_DTYPES[dtype])
        for isa in native.available_isas():
            native.set_isa(isa)
            out = native.linear(x, weight)
            assert not np.isfinite(out[:, row]).any()
            assert same_bits(np.delete(out, row, 1), np.delete(clean, row, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_and_the_largest_numbers(dtype: str) -> None:
    """Subnormal products and sums keep every bit; what is too large is an infinity."""
    weight, x = matrix(20, 64, dtype), rows(9, 64)
    for scale in (2.0**-118, 2.0**-130, 2.0**-141):
        small = x * np.float32(scale)
        on_every_isa(small, weight, oracle.linear_numbers(small, weight))
    ones = np.ones((1, 64), np.float32)
    huge = converted(np.full((3, 64), 2.0**127, np.float32), FLOAT_DTYPES[dtype])
    on_every_isa(ones, huge, np.full((1, 3), np.inf, np.float32))
    on_every_isa(-ones, huge, np.full((1, 3), -np.inf, np.float32))


def test_border_refuses_what_the_kernels_cannot_read() -> None:
    x = np.zeros((2, 64), np.float32)
    for kind in (np.float16, np.float64, np.uint8, np.int16):
        with pytest.raises(TypeError, match="packed, float32 or bfloat16"):
            native.linear(x, np.zeros((32, 64), kind))
    for dtype in (np.dtype(np.float32), BF16):
        with pytest.raises(ValueError, match="contiguous"):
            native.linear(x, np.zeros((64, 32), dtype).T)
        with pytest.raises(ValueError, match="contiguous"):
            native.linear(x, np.zeros((32, 128), dtype)[:, :64])
        with pytest.raises(ValueError, match=r"\[rows, columns\]"):
            native.linear(x, np.zeros(64, dtype))
        with pytest.raises(ValueError, match=r"x must be \[2, 63\]"):
            native.linear(x, np.zeros((32, 63), dtype))
    with pytest.raises(TypeError, match="x must be float32"):
        native.linear(np.zeros((2, 64), BF16), np.zeros((32, 64), BF16))
