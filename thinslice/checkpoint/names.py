"""The names of tensors: of a GGUF and of a larger model's text trunk as Hugging Face's checkpoints
have them, and all of them held against those that the ModelShape implies.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from thinslice.checkpoint.index import TensorEntry
from thinslice.errors import CheckpointError, plain
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packing import Packing
from thinslice.plan.tensors import HEAD, tensors_of

_NUM_SHOWN = 10
# Rotary frequencies, positions and masks that old checkpoints store although they follow from the
# config.
_BUFFER = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?"
    r"(rotary_emb\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached|position_ids)",
    re.ASCII,
)
# What safetensors calls whole numbers and truth values: no weight of ours is one.
_WHOLE_DTYPES = frozenset({"BOOL", "I8", "I16", "I32", "I64", "U16", "U32", "U64"})
_PREDICTION_LAYER = re.compile(r"model\.mtp_layers\.(\d{1,4})\.", re.ASCII)

# Of a GGUF. Source: gguf-py/gguf/tensor_mapping.py and conversion/llama.py in ggml-org/llama.cpp.
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

# Of models that also take in pictures or sound. Sources: Qwen2.5-VL as transformers writes it,
# before and since 4.52; MiMo-Audio's own code (XiaomiMiMo/MiMo-Audio, modeling_mimo_audio.py).
_OTHER_PARTS = (
    "visual.",
    "model.visual.",
    "local_transformer.",
    "local_transformer_lm_heads.",
    "input_local_transformer.",
    "speech_embeddings.",
    "speech_embeddings_to_local.",
    "speech_group_downcast.",
    "hidden_states_downcast.",
)
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}

Shapes = dict[str, tuple[int, ...]]


def from_gguf_names(
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


def trunk_name(name: str) -> str | None:
    """A tensor's name in the trunk alone; None for a tensor of another part."""
    if name.startswith(_OTHER_PARTS):
        return None
    for prefix, in_trunk in _PREFIXES.items():
        if name.startswith(prefix):
            return in_trunk + name.removeprefix(prefix)
    return name


def from_trunk_names(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of the trunk under the names that the family has for them.

    Errors: CheckpointError where two tensors would have the same name.
    """
    renamed: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        own_name = trunk_name(name)
        if own_name is None:
            continue
        if own_name in renamed:
            raise CheckpointError(f"{entry.path}: {plain(own_name, 120)} is there under two names")
        renamed[own_name] = replace(entry, name=own_name)
    return renamed


def expected_tensors(shape: ModelShape, packing: Packing | None = None) -> Shapes:
    """Every tensor of a model under its exact name, with its shape, rows first.

    Args:
        packing: of a packed checkpoint, whose feed-forwards are cut into blocks.
    """
    return {tensor.name: tensor.shape for tensor in tensors_of(shape, packing)}


def check_names(
    shape: ModelShape, tensors: Mapping[str, TensorEntry], packing: Packing | None = None
) -> tuple[ModelShape, dict[str, TensorEntry]]:
    """Compare a checkpoint with its shape; return the shape as it holds, and the tensors in use.

    Some tensors need not be used and are left out: stored rotary frequencies, a head although the
    embeddings are tied, prediction layers the config does not count, and, where no weight is
    missing, tensors of whole numbers. A checkpoint without any prediction layer, such as a re-save
    of MiMo, is whole: the returned shape then counts none.

    Errors: one CheckpointError with all that is missing, unexpected or misshapen.
    """
    if not any(_PREDICTION_LAYER.match(name) for name in tensors):
        shape = replace(shape, num_nextn_predict_layers=0)
    expected = expected_tensors(shape, packing)
    missing = [name for name in expected if name not in tensors]
    unexpected = [
        f"{name!r:.120}"
        for name, entry in tensors.items()
        if name not in expected
        and not _is_ignorable(name, shape)
        and (missing or entry.dtype not in _WHOLE_DTYPES)
    ]
    misshapen = [
        f"{name} {tensors[name].shape}, not {wanted}"
        for name, wanted in expected.items()
        if name in tensors and tensors[name].shape != wanted
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        lines = [f"\n  {_listed(kind, items)}" for kind, items in problems.items() if items]
        raise CheckpointError(
            f"the tensors are not those of the {shape.architecture} that the checkpoint "
            f"describes{''.join(lines)}"
        )
    return shape, {name: tensors[name] for name in expected}


def left_out_note(shape: ModelShape, tensors: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    """A line naming the tensors that ``check_names`` leaves out without knowing what they are."""
    expected = expected_tensors(shape)
    odd = [
        plain(name, 120)
        for name in tensors
        if name not in expected and not _is_ignorable(name, shape)
    ]
    if not odd:
        return ()
    return (f"tensors of whole numbers are left out: {_listed('unknown', sorted(odd))}",)


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


def _is_ignorable(name: str, shape: ModelShape) -> bool:
    if name == HEAD:  # not expected, so the embeddings are tied
        return True
    prediction_layer = _PREDICTION_LAYER.match(name)
    if prediction_layer is not None:
        return int(prediction_layer[1]) >= shape.num_nextn_predict_layers
    return _BUFFER.fullmatch(name) is not None


def _listed(kind: str, items: list[str]) -> str:
    shown = ", ".join(items[:_NUM_SHOWN])
    rest = len(items) - _NUM_SHOWN
    return f"{len(items)} {kind}: {shown}" + (f" and {rest} more" if rest > 0 else "")
