"""Which model a config.json describes: by its class, by its type, or by the trunk within it."""

import copy
from typing import Any

import pytest
from transformers import Qwen2_5_VLConfig

from tests.checkpoints import tiny_config
from tests.unit.plan.test_shape_from_config import MIMO_CONFIG
from thinslice.errors import CheckpointError
from thinslice.plan.architectures import SUPPORTED_ARCHITECTURES, text_trunk_of
from thinslice.plan.shape_from_config import notes_of_config, shape_from_config

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "mimo")


@pytest.mark.parametrize(
    ("architecture", "model_type"), list(zip(SUPPORTED_ARCHITECTURES, MODEL_TYPES, strict=True))
)
@pytest.mark.parametrize("architectures", ["missing", None, []])
def test_model_type_tells_where_architectures_does_not(
    architecture: str, model_type: str, architectures: Any
) -> None:
    named = tiny_config(architecture)
    config = {**named, "architectures": architectures, "model_type": model_type}
    if architectures == "missing":
        del config["architectures"]
    assert shape_from_config(config) == shape_from_config(named)


def test_a_class_and_a_type_that_contradict_each_other() -> None:
    assert shape_from_config(tiny_config("MiMoForCausalLM", model_type="qwen2"))
    with pytest.raises(CheckpointError, match="says LlamaForCausalLM and model_type says qwen2"):
        shape_from_config(tiny_config(model_type="qwen2"))


@pytest.mark.parametrize(
    "architecture", [*SUPPORTED_ARCHITECTURES, "Qwen2_5_VLForConditionalGeneration"]
)
@pytest.mark.parametrize(
    "model_type", ["helium", "granite", "gemma2", "olmo", "stablelm", "", "LLAMA", 1, ["llama"]]
)
def test_a_type_of_another_family_is_refused(architecture: str, model_type: Any) -> None:
    """It is what transformers goes by; a class of our families beside it is not computed alike."""
    config = tiny_config(architecture, model_type=model_type)
    with pytest.raises(CheckpointError, match=f"says {architecture} and model_type says "):
        shape_from_config(config)


# Sizes of XiaomiMiMo/MiMo-7B-RL's decoder, as Qwen2.5-VL's config.json has the keys.
_VL_ONLY = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "hidden_size": 1280, "model_type": "qwen2_5_vl"},
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_DECODER = {
    key: value
    for key, value in MIMO_CONFIG.items()
    if key not in ("architectures", "num_nextn_predict_layers", "rope_scaling")
}
# The keys of XiaomiMiMo/MiMo-Audio's own configuration class, beside those of Qwen2Config.
_AUDIO_ONLY = {
    "architectures": ["MiMoAudioModel"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 8192,
    "layer_types": ["full_attention"] * 36,
    "speech_vocab_size": "1025-1025-129-129-129-129-129-129",
    "delay_pattern": "0-1-2-3-4-5-6-7",
    "group_size": 4,
    "audio_channels": 8,
    "local_layers": 16,
    "local_dim": 1024,
    "input_local_layers": 6,
}


def trunks() -> dict[str, dict[str, Any]]:
    flat = {**_DECODER, **_VL_ONLY}
    settings = {"tie_word_embeddings", "torch_dtype", "eos_token_id"}
    nested = {key: value for key, value in flat.items() if key in _VL_ONLY or key in settings}
    nested.pop("rope_scaling")
    text = {key: value for key, value in _DECODER.items() if key not in settings}
    text["model_type"] = "qwen2_5_vl_text"
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": [16, 24, 24],
    }
    return {
        "flat": flat,
        "nested": {**nested, "text_config": text},
        "both": {**flat, "text_config": {**text, "eos_token_id": None}},
        "audio": {**_DECODER, **_AUDIO_ONLY},
    }


@pytest.mark.parametrize("kind", trunks())
def test_the_trunk_of_a_model_for_pictures_or_sound_is_the_decoder_it_is(kind: str) -> None:
    config = trunks()[kind]
    expected = {**_DECODER, "architectures": ["Qwen2ForCausalLM"]}
    if kind == "audio":
        expected |= {"rms_norm_eps": 1e-06, "max_position_embeddings": 8192}
    assert shape_from_config(config) == shape_from_config(expected)
    name = config["architectures"][0]
    assert text_trunk_of(config) == name
    assert notes_of_config(config) == (f"only the text trunk of this {name} is used",)


def test_defaults_of_a_trunk_are_those_of_its_own_class() -> None:
    config = tiny_config(**_VL_ONLY)
    for key in ("rms_norm_eps", "rope_theta"):
        del config[key]
    shape = shape_from_config(config)
    assert (shape.rms_norm_eps, shape.rope_theta) == (1e-5, 1000000.0)


def test_a_tie_may_stand_in_either_place() -> None:
    flat = tiny_config(**_VL_ONLY)
    assert shape_from_config({**flat, "tie_word_embeddings": True}).tie_word_embeddings
    nested = {**flat, "text_config": {**tiny_config(), "tie_word_embeddings": True}}
    assert shape_from_config(nested).tie_word_embeddings
    nested["tie_word_embeddings"] = True
    nested["text_config"]["tie_word_embeddings"] = False
    assert shape_from_config(nested).tie_word_embeddings
    assert Qwen2_5_VLConfig(**copy.deepcopy(nested)).tie_word_embeddings


# What the top level says, and what text_config does, of what the decoder is computed by.
LEAKS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, {}),
    (
        {"sliding_window": 8},
        {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
    ),
    ({"rope_theta": 500.0, "rms_norm_eps": 0.5}, {}),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {}),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, {"rope_theta": 70000.0}),
    ({"rope_theta": 500.0}, {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 5]}}),
    ({"num_key_value_heads": 4, "hidden_size": 128, "head_dim": 32}, {}),
]


@pytest.mark.parametrize(("top", "inner"), LEAKS)
def test_a_text_config_is_all_that_the_trunk_is_made_of(
    top: dict[str, Any], inner: dict[str, Any]
) -> None:
    text = {**tiny_config(), **inner}
    for key in ("architectures", "rms_norm_eps", "rope_theta", "head_dim", "sliding_window"):
        if key not in inner:
            del text[key]
    config = {key: value for key, value in _VL_ONLY.items() if key != "rope_scaling"}
    shape = shape_from_config(config | {**top, "text_config": text})
    theirs = Qwen2_5_VLConfig(text_config=copy.deepcopy(text), **copy.deepcopy(top)).text_config
    assert shape.rms_norm_eps == theirs.rms_norm_eps
    assert shape.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (shape.rope_scaling is None) == (theirs.rope_parameters["rope_type"] == "default")
    assert shape.sliding_window == theirs.sliding_window
    assert shape.hidden_size == theirs.hidden_size
    assert shape.num_key_value_heads == theirs.num_key_value_heads


def test_a_text_config_that_no_code_of_the_model_reads_is_refused() -> None:
    config = tiny_config(**_AUDIO_ONLY, text_config={"hidden_size": 32})
    config["layer_types"] = None
    with pytest.raises(CheckpointError, match="text_config is"):
        shape_from_config(config)


# The keys of MiMoV2FlashConfig in transformers 5.23 that set it apart.
MIMO_V2 = {
    "architectures": ["MiMoV2FlashForCausalLM"],
    "model_type": "mimo_v2_flash",
    "n_routed_experts": 256,
    "head_dim": 192,
    "v_head_dim": 128,
    "partial_rotary_factor": 0.334,
    "add_swa_attention_sink_bias": True,
    "quantization_config": {"quant_method": "fp8"},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            MIMO_V2,
            "architecture MiMoV2FlashForCausalLM is not supported: it would take a mixture of 256 "
            "experts, values of another size than keys, rotary embedding of a part of each head, "
            "attention sinks, weights in fp8; supported: LlamaForCausalLM, MistralForCausalLM, "
            "Qwen2ForCausalLM, Qwen3ForCausalLM, MiMoForCausalLM",
        ),
        (
            {"architectures": ["NewForCausalLM"], "kv_lora_rank": 512, "hidden_act": "gelu"},
            "architecture NewForCausalLM is not supported: it would take latent attention, the "
            "activation gelu; supported: ",
        ),
        (
            {"architectures": ["NewVLModel"], "text_config": {"num_experts": 8, "ssm_state": 1}},
            "it would take a mixture of 8 experts, state-space or linear-attention layers; ",
        ),
        ({"architectures": ["T5"], "is_encoder_decoder": True}, "it would take an encoder; "),
        ({"architectures": ["PlainForCausalLM"]}, "PlainForCausalLM is not supported; supported: "),
    ],
)
def test_what_other_models_would_take(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        shape_from_config(tiny_config(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
