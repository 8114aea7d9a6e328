"""Read a ModelShape from the metadata and the tensor shapes of a GGUF.

Key names are those of the GGUF specification (ggml-org/ggml, docs/gguf.md) and of llama.cpp's
gguf-py/gguf/constants.py. How llama.cpp reads them is the reference for their meaning.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from thinslice.errors import CheckpointError
from thinslice.plan.header_fields import HeaderFields
from thinslice.plan.known_keys import check_gguf_keys
from thinslice.plan.model_shape import ModelShape, RopeScaling
from thinslice.plan.rope_settings import (
    check_rope_scaling,
    check_yarn_theta,
    factors_scaling,
    scaled_context,
)

# Mistral and SmolLM2 are written as llama, MiMo as qwen2 (without its prediction layers).
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE_THETA = 10000.0  # llama.cpp's, where rope.freq_base is left out


def shape_from_gguf(
    metadata: Mapping[str, Any],
    tensor_shapes: Mapping[str, tuple[int, ...]],
    freq_factors: tuple[float, ...] = (),
) -> ModelShape:
    """Read the shape a GGUF header describes.

    Args:
        tensor_shapes: the file's tensors under their GGUF names, rows first. Biases, a head of its
            own and the size of the vocabulary are told by these, not by the metadata.
        freq_factors: the content of rope_freqs.weight, where there is one.

    Errors: CheckpointError for an architecture or a rotary type that is not supported, and for
    sizes that are missing or out of range.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in tuple(_ARCHITECTURES):
        raise CheckpointError(
            f"GGUF architecture {architecture!r:.60} is not supported; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )
    fields = HeaderFields(f"GGUF {architecture}", metadata, f"{architecture}.")
    if fields.integer("expert_count", 0):
        raise CheckpointError("this GGUF is a mixture of experts; only dense models are supported")
    check_gguf_keys(fields)
    num_layers = fields.integer("block_count")
    num_heads = fields.layer_integer("attention.head_count")
    max_positions = fields.integer("context_length")
    head_dim = _head_dim(fields, num_heads)
    _check_attention_scale(fields, head_dim)
    scaling = _rope_scaling(fields, max_positions, freq_factors, head_dim)
    theta = fields.short_number("rope.freq_base", _ROPE_THETA)
    check_yarn_theta(scaling, theta)
    window = _sliding_window(fields, architecture)
    has_layers = 0 < num_layers <= 1024
    return ModelShape(
        architecture=_ARCHITECTURES[architecture],
        vocab_size=_vocab_size(metadata, tensor_shapes),
        hidden_size=fields.integer("embedding_length"),
        intermediate_size=fields.layer_integer("feed_forward_length"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=fields.layer_integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.short_number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        max_position_embeddings=scaled_context(scaling, max_positions),
        rope_scaling=scaling,
        attention_bias="blk.0.attn_q.bias" in tensor_shapes,
        attention_out_bias="blk.0.attn_output.bias" in tensor_shapes,
        mlp_bias="blk.0.ffn_gate.bias" in tensor_shapes,
        use_qk_norm=architecture == "qwen3",
        tie_word_embeddings="output.weight" not in tensor_shapes,
        sliding_window=window,
        sliding_layers=frozenset(range(num_layers)) if window and has_layers else frozenset(),
        bos_token_id=HeaderFields("GGUF", metadata).optional_integer("tokenizer.ggml.bos_token_id"),
        eos_token_ids=_eos_ids(metadata),
    )


def _vocab_size(metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]) -> int:
    rows = tensor_shapes.get("token_embd.weight", (0,))[0]
    if not rows:
        raise CheckpointError("this GGUF has no token_embd.weight; it is not a whole model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise CheckpointError(
            f"this GGUF lists {len(tokens)} tokens but token_embd.weight has {rows} rows"
        )
    return rows


def _head_dim(fields: HeaderFields, num_heads: int) -> int:
    """The one head size of queries, keys, values and rotary embedding."""
    default = fields.integer("embedding_length") // max(num_heads, 1)
    head_dim = fields.integer("attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = fields.integer(key, head_dim)
        if other != head_dim:
            raise CheckpointError(
                f"{fields.source}: {key} is {other} and the head size {head_dim}; "
                "only models where they are equal are supported"
            )
    return head_dim


def _check_attention_scale(fields: HeaderFields, head_dim: int) -> None:
    """Refuse a scale of attention's scores other than the usual one, which 0 stands for too."""
    scale = fields.number("attention.scale", 0.0)
    usual = max(head_dim, 1) ** -0.5
    if scale != 0.0 and not math.isclose(scale, usual, rel_tol=1e-6):
        raise CheckpointError(
            f"{fields.source}: attention.scale is {scale}; only {usual:.6g}, of a head of "
            f"{head_dim}, is supported"
        )


def _sliding_window(fields: HeaderFields, architecture: str) -> int | None:
    """Mistral's window, for all layers. llama.cpp has none for Qwen, whose key is inert."""
    window = fields.integer("attention.sliding_window", 0) if architecture == "llama" else 0
    if window < 0:
        raise CheckpointError(f"{fields.source}: attention.sliding_window is {window}")
    return window or None


def _eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of end of sequence, end of turn and end of message, as far as they are given."""
    fields = HeaderFields("GGUF", metadata, "tokenizer.ggml.")
    ids = (fields.optional_integer(f"{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _rope_scaling(
    fields: HeaderFields, max_positions: int, freq_factors: tuple[float, ...], head_dim: int
) -> RopeScaling | None:
    """Rotary scaling; a factor without a type is linear, as llama.cpp has it."""
    older_factor = fields.short_number("rope.scale_linear", 0.0)
    factor = fields.short_number("rope.scaling.factor", older_factor)
    rope_type = fields.text("rope.scaling.type", "linear")
    if rope_type not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"rotary scaling {rope_type!r:.40} is not supported; supported: none, linear, yarn"
        )
    # llama.cpp takes a factor of 0 for none, and a factor of 1 changes no frequency.
    is_scaled = rope_type != "none" and factor not in (0.0, 1.0)
    is_yarn = is_scaled and rope_type == "yarn"
    if not is_yarn and fields.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"{fields.source}: rope.scaling.attn_factor is only supported with yarn scaling"
        )
    if freq_factors:
        if is_scaled:
            raise CheckpointError(
                f"this GGUF scales rotary frequencies twice: {rope_type} and rope_freqs.weight"
            )
        return factors_scaling(freq_factors, head_dim)
    if not is_scaled:
        return None
    scaling = RopeScaling(
        rope_type=rope_type,
        factor=factor,
        original_max_position_embeddings=fields.integer(
            "rope.scaling.original_context_length", max_positions
        ),
    )
    check_rope_scaling(scaling)
    return _yarn(fields, scaling) if is_yarn else scaling


def _yarn(fields: HeaderFields, scaling: RopeScaling) -> RopeScaling:
    """Add YaRN's further settings, under the names config.json has for them.

    Source: llama_context in llama.cpp's src/llama-context.cpp. Its yarn_log_multiplier is
    mscale_all_dim with mscale fixed at 1, and attn_factor multiplies what they give.
    """
    log_multiplier = fields.short_number("rope.scaling.yarn_log_multiplier", 0.0)
    yarn = replace(
        scaling,
        beta_fast=fields.short_number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.short_number("rope.scaling.yarn_beta_slow", 1.0),
        mscale=1.0 if log_multiplier else None,
        mscale_all_dim=log_multiplier or None,
    )
    check_rope_scaling(yarn)
    extra = fields.optional_number("rope.scaling.attn_factor")
    if extra is None:
        return yarn
    stretch = 0.1 * math.log(yarn.factor)
    attention_factor = extra * (1.0 + stretch)
    if log_multiplier:
        attention_factor /= 1.0 + log_multiplier * stretch
    yarn = replace(yarn, attention_factor=attention_factor)
    check_rope_scaling(yarn)
    return yarn
