"""Which models a config.json can describe: the families, and models that have one as their trunk.

A model for pictures or sound may have a decoder of a family as its text trunk. Such a trunk runs as
what it is; the tensors of the other parts are left out.
"""

from collections.abc import Mapping
from typing import Any

from thinslice.errors import CheckpointError, plain
from thinslice.plan.known_keys import CONFIG_READ, key_set

# model_type, as transformers and the models' own files have it, for each class.
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MiMoForCausalLM": "mimo",
}
SUPPORTED_ARCHITECTURES = tuple(_MODEL_TYPES)
# MiMo's own class extends Qwen2's, whose type stands in its place in some files.
_MORE_MODEL_TYPES = {"MiMoForCausalLM": ("qwen2",)}
_ARCHITECTURE_OF = {model_type: name for name, model_type in _MODEL_TYPES.items()}
# MiMo-VL-7B and MiMo-Embodied-7B are of the first class, as their model cards say. The second is
# named in MiMo-Audio-7B's config.json, the third in its code (XiaomiMiMo/MiMo-Audio,
# modeling_mimo_audio.py): a Qwen2Model with a head, and local transformers beside it that make
# speech of its hidden states.
_QWEN2_5_VL = "Qwen2_5_VLForConditionalGeneration"
_TRUNKS = {
    _QWEN2_5_VL: "Qwen2ForCausalLM",
    "MiMoAudioModel": "Qwen2ForCausalLM",
    "MiMoAudioForCausalLM": "Qwen2ForCausalLM",
}
_TRUNK_MODEL_TYPES = {"qwen2_5_vl": _QWEN2_5_VL}
# The configuration class of MiMo-Audio's own code is Qwen2's, with a few keys more.
_TYPES_OF_TRUNKS = {
    _QWEN2_5_VL: ("qwen2_5_vl",),
    "MiMoAudioModel": ("qwen2", "mimo_audio"),
    "MiMoAudioForCausalLM": ("qwen2", "mimo_audio"),
}
# Where Qwen2_5_VLTextConfig of transformers has other defaults than Qwen2Config.
_QWEN2_5_VL_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_window_layers": 80}
_SILU = ("silu", "swish")
_ROPE_PLACES = ("rope_scaling", "rope_parameters")
# Of the top level, what holds for the whole model also where there is a text_config.
_OF_THE_WHOLE = key_set(
    "architectures bos_token_id dtype eos_token_id model_type quantization_config torch_dtype"
)


def read_architecture(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The family's class, and the settings of the decoder: those of the trunk where it is one.

    Where ``architectures`` is missing, ``model_type`` tells.

    Errors: CheckpointError for a model of another kind, with what it would take, and where the two
    keys contradict each other.
    """
    name = _class_name(config)
    if name in _TRUNKS:
        _check_model_type(config, name, _TYPES_OF_TRUNKS[name])
        return _TRUNKS[name], _trunk_settings(config, name)
    if name not in _MODEL_TYPES:
        found = name or config.get("model_type")
        if found is None:
            raise CheckpointError(
                "config.json names no architecture: neither architectures nor model_type is there; "
                f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        raise CheckpointError(
            f"architecture {plain(found, 80)} is not supported{_what_it_takes(config)}; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    _check_model_type(config, name, (_MODEL_TYPES[name], *_MORE_MODEL_TYPES.get(name, ())))
    return name, config


def _check_model_type(config: Mapping[str, Any], name: str, known: tuple[str, ...]) -> None:
    """Refuse a model_type that is not the class's: it is what transformers chooses the model by."""
    model_type = config.get("model_type")
    if model_type is not None and model_type not in known:
        raise CheckpointError(
            f"config.json: architectures says {name} and model_type says "
            f"{plain(model_type, 40)}; make them agree"
        )


def text_trunk_of(config: Mapping[str, Any]) -> str | None:
    """The class of a model of which only the text trunk is used; None for every other."""
    name = _class_name(config)
    return name if name in _TRUNKS else None


def _class_name(config: Mapping[str, Any]) -> str | None:
    """The class that the config names, or that its model_type stands for."""
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    if isinstance(names, str):
        return names
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    return _ARCHITECTURE_OF.get(model_type) or _TRUNK_MODEL_TYPES.get(model_type)


def _trunk_settings(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The decoder's settings: those of text_config where there is one, else of the top level.

    With text alone the three axes of multimodal rotary positions are equal, so that its frequencies
    are those of plain rotary embedding.

    Source: Qwen2_5_VLConfig of transformers 5.23, which reads no more of the top level than the tie
    of the embeddings where there is a text_config; MiMo-Audio's own code knows none.
    """
    if name != _QWEN2_5_VL:
        return config
    settings = _merged_settings(config)
    for key in _ROPE_PLACES:
        if isinstance(settings.get(key), dict):
            settings[key] = {
                inner: "default" if value == "mrope" else value
                for inner, value in settings[key].items()
            }
    places = [settings.get(key) for key in _ROPE_PLACES]
    has_theta = any(isinstance(place, dict) and "rope_theta" in place for place in places)
    for key, value in _QWEN2_5_VL_DEFAULTS.items():
        if settings.get(key) is None and not (key == "rope_theta" and has_theta):
            settings[key] = value
    return settings


def _merged_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """text_config, and of the top level what holds for the whole model."""
    nested = config.get("text_config")
    if nested is not None and not isinstance(nested, dict):
        raise CheckpointError("config.json: text_config is not an object")
    settings = {key: value for key, value in config.items() if key != "text_config"}
    if nested is None:
        return settings
    of_decoder = CONFIG_READ - _OF_THE_WHOLE
    settings = {key: value for key, value in settings.items() if key not in of_decoder}
    settings |= {
        key: value for key, value in nested.items() if not (value is None and key in _OF_THE_WHOLE)
    }
    tie = "tie_word_embeddings"
    settings[tie] = config.get(tie) or nested.get(tie)
    return settings


def _what_it_takes(config: Mapping[str, Any]) -> str:
    """What thinslice would need for a model it does not know, as far as its config tells."""
    nested = config.get("text_config")
    settings = {**config, **(nested if isinstance(nested, dict) else {})}
    needs = []
    for key in ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"):
        count = settings.get(key)
        if type(count) is int and count > 1:
            needs.append(f"a mixture of {count} experts")
            break
    if settings.get("kv_lora_rank") is not None:
        needs.append("latent attention")
    if any("mamba" in key or "linear_num" in key or "ssm_" in key for key in settings):
        needs.append("state-space or linear-attention layers")
    if settings.get("v_head_dim") not in (None, settings.get("head_dim")):
        needs.append("values of another size than keys")
    if settings.get("partial_rotary_factor") not in (None, 1.0):
        needs.append("rotary embedding of a part of each head")
    if any("sink_bias" in key and settings[key] is True for key in settings):
        needs.append("attention sinks")
    if settings.get("is_encoder_decoder") is True:
        needs.append("an encoder")
    activation = settings.get("hidden_activation") or settings.get("hidden_act")
    if isinstance(activation, str) and activation not in _SILU:
        needs.append(f"the activation {plain(activation, 20)}")
    quantised = settings.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if isinstance(method, str):
        needs.append(f"weights in {plain(method, 20)}")
    return f": it would take {', '.join(needs)}" if needs else ""
