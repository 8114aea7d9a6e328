"""Read a ModelShape from the JSON object of a Hugging Face config.json.

Which keys are read, refused or known not to matter is in known_keys.py, what rotary settings mean
in rope_settings.py, and which models there are in architectures.py.
"""

from collections.abc import Mapping
from typing import Any

from thinslice.errors import CheckpointError, plain
from thinslice.plan.architectures import read_architecture, text_trunk_of
from thinslice.plan.header_fields import HeaderFields
from thinslice.plan.known_keys import check_config_keys, config_notes
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packing import QUANT_METHOD
from thinslice.plan.rope_settings import read_rope, unread_settings

# Defaults of the families' configuration classes in transformers; they stand in where a config.json
# leaves the key out.
_RMS_NORM_EPS = 1e-6
_SLIDING_WINDOW = 4096  # Mistral and Qwen; an explicit null means no window
_MAX_WINDOW_LAYERS = 28
_QWEN3_HEAD_DIM = 128
_DTYPES = ("bfloat16", "float16", "float32")
_FULL, _SLIDING = "full_attention", "sliding_attention"
_LAYER_TYPES = {_FULL: False, "attention": False, _SLIDING: True}


def shape_from_config(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelShape:
    """Read the shape a config.json describes; of a model with a text trunk, that of the trunk.

    ``generation_config`` (generation_config.json, where there is one) only adds end-of-sequence
    ids: some MiMo checkpoints name <|endoftext|> in one file and <|im_end|> in the other, and both
    must stop a generation.

    Errors: CheckpointError for an architecture, an activation, a rotary type or any other setting
    that is not supported, and for sizes that are missing or out of range.
    """
    architecture, config = read_architecture(config)
    _check_not_quantised(config)
    check_config_keys(config)
    fields = HeaderFields("config.json", config)
    activation = config.get("hidden_act", "silu")  # where null is none of transformers' names
    if activation is None or fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act {activation!r:.40} is not supported; only silu is")
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings")
    num_layers = fields.integer("num_hidden_layers")
    is_llama = architecture == "LlamaForCausalLM"
    is_qwen3 = architecture == "Qwen3ForCausalLM"
    has_bias = fields.flag("attention_bias") and (is_llama or is_qwen3)
    window, window_layers = _sliding_window(fields, architecture, num_layers)
    default_head_dim = _QWEN3_HEAD_DIM if is_qwen3 else hidden_size // max(num_heads, 1)
    head_dim = fields.integer("head_dim", default_head_dim)
    rope = read_rope(config, max_positions, head_dim)
    return ModelShape(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", _RMS_NORM_EPS),
        rope_theta=rope.theta,
        max_position_embeddings=rope.context,
        rope_scaling=rope.scaling,
        attention_bias=has_bias or architecture in ("Qwen2ForCausalLM", "MiMoForCausalLM"),
        attention_out_bias=has_bias,
        mlp_bias=fields.flag("mlp_bias") and is_llama,
        use_qk_norm=is_qwen3,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", 0)
        if architecture == "MiMoForCausalLM"
        else 0,
        sliding_window=window,
        sliding_layers=window_layers,
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=_eos_ids(fields, generation_config or {}),
        dtype=_dtype(config),
    )


def notes_of_config(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """What the user should know of a config.json that ``shape_from_config`` reads.

    That is: which keys are not read although they may matter, and that only a trunk is used.
    """
    trunk = text_trunk_of(config)
    notes = [] if trunk is None else [f"only the text trunk of this {trunk} is used"]
    _, settings = read_architecture(config)
    return (*notes, *config_notes(settings, unread_settings(settings), generation_config or {}))


def _check_not_quantised(config: Mapping[str, Any]) -> None:
    """Refuse a model that another program quantised, whatever its tensors look like.

    Some methods keep tensors of a float type that mean nothing without the program's own code.
    """
    for key in ("quantization_config", "quantization", "compression_config"):
        section = config.get(key)
        if section is None or section == {}:
            continue
        method = section.get("quant_method", key) if isinstance(section, dict) else key
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"config.json: {key} says that this model was quantised ({plain(method, 40)}), "
                "which is not supported; take the checkpoint before it was quantised, or a GGUF"
            )


def _dtype(config: Mapping[str, Any]) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return dtype if dtype in _DTYPES else "bfloat16"


def _eos_ids(fields: HeaderFields, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the end tokens of both files, each once."""
    generation = HeaderFields("generation_config.json", generation_config)
    ids = (*fields.integers("eos_token_id"), *generation.integers("eos_token_id"))
    return tuple(dict.fromkeys(ids))


def _sliding_window(
    fields: HeaderFields, architecture: str, num_layers: int
) -> tuple[int | None, frozenset[int]]:
    """The window and the layers it holds for, as layer_types says or the family's older keys.

    Qwen's window is inert unless use_sliding_window is set, and Llama has none.
    """
    if not 0 < num_layers <= 1024:  # ModelShape refuses it
        return None, frozenset()
    window = fields.values.get("sliding_window", _SLIDING_WINDOW)
    is_asked = fields.flag("use_sliding_window")
    is_active = architecture == "MistralForCausalLM" or (
        architecture != "LlamaForCausalLM" and is_asked
    )
    sliding = _sliding_layers(fields, num_layers)
    if not is_active or window is None:
        if sliding:
            raise CheckpointError(
                f"config.json: layer_types has {len(sliding)} layers of {_SLIDING}, but there is "
                f"no sliding_window that holds for a {architecture}"
            )
        return None, frozenset()
    if sliding is None:
        first = 0
        if architecture != "MistralForCausalLM":
            if fields.values.get("max_window_layers", _MAX_WINDOW_LAYERS) is None:
                raise CheckpointError("config.json: max_window_layers is null beside a window")
            first = max(fields.integer("max_window_layers", _MAX_WINDOW_LAYERS), 0)
        sliding = frozenset(range(first, num_layers))
    if type(window) is not int or window <= 0:
        raise CheckpointError(
            f"config.json: sliding_window is {window!r:.80}; expected a whole number above 0"
        )
    return window, sliding


def _sliding_layers(fields: HeaderFields, num_layers: int) -> frozenset[int] | None:
    """Which layers layer_types gives a sliding window; None where it is not there."""
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        return None
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        found = f"{len(layer_types)} entries" if isinstance(layer_types, list) else "no list"
        raise CheckpointError(
            f"config.json: layer_types has {found}; expected one for each of {num_layers} layers"
        )
    for layer_type in layer_types:
        if not isinstance(layer_type, str) or layer_type not in _LAYER_TYPES:
            raise CheckpointError(
                f"config.json: layer_types has {layer_type!r:.40}; supported are {_FULL} and "
                f"{_SLIDING}"
            )
    return frozenset(idx for idx, kind in enumerate(layer_types) if _LAYER_TYPES[kind])
