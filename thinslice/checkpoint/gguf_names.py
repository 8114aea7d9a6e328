"""From the tensor names of a GGUF to those of Hugging Face checkpoints, for the dense family.

Source: gguf-py/gguf/tensor_mapping.py and conversion/llama.py in ggml-org/llama.cpp.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from thinslice.checkpoint.index import TensorEntry
from thinslice.plan.model_shape import ModelShape

ROPE_FACTORS = "rope_freqs.weight"

_OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)", re.ASCII)


def to_checkpoint_names(
    tensors: Mapping[str, TensorEntry], shape: ModelShape
) -> dict[str, TensorEntry]:
    """Rename a GGUF's tensors, and mark those whose rows llama.cpp reordered.

    The rotary factors are left out, for they are part of the shape. A name without a counterpart
    is kept as ``gguf:NAME``, which the name check reports as unexpected.
    """
    renamed = {}
    for gguf_name, entry in tensors.items():
        if gguf_name != ROPE_FACTORS:
            name = _checkpoint_name(gguf_name)
            heads = _rotary_heads(name, shape)
            renamed[name] = replace(entry, name=name, rotary_heads=heads)
    return renamed


def _checkpoint_name(gguf_name: str) -> str:
    match = _LAYER_NAME.fullmatch(gguf_name)
    if match is not None and match[2] in _IN_LAYER:
        return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
    return _OUTSIDE_LAYERS.get(gguf_name, f"gguf:{gguf_name}")


def _rotary_heads(name: str, shape: ModelShape) -> int:
    """Heads of a q or k tensor that llama.cpp permuted, which it does for Llama only."""
    if shape.architecture != "LlamaForCausalLM":
        return 0
    if ".self_attn.q_proj." in name:
        return shape.num_attention_heads
    return shape.num_key_value_heads if ".self_attn.k_proj." in name else 0
