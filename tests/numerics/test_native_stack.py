"""All layers in one call give the bits of one operator after the other."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from tests.checkpoints import GgufOptions, tiny_config, write_gguf_model
from tests.engines import engine_of, greedy, logits_of
from tests.speculation import SMALL_MTP
from thinslice.checkpoint.open import open_checkpoint
from thinslice.engine.engine import Engine
from thinslice.engine.load import load_engine
from thinslice.engine.planning import Model, checkpoint_dtype
from thinslice.kernels import native
from thinslice.kernels.ops import Linear
from thinslice.kernels.packed import PackedWeight
from thinslice.model.batch import TokenRun, pack
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan.case import Workload
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.planner import plan
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.units import GIB

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the kernels are not built")

PROMPT = [3, 17, 5, 88, 41, 9, 60, 2, 33, 71, 12]
ARCHITECTURES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


def packed_engine(folder: Path, architecture: str, ggml_type: str) -> Engine:
    path = folder / "tiny.gguf"
    shape = shape_from_config(tiny_config(architecture, tie_word_embeddings=True))
    write_gguf_model(path, shape, 7, GgufOptions(dtype=ggml_type))
    checkpoint = open_checkpoint(path)
    return engine_of(checkpoint, checkpoint_dtype(checkpoint), max_num_seqs=2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("ggml_type", ["Q4_0", "Q4_1", "Q8_0"])
def test_the_stack_gives_the_bits_of_the_layers(
    architecture: str, ggml_type: str, tmp_path: Path
) -> None:
    engine = packed_engine(tmp_path, architecture, ggml_type)
    weights = engine.runner.weights
    assert weights.fused is not None
    logits, tokens = logits_of(engine, PROMPT), greedy(engine, PROMPT, 12)
    weights.fused = None
    assert torch.equal(logits_of(engine, PROMPT), logits)
    assert greedy(engine, PROMPT, 12) == tokens


def test_a_planted_fault_is_seen(tmp_path: Path) -> None:
    engine = packed_engine(tmp_path, "LlamaForCausalLM", "Q4_1")
    weights = engine.runner.weights
    logits = logits_of(engine, PROMPT)
    weights.fused = None
    first, second = weights.layers
    (block,) = second.blocks
    nothing = replace(block, down=replace(block.down, slices=lambda: ()))
    weights.layers = (first, replace(second, blocks=(nothing,)))
    assert not torch.equal(logits_of(engine, PROMPT), logits)


@torch.inference_mode()
def test_a_prediction_layer_in_one_call_gives_the_bits_of_its_parts(tmp_path: Path) -> None:
    pack_model(open_checkpoint(SMALL_MTP), tmp_path / "int8", PackOptions(PackedFormat.INT8, "a"))
    checkpoint = open_checkpoint(tmp_path / "int8")
    workload = Workload(64, 2, "int8", draft="mtp")
    layout = Model.of(checkpoint).layout("int8")
    engine = load_engine(checkpoint, plan(checkpoint.shape, layout, GIB, workload, 0), frozenset())
    assert engine.drafting is not None
    assert engine.drafting.mtp is not None
    weights, layer = engine.runner.weights, engine.drafting.mtp.layers[0]
    torch.manual_seed(2)
    hidden, token = torch.randn(2, 7, weights.shape.hidden_size)
    # The first rows attend to positions that nothing was written to.
    for cache in (layer.kv_cache.k, layer.kv_cache.v):
        cache.zero_()
    batch = pack([TokenRun(range(5), 3, [1]), TokenRun(range(2), 0, [2])], 16)
    assert weights.fused_predictions[0] is not None
    fused = layer.predict(hidden, token, batch)
    weights.fused_predictions = [None]
    assert torch.equal(layer.predict(hidden, token, batch), fused)
    # The planted fault: the two halves the other way round.
    assert not torch.equal(layer.predict(token, hidden, batch), fused)


def test_a_row_has_the_same_bits_alone_and_in_company(tmp_path: Path) -> None:
    """A prompt in one chunk, in chunks of three and token by token."""
    engine = packed_engine(tmp_path, "Qwen2ForCausalLM", "Q4_0")
    expected = greedy(engine, PROMPT, 12)
    for chunk in (1, 3, 16):
        engine.scheduler.chunk = chunk
        assert greedy(engine, PROMPT, 12) == expected


def test_what_a_model_rounds_to_16_bits(tmp_path: Path) -> None:
    """Products with int8 weights, and those that make K and V."""
    for ggml_type in ("Q4_1", "Q8_0"):
        engine = packed_engine(tmp_path, "LlamaForCausalLM", ggml_type)
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
