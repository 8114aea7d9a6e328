"""The tables of keys: whole, without overlaps, and each key does what its table says."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import gguf
import pytest
from transformers import GenerationConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
)

from tests.checkpoints import tiny_config
from thinslice.errors import CheckpointError
from thinslice.plan.advised_sampling import GGUF_NAMES
from thinslice.plan.known_keys import (
    CONFIG_INERT,
    CONFIG_NEUTRAL,
    CONFIG_READ,
    GENERATION_INERT,
    GENERATION_NOT_APPLIED,
    GENERATION_READ,
    GGUF_INERT,
    GGUF_NEUTRAL,
    GGUF_READ,
    GGUF_SAMPLING_INERT,
    GGUF_SAMPLING_NOT_APPLIED,
    GGUF_SAMPLING_READ,
    gguf_notes,
)
from thinslice.plan.shape_from_config import notes_of_config, shape_from_config
from thinslice.plan.shape_from_gguf import shape_from_gguf

CLASSES = (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
)
OTHER = "no value that any table lists"
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
# For each key that is read: settings to begin with, and another value that must be seen.
READ: dict[str, tuple[dict[str, Any], Any]] = {
    "architectures": ({}, ["MistralForCausalLM"]),
    "attention_bias": ({}, True),
    "bos_token_id": ({}, 7),
    "dtype": ({}, "float32"),
    "eos_token_id": ({}, 7),
    "head_dim": ({}, 32),
    "hidden_act": ({}, "gelu"),
    "hidden_size": ({}, 128),
    "intermediate_size": ({}, 128),
    "layer_types": (
        {"architectures": ["Qwen3ForCausalLM"], **WINDOW},
        ["sliding_attention", "full_attention"],
    ),
    "max_position_embeddings": ({}, 1024),
    "max_window_layers": ({"architectures": ["Qwen2ForCausalLM"], **WINDOW}, 0),
    "mlp_bias": ({}, True),
    "model_type": ({"architectures": None, "model_type": "llama"}, "qwen3"),
    "num_attention_heads": ({}, 8),
    "num_hidden_layers": ({}, 3),
    "num_key_value_heads": ({}, 4),
    "num_nextn_predict_layers": ({"architectures": ["MiMoForCausalLM"]}, 2),
    "original_max_position_embeddings": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 64),
    "partial_rotary_factor": ({}, 0.5),
    "quantization_config": ({}, {"quant_method": "awq"}),
    "rms_norm_eps": ({}, 1e-6),
    "rope_parameters": ({}, {"rope_type": "linear", "factor": 2.0}),
    "rope_scaling": ({}, {"rope_type": "linear", "factor": 2.0}),
    "rope_theta": ({}, 500000.0),
    "sliding_window": ({"architectures": ["MistralForCausalLM"]}, 8),
    "tie_word_embeddings": ({}, True),
    "torch_dtype": ({}, "float32"),
    "use_sliding_window": (
        {"architectures": ["Qwen2ForCausalLM"], **WINDOW, "use_sliding_window": False},
        True,
    ),
    "vocab_size": ({}, 128),
}


def outcome(config: Mapping[str, Any]) -> Any:
    """The shape, or the words of the refusal."""
    try:
        return shape_from_config(config)
    except CheckpointError as error:
        return str(error)


def test_every_key_of_the_reference_classes_is_in_a_table() -> None:
    keys = {field.name for one in CLASSES for field in fields(one)}
    keys |= {key for one in CLASSES for key in one().to_dict()}
    assert keys - {"text_config"} <= CONFIG_READ | set(CONFIG_NEUTRAL) | CONFIG_INERT
    generation = set(vars(GenerationConfig())) | {"transformers_version"}
    known = GENERATION_READ | GENERATION_INERT | set(GENERATION_NOT_APPLIED)
    assert generation <= known
    assert set(GenerationConfig._get_default_generation_params()) <= known


@pytest.mark.parametrize(
    "tables",
    [
        (CONFIG_READ, CONFIG_NEUTRAL, CONFIG_INERT),
        (GENERATION_READ, GENERATION_INERT, GENERATION_NOT_APPLIED),
        (GGUF_READ, GGUF_NEUTRAL, GGUF_INERT),
    ],
)
def test_no_key_is_in_two_tables(tables: tuple[Any, ...]) -> None:
    keys = [key for table in tables for key in table]
    assert len(keys) == len(set(keys))


def test_what_is_read_changes_what_is_computed() -> None:
    assert set(READ) == CONFIG_READ
    for key, (changes, value) in READ.items():
        config = tiny_config(**changes)
        config.pop("torch_dtype" if key == "dtype" else "", None)
        assert outcome({**config, key: value}) != outcome(config), key


@pytest.mark.parametrize("key", CONFIG_NEUTRAL)
def test_what_would_change_numbers_is_refused(key: str) -> None:
    plain = shape_from_config(tiny_config())
    for neutral in (None, *CONFIG_NEUTRAL[key]):
        assert shape_from_config(tiny_config(**{key: neutral})) == plain
    with pytest.raises(CheckpointError, match=key):
        shape_from_config(tiny_config(**{key: OTHER}))


def test_what_does_not_matter_changes_nothing_and_is_not_named() -> None:
    config = tiny_config(**dict.fromkeys(CONFIG_INERT, OTHER))
    assert shape_from_config(config) == shape_from_config(tiny_config())
    assert notes_of_config(config, dict.fromkeys(GENERATION_INERT, OTHER)) == ()


def test_other_keys_are_named_on_one_line_for_each_file() -> None:
    config = tiny_config(**{f"new_{number}": 0 for number in range(10)})
    generation = {"novel": 1, "suppress_tokens": [3], "guidance_scale": 1.0, "stop_strings": ["."]}
    assert notes_of_config(config, generation) == (
        "config.json sets new_0, new_1, new_2, new_3, new_4, new_5, new_6, new_7 and 2 more, which "
        "are not known to thinslice and not read",
        "generation_config.json sets novel, which is not known to thinslice and not read",
        "generation_config.json sets stop_strings, suppress_tokens, which are not applied",
    )


@pytest.mark.parametrize("key", GENERATION_NOT_APPLIED)
def test_generation_settings_are_named_where_they_would_change_an_answer(key: str) -> None:
    for neutral in (None, *GENERATION_NOT_APPLIED[key]):
        assert notes_of_config(tiny_config(), {key: neutral, "length_penalty": 2.0}) == ()
    assert notes_of_config(tiny_config(), {key: OTHER}) == (
        f"generation_config.json sets {key}, which is not applied",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("typical_p", 0.9),
        ("epsilon_cutoff", 1e-4),
        ("eta_cutoff", 1e-4),
        ("top_h", 0.4),
        ("min_new_tokens", 5),
        ("min_length", 5),
        ("num_beams", 4),
        ("encoder_repetition_penalty", 1.2),
    ],
)
def test_what_transformers_samples_by_and_thinslice_does_not_is_named(
    key: str, value: float
) -> None:
    defaults = GenerationConfig().to_dict()
    assert notes_of_config(tiny_config(), defaults) == ()
    assert notes_of_config(tiny_config(), {**defaults, key: value}) == (
        f"generation_config.json sets {key}, which is not applied",
    )


def test_names_from_a_file_are_shown_on_one_line_without_characters_that_control() -> None:
    generation = {"a\x1b[31m\nb": 1, "é\u202e": 1, "\ud800": 1}
    (note,) = notes_of_config(tiny_config(), generation)
    assert note == (
        r"generation_config.json sets a\x1b[31m\nb, é\u202e, \ud800, which are not known to "
        "thinslice and not read"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["A\nB\x1b"]},
        {"model_type": "A\nB\x1b"},
        {"quantization_config": {"quant_method": "A\nB\x1b"}},
        {"architectures": ["New"], "hidden_act": "A\nB\x1b"},
        {"architectures": ["New"], "quantization_config": {"quant_method": "A\nB\x1b"}},
        {"rope_parameters": {"A\nB\x1b_attention": 1}},
        {"rope_scaling": {"A\nB\x1b": 1}, "rope_parameters": {"A\nB\x1b": 2}},
        {"rope_scaling": {"type": None, "A\nB\x1b": 1}},
    ],
)
def test_a_refusal_shows_what_a_file_says_on_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        shape_from_config(tiny_config(**changes))
    assert str(caught.value).isprintable()
    assert r"A\nB\x1b" in str(caught.value)


@pytest.mark.parametrize("section", [{"quant_method": "quark"}, {"bits": 4}, "int8"])
@pytest.mark.parametrize("key", ["quantization_config", "quantization", "compression_config"])
def test_models_that_others_quantised_are_refused_by_their_settings(key: str, section: Any) -> None:
    method = section.get("quant_method", key) if isinstance(section, dict) else key
    message = (
        rf"{key} says that this model was quantised \({method}\), which is not supported; take"
    )
    with pytest.raises(CheckpointError, match=message):
        shape_from_config(tiny_config(**{key: section}))


METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
TENSORS = {"token_embd.weight": (96, 64)}


def gguf_outcome(metadata: Mapping[str, Any]) -> Any:
    try:
        return shape_from_gguf(metadata, TENSORS)
    except CheckpointError as error:
        return str(error)


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
GGUF_OTHER: dict[str, tuple[dict[str, Any], Any]] = {
    "attention.head_count": ({}, 8),
    "attention.head_count_kv": ({}, 1),
    "attention.key_length": ({}, 32),
    "attention.layer_norm_rms_epsilon": ({}, 1e-6),
    "attention.scale": ({}, 0.5),
    "attention.sliding_window": ({}, 8),
    "attention.value_length": ({}, 32),
    "block_count": ({}, 3),
    "context_length": ({}, 1024),
    "embedding_length": ({}, 128),
    "expert_count": ({}, 8),
    "feed_forward_length": ({}, 128),
    "rope.dimension_count": ({}, 8),
    "rope.freq_base": ({}, 500000.0),
    "rope.scale_linear": ({}, 2.0),
    "rope.scaling.attn_factor": ({}, 1.5),
    "rope.scaling.factor": ({}, 2.0),
    "rope.scaling.original_context_length": (YARN, 64),
    "rope.scaling.type": (YARN, "linear"),
    "rope.scaling.yarn_beta_fast": (YARN, 16.0),
    "rope.scaling.yarn_beta_slow": (YARN, 2.0),
    "rope.scaling.yarn_log_multiplier": (YARN, 0.5),
}


def with_keys(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {**METADATA, **{f"llama.{key}": value for key, value in changes.items()}}


def test_gguf_keys_that_are_read_change_what_is_computed() -> None:
    assert set(GGUF_OTHER) == GGUF_READ
    for key, (changes, value) in GGUF_OTHER.items():
        plain = with_keys(changes)
        assert gguf_outcome({**plain, f"llama.{key}": value}) != gguf_outcome(plain), key


@pytest.mark.parametrize("key", GGUF_NEUTRAL)
def test_gguf_keys_that_would_change_numbers_are_refused(key: str) -> None:
    for neutral in GGUF_NEUTRAL[key]:
        assert gguf_outcome(with_keys({key: neutral})) == gguf_outcome(METADATA)
    with pytest.raises(CheckpointError, match=f"GGUF llama: {key} is 'no value"):
        shape_from_gguf(with_keys({key: OTHER}), TENSORS)


def test_gguf_keys_that_do_not_matter_change_nothing() -> None:
    keys = with_keys(dict.fromkeys(GGUF_INERT, OTHER)) | {"general.comment": 1, "split.no": 0}
    assert gguf_outcome(keys) == gguf_outcome(METADATA)
    assert gguf_notes(keys, "llama") == ()
    unknown = dict.fromkeys(["llama.new", "qwen2.block_count", "general.sampling.novel"], 1)
    assert gguf_notes(keys | unknown, "llama") == (
        "this GGUF sets general.sampling.novel, llama.new, qwen2.block_count, which are not known "
        "to thinslice and not read",
    )


def test_sampling_keys_of_a_gguf_are_whole_and_those_not_applied_are_named() -> None:
    prefix = "general.sampling."
    names = {
        value.removeprefix(prefix)
        for value in vars(gguf.Keys.General).values()
        if isinstance(value, str) and value.startswith(prefix)
    }
    tables = (GGUF_SAMPLING_READ, GGUF_SAMPLING_INERT, set(GGUF_SAMPLING_NOT_APPLIED))
    assert set().union(*tables) == names
    assert sum(map(len, tables)) == len(names)
    assert set(GGUF_NAMES) == GGUF_SAMPLING_READ
    quiet = dict.fromkeys((*GGUF_SAMPLING_READ, *GGUF_SAMPLING_INERT), 1)
    assert gguf_notes({f"{prefix}{key}": value for key, value in quiet.items()}, "llama") == ()
    for key, neutral in GGUF_SAMPLING_NOT_APPLIED.items():
        for value in neutral:
            assert gguf_notes({prefix + key: value}, "llama") == ()
        assert gguf_notes({prefix + key: OTHER}, "llama") == (
            f"this GGUF sets {prefix}{key}, which is not applied",
        )


def test_the_scale_of_attention_may_be_said_where_it_is_the_usual_one() -> None:
    for scale in (0.0, 0.25):
        assert gguf_outcome(with_keys({"attention.scale": scale})) == gguf_outcome(METADATA)


def test_yarn_of_a_gguf_gives_the_scaled_context() -> None:
    shape = shape_from_gguf(with_keys(YARN), TENSORS)
    assert shape.max_position_embeddings == 2048


def test_keys_are_spelled_as_the_gguf_package_has_them() -> None:
    names = {
        value.removeprefix("{arch}.")
        for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        for value in vars(group).values()
        if isinstance(value, str) and value.startswith("{arch}.")
    }
    only_in_llama_cpp = {"hidden_activation", "attention.value_scale", "rope.scale_linear"}
    assert GGUF_READ | set(GGUF_NEUTRAL) | GGUF_INERT <= names | only_in_llama_cpp
