"""Paged attention against fp64, and against itself in other company."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinslice.kernels import native
from thinslice.kernels.native_attention import attention, write_kv
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch

pytestmark = pytest.mark.usefixtures("kernels")


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of one attention."""

    heads: int
    kv_heads: int
    dim: int
    block_size: int


SMALL = Shape(heads=6, kv_heads=2, dim=32, block_size=16)
SHAPES = [SMALL, Shape(9, 3, 64, 16), Shape(8, 2, 128, 32), Shape(2, 2, 80, 5)]


class Scene:
    """Some sequences in a cache with shuffled blocks; the unused positions hold NaN."""

    def __init__(self, shape: Shape, contexts: list[int], dtype: torch.dtype, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        self.shape, self.contexts = shape, contexts
        sizes = [-(-context // shape.block_size) for context in contexts]
        order = torch.randperm(sum(sizes) + 1, generator=rng).to(torch.int32)
        self.tables = torch.full((len(contexts), max(sizes)), -1, dtype=torch.int32)
        for i, size in enumerate(sizes):
            self.tables[i, :size] = order[sum(sizes[:i]) : sum(sizes[: i + 1])]
        room = (sum(sizes) + 1, shape.kv_heads, shape.block_size, shape.dim)
        if dtype == torch.int8:
            scales = [torch.zeros(room[:3], dtype=torch.float16) for _ in range(2)]
            empty = [torch.zeros(room, dtype=torch.int8) for _ in range(2)]
            self.cache = PagedKv(*empty, *scales)
        else:
            self.cache = PagedKv(*(torch.full(room, torch.nan, dtype=dtype) for _ in range(2)))
        self.q, self.k, self.v = [], [], []
        for i, context in enumerate(contexts):
            self.q.append(torch.randn(context, shape.heads, shape.dim, generator=rng))
            self.k.append(torch.randn(context, shape.kv_heads, shape.dim, generator=rng))
            self.v.append(torch.randn(context, shape.kv_heads, shape.dim, generator=rng))
            write_kv(self.k[i], self.v[i], self.cache, self.slots(i, range(context)))

    def slots(self, sequence: int, positions: range) -> torch.Tensor:
        size = self.shape.block_size
        table = self.tables[sequence]
        return torch.tensor([int(table[p // size]) * size + p % size for p in positions])

    def run(self, new_tokens: list[int], *, window: int = 0, cut: int = 0) -> torch.Tensor:
        """The last new_tokens[i] of each sequence, all contexts shortened by `cut`."""
        ends = [context - cut for context in self.contexts]
        q = torch.cat([s[e - n : e] for s, e, n in zip(self.q, ends, new_tokens, strict=True)])
        starts = torch.tensor([0, *new_tokens]).cumsum(0).to(torch.int32)
        batch = SequenceBatch(starts, torch.tensor(ends, dtype=torch.int32), self.tables)
        return attention(q, self.cache, batch, scale=self.shape.dim**-0.5, window=window)

    def cached(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [S, K, H] as the cache holds them, fp32."""
        slots = self.slots(sequence, range(self.contexts[sequence]))
        size, rows = self.shape.block_size, []
        for values, scale in (
            (self.cache.k, self.cache.k_scale),
            (self.cache.v, self.cache.v_scale),
        ):
            row = values[slots // size, :, slots % size].to(torch.float32)
            if scale is not None:
                row = row * scale[slots // size, :, slots % size, None].to(torch.float32)
            rows.append(row)
        return rows[0], rows[1]

    def plain(self, sequence: int, dtype: torch.dtype, window: int = 0) -> torch.Tensor:
        """All tokens of one sequence, the textbook way."""
        k, v = (t.to(dtype) for t in self.cached(sequence))
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        q = self.q[sequence].to(dtype)
        scores = torch.einsum("tnh,snh->nts", q, k) * self.shape.dim**-0.5
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (distance < 0) | ((distance >= window) if window else torch.tensor(False))
        p = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=2)
        return torch.einsum("nts,snh->tnh", p, v)


def rms(x: torch.Tensor) -> float:
    return float(x.to(torch.float64).square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 1, 50, 100])
def test_attention_is_as_exact_as_torch(shape: Shape, dtype: torch.dtype, window: int) -> None:
    """At most twice the error of torch's fp32 on the same cache, on every instruction set."""
    scene = Scene(shape, [150], dtype)
    exact = scene.plain(0, torch.float64, window)
    theirs = rms(scene.plain(0, torch.float32, window) - exact)
    results = []
    for isa in native.available_isas():
        native.set_isa(isa)
        results.append(scene.run([150], window=window))
    assert rms(results[0] - exact) <= 2 * theirs + 1e-12
    for result in results[1:]:
        assert torch.equal(result, results[0])


@settings(max_examples=25, deadline=None)
@given(
    contexts=st.lists(st.integers(1, 140), min_size=1, max_size=4),
    share=st.floats(0.0, 1.0),
    window=st.sampled_from([0, 40]),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_token_does_not_depend_on_its_company(
    contexts: list[int], share: float, window: int, threads: int, dtype: torch.dtype
) -> None:
    """Any split into cached and new tokens, any neighbours, any threads: the same bits."""
    scene = Scene(SMALL, contexts, dtype)
    native.set_num_threads(threads)
    whole = scene.run(contexts, window=window).split(contexts)
    new_tokens = [max(1, round(share * context)) for context in contexts]
    later = scene.run(new_tokens, window=window).split(new_tokens)
    for all_rows, last_rows, count in zip(whole, later, new_tokens, strict=True):
        assert torch.equal(all_rows[-count:], last_rows)


def test_decoding_equals_prefill() -> None:
    scene = Scene(SHAPES[1], [130], torch.bfloat16)
    whole = scene.run([130])
    for cut in (0, 1, 2, 65, 66, 67, 129):
        assert torch.equal(scene.run([1], cut=cut)[0], whole[129 - cut])


@pytest.mark.parametrize("fault", ["swap", "last", "block"])
def test_planted_fault_is_seen(fault: str) -> None:
    scene = Scene(SMALL, [100], torch.float32)
    exact = scene.plain(0, torch.float64)
    k, v, tables = scene.cache.k, scene.cache.v, scene.tables
    if fault == "swap":
        scene.cache = PagedKv(v, k)
    elif fault == "last":
        v[tables[0, -1], :, 99 % SMALL.block_size] = 0.0
    else:
        tables[0, :2] = tables[0, :2].flip(0)
    error = (scene.run([100]) - exact).abs().amax(dim=(1, 2))
    assert float(error.max()) > 1e-3


def test_window_needs_only_its_blocks() -> None:
    scene = Scene(SMALL, [100], torch.float32)
    before = scene.run([4], window=20)
    scene.tables[0, :4] = -1
    assert torch.equal(scene.run([4], window=20), before)


def test_int8_cache_keeps_seven_bits() -> None:
    scene = Scene(SMALL, [50], torch.int8)
    for kept, given_rows in zip(scene.cached(0), (scene.k[0], scene.v[0]), strict=True):
        half_step = given_rows.abs().amax(2, keepdim=True) / 127 / 2
        # The fp16 scale may be 2**-11 too small, which cuts 127 * 2**-11 steps off the largest.
        assert ((kept - given_rows).abs() <= half_step * 1.13).all()


def test_bf16_queries() -> None:
    scene = Scene(SMALL, [70], torch.bfloat16)
    scene.q[0] = scene.q[0].to(torch.bfloat16)
    out = scene.run([70])
    wide = Scene(SMALL, [70], torch.bfloat16)
    wide.q[0] = scene.q[0].to(torch.float32)
    assert torch.equal(out, wide.run([70]).to(torch.bfloat16))


def test_refusals() -> None:
    scene = Scene(SMALL, [40], torch.float32)
    q = torch.zeros(2, 6, 32)

    def run(starts: list[int], context: int, tables: torch.Tensor) -> None:
        batch = SequenceBatch(
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([context], dtype=torch.int32),
            tables,
        )
        attention(q, scene.cache, batch, scale=1.0)

    with pytest.raises(ValueError, match="block -1 is outside"):
        run([0, 2], 40, torch.full_like(scene.tables, -1))
    with pytest.raises(ValueError, match="needs 4 blocks"):
        run([0, 2], 49, scene.tables)
    with pytest.raises(ValueError, match="2 new tokens in a context of 1"):
        run([0, 2], 1, scene.tables)
    with pytest.raises(ValueError, match="number of tokens"):
        run([0, 1], 40, scene.tables)
    with pytest.raises(ValueError, match="slot 999 is outside"):
        write_kv(q[:1, :2], q[:1, :2], scene.cache, torch.tensor([999]))
    with pytest.raises(ValueError, match="needs scales"):
        PagedKv(torch.zeros(1, 1, 1, 16).to(torch.int8), torch.zeros(1, 1, 1, 16).to(torch.int8))
