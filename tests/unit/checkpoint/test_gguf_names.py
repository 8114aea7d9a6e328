"""GGUF tensor names against gguf's own table, and which tensors have their rows reordered."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from tests.checkpoints import tiny_config
from thinslice.checkpoint.index import TensorEntry
from thinslice.checkpoint.names import expected_tensors, from_gguf_names
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.shape_from_config import shape_from_config

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}


def renamed(names: list[str], shape: ModelShape) -> dict[str, TensorEntry]:
    entries = {name: TensorEntry(name, Path("model.gguf"), "F32", (1,), 0, 4) for name in names}
    return from_gguf_names(entries, shape)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_name_of_a_model(architecture: str) -> None:
    shape = replace(
        shape_from_config(tiny_config(architecture, num_hidden_layers=11)),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )
    table = gguf.get_tensor_name_map(ARCHITECTURES[architecture], 11)
    names = list(expected_tensors(shape))
    gguf_names = [table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names]
    entries = renamed(gguf_names, shape)
    assert list(entries) == names
    assert [entry.name for entry in entries.values()] == names


def test_rows_are_reordered_in_q_and_k_of_llama_only() -> None:
    names = [f"blk.1.attn_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")]
    names += ["blk.1.attn_q_norm.weight", "blk.1.attn_k_norm.weight", "blk.1.attn_output.weight"]
    llama = renamed(names, shape_from_config(tiny_config("LlamaForCausalLM")))
    heads = {name: entry.rotary_heads for name, entry in llama.items() if entry.rotary_heads}
    prefix = "model.layers.1.self_attn"
    assert heads == {
        f"{prefix}.q_proj.weight": 4,
        f"{prefix}.q_proj.bias": 4,
        f"{prefix}.k_proj.weight": 2,
        f"{prefix}.k_proj.bias": 2,
    }
    for architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        others = renamed(names, shape_from_config(tiny_config(architecture)))
        assert not any(entry.rotary_heads for entry in others.values())


def test_rotary_factors_are_left_out_and_unknown_names_marked() -> None:
    shape = shape_from_config(tiny_config())
    unknown = ["blk.0.ffn_gate_exps.weight", "blk.01.attn_q.weight", "model.norm.weight", "blk.0"]
    entries = renamed(["rope_freqs.weight", *unknown], shape)
    assert list(entries) == [f"gguf:{name}" for name in unknown]
