"""All layers in one call give the bits of one operator after the other."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.checkpoints import GgufOptions, tiny_config, write_gguf_model
from tests.engines import engine_of, greedy, logits_of
from tests.numerics import oracle
from tests.speculation import SMALL_MTP
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import SamplingParams
from thinslice.engine.engine import Engine
from thinslice.engine.load import load_engine
from thinslice.engine.planning import Model
from thinslice.kernels import native
from thinslice.kernels.arrays import BF16
from thinslice.kernels.native import attention, write_kv
from thinslice.kernels.native_pack import converted
from thinslice.kernels.native_stack import fuse
from thinslice.kernels.ops import FeedForwardWeights, LayerWeights, Linear
from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch
from thinslice.model.batch import TokenRun, pack
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan.case import Workload
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.planner import plan
from thinslice.plan.processor import Processor
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.units import GIB

pytestmark = pytest.mark.usefixtures("kernels")

Floats = NDArray[np.float32]
FLOAT32 = np.dtype(np.float32)
PROMPT = [3, 17, 5, 88, 41, 9, 60, 2, 33, 71, 12]
ARCHITECTURES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


# Types of a GGUF, and what they are computed in.
TYPES = [
    ("Q4_0", "int4"),
    ("Q4_1", "int4"),
    ("Q8_0", "int8"),
    ("BF16", "bfloat16"),
    ("F32", "float32"),
    ("F16", "bfloat16"),
]


def tiny(folder: Path, architecture: str, kind: tuple[str, str], **changes: int) -> Engine:
    ggml_type, dtype = kind
    path = folder / "tiny.gguf"
    shape = shape_from_config(tiny_config(architecture, tie_word_embeddings=True, **changes))
    write_gguf_model(path, shape, 7, GgufOptions(dtype=ggml_type))
    return engine_of(open_checkpoint(path), dtype, max_num_seqs=2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", TYPES, ids="-".join)
def test_the_stack_gives_the_bits_of_the_layers(
    architecture: str, kind: tuple[str, str], tmp_path: Path
) -> None:
    engine = tiny(tmp_path, architecture, kind)
    weights = engine.runner.weights
    assert weights.fused is not None
    logits, tokens = logits_of(engine, PROMPT), greedy(engine, PROMPT, 12)
    weights.fused = None
    assert np.array_equal(logits_of(engine, PROMPT), logits)
    assert greedy(engine, PROMPT, 12) == tokens


HEADS, KV_HEADS, SIZE, INNER, ROWS = 8, 2, 96, 160, 19


INT4, INT4M, INT8 = PackedFormat
# Matrices of q, k and v, o, gate and up, down; those that are multiplied with the same rows are all
# packed or of one type.
MATRICES: dict[str, tuple[PackedFormat | np.dtype, ...]] = {
    "packed": (INT4M, INT4, INT8, INT4, INT4M, INT8, INT8),
    "bfloat16": (BF16,) * 7,
    "float32": (FLOAT32,) * 7,
    "mixed": (BF16, BF16, BF16, INT4, FLOAT32, FLOAT32, INT8),
}


def random_layer(kinds: tuple[PackedFormat | np.dtype, ...], dim: int, seed: int) -> LayerWeights:
    """A layer of such matrices, biases at q, k and v, two blocks."""
    rng = np.random.default_rng(seed)
    q, k, v, o, gate, up, down = kinds

    def matrix(kind: PackedFormat | np.dtype, n: int, k: int, has_bias: bool = False) -> Linear:
        bias = rng.standard_normal(n, np.float32) if has_bias else None
        if isinstance(kind, PackedFormat):
            weight = oracle.random_packed(kind, n, k, seed, makes_kv=kind is INT4)
            return Linear.resident(weight, bias)
        numbers = rng.standard_normal((n, k), np.float32) * np.float32(0.2)
        return Linear.resident(converted(numbers, kind), bias)

    def norm(size: int) -> Floats:
        return rng.random(size, np.float32) + np.float32(0.5)

    def block() -> FeedForwardWeights:
        return FeedForwardWeights(
            matrix(gate, INNER, SIZE), matrix(up, INNER, SIZE), matrix(down, SIZE, INNER)
        )

    return LayerWeights(
        input_norm=norm(SIZE),
        query=matrix(q, HEADS * dim, SIZE, True),
        key=matrix(k, KV_HEADS * dim, SIZE, True),
        value=matrix(v, KV_HEADS * dim, SIZE, True),
        output=matrix(o, SIZE, HEADS * dim),
        query_norm=norm(dim),
        key_norm=norm(dim),
        post_attention_norm=norm(SIZE),
        blocks=(block(), block()),
    )


def run_in_parts(
    layer: LayerWeights,
    x_TD: Floats,
    rotary: tuple[Floats, Floats],
    cache: PagedKv,
    slots_T: NDArray[np.int64],
    sequences: SequenceBatch,
    eps: float,
) -> Floats:
    """A layer, one kernel after the other."""

    def times(x: Floats, matrix: Linear, out: Floats | None = None) -> Floats:
        assert matrix.whole is not None
        return native.linear(x, matrix.whole, bias=matrix.bias, residual=out, out=out)

    dim = cache.k.shape[3]
    normed = native.rms_norm(x_TD, layer.input_norm, eps)
    q, k, v = (times(normed, m) for m in (layer.query, layer.key, layer.value))
    heads = []
    for rows, norm in ((q, layer.query_norm), (k, layer.key_norm)):
        assert norm is not None
        by_heads = native.rms_norm(rows.reshape(-1, dim), norm, eps).reshape(ROWS, -1, dim)
        heads.append(native.rope_(by_heads, np.arange(ROWS), *rotary))
    write_kv(heads[1], v.reshape(ROWS, -1, dim), cache, slots_T)
    attended = attention(heads[0], cache, sequences, scale=dim**-0.5)
    x_TD = times(attended.reshape(ROWS, -1), layer.output, x_TD)
    normed = native.rms_norm(x_TD, layer.post_attention_norm, eps)
    for block in layer.blocks:
        inner = native.silu_mul(times(normed, block.gate), times(normed, block.up))
        x_TD = times(inner, block.down, x_TD)
    return x_TD


@pytest.mark.parametrize("dim", [8, 20, 64, 80, 100])
@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=str)
@pytest.mark.parametrize("matrices", MATRICES)
def test_the_stack_gives_the_bits_of_the_kernels(dim: int, dtype: np.dtype, matrices: str) -> None:
    """Two layers of matrices of several formats, heads of any size."""
    shape = ModelShape(
        architecture="Qwen3ForCausalLM",
        vocab_size=1,
        hidden_size=SIZE,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=dim,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=ROWS,
    )
    layers = [random_layer(MATRICES[matrices], dim, seed) for seed in range(2)]
    caches = [PagedKv(*np.zeros((2, 2, KV_HEADS, 16, dim), dtype)) for _ in layers]
    x = np.random.default_rng(4).standard_normal((ROWS, SIZE), np.float32)
    angles = np.arange(ROWS)[:, None] / 10000 ** (np.arange(dim // 2) / (dim // 2))
    rotary = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    ints = ([0, ROWS], [ROWS], [[1, 0]])
    sequences = SequenceBatch(*(np.array(values, np.int32) for values in ints))
    slots = (np.arange(ROWS) + 16) % 32
    stack = fuse(shape, layers, caches)
    assert stack is not None
    fused = stack.run(x.copy(), rotary, slots, sequences)
    caches = [PagedKv(*np.zeros((2, 2, KV_HEADS, 16, dim), dtype)) for _ in layers]
    in_parts = x.copy()
    for layer, cache in zip(layers, caches, strict=True):
        in_parts = run_in_parts(layer, in_parts, rotary, cache, slots, sequences, 1e-6)
    assert np.isfinite(fused).all()
    assert np.array_equal(fused, in_parts)


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("other", [INT8, FLOAT32])
def test_packed_and_numbers_at_the_same_rows_are_not_fused(
    place: int, other: PackedFormat | np.dtype
) -> None:
    """Of q, k and v, or of gate and up: one call prepares the rows once for all of them."""
    kinds: list[PackedFormat | np.dtype] = [BF16] * 7
    kinds[place] = other
    shape = shape_from_config(tiny_config(hidden_size=SIZE, intermediate_size=INNER, head_dim=20))
    cache = PagedKv(*np.zeros((2, 2, KV_HEADS, 16, 20), np.float32))
    shape = replace(shape, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    stack = fuse(shape, [random_layer(tuple(kinds), 20, 0)], [cache])
    assert (stack is None) == (place not in (3, 6))


@pytest.mark.parametrize("kind", [("Q4_1", "int4"), ("BF16", "bfloat16")], ids="-".join)
def test_a_planted_fault_is_seen(kind: tuple[str, str], tmp_path: Path) -> None:
    engine = tiny(tmp_path, "LlamaForCausalLM", kind)
    weights = engine.runner.weights
    logits = logits_of(engine, PROMPT)
    weights.fused = None
    first, second = weights.layers
    (block,) = second.blocks
    nothing = replace(block, down=replace(block.down, slices=lambda: ()))
    weights.layers = (first, replace(second, blocks=(nothing,)))
    assert not np.array_equal(logits_of(engine, PROMPT), logits)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_a_prediction_layer_in_one_call_gives_the_bits_of_its_parts(
    dtype: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(SMALL_MTP)
    if dtype == "int8":
        pack_model(checkpoint, tmp_path / "int8", PackOptions(INT8, "a"))
        checkpoint = open_checkpoint(tmp_path / "int8")
    workload = Workload(64, 2, dtype, draft="mtp")
    layout = Model.of(checkpoint).layout(dtype)
    engine = load_engine(
        checkpoint, plan(checkpoint.shape, layout, workload, Processor.of(GIB, 0)), frozenset()
    )
    assert engine.drafting is not None
    assert engine.drafting.mtp is not None
    weights, layer = engine.runner.weights, engine.drafting.mtp.layers[0]
    size = (2, 7, weights.shape.hidden_size)
    hidden, token = np.random.default_rng(2).standard_normal(size, np.float32)
    # The first rows attend to positions that nothing was written to.
    for cache in (layer.kv_cache.k, layer.kv_cache.v):
        cache.fill(0)
    batch = pack([TokenRun(range(5), 3, [1]), TokenRun(range(2), 0, [2])], 16)
    assert weights.fused_predictions[0] is not None
    fused = layer.predict(hidden, token, batch)
    weights.fused_predictions = [None]
    assert np.array_equal(layer.predict(hidden, token, batch), fused)
    # The planted fault: the two halves the other way round.
    assert not np.array_equal(layer.predict(token, hidden, batch), fused)


@pytest.mark.parametrize("sizes", [{}, {"num_attention_heads": 8, "head_dim": 20}])
@pytest.mark.parametrize("kind", TYPES, ids="-".join)
def test_a_row_has_the_same_bits_alone_and_in_company(
    kind: tuple[str, str], sizes: dict[str, int], tmp_path: Path
) -> None:
    """A prompt in one chunk, in chunks of three and token by token; beside another; any threads."""
    engine = tiny(tmp_path, "Qwen2ForCausalLM", kind, **sizes)
    assert engine.runner.weights.fused is not None
    expected = greedy(engine, PROMPT, 12)
    scores = [*engine.score(PROMPT, 1, num_top=3)]
    for chunk, threads in ((1, 1), (3, 2), (16, 3)):
        native.set_num_threads(threads)
        engine.scheduler.chunk = chunk
        assert greedy(engine, PROMPT, 12) == expected
        # Log-probabilities show every bit of the logits.
        assert [*engine.score(PROMPT, 1, num_top=3)] == scores
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        company = [engine.add_request(one, params) for one in (PROMPT, PROMPT[3:])]
        while engine.has_work:
            engine.step()
        assert company[0].completion_token_ids == expected


def test_what_a_model_rounds_to_16_bits(tmp_path: Path) -> None:
    """Products with int8 weights, and those that make K and V."""
    for ggml_type, dtype in (("Q4_1", "int4"), ("Q8_0", "int8")):
        engine = tiny(tmp_path, "LlamaForCausalLM", (ggml_type, dtype))
        wide = set()
        for layer in engine.runner.weights.layers:
            for part in (layer, *layer.blocks):
                for name in (field.name for field in fields(part)):
                    linear = getattr(part, name)
                    if isinstance(linear, Linear):
                        kinds = {
                            rows.is_wide
                            for *_, rows in linear.slices()
                            if isinstance(rows, PackedWeight)
                        }
                        assert len(kinds) == 1, name
                        wide |= {name} if kinds == {True} else set()
        every = {"query", "output", "gate", "up", "down"}
        assert wide == {"key", "value"} | (set() if ggml_type == "Q4_1" else every)
