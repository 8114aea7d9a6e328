"""Rotary settings in the three places of a config.json, against transformers' own reading.

Where ours gives settings, the frequencies and the factor of attention are those transformers
computes; what two places contradict each other in is refused.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import LlamaConfig, modeling_rope_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.checkpoints import tiny_config
from thinslice.errors import CheckpointError
from thinslice.kernels.rotary import attention_factor, inverse_frequencies
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.shape_from_config import notes_of_config, shape_from_config

MAX_POSITIONS = 512
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"
PLACES = ("top", "rope_scaling", "rope_parameters", "nested")


def placed(values: dict[str, Any], where: dict[str, str]) -> dict[str, Any]:
    """A config.json with each rotary setting in the place that is named for it."""
    config = tiny_config(max_position_embeddings=MAX_POSITIONS)
    del config["rope_theta"]
    for name, value in values.items():
        place = where[name]
        if place == "top":
            config[name] = value
        elif place == "nested":
            inner = config.setdefault("rope_parameters", {}).setdefault("full_attention", {})
            inner[name] = value
        else:
            config.setdefault(place, {})[name] = value
    return config


class Doubles:
    """torch, whose single precision is double: what transformers rounds at each step is not what
    its formulas are held for."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(scope="module", autouse=True)
def formulas_in_double_precision() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (modeling_rope_utils, modeling_llama):
            patch.setattr(module, "torch", Doubles())
        yield


def of_transformers(values: dict[str, Any]) -> tuple[NDArray[np.float64], float]:
    """What transformers makes of the settings in its own place."""
    sizes = tiny_config(max_position_embeddings=MAX_POSITIONS)
    for name in ("architectures", "torch_dtype", "sliding_window", "rope_theta"):
        del sizes[name]
    config = LlamaConfig(**sizes, rope_parameters=json.loads(json.dumps(values)))
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](config)
    return inv_freq.numpy(), float(factor)


def assert_same(shape: ModelShape, values: dict[str, Any]) -> None:
    inv_freq, factor = of_transformers(values)
    found = inverse_frequencies(shape)
    assert (found.dtype, inv_freq.dtype) == (np.float32, np.float64)
    # Where two frequencies are blended, each rounded to single precision, an error is as large as
    # the larger one has it, of which a factor may leave a sixteenth.
    exponents = np.arange(0, shape.head_dim, 2) / shape.head_dim
    terms = np.maximum(inv_freq, values["rope_theta"] ** -exponents)
    assert (np.abs(found - inv_freq) <= 1e-6 * terms).all()
    assert attention_factor(shape.rope_scaling) == pytest.approx(factor, rel=1e-12)


optional = st.none() | st.floats(0.25, 4.0)
SCALINGS = st.one_of(
    st.fixed_dictionaries({}, optional={"rope_type": st.just("default")}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": st.floats(1.0, 16.0)}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1.0, 16.0),
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 8.0),
        },
        optional={ORIGINAL: st.integers(32, 511)},
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": st.none() | st.floats(1.0, 16.0)},
        optional={
            ORIGINAL: st.integers(32, 512),
            "attention_factor": optional,
            "beta_fast": st.none() | st.integers(16, 64),
            "beta_slow": st.none() | st.integers(1, 8),
            "mscale": optional,
            "mscale_all_dim": optional,
            "truncate": st.none() | st.booleans(),
        },
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    values=SCALINGS,
    theta=st.none() | st.floats(1000.0, 5e6) | st.integers(1000, 5_000_000),
    choices=st.lists(st.sampled_from(PLACES), min_size=12, max_size=12),
)
def test_settings_mean_the_same_wherever_they_stand(
    values: dict[str, Any], theta: float | None, choices: list[str]
) -> None:
    if theta is not None:
        values = {**values, "rope_theta": theta}
    places = iter(choices)
    top = ("rope_theta", ORIGINAL)
    where = {
        name: place if (place := next(places)) != "top" or name in top else "rope_scaling"
        for name in values
    }
    shape = shape_from_config(placed(values, where))
    assert_same(shape, {"rope_type": "default", "rope_theta": 10000.0} | values)
    assert notes_of_config(placed(values, where)) == ()


YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 128, "rope_theta": 1000000.0}


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(PLACES, 2)))
@pytest.mark.parametrize("name", YARN)
def test_what_is_said_twice_must_agree(first: str, second: str, name: str) -> None:
    if "top" in (first, second) and name not in ("rope_theta", ORIGINAL):
        return  # these have no place at the top level
    config = placed(YARN, dict.fromkeys(YARN, second if second != "top" else first))
    again = placed({name: YARN[name]}, {name: first if second != "top" else second})
    for key in ("rope_scaling", "rope_parameters"):
        if key in again:
            config[key] = config.get(key, {}) | again[key]
    config |= {key: again[key] for key in ("rope_theta", ORIGINAL) if key in again}
    assert_same(shape_from_config(config), YARN)

    def changed(value: Any) -> Any:
        return {"yarn": "linear"}.get(value, 64) if isinstance(value, str | int) else value / 2

    place: dict[str, Any] = config
    if first != "top":
        place = config["rope_parameters" if first == "nested" else first]
        place = place["full_attention"] if first == "nested" else place
    place[name] = changed(YARN[name])
    with pytest.raises(CheckpointError, match=f"config.json: {name} is .* make them agree"):
        shape_from_config(config)


def test_both_spellings_of_the_type_must_agree() -> None:
    scaling = {"factor": 4.0, ORIGINAL: 128}
    assert shape_from_config(
        tiny_config(rope_scaling={"type": "yarn", "rope_type": "yarn", **scaling})
    ) == shape_from_config(tiny_config(rope_scaling={"type": "yarn", **scaling}))
    with pytest.raises(
        CheckpointError, match="rope_type is 'linear' in rope_scaling and 'yarn' in"
    ):
        shape_from_config(tiny_config(rope_scaling={"type": "linear", "rope_type": "yarn"}))


def test_layers_with_other_rotary_settings_are_refused() -> None:
    kinds = ("full_attention", "sliding_attention")
    same = {kind: {"rope_type": "default", "rope_theta": 5000.0} for kind in kinds}
    config = tiny_config("Qwen3ForCausalLM", rope_parameters=same)
    del config["rope_theta"]
    assert shape_from_config(config).rope_theta == 5000.0
    config["rope_parameters"] = same | {"sliding_attention": {"rope_theta": 10000.0}}
    with pytest.raises(CheckpointError, match=r"rope_theta is 5000\.0 in rope_parameters\.full"):
        shape_from_config(config)
    config["rope_parameters"] = same | {"sliding_attention": None}
    with pytest.raises(CheckpointError, match=r"\.sliding_attention is not an object"):
        shape_from_config(config)


@pytest.mark.parametrize(
    ("max_positions", "original", "factor", "context"),
    [
        (512, 512, 4.0, 2048),  # the recipe of the model cards: the config keeps what it was
        (640, 512, 4.0, 2048),  # Qwen3's, which has room for an answer beside the original
        (2048, 512, 4.0, 2048),  # a config that says the scaled context itself
        (512, None, 4.0, 2048),
        (512, 128, None, 512),
        (512, 100, 2.5, 512),
    ],
)
def test_the_context_of_yarn(
    max_positions: int, original: int | None, factor: float | None, context: int
) -> None:
    scaling = {"type": "yarn", "factor": factor, ORIGINAL: original}
    config = tiny_config(max_position_embeddings=max_positions, rope_scaling=scaling)
    assert shape_from_config(config).max_position_embeddings == context


def test_other_scalings_leave_the_context_alone() -> None:
    for scaling in ({"type": "linear", "factor": 4.0}, {"type": "llama3", "factor": 4.0, **LLAMA3}):
        assert shape_from_config(tiny_config(rope_scaling=scaling)).max_position_embeddings == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only rotary embedding of"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "is not supported"),
        ({"rope_scaling": YARN | {"rope_theta": 1.0}, "rope_theta": None}, "rope_theta 1.0; "),
        ({"rope_scaling": YARN | {"rope_theta": 0.5}, "rope_theta": None}, "rope_theta 0.5; "),
        (
            {"rope_scaling": {**YARN, "truncate": "false"}, "rope_theta": None},
            "truncate is 'false'",
        ),
        ({"rope_theta": 0.0}, "rope_theta 0.0 is out of range"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_scaling": {**YARN, "rope_theta": None, "beta_slow": 5e-324}}, "beta_slow 5e-324"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        shape_from_config(tiny_config(**changes))


def test_settings_of_another_type_are_named() -> None:
    scaling = {
        "type": "linear",
        "factor": 2.0,
        "beta_fast": 32,
        "new_setting": 1,
        "finetuned": True,
    }
    assert notes_of_config(tiny_config(rope_scaling=scaling)) == (
        "config.json's rotary scaling sets beta_fast, new_setting, which are not known to "
        "thinslice and not read",
    )


def test_a_planted_fault_is_seen() -> None:
    """The comparison with transformers fails where one place is dropped."""
    config = placed(YARN, dict.fromkeys(YARN, "rope_scaling") | {"rope_theta": "rope_parameters"})
    assert_same(shape_from_config(config), YARN)
    del config["rope_parameters"]
    with pytest.raises(AssertionError):
        assert_same(shape_from_config(config), YARN)
