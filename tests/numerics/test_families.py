"""Tiny random checkpoints of every family against transformers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.engines import engine_of, greedy, logits_of
from tests.numerics.exactness import Reference
from thinslice.checkpoint.open import open_checkpoint

SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    # Wide enough that every layer moves the logits well above rounding.
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-biased": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 24}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen2-yarn": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": YARN}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24}),
    "qwen3-yarn": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}},
    ),
}


def make_reference(family: str) -> PreTrainedModel:
    model_class, config_class, extra = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(config_class(**{**SIZES, **extra})).float().eval()
    for name, parameter in model.named_parameters():
        # Norms and biases start as ones and zeros, which would hide a missing one.
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def reference_greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, use_cache=True
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    reference = make_reference(family)
    reference.save_pretrained(tmp_path)
    engine = engine_of(open_checkpoint(tmp_path), dtype="float32")
    prompt = torch.randint(0, SIZES["vocab_size"], (70,)).tolist()

    Reference(reference).check((prompt, logits_of(engine, prompt)))
    assert greedy(engine, prompt, 32) == reference_greedy(reference, prompt, 32)


def test_mimo_equals_qwen2_of_the_same_weights(tmp_path: Path) -> None:
    """MiMo's main model is Qwen2's block; only names, epsilon and the MTP layer differ."""
    reference = make_reference("qwen2")
    reference.save_pretrained(tmp_path)
    config_path = tmp_path / "config.json"
    config = json.loads(config_path.read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True}
    config_path.write_text(json.dumps(config))
    engine = engine_of(open_checkpoint(tmp_path), dtype="float32")
    prompt = torch.randint(0, SIZES["vocab_size"], (40,)).tolist()

    Reference(reference).check((prompt, logits_of(engine, prompt)))


def test_a_planted_fault_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails when K and V are swapped."""
    reference = make_reference("llama")
    reference.save_pretrained(tmp_path)
    engine = engine_of(open_checkpoint(tmp_path), dtype="float32")
    prompt = torch.randint(0, SIZES["vocab_size"], (40,)).tolist()
    weights = engine.runner.weights
    weights.fused = None
    weights.layers = tuple(
        replace(layer, key=layer.value, value=layer.key) for layer in weights.layers
    )

    with pytest.raises(AssertionError):
        Reference(reference).check((prompt, logits_of(engine, prompt)))
