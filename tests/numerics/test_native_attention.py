"""Paged attention against fp64, and against itself in other company."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.arrays import array_of, tensor_of, to_float32
from thinslice.kernels import native
from thinslice.kernels.arrays import BF16
from thinslice.kernels.native import attention, write_kv
from thinslice.kernels.native_pack import converted
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch

Floats = NDArray[np.float32]
pytestmark = pytest.mark.usefixtures("kernels")


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of one attention."""

    heads: int
    kv_heads: int
    dim: int
    block_size: int


SMALL = Shape(heads=6, kv_heads=2, dim=32, block_size=16)
ODD = Shape(heads=6, kv_heads=3, dim=20, block_size=16)
SHAPES = [
    SMALL,
    Shape(9, 3, 64, 16),
    Shape(8, 2, 128, 32),
    Shape(2, 2, 80, 5),
    Shape(4, 2, 8, 16),
    ODD,
    Shape(4, 1, 100, 7),
    Shape(4, 2, 15, 5),
]
FLOAT32, INT8 = np.dtype(np.float32), np.dtype(np.int8)
CACHES = [FLOAT32, BF16, INT8]


class Scene:
    """Some sequences in a cache with shuffled blocks; the unused positions hold NaN."""

    def __init__(self, shape: Shape, contexts: list[int], dtype: np.dtype, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.shape, self.contexts = shape, contexts
        sizes = [-(-context // shape.block_size) for context in contexts]
        order = rng.permutation(sum(sizes) + 1).astype(np.int32)
        self.tables = np.full((len(contexts), max(sizes)), -1, np.int32)
        for i, size in enumerate(sizes):
            self.tables[i, :size] = order[sum(sizes[:i]) : sum(sizes[: i + 1])]
        room = (sum(sizes) + 1, shape.kv_heads, shape.block_size, shape.dim)
        if dtype == INT8:
            scales = np.zeros((2, *room[:3]), np.float16)
            self.cache = PagedKv(*np.zeros((2, *room), dtype), *scales)
        else:
            self.cache = PagedKv(*converted(np.full((2, *room), np.nan, np.float32), dtype))
        self.q, self.k, self.v = [], [], []
        for i, context in enumerate(contexts):
            self.q.append(rng.standard_normal((context, shape.heads, shape.dim), np.float32))
            self.k.append(rng.standard_normal((context, shape.kv_heads, shape.dim), np.float32))
            self.v.append(rng.standard_normal((context, shape.kv_heads, shape.dim), np.float32))
            write_kv(self.k[i], self.v[i], self.cache, self.slots(i, range(context)))

    def slots(self, sequence: int, positions: range) -> NDArray[np.int64]:
        size = self.shape.block_size
        table = self.tables[sequence]
        return np.array([int(table[p // size]) * size + p % size for p in positions])

    def run(self, new_tokens: list[int], *, window: int = 0, cut: int = 0) -> Floats:
        """The last new_tokens[i] of each sequence, all contexts shortened by `cut`."""
        ends = [context - cut for context in self.contexts]
        own = [s[e - n : e] for s, e, n in zip(self.q, ends, new_tokens, strict=True)]
        q, starts = np.concatenate(own), np.cumsum([0, *new_tokens]).astype(np.int32)
        batch = SequenceBatch(starts, np.array(ends, np.int32), self.tables)
        return attention(q, self.cache, batch, scale=self.shape.dim**-0.5, window=window)

    def cached(self, sequence: int) -> tuple[Floats, Floats]:
        """K and V [S, K, H] as the cache holds them, fp32."""
        slots = self.slots(sequence, range(self.contexts[sequence]))
        size, rows = self.shape.block_size, []
        for values, scale in (
            (self.cache.k, self.cache.k_scale),
            (self.cache.v, self.cache.v_scale),
        ):
            row = to_float32(values[slots // size, :, slots % size])
            if scale is not None:
                row = row * scale[slots // size, :, slots % size, None].astype(np.float32)
            rows.append(row)
        return rows[0], rows[1]

    def plain(self, sequence: int, dtype: torch.dtype, window: int = 0) -> torch.Tensor:
        """All tokens of one sequence, the textbook way."""
        k, v = (tensor_of(one).to(dtype) for one in self.cached(sequence))
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        q = tensor_of(self.q[sequence]).to(dtype)
        scores = torch.einsum("tnh,snh->nts", q, k) * self.shape.dim**-0.5
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (distance < 0) | ((distance >= window) if window else torch.tensor(False))
        p = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=2)
        return torch.einsum("nts,snh->tnh", p, v)


def rms(x: torch.Tensor) -> float:
    return float(x.to(torch.float64).square().mean().sqrt())


@pytest.mark.parametrize("dtype", CACHES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 1, 50, 100])
def test_attention_is_as_exact_as_torch(shape: Shape, dtype: np.dtype, window: int) -> None:
    """At most twice the error of torch's fp32 on the same cache, on every instruction set."""
    scene = Scene(shape, [150], dtype)
    exact = scene.plain(0, torch.float64, window)
    theirs = rms(scene.plain(0, torch.float32, window) - exact)
    results = []
    for isa in native.available_isas():
        native.set_isa(isa)
        results.append(scene.run([150], window=window))
    assert rms(tensor_of(results[0]) - exact) <= 2 * theirs + 1e-12
    for result in results[1:]:
        assert np.array_equal(result, results[0])


@settings(max_examples=25, deadline=None)
@given(
    contexts=st.lists(st.integers(1, 140), min_size=1, max_size=4),
    share=st.floats(0.0, 1.0),
    window=st.sampled_from([0, 40]),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(CACHES),
    shape=st.sampled_from([SMALL, ODD]),
)
def test_token_does_not_depend_on_its_company(
    contexts: list[int],
    share: float,
    window: int,
    threads: int,
    dtype: np.dtype,
    shape: Shape,
) -> None:
    """Any split into cached and new tokens, any neighbours, any threads: the same bits."""
    scene = Scene(shape, contexts, dtype)
    native.set_num_threads(threads)
    new_tokens = [max(1, round(share * context)) for context in contexts]
    whole, later = (
        np.split(scene.run(counts, window=window), np.cumsum(counts)[:-1])
        for counts in (contexts, new_tokens)
    )
    for all_rows, last_rows, count in zip(whole, later, new_tokens, strict=True):
        assert np.array_equal(all_rows[-count:], last_rows)


@pytest.mark.parametrize("dtype", CACHES, ids=str)
def test_decoding_equals_prefill(dtype: np.dtype) -> None:
    scene = Scene(SHAPES[1], [130], dtype)
    whole = scene.run([130])
    for cut in (0, 1, 2, 65, 66, 67, 129):
        assert np.array_equal(scene.run([1], cut=cut)[0], whole[129 - cut])


@pytest.mark.parametrize("fault", ["swap", "last", "block"])
def test_planted_fault_is_seen(fault: str) -> None:
    scene = Scene(SMALL, [100], FLOAT32)
    exact = scene.plain(0, torch.float64)
    k, v, tables = scene.cache.k, scene.cache.v, scene.tables
    if fault == "swap":
        scene.cache = PagedKv(v, k)
    elif fault == "last":
        v[tables[0, -1], :, 99 % SMALL.block_size] = 0.0
    else:
        tables[0, :2] = tables[0, 1::-1].copy()
    assert float((tensor_of(scene.run([100])) - exact).abs().max()) > 1e-3


def test_window_needs_only_its_blocks() -> None:
    scene = Scene(SMALL, [100], FLOAT32)
    before = scene.run([4], window=20)
    scene.tables[0, :4] = -1
    assert np.array_equal(scene.run([4], window=20), before)


def written(x: Floats, dtype: np.dtype) -> tuple[NDArray[np.generic], NDArray[np.float16]]:
    """What a cache holds of rows [.., H], and their scales, which int8 alone has."""
    scale = (np.abs(x).max(-1) / np.float32(127)).astype(np.float16)
    if dtype == BF16:
        return array_of(tensor_of(x).bfloat16()), scale
    if dtype != INT8:
        return x, scale
    codes = x * (1 / scale.astype(np.float32))[..., None]
    return np.round(codes.clip(-127, 127)).astype(dtype), scale


@pytest.mark.parametrize("dtype", CACHES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_written_where_it_belongs_and_nowhere_else(shape: Shape, dtype: np.dtype) -> None:
    """Each value of a head, the last ones too; the rows beside it keep theirs."""
    room = (3, shape.kv_heads, shape.block_size, shape.dim)
    slots = np.array([shape.block_size + 2, 0])
    x = np.random.default_rng(3).standard_normal((2, 2, *room[1::2]), np.float32)
    for isa in native.available_isas():
        native.set_isa(isa)
        both, scales = np.full((2, *room), 77, dtype), np.full((2, *room[:3]), 77, np.float16)
        expected, expected_scales = both.copy(), scales.copy()
        cache = PagedKv(*both, *(scales if dtype == INT8 else ()))
        write_kv(x[0], x[1], cache, slots)
        for rows, values, factors in zip(x, expected, expected_scales, strict=True):
            for row, slot in zip(rows, slots.tolist(), strict=True):
                at = (slot // shape.block_size, slice(None), slot % shape.block_size)
                values[at], factors[at] = written(row, dtype)
        assert np.array_equal(both, expected)
        assert dtype != INT8 or np.array_equal(scales, expected_scales)


@pytest.mark.parametrize("shape", [SMALL, ODD])
def test_bf16_rounds_as_torch_does(shape: Shape) -> None:
    """Any bits, and those around a tie: overflow, infinities and NaN among them."""
    size = (2, 512, shape.kv_heads, shape.dim)
    bits = np.random.default_rng(5).integers(0, 2**32, size, np.uint32)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001], np.uint32)
    near = bits & np.uint32(0xFFFF0000) | lower[bits % 5]
    for x in (bits.view(np.float32), near.view(np.float32)):
        exact = tensor_of(x).bfloat16()
        for isa in native.available_isas():
            native.set_isa(isa)
            both = np.zeros((2, 512, shape.kv_heads, 1, shape.dim), BF16)
            write_kv(x[0], x[1], PagedKv(*both), np.arange(512))
            found = both[:, :, :, 0]
            is_nan = exact.isnan().numpy()
            assert np.array_equal(found[~is_nan], array_of(exact)[~is_nan])
            assert np.isnan(to_float32(found[is_nan])).all()


@pytest.mark.parametrize("shape", [SMALL, ODD])
def test_int8_cache_keeps_seven_bits(shape: Shape) -> None:
    scene = Scene(shape, [50], INT8)
    for kept, given_rows in zip(scene.cached(0), (scene.k[0], scene.v[0]), strict=True):
        half_step = np.abs(given_rows).max(2, keepdims=True) / 127 / 2
        # The fp16 scale may be 2**-11 too small, which cuts 127 * 2**-11 steps off the largest.
        assert (np.abs(kept - given_rows) <= half_step * 1.13).all()


def test_refusals() -> None:
    scene = Scene(SMALL, [40], FLOAT32)
    q, bits = np.zeros((2, 6, 32), np.float32), np.zeros((2, 6, 32), BF16)

    def run(starts: list[int], context: int, tables: NDArray[np.int32], q: Floats = q) -> None:
        batch = SequenceBatch(np.array(starts, np.int32), np.array([context], np.int32), tables)
        attention(q, scene.cache, batch, scale=1.0)

    with pytest.raises(ValueError, match="block -1 is outside"):
        run([0, 2], 40, np.full_like(scene.tables, -1))
    with pytest.raises(ValueError, match="needs 4 blocks"):
        run([0, 2], 49, scene.tables)
    with pytest.raises(ValueError, match="2 new tokens in a context of 1"):
        run([0, 2], 1, scene.tables)
    with pytest.raises(ValueError, match="number of tokens"):
        run([0, 1], 40, scene.tables)
    with pytest.raises(ValueError, match="slot 999 is outside"):
        write_kv(q[:1, :2], q[:1, :2], scene.cache, np.array([999]))
    with pytest.raises(TypeError, match="k must be float32"):
        write_kv(bits[:1, :2], q[:1, :2], scene.cache, np.array([0]))
    with pytest.raises(TypeError, match="q must be float32"):
        run([0, 2], 40, scene.tables, bits)
    with pytest.raises(ValueError, match="needs scales"):
        _ = PagedKv(*np.zeros((2, 1, 1, 1, 16), np.int8)).addresses
    with pytest.raises(TypeError, match="float32, bfloat16 or int8"):
        _ = PagedKv(*np.zeros((2, 1, 1, 1, 16), np.float16)).addresses
