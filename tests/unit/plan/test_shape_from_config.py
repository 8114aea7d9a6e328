"""config.json to ModelShape: every family against transformers' own classes, and every refusal."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from tests.checkpoints import tiny_config
from thinslice.errors import CheckpointError
from thinslice.plan.architectures import SUPPORTED_ARCHITECTURES
from thinslice.plan.model_shape import RopeScaling
from thinslice.plan.shape_from_config import shape_from_config

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 3e-5,
}
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}
# XiaomiMiMo/MiMo-7B-RL
MIMO_CONFIG = {
    "architectures": ["MiMoForCausalLM"],
    "attention_bias": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 640000,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151680,
}


def saved(config: PreTrainedConfig, architecture: str) -> dict[str, Any]:
    """What transformers writes to config.json."""
    config.architectures = [architecture]
    written: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return written


@pytest.mark.parametrize("architecture", FAMILIES)
def test_sizes_are_those_of_transformers(architecture: str) -> None:
    reference = FAMILIES[architecture](**SIZES, tie_word_embeddings=True)
    shape = shape_from_config(saved(reference, architecture))
    assert shape.architecture == architecture
    for name, value in SIZES.items():
        assert getattr(shape, name) == value
    assert shape.head_dim == getattr(reference, "head_dim", 8)
    assert shape.tie_word_embeddings is True
    assert shape.rope_theta == reference.rope_parameters["rope_theta"]
    assert shape.rope_scaling is None
    assert shape.attention_bias is (architecture == "Qwen2ForCausalLM")
    assert shape.use_qk_norm is (architecture == "Qwen3ForCausalLM")
    assert shape.num_nextn_predict_layers == 0


@pytest.mark.parametrize("architecture", FAMILIES)
def test_keys_left_out_have_transformers_defaults(architecture: str) -> None:
    required = {name: SIZES[name] for name in SIZES if name != "rms_norm_eps"}
    config = {"architectures": [architecture], **required}
    reference = FAMILIES[architecture](**required)
    shape = shape_from_config(config)
    assert shape.rms_norm_eps == reference.rms_norm_eps
    assert shape.rope_theta == reference.rope_parameters["rope_theta"]
    assert shape.sliding_window == getattr(reference, "sliding_window", None)
    assert shape.head_dim == getattr(reference, "head_dim", 8)
    assert shape.tie_word_embeddings == reference.tie_word_embeddings


def test_mimo() -> None:
    shape = shape_from_config(MIMO_CONFIG, {"eos_token_id": 151643, "max_new_tokens": 2048})
    assert shape.num_nextn_predict_layers == 1
    assert shape.rope_theta == 640000.0
    assert shape.attention_bias
    assert not shape.attention_out_bias
    assert shape.sliding_window is None
    assert shape.eos_token_ids == (151645, 151643)
    assert shape.bos_token_id == 151643
    assert (shape.q_size, shape.kv_size) == (4096, 1024)


@pytest.mark.parametrize(
    ("architecture", "biased"),
    [
        ("LlamaForCausalLM", (True, True, True)),
        ("Qwen3ForCausalLM", (True, True, False)),
        ("MistralForCausalLM", (False, False, False)),
        ("Qwen2ForCausalLM", (True, False, False)),
        ("MiMoForCausalLM", (True, False, False)),
    ],
)
def test_biases_that_a_family_has_when_they_are_asked_for(
    architecture: str, biased: tuple[bool, bool, bool]
) -> None:
    shape = shape_from_config(tiny_config(architecture, attention_bias=True, mlp_bias=True))
    assert (shape.attention_bias, shape.attention_out_bias, shape.mlp_bias) == biased


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 8}, [8, 8, 8, 8]),
        ("MistralForCausalLM", {"sliding_window": None}, [None] * 4),
        ("LlamaForCausalLM", {"sliding_window": 8}, [None] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "max_window_layers": 1}, [None] * 4),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            [None, 8, 8, 8],
        ),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 8}, [None] * 4),
    ],
)
def test_sliding_window_of_each_layer(
    architecture: str, changes: dict[str, Any], windows: list[int | None]
) -> None:
    shape = shape_from_config(tiny_config(architecture, num_hidden_layers=4, **changes))
    assert [shape.window_of(layer_idx) for layer_idx in range(4)] == windows


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS = {
    "linear": ({"factor": 4.0}, RopeScaling("linear", 4.0, 512)),
    "llama3": (LLAMA3, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
    "yarn": (
        {
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 1.25,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "truncate": False,
        },
        RopeScaling(
            "yarn",
            4.0,
            128,
            attention_factor=1.25,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=1.0,
            mscale_all_dim=0.8,
            truncate=False,
        ),
    ),
}


@pytest.mark.parametrize("rope_type", SCALINGS)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_type", "type"])
def test_rotary_scaling_in_every_spelling(rope_type: str, spelling: str) -> None:
    numbers, expected = SCALINGS[rope_type]
    config = tiny_config(rope_theta=500000)
    if spelling == "rope_parameters":
        del config["rope_theta"]
        config[spelling] = {"rope_type": rope_type, "rope_theta": 500000.0, **numbers}
    else:
        config["rope_scaling"] = {spelling: rope_type, **numbers}
    shape = shape_from_config(config)
    assert shape.rope_theta == 500000.0
    assert shape.rope_scaling == expected


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": None}])
def test_no_rotary_scaling(scaling: Any) -> None:
    assert shape_from_config(tiny_config(rope_scaling=scaling)).rope_scaling is None


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "ids"),
    [
        (2, None, (2,)),
        (2, {"eos_token_id": [2, 5]}, (2, 5)),
        ([7, 8, 7], {"eos_token_id": 9}, (7, 8, 9)),
        (None, {"eos_token_id": 9}, (9,)),
        (None, {}, ()),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_every_end_of_sequence_id(in_config: Any, in_generation_config: Any, ids: tuple) -> None:
    shape = shape_from_config(tiny_config(eos_token_id=in_config), in_generation_config)
    assert shape.eos_token_ids == ids


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": None, "dtype": "float32"}, "float32"),
        ({"torch_dtype": "float8_e4m3fn"}, "bfloat16"),
        ({"torch_dtype": None}, "bfloat16"),
        ({"torch_dtype": ["float16"]}, "bfloat16"),
    ],
)
def test_dtype(changes: dict[str, Any], dtype: str) -> None:
    assert shape_from_config(tiny_config(**changes)).dtype == dtype


YARN = {"type": "yarn", "factor": 2.0}
REFUSALS = [
    ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported; supp"),
    ({"architectures": None, "model_type": "phi3"}, "architecture phi3 is not supported"),
    ({"architectures": []}, "neither architectures nor model_type is there; supported: Llama"),
    ({"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only silu is"),
    ({"hidden_act": ["silu"]}, "hidden_act is .* expected a string"),
    ({"hidden_act": None}, "hidden_act None is not supported; only silu is"),
    *[
        ({key: value}, f"config.json: {key} is .*; expected true or false")
        for key in ("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias")
        for value in ("false", 1, [True])
    ],
    *[
        ({"eos_token_id": value}, "config.json: eos_token_id is .*; expected a whole number or a")
        for value in ("2", 2.0, True, [2.5, "x"], [[1]], {}, [2, None])
    ],
    ({"bos_token_id": [1]}, "bos_token_id is .1.; expected a whole number"),
    ({"rope_scaling": {"type": None, "factor": 8.0}}, "scaling is null beside 'factor'; name it"),
    ({"text_config": {"hidden_size": 32}}, "text_config is .*in a way that is not supported"),
    ({"hidden_size": None}, "config.json: hidden_size is None; expected a whole number"),
    ({"hidden_size": 64.0}, "hidden_size is 64.0; expected a whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True; expected a whole number"),
    ({"vocab_size": -1}, "vocab_size is -1; expected a whole number 1.."),
    ({"vocab_size": 10**400}, "vocab_size is 10000"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
    ({"head_dim": 15}, "head_dim is 15; rotary embedding needs it even"),
    ({"rms_norm_eps": 0}, "rms_norm_eps 0.0 or rope_theta .* is out of range"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; expected a number"),
    ({"rope_theta": 10**400}, "rope_theta is 1000.*; expected a number"),
    ({"rope_theta": float("nan")}, "rope_theta is nan; expected a number"),
    ({"rope_scaling": "linear"}, "rope_scaling is not an object"),
    ({"rope_parameters": [1]}, "rope_parameters is not an object"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not supp"),
    ({"rope_scaling": {"type": "yarn"}}, "factor is missing; expected a number"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "rotary scaling: factor 0.5 with"),
    ({"rope_scaling": YARN | {"factor": float("nan")}}, "factor is nan; expected a number"),
    (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
        "rotary scaling: factor 2.0 with original_max_position_embeddings 0",
    ),
    ({"rope_scaling": YARN | {"beta_slow": 0}}, "beta_slow 0.0 with beta_fast 32.0"),
    ({"rope_scaling": YARN | {"mscale": -10}}, "mscale is -10.0; expected at least 0"),
    (
        {"rope_scaling": LLAMA3 | {"type": "llama3", "low_freq_factor": 4}},
        "low_freq_factor 4.0 with high_freq_factor 4.0",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_refusals_say_what_and_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        shape_from_config(tiny_config(**changes))


def test_an_end_of_another_type_is_refused_in_either_file() -> None:
    message = "generation_config.json: eos_token_id is '2'; expected a whole number or a list"
    with pytest.raises(CheckpointError, match=message):
        shape_from_config(tiny_config(), {"eos_token_id": "2"})


def test_refused_windows_and_prediction_layers() -> None:
    for window in (0, -4, "8", 1.5):
        with pytest.raises(CheckpointError, match="sliding_window is"):
            shape_from_config(tiny_config("MistralForCausalLM", sliding_window=window))
    active = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": None}
    with pytest.raises(CheckpointError, match="max_window_layers is null beside a window"):
        shape_from_config(tiny_config("Qwen2ForCausalLM", **active))
    idle = active | {"use_sliding_window": False}
    assert shape_from_config(tiny_config("Qwen2ForCausalLM", **idle)).sliding_window is None
    with pytest.raises(CheckpointError, match=r"num_nextn_predict_layers is 17; expected 0\.\.16"):
        shape_from_config(tiny_config("MiMoForCausalLM", num_nextn_predict_layers=17))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
ROPE_KEYS = ["rope_type", "factor", "original_max_position_embeddings", "beta_fast", "mscale"]
KEYS = [*MIMO_CONFIG, "rope_parameters", "hidden_act", "use_sliding_window", "rms_norm_eps"]


@settings(max_examples=300, deadline=None)
@given(
    architecture=st.sampled_from(SUPPORTED_ARCHITECTURES),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
    rope=st.dictionaries(st.sampled_from(ROPE_KEYS), JSON, max_size=3),
)
def test_any_json_value_gives_a_shape_or_a_checkpoint_error(
    architecture: str, changes: dict[str, Any], rope: dict[str, Any]
) -> None:
    config = {**tiny_config(architecture), "rope_scaling": {**YARN, **rope}, **changes}
    try:
        shape_from_config(config, changes)
    except CheckpointError:
        return
