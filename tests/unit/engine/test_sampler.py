"""Sampling against plain definitions, and its distribution against the probabilities."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.arrays import log_softmax
from thinslice.config import SamplingParams, TokenSampling
from thinslice.engine.draws import Draws
from thinslice.engine.sampler import (
    _DRAW_BLOCK,
    Chosen,
    _likeliest,
    best_tokens,
    descending_keys,
    keep_likely,
    of_keys,
    sample,
    sample_rows,
    token_logprobs,
)
from thinslice.engine.sequence import Sequence
from thinslice.errors import CheckpointError

filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)


def sequence_of(
    params: SamplingParams, prompt: tuple[int, ...] = (0,), completion: tuple[int, ...] = ()
) -> Sequence:
    return Sequence(0, list(prompt), params, 100, Draws(params.seed or 0), list(completion))


def normal(size: int | tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def plainly_kept(logits: np.ndarray, params: SamplingParams) -> list[int]:
    """The filters one after the other, each by its definition, in plain Python."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if params.top_k:
        order = order[: params.top_k]
    best = float(logits[order[0]])
    weights = [float(np.exp((float(logits[i]) - best) / params.temperature)) for i in order]
    kept, mass = 0, 0.0
    while kept < len(order) and (kept == 0 or mass / sum(weights) < params.top_p):
        mass += weights[kept]
        kept += 1
    kept = kept if params.top_p < 1.0 else len(order)
    return [i for i, w in zip(order[:kept], weights[:kept], strict=True) if w >= params.min_p]


@given(filters, st.integers(0, 2**32), st.sampled_from([5, 300, 1700]), st.sampled_from([0.1, 2]))
def test_filters_keep_what_their_definitions_keep(
    params: SamplingParams, seed: int, size: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(size) * spread).astype(np.float32)
    logits[rng.integers(size, size=3)] = 1.0  # ties, resolved by id
    logits[rng.integers(size, size=2)] = (0.0, -0.0)
    kept_logits, token_ids = keep_likely(logits, params)
    assert token_ids.tolist() == plainly_kept(logits, params)
    assert (kept_logits == logits[token_ids]).all()


@pytest.mark.parametrize(
    ("settings", "num_sorted"),
    [
        ({"top_k": 3}, 5),
        ({"top_k": 5}, 5),
        ({"top_k": 6}, 9),
        ({"top_k": 10}, 13),
        ({"top_k": 14}, 14),  # the 14th likeliest is looked for by itself
        ({"top_k": 99}, 99),
        ({"top_k": 100}, 100),
        ({"top_k": 101}, 100),
        ({"top_k": 3, "top_p": 0.9999}, 5),
        ({"top_p": 0.9}, 5),
        ({"top_p": 0.999}, 9),
        ({"top_p": 0.99999}, 13),
        ({"top_p": 0.9999999}, 100),
        ({"min_p": 0.5}, 5),
        ({"min_p": 0.02}, 5),
        ({"min_p": 0.018}, 9),  # that of the last of five is 0.0183, and the next ones matter
        ({"min_p": 0.0}, 100),
        ({"min_p": 0.018, "top_p": 0.9}, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_few_tokens_are_sorted(
    settings: dict[str, Any], num_sorted: int, temperature: float
) -> None:
    """Where the filters keep few; sorting is what takes longest of a wide vocabulary."""
    ladder = -np.arange(100, dtype=np.float32) * np.float32(temperature)
    tokens = TokenSampling(temperature=temperature, **{"top_k": 0, "top_p": 1.0, **settings})
    total = float(np.exp(ladder / temperature).sum()) if tokens.top_p < 1 else None
    logits, token_ids = _likeliest(ladder, ladder.max(), tokens, total)
    assert token_ids.tolist() == [*range(num_sorted)]
    assert (logits == ladder[:num_sorted]).all()


def test_a_filter_ends_where_it_has_enough_exactly() -> None:
    """The least tokens whose mass is top-p or more; and of all, the one that is barely likely."""
    half = SamplingParams(temperature=1.0, top_p=0.5).resolved({})
    assert keep_likely(np.zeros(2, np.float32), half)[1].tolist() == [0]
    all_but_nothing = SamplingParams(temperature=1.0, top_p=1.0, min_p=1e-30).resolved({})
    logits = np.array([-60.0, 0.0, -80.0], np.float32)
    assert keep_likely(logits, all_but_nothing)[1].tolist() == [1, 0]


def test_log_probabilities_of_large_logits() -> None:
    logits = np.array([1000.0, 1001.0, -1000.0], np.float32)
    expected = log_softmax(logits)
    for token_id in range(3):
        got = token_logprobs(logits, Chosen(token_id, 0.0), 0).logprob
        assert got == pytest.approx(float(expected[token_id]))


@pytest.mark.parametrize(("top_k", "num_sorted"), [(0, 5), (4, 4), (6, 5), (20, 5)])
def test_what_is_ruled_out_is_not_sorted(top_k: int, num_sorted: int) -> None:
    logits = np.full(20, -np.inf, np.float32)
    logits[[2, 9, 11, 4, 5]] = (0.0, -1.0, -2.0, -3.0, -90.0)
    tokens = TokenSampling(temperature=1.0, top_k=top_k, top_p=1.0)
    _, token_ids = _likeliest(logits, logits.max(), tokens, None)
    assert token_ids.tolist() == [2, 9, 11, 4, 5][:num_sorted]


@given(st.integers(0, 2**32), st.sampled_from([0, 7, 2**31]))
def test_keys_are_in_the_order_of_the_logits(seed: int, first: int) -> None:
    logits = normal((3, 40), seed)
    logits[:, 5:9] = (-0.0, 0.0, -np.inf, np.inf)
    logits[:, 20:22] = 1.5  # equal ones, by place
    keys = np.sort(descending_keys(logits, first), axis=-1)
    for row, of_row in zip(logits, keys, strict=True):
        values, places = of_keys(of_row)
        expected = sorted(range(40), key=lambda i: (-float(row[i]), i))
        assert (places - first).tolist() == expected
        assert (values == row[expected]).all()
        assert not np.signbit(values[values == 0]).any()


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 20,000 draws; a wrong temperature is seen by the same statistic."""
    logits = np.array([2.0, 1.0, 0.0, -1.0, 0.5], np.float32)
    count = 20_000
    expected = np.exp(log_softmax(logits / 0.7)) * count

    def statistic(temperature: float) -> float:
        sequence = sequence_of(SamplingParams(temperature=temperature, top_p=1.0, seed=11))
        observed = np.bincount([sample(logits, sequence) for _ in range(count)], minlength=5)
        return float(((observed - expected) ** 2 / expected).sum())

    critical = 18.47  # chi-square with 4 degrees of freedom, p = 0.001
    assert statistic(0.7) < critical
    assert statistic(0.8) > critical


def test_draws_from_a_whole_vocabulary_follow_the_probabilities() -> None:
    """Over several blocks of tokens; chi-square over the blocks, and over the tokens of one."""
    logits = normal(5 * _DRAW_BLOCK + 77)
    sequence = sequence_of(SamplingParams(temperature=1.0, top_p=1.0, seed=3))
    count = 20_000
    draws = [sample(logits, sequence) for _ in range(count)]
    probs = np.exp(log_softmax(logits))
    blocks = np.arange(len(logits)) // _DRAW_BLOCK

    def statistic(bins: np.ndarray, num_bins: int) -> float:
        expected = np.bincount(bins, probs, num_bins) * count
        observed = np.bincount(bins[draws], minlength=num_bins)
        return float(((observed - expected) ** 2 / expected).sum())

    assert statistic(blocks, 6) < 20.52  # 5 degrees of freedom, p = 0.001
    assert statistic(np.arange(len(logits)) % 16, 16) < 37.70  # 15 degrees, p = 0.001


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = np.full(700, -np.inf, np.float32)
    logits[[3, 600]] = 0.0
    for top_p in (1.0, 0.99999):
        sequence = sequence_of(SamplingParams(temperature=1.0, top_p=top_p))
        assert {sample(logits, sequence) for _ in range(200)} == {3, 600}


def test_logits_that_are_no_numbers_are_an_error() -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        logits = np.full(10, value, np.float32)
        for temperature in (0.0, 1.0):
            with pytest.raises(CheckpointError, match="are not numbers"):
                sample(logits, sequence_of(SamplingParams(temperature=temperature)))


@pytest.mark.parametrize("size", [10, 5000])
def test_logprobs_are_those_of_the_unchanged_logits(size: int) -> None:
    logits = normal(size, seed=size) * 4
    logits[5:8] = 30.0  # equal ones, by id
    params = SamplingParams(temperature=2.0, top_k=2, frequency_penalty=1.5, logprobs=4, seed=1)
    sequence = sequence_of(params, completion=(5, 5))
    sampled = sample_rows(logits[None], best_tokens(logits[None]), sequence)
    expected = log_softmax(logits)
    (got,) = sampled.logprobs
    order = sorted(range(size), key=lambda i: (-float(logits[i]), i))[:4]
    assert [token_id for token_id, _ in got.top] == order
    values = [got.logprob, *(value for _, value in got.top)]
    np.testing.assert_allclose(values, expected[[*sampled.token_ids, *order]], 1e-7, 1e-7)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(values, log_softmax(logits / 2)[[0, *order]], 1e-7, 1e-7)


def test_no_top_logprobs_gives_the_chosen_one_alone() -> None:
    assert token_logprobs(np.zeros(4, dtype=np.float32), Chosen(2, 0.0), 0).top == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 1.0},
        {"top_p": 0.8},
        {"top_p": 0.9, "top_k": 7},
        {"top_p": 1.0, "min_p": 0.2},
        {"top_p": 0.7, "repetition_penalty": 1.5, "logit_bias": {3: 2.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_a_token_has_its_log_probability_under_what_it_was_drawn_from(
    settings: dict[str, Any], temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, logprobs=0, seed=4, **settings).resolved({})
    sequence = sequence_of(params, prompt=(1, 2), completion=(3, 5))
    logits = normal((1, 40), seed=1) * 2
    row = logits[0]
    for processor in sequence.processors:
        row = processor(row, sequence, [])
    kept = plainly_kept(row, params)
    scaled = row[kept].astype(np.float64) / temperature
    expected = dict(zip(kept, scaled - np.logaddexp.reduce(scaled), strict=True))
    seen = set()
    for _ in range(60):
        sampled = sample_rows(logits, best_tokens(logits), sequence)
        (token_id,), (got,) = sampled.token_ids, sampled.logprobs
        assert got.drawn_logprob == pytest.approx(expected[token_id], abs=2e-6)
        seen.add(token_id)
    assert len(seen) > 1
    is_models_own = settings == {"top_p": 1.0} and temperature == 1.0
    models_own = log_softmax(logits[0])
    differs = any(abs(expected[one] - float(models_own[one])) > 0.01 for one in seen)
    assert differs != is_models_own


def test_a_greedy_token_is_certain() -> None:
    logits = normal((1, 40))
    sequence = sequence_of(SamplingParams(temperature=0, logprobs=0))
    (got,) = sample_rows(logits, best_tokens(logits), sequence).logprobs
    assert got.drawn_logprob == 0.0
    assert got.logprob < 0.0


def test_rows_behind_drafts_give_the_tokens_that_come_without() -> None:
    """A draft that is right is accepted, a wrong one ends the run with the right token."""
    logits = normal((5, 40), seed=4) * 2
    params = SamplingParams(temperature=1.0, seed=9, frequency_penalty=0.5, repetition_penalty=1.2)
    alone = sequence_of(params)
    for row in logits:
        alone.completion_token_ids.append(sample(row, alone))
    right = alone.completion_token_ids
    for num_right in range(5):
        sequence = sequence_of(params)
        drafts = [*right[:num_right], *[(token_id + 1) % 40 for token_id in right[num_right:4]]]
        sequence.draft_token_ids = drafts
        sampled = sample_rows(logits, best_tokens(logits), sequence)
        assert sampled.token_ids == right[: num_right + 1]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([1.0, 3.0, 3.0], np.float32)
    assert sample(logits, sequence_of(SamplingParams(temperature=0))) == 1


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = normal(1000) * 10
    for temperature in (1e-300, 1e-8, 1e-3):
        params = SamplingParams(temperature=temperature, top_p=1.0)
        assert sample(logits, sequence_of(params)) == int(logits.argmax())


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = normal(100)
    params = SamplingParams(seed=5, top_p=1.0, temperature=2.0)
    first, second = sequence_of(params), sequence_of(params)
    draws = [sample(logits, first) for _ in range(20)]
    assert draws == [sample(logits, second) for _ in range(20)]
    assert len(set(draws)) > 3


def test_penalties_by_their_definitions() -> None:
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, temperature=1
    )
    logits = np.array([4.0, -4.0, 1.0, 1.0, 1.0], np.float32)
    sequence = sequence_of(params, prompt=(0, 1), completion=(2, 2))
    expected = [2.0, -8.0, 0.5 - 0.5 - 0.5, 0.5 - 0.5 - 0.25, 1.0]
    (penalize,) = sequence.processors
    penalized = penalize(logits, sequence, [3])
    assert penalized.dtype == np.float32
    np.testing.assert_allclose(penalized, expected, rtol=1.3e-6, atol=1e-5)
    assert logits[0] == 4.0, "the row given is left as it was"
