"""GGUF metadata to ModelShape: equal to the config.json's, rotary scaling, and every refusal."""

import array
import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import tiny_config
from thinslice.errors import CheckpointError
from thinslice.plan.model_shape import ModelShape, RopeScaling
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.plan.shape_from_gguf import shape_from_gguf

TENSORS = {"token_embd.weight": (96, 64), "output.weight": (96, 64)}


def float32(value: float) -> float:
    """The value as a GGUF's float32 gives it back."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def tiny_metadata(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Metadata of tiny_config's model. In the names of ``changes``, __ stands for a dot."""
    sizes = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.layer_norm_rms_epsilon": float32(1e-5),
        "rope.freq_base": 10000.0,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"{architecture}.{name}": value for name, value in sizes.items()},
    }


def scaling_of(**changes: Any) -> RopeScaling | None:
    """Rotary scaling of a tiny model with some rope.* settings; _ ends a word, __ is a dot."""
    renamed = {f"rope__{name}": value for name, value in changes.items()}
    return shape_from_gguf(tiny_metadata(**renamed), TENSORS).rope_scaling


@pytest.mark.parametrize(
    ("architecture", "family", "tensors"),
    [
        ("llama", "LlamaForCausalLM", {}),
        ("qwen2", "Qwen2ForCausalLM", {"blk.0.attn_q.bias": (64,)}),
        ("qwen3", "Qwen3ForCausalLM", {}),
    ],
)
def test_same_shape_as_from_the_config(
    architecture: str, family: str, tensors: dict[str, tuple[int, ...]]
) -> None:
    shape = shape_from_gguf(tiny_metadata(architecture), TENSORS | tensors)
    assert shape == shape_from_config(tiny_config(family))


def test_what_the_tensors_tell() -> None:
    tensors = {
        "token_embd.weight": (96, 64),
        "blk.0.attn_q.bias": (64,),
        "blk.0.attn_output.bias": (64,),
        "blk.0.ffn_gate.bias": (96,),
    }
    shape = shape_from_gguf(tiny_metadata(), tensors)
    assert shape.tie_word_embeddings
    assert (shape.attention_bias, shape.attention_out_bias, shape.mlp_bias) == (True, True, True)
    assert shape.vocab_size == 96


def test_defaults() -> None:
    metadata = tiny_metadata()
    for key in ("attention.head_count_kv", "attention.key_length", "rope.freq_base"):
        del metadata[f"llama.{key}"]
    shape = shape_from_gguf(metadata, TENSORS)
    assert shape.num_key_value_heads == 4
    assert shape.head_dim == 16
    assert shape.rope_theta == 10000.0


def test_sizes_given_once_per_layer() -> None:
    per_layer = array.array("I", [2, 2])
    shape = shape_from_gguf(tiny_metadata(attention__head_count_kv=per_layer), TENSORS)
    assert shape.num_key_value_heads == 2
    for unequal in (array.array("I", [2, 4]), array.array("I"), ["2", "2"]):
        with pytest.raises(CheckpointError, match="expected one whole number for all layers"):
            shape_from_gguf(tiny_metadata(attention__head_count_kv=unequal), TENSORS)


@pytest.mark.parametrize("written", [1e-5, 1e-6, 1.1902381, 640000.0, 1e9, 0.1, 1 / 3])
def test_float32_comes_back_as_it_was_written(written: float) -> None:
    shape = shape_from_gguf(tiny_metadata(rope__freq_base=float32(written)), TENSORS)
    assert float32(shape.rope_theta) == float32(written)
    assert len(f"{shape.rope_theta!r}") <= len(f"{float32(written)!r}")
    if written != 1 / 3:
        assert shape.rope_theta == written


def test_every_end_of_sequence_id() -> None:
    metadata = tiny_metadata()
    metadata |= {
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.eom_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 9,
    }
    assert shape_from_gguf(metadata, TENSORS).eos_token_ids == (2, 7)


def test_sliding_window_is_mistrals_only() -> None:
    mistral = shape_from_gguf(tiny_metadata(attention__sliding_window=128), TENSORS)
    assert [mistral.window_of(0), mistral.window_of(1)] == [128, 128]
    qwen = shape_from_gguf(tiny_metadata("qwen2", attention__sliding_window=128), TENSORS)
    assert qwen.window_of(0) is None
    with pytest.raises(CheckpointError, match=r"attention.sliding_window is -1"):
        shape_from_gguf(tiny_metadata(attention__sliding_window=-1), TENSORS)


def test_no_rotary_scaling() -> None:
    assert scaling_of() is None
    assert scaling_of(scaling__type="none", scaling__factor=4.0) is None
    assert scaling_of(scaling__type="linear", scaling__factor=1.0) is None
    assert scaling_of(scaling__type="yarn", scaling__factor=0.0) is None


def test_linear_scaling_in_every_spelling() -> None:
    expected = RopeScaling("linear", 4.0, 512)
    assert scaling_of(scaling__type="linear", scaling__factor=4.0) == expected
    assert scaling_of(scaling__factor=4.0) == expected
    assert scaling_of(scale_linear=4.0) == expected


def test_yarn() -> None:
    yarn = {"scaling__type": "yarn", "scaling__factor": 4.0}
    assert scaling_of(**yarn) == RopeScaling("yarn", 4.0, 512)
    settings = {
        "scaling__original_context_length": 128,
        "scaling__yarn_beta_fast": 16.0,
        "scaling__yarn_beta_slow": 2.0,
        "scaling__yarn_log_multiplier": float32(0.8),
    }
    assert scaling_of(**yarn, **settings) == RopeScaling(
        "yarn", 4.0, 128, beta_fast=16.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.8
    )


@pytest.mark.parametrize("log_multiplier", [0.0, 0.5, 1.0])
def test_yarn_attn_factor_multiplies_what_the_other_settings_give(log_multiplier: float) -> None:
    scaling = scaling_of(
        scaling__type="yarn",
        scaling__factor=8.0,
        scaling__attn_factor=1.5,
        scaling__yarn_log_multiplier=log_multiplier,
    )
    assert scaling is not None
    divisor = 0.1 * log_multiplier * math.log(8.0) + 1.0
    assert scaling.attention_factor == pytest.approx(1.5 * (0.1 * math.log(8.0) + 1.0) / divisor)


def test_rotary_factors() -> None:
    factors = (1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0)
    shape = shape_from_gguf(tiny_metadata(), TENSORS, factors)
    assert shape.rope_scaling == RopeScaling("factors", freq_factors=factors)
    for wrong in (factors[1:], (*factors[1:], 0.0), (*factors[1:], math.nan)):
        with pytest.raises(CheckpointError, match=r"has . factors; expected 8"):
            shape_from_gguf(tiny_metadata(), TENSORS, wrong)
    with pytest.raises(CheckpointError, match=r"twice: linear and rope_freqs.weight"):
        shape_from_gguf(tiny_metadata(rope__scaling__factor=2.0), TENSORS, factors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, "GGUF llama: block_count is None; expected a whole number"),
        ({"block_count": "2"}, "block_count is '2'"),
        ({"block_count": 0}, "num_hidden_layers is 0"),
        ({"block_count": 1 << 62}, "num_hidden_layers is 4611686018427387904"),
        ({"embedding_length": 1 << 40}, "hidden_size is 1099511627776"),
        ({"attention__head_count": 0}, "num_attention_heads is 0"),
        ({"attention__value_length": 8}, "attention.value_length is 8 and the head size 16"),
        ({"rope__dimension_count": 8}, "rope.dimension_count is 8 and the head size 16"),
        ({"expert_count": 8}, "mixture of experts; only dense models"),
        ({"attention__layer_norm_rms_epsilon": None}, "rms_epsilon is None; expected a number"),
        ({"attention__layer_norm_rms_epsilon": math.inf}, "rms_epsilon is inf; expected a number"),
        ({"rope__freq_base": math.nan}, "rope.freq_base is nan; expected a number"),
        ({"rope__freq_base": 1e300}, "rope.freq_base is 1e.300; expected a number"),
        ({"rope__scaling__type": "longrope"}, "rotary scaling 'longrope' is not supported"),
        ({"rope__scaling__type": 3}, "rope.scaling.type is 3; expected a string"),
        ({"rope__scaling__factor": -2.0}, "rotary scaling: factor -2.0"),
    ],
)
def test_refusals_say_what_and_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        shape_from_gguf(tiny_metadata(**changes), TENSORS)


@pytest.mark.parametrize("found", ["gemma3", None, 7, ["llama"]])
def test_other_architectures_are_named_with_the_supported_ones(found: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        shape_from_gguf({"general.architecture": found}, {})
    message = f"GGUF architecture {found!r} is not supported; supported: llama, qwen2, qwen3"
    assert str(caught.value) == message


def test_vocabulary() -> None:
    with pytest.raises(CheckpointError, match=r"no token_embd.weight; it is not a whole model"):
        shape_from_gguf(tiny_metadata(), {})
    metadata = tiny_metadata() | {"tokenizer.ggml.tokens": ["a"] * 97}
    with pytest.raises(CheckpointError, match=r"lists 97 tokens but token_embd.weight has 96 rows"):
        shape_from_gguf(metadata, TENSORS)


def test_yarn_settings_out_of_range() -> None:
    yarn = {"scaling__type": "yarn", "scaling__factor": 4.0}
    for name, value in (
        ("yarn_beta_slow", 0.0),
        ("yarn_log_multiplier", -8.0),
        ("attn_factor", -1),
    ):
        with pytest.raises(CheckpointError, match="rotary scaling: "):
            scaling_of(**yarn, **{f"scaling__{name}": value})


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([])
) | st.lists(st.integers(), max_size=3)
KEYS = [key.removeprefix("llama.") for key in tiny_metadata() if key.startswith("llama.")] + [
    f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "attn_factor")
]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_value_gives_a_shape_or_a_checkpoint_error(changes: dict[str, Any]) -> None:
    metadata = tiny_metadata(rope__scaling__type="yarn", rope__scaling__factor=2.0)
    metadata |= {f"llama.{key}": value for key, value in changes.items()}
    try:
        shape = shape_from_gguf(metadata, TENSORS)
    except CheckpointError:
        return
    assert isinstance(shape, ModelShape)
