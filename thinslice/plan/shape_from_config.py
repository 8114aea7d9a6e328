"""Read a ModelShape from the JSON object of a Hugging Face config.json.

Both spellings of rotary settings are read: ``rope_theta`` with ``rope_scaling``, and the newer
``rope_parameters``. Unknown architectures and unknown rotary types are refused by name.
"""

from collections.abc import Mapping
from typing import Any

from thinslice.errors import CheckpointError
from thinslice.plan.header_fields import HeaderFields
from thinslice.plan.model_shape import ModelShape, RopeScaling

# Defaults of the families' configuration classes in transformers; they stand in where a config.json
# leaves the key out.
_RMS_NORM_EPS = 1e-6
_ROPE_THETA = 10000.0
_SLIDING_WINDOW = 4096  # Mistral and Qwen; an explicit null means no window
_QWEN3_HEAD_DIM = 128
SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MiMoForCausalLM",
)
_DTYPES = ("bfloat16", "float16", "float32")


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
    fields = HeaderFields("config.json", config)
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(
            f"hidden_act {config['hidden_act']!r:.40} is not supported; only silu is"
        )
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings")
    num_layers = fields.integer("num_hidden_layers")
    is_llama = architecture == "LlamaForCausalLM"
    is_qwen3 = architecture == "Qwen3ForCausalLM"
    has_bias = bool(config.get("attention_bias", False)) and (is_llama or is_qwen3)
    window, window_layers = _sliding_window(fields, architecture, num_layers)
    default_head_dim = _QWEN3_HEAD_DIM if is_qwen3 else hidden_size // max(num_heads, 1)
    head_dim = fields.integer("head_dim", default_head_dim)
    rope_theta, rope_scaling = _rope(config, max_positions, head_dim)
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
        rope_theta=rope_theta,
        max_position_embeddings=max_positions,
        rope_scaling=rope_scaling,
        attention_bias=has_bias or architecture in ("Qwen2ForCausalLM", "MiMoForCausalLM"),
        attention_out_bias=has_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and is_llama,
        use_qk_norm=is_qwen3,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", 0)
        if architecture == "MiMoForCausalLM"
        else 0,
        sliding_window=window,
        sliding_layers=window_layers,
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=_eos_ids(config, generation_config or {}),
        dtype=_dtype(config),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in SUPPORTED_ARCHITECTURES:
        found = name or config.get("model_type") or "none"
        raise CheckpointError(
            f"architecture {found!s:.80} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return str(name)


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
    fields: HeaderFields, architecture: str, num_layers: int
) -> tuple[int | None, frozenset[int]]:
    """The window and the layers it holds for. Qwen's is inert unless use_sliding_window is set."""
    window = fields.values.get("sliding_window", _SLIDING_WINDOW)
    if window is None or architecture == "LlamaForCausalLM" or not 0 < num_layers <= 1024:
        return None, frozenset()
    first = 0
    if architecture != "MistralForCausalLM":
        if not fields.values.get("use_sliding_window", False):
            return None, frozenset()
        first = max(fields.integer("max_window_layers", 28), 0)
    if type(window) is not int or window <= 0:
        raise CheckpointError(
            f"config.json: sliding_window is {window!r:.80}; expected a whole number above 0"
        )
    return window, frozenset(range(first, num_layers))


def _rope(
    config: Mapping[str, Any], max_positions: int, head_dim: int
) -> tuple[float, RopeScaling | None]:
    newer = config.get("rope_parameters")
    older = config.get("rope_scaling")
    for name, value in (("rope_parameters", newer), ("rope_scaling", older)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"config.json: {name} is not an object")
    params: Mapping[str, Any] = newer or older or {}
    theta_home = newer if newer and "rope_theta" in newer else config
    theta = HeaderFields("config.json", theta_home).number("rope_theta", _ROPE_THETA)
    rope_type = params.get("rope_type", params.get("type"))
    if rope_type in (None, "default"):
        return theta, None
    if rope_type == "factors":
        # Ours alone: what a GGUF keeps as rope_freqs.weight, in a packed checkpoint made of it.
        return theta, factors_scaling(params.get("freq_factors"), head_dim)
    if rope_type not in ("linear", "llama3", "yarn"):
        raise CheckpointError(
            f"rotary scaling {rope_type!r:.40} is not supported; supported: linear, llama3, yarn"
        )
    fields = HeaderFields("config.json", params)
    scaling = RopeScaling(
        rope_type=rope_type,
        factor=fields.number("factor"),
        original_max_position_embeddings=fields.integer(
            "original_max_position_embeddings", max_positions
        ),
        low_freq_factor=fields.number("low_freq_factor", 1.0),
        high_freq_factor=fields.number("high_freq_factor", 4.0),
        attention_factor=fields.optional_number("attention_factor"),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        mscale=fields.optional_number("mscale"),
        mscale_all_dim=fields.optional_number("mscale_all_dim"),
        truncate=bool(params.get("truncate", True)),
    )
    check_rope_scaling(scaling)
    return theta, scaling


def factors_scaling(factors: Any, head_dim: int) -> RopeScaling:
    """Rotary scaling by explicit divisors, one for each frequency.

    Errors: CheckpointError for anything but so many positive numbers.
    """
    is_list = isinstance(factors, list | tuple)
    if not is_list or len(factors) != head_dim // 2 or not all(map(_is_factor, factors)):
        found = f"{len(factors)} factors" if is_list else f"{factors!r:.40}"
        raise CheckpointError(
            f"rotary scaling by factors has {found}; expected {head_dim // 2} numbers above 0"
        )
    return RopeScaling(rope_type="factors", freq_factors=tuple(map(float, factors)))


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and 0.0 < value < 1e6


def check_rope_scaling(scaling: RopeScaling) -> None:
    """Refuse factors that rotary scaling cannot be computed with.

    Errors: CheckpointError naming the setting.
    """
    original = scaling.original_max_position_embeddings
    if not 1.0 <= scaling.factor <= 1e6 or original is None or not 0 < original <= 1 << 27:
        raise CheckpointError(
            f"rotary scaling: factor {scaling.factor} with "
            f"original_max_position_embeddings {original}"
        )
    if not 0.0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise CheckpointError(
            f"rotary scaling: low_freq_factor {scaling.low_freq_factor} with "
            f"high_freq_factor {scaling.high_freq_factor}"
        )
    if not 0.0 < scaling.beta_slow <= scaling.beta_fast:
        raise CheckpointError(
            f"rotary scaling: beta_slow {scaling.beta_slow} with beta_fast {scaling.beta_fast}"
        )
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        value = getattr(scaling, name)
        if value is not None and value < 0.0:
            raise CheckpointError(f"rotary scaling: {name} is {value}; expected at least 0")
