"""All layers in one call give the bits of one operator after the other."""

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
from thinslice.kernels.packed import PackedWeight
from thinslice.model.batch import TokenRun, pack
from thinslice.model.decoder import LayerContext, Linear
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
    decoder = engine.runner.decoder
    assert decoder.stack is not None
    logits, tokens = logits_of(engine, PROMPT), greedy(engine, PROMPT, 12)
    decoder.stack = None
    assert torch.equal(logits_of(engine, PROMPT), logits)
    assert greedy(engine, PROMPT, 12) == tokens


def test_a_planted_fault_is_seen(tmp_path: Path) -> None:
    engine = packed_engine(tmp_path, "LlamaForCausalLM", "Q4_1")
    decoder = engine.runner.decoder
    logits = logits_of(engine, PROMPT)
    decoder.stack = None
    decoder.model.layers[1].mlp.down_proj.slices = lambda: iter([])
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
    decoder, layer = engine.drafting.mtp.decoder, engine.drafting.mtp.layers[0]
    torch.manual_seed(2)
    hidden, token = torch.randn(2, 7, decoder.shape.hidden_size)
    # The first rows attend to positions that nothing was written to.
    for cache in (engine.drafting.mtp.caches[0].k, engine.drafting.mtp.caches[0].v):
        cache.zero_()
    batch = pack([TokenRun(range(5), 3, [1]), TokenRun(range(2), 0, [2])], 16)
    context = LayerContext(
        batch, *decoder.rotary.tables(batch.positions_T), engine.drafting.mtp.caches[0]
    )
    assert layer.stack is not None
    fused = layer.predict(hidden, token, context)
    layer.stack = None
    assert torch.equal(layer.predict(hidden, token, context), fused)
    # The planted fault: the two halves the other way round.
    assert not torch.equal(layer.predict(token, hidden, context), fused)


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
        for name, module in engine.runner.decoder.named_modules():
            if isinstance(module, Linear) and module.slices is not None:
                kinds = {
                    rows.is_wide for *_, rows in module.slices() if isinstance(rows, PackedWeight)
                }
                assert len(kinds) == 1, name
                wide |= {name.split(".")[-1]} if kinds == {True} else set()
        every = {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        expected = {"k_proj", "v_proj"} if ggml_type == "Q4_1" else {"k_proj", "v_proj"} | every
        assert wide - {"lm_head"} == expected
