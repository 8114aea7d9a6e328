"""Read a ModelShape from the JSON object of a Hugging Face config.json.

Both spellings of rotary settings are read: ``rope_theta`` with ``rope_scaling``, and the newer
``rope_parameters``. Unknown architectures and unknown rotary types are refused by name.
"""

from collections.abc import Mapping
from typing import Any

from thinslice.errors import CheckpointError
from thinslice.plan.model_shape import ModelShape, RopeScaling

# rms_norm_eps and rope_theta are the defaults of each family's configuration class in transformers,
# which hold where a config.json leaves the key out.
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "MistralForCausalLM": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "Qwen2ForCausalLM": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "qkv_bias": True},
    "Qwen3ForCausalLM": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "qk_norm": True},
    "MiMoForCausalLM": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "qkv_bias": True},
}
SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)
_DTYPES = {"bfloat16", "float16", "float32"}


def shape_from_config(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelShape:
    """Read the shape a config.json describes.

    ``generation_config`` (generation_config.json, where there is one) only adds end-of-sequence
    ids: some MiMo checkpoints name <|endoftext|> in one file and <|im_end|> in the other, and both
    must stop a generation.

    Errors: CheckpointError for an architecture, an activation or a rotary type that is not
    supported, and for sizes that are missing or out of range.
    """
    architecture = _architecture(config)
    family = _FAMILIES[architecture]
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act {config['hidden_act']!r} is not supported; only silu is")
    hidden_size = _int(config, "hidden_size")
    num_heads = _int(config, "num_attention_heads")
    max_positions = _int(config, "max_position_embeddings")
    num_layers = _int(config, "num_hidden_layers")
    rope_theta, rope_scaling = _rope(config, family["rope_theta"], max_positions)
    is_llama = architecture == "LlamaForCausalLM"
    has_bias = bool(config.get("attention_bias", False)) and architecture != "MistralForCausalLM"
    window, window_layers = _sliding_window(config, architecture, num_layers)
    return ModelShape(
        architecture=architecture,
        vocab_size=_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_int(config, "intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=_int(config, "num_key_value_heads", num_heads),
        head_dim=_int(config, "head_dim", hidden_size // max(num_heads, 1)),
        rms_norm_eps=_float(config, "rms_norm_eps", family["rms_norm_eps"]),
        rope_theta=rope_theta,
        max_position_embeddings=max_positions,
        rope_scaling=rope_scaling,
        attention_bias=bool(family.get("qkv_bias", False)) or has_bias,
        attention_out_bias=has_bias and (is_llama or architecture == "Qwen3ForCausalLM"),
        mlp_bias=bool(config.get("mlp_bias", False)) and is_llama,
        use_qk_norm=bool(family.get("qk_norm", False)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        num_nextn_predict_layers=_int(config, "num_nextn_predict_layers", 0)
        if architecture == "MiMoForCausalLM"
        else 0,
        sliding_window=window,
        sliding_layers=window_layers,
        bos_token_id=_optional_int(config, "bos_token_id"),
        eos_token_ids=_eos_ids(config, generation_config or {}),
        dtype=_dtype(config),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in _FAMILIES:
        found = name or config.get("model_type") or "none"
        raise CheckpointError(
            f"architecture {found!s:.80} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return str(name)


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int:
        raise CheckpointError(f"config.json: {key} is {value!r:.80}; expected a whole number")
    return value


def _optional_int(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int else None


def _float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json: {key} is {value!r:.80}; expected a number")
    return float(value)


def _dtype(config: Mapping[str, Any]) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return dtype if dtype in _DTYPES else "bfloat16"


def _eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    for source in (config, generation_config):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if type(token_id) is int and token_id not in ids:
                ids.append(token_id)
    return tuple(ids)


def _sliding_window(
    config: Mapping[str, Any], architecture: str, num_layers: int
) -> tuple[int | None, frozenset[int]]:
    """The window and the layers it holds for. Qwen's is inert unless use_sliding_window is set."""
    window = _optional_int(config, "sliding_window")
    if window is None or not 0 < num_layers <= 1024:
        return None, frozenset()
    if architecture == "MistralForCausalLM":
        return window, frozenset(range(num_layers))
    if architecture == "LlamaForCausalLM" or not config.get("use_sliding_window", False):
        return None, frozenset()
    first = _int(config, "max_window_layers", 28)
    return window, frozenset(range(max(first, 0), num_layers))


def _rope(
    config: Mapping[str, Any], default_theta: float, max_positions: int
) -> tuple[float, RopeScaling | None]:
    newer = config.get("rope_parameters")
    older = config.get("rope_scaling")
    for name, value in (("rope_parameters", newer), ("rope_scaling", older)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"config.json: {name} is not an object")
    params: Mapping[str, Any] = newer or older or {}
    theta_home = newer if newer and "rope_theta" in newer else config
    theta = _float(theta_home, "rope_theta", default_theta)
    rope_type = params.get("rope_type", params.get("type", "default"))
    if rope_type in (None, "default"):
        return theta, None
    if rope_type not in ("linear", "llama3", "yarn"):
        raise CheckpointError(
            f"rotary scaling {rope_type!r:.40} is not supported; supported: linear, llama3, yarn"
        )
    factor = _float(params, "factor")
    original = _int(params, "original_max_position_embeddings", max_positions)
    if factor < 1.0 or not 0 < original <= 1 << 27:
        raise CheckpointError(
            f"rotary scaling: factor {factor} with original_max_position_embeddings {original}"
        )
    return theta, RopeScaling(
        rope_type=rope_type,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=_float(params, "low_freq_factor", 1.0),
        high_freq_factor=_float(params, "high_freq_factor", 4.0),
        attention_factor=_optional_float(params, "attention_factor"),
        beta_fast=_float(params, "beta_fast", 32.0),
        beta_slow=_float(params, "beta_slow", 1.0),
        mscale=_optional_float(params, "mscale"),
        mscale_all_dim=_optional_float(params, "mscale_all_dim"),
        truncate=bool(params.get("truncate", True)),
    )


def _optional_float(config: Mapping[str, Any], key: str) -> float | None:
    return None if config.get(key) is None else _float(config, key)
