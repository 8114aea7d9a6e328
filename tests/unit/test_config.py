"""What EngineSettings refuses, and whose sampling parameters hold."""

from typing import Any

import pytest

from thinslice.config import ADVISABLE, EngineSettings, SamplingParams, TokenSampling
from thinslice.errors import ConfigError, RequestError


@pytest.mark.parametrize("mtp_hidden", ["pre-norm", "post-norm"])
@pytest.mark.parametrize("draft", ["auto", "mtp"])
def test_a_prediction_layer_takes_either_hidden_state(draft: str, mtp_hidden: str) -> None:
    assert EngineSettings(draft=draft, mtp_hidden=mtp_hidden).mtp_hidden == mtp_hidden


def test_a_hidden_state_of_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="mtp_hidden 'mid' is unknown; one of pre-norm, post-"):
        EngineSettings(mtp_hidden="mid")


@pytest.mark.parametrize("draft", ["ngram", "off"])
def test_a_hidden_state_that_nothing_takes_is_refused(draft: str) -> None:
    with pytest.raises(ConfigError, match=f"draft {draft} uses none; draft mtp does"):
        EngineSettings(draft=draft, mtp_hidden="post-norm")


OF_USER = {
    "temperature": 0.9,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.3,
}
OF_MODEL = {
    "temperature": 0.2,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
}
DEFAULTS = {
    "temperature": 0.6,
    "top_k": 0,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


@pytest.mark.parametrize("name", ADVISABLE)
def test_the_users_value_holds_then_the_models_then_the_default(name: str) -> None:
    given: dict[str, Any] = {name: OF_USER[name]}
    advised = {name: OF_MODEL[name]}
    for params, of_model, value, source in (
        (SamplingParams(**given), advised, OF_USER[name], "user"),
        (SamplingParams(**given), {}, OF_USER[name], "user"),
        (SamplingParams(), advised, OF_MODEL[name], "model"),
        (SamplingParams(), {}, DEFAULTS[name], "default"),
    ):
        used = params.resolved(of_model)
        assert getattr(used, name) == getattr(used.token_sampling, name) == value
        assert params.sources(of_model)[name] == source
        others = set(ADVISABLE) - {name}
        assert all(getattr(used, other) == DEFAULTS[other] for other in others)


def test_zero_is_a_value_of_the_users() -> None:
    params = SamplingParams(temperature=0, top_k=0, min_p=0)
    used = params.resolved(OF_MODEL)
    assert (used.temperature, used.top_k, used.min_p, used.top_p) == (0, 0, 0, 0.8)
    assert used.is_greedy


def test_resolving_keeps_every_other_parameter() -> None:
    params = SamplingParams(seed=3, stop=("x",), max_tokens=4, presence_penalty=0.5)
    assert params.resolved({}) == SamplingParams(
        **DEFAULTS, seed=3, stop=("x",), max_tokens=4, presence_penalty=0.5
    )


def test_parameters_that_nobody_resolved_have_the_defaults() -> None:
    assert SamplingParams().token_sampling == TokenSampling(**DEFAULTS)


@pytest.mark.parametrize(
    "value",
    # Python writes no number of 5,000 digits.
    [float("nan"), float("inf"), -1, 10**400, pytest.param(10**5000, id="long"), True, "hot"],
)
@pytest.mark.parametrize("name", ADVISABLE)
def test_a_sampling_parameter_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} is .*; expected "):
        SamplingParams(**{name: value})


class Ambiguous:
    """As an array is: neither equal nor unequal to anything."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value is ambiguous")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(10**6000, id="long"),
        pytest.param(-(10**6000), id="low"),
        Ambiguous(),
        [1],
        b"int4",
        1.5,
    ],
)
@pytest.mark.parametrize(
    "name",
    ["memory", "device", "context", "dtype", "kv_dtype", "draft", "draft_length", "max_num_seqs"],
)
def test_settings_of_no_sense_are_told_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}"):
        EngineSettings(**{name: value})


def test_flags_are_true_or_false() -> None:
    for value in ("no", 1, None, [], Ambiguous()):
        with pytest.raises(ConfigError, match=r"offline is .*; expected True or False"):
            EngineSettings(offline=value)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"ignore_eos is .*; expected True or False"):
            SamplingParams(ignore_eos=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^memory: 'x' is not a size"):
        EngineSettings(memory="x")
    for memory in ("999999999TiB", 1 << 61):
        with pytest.raises(ConfigError, match="memory is more memory than there is"):
            EngineSettings(memory=memory)
        with pytest.raises(ConfigError, match="reserve is more memory than there is"):
            EngineSettings(reserve=memory)
    for reserve in (-1, 1.5, None, True, "x"):
        for name in ("reserve", "reserve_per_token"):
            with pytest.raises(ConfigError, match=f"^{name}"):
                EngineSettings(**{name: reserve})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="stop is a int that cannot be written out"):
        SamplingParams(stop=10**6000)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_thinking_tokens": -1}, "max_thinking_tokens is -1; expected 0"),
        ({"max_thinking_tokens": 1.5}, "max_thinking_tokens is 1.5; expected a whole number"),
        ({"max_thinking_seconds": -0.1}, "max_thinking_seconds is -0.1; expected 0.0"),
        ({"max_thinking_seconds": float("nan")}, "max_thinking_seconds is nan"),
        ({"max_thinking_seconds": True}, "max_thinking_seconds is True; expected a number"),
    ],
)
def test_what_is_no_thinking_budget_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        SamplingParams(**given)


def test_no_seconds_are_no_tokens() -> None:
    assert SamplingParams(max_thinking_seconds=0, max_thinking_tokens=9).most_thinking_tokens == 0
    assert SamplingParams(max_thinking_seconds=1, max_thinking_tokens=9).most_thinking_tokens == 9
    assert SamplingParams(max_thinking_seconds=1).most_thinking_tokens is None
