"""Verified drafts against sampling without drafts: the same distribution, and the same text."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.config import SamplingParams
from thinslice.engine import sampler
from thinslice.engine.draws import Draws
from thinslice.engine.sampler import best_tokens, keep_likely, sample, sample_rows
from thinslice.engine.sequence import Sequence

# Two rows: the logits that follow the prompt, and those that follow the draft.
LOGITS = np.array([[1.2, 0.3, 2.0, -0.5, 0.9, -1.0], [0.1, 1.5, 1.7, 0.2, -0.3, 0.8]], np.float32)
VOCAB_SIZE, DRAFT = LOGITS.shape[1], 2
PROMPT, COMPLETION = [0, 4], [1, 2, 2]
COUNT, COUNT_OF_FAULTS = 25_000, 8_000
Verify = Callable[[np.ndarray, list[int], Sequence], list[int]]
Outcome = tuple[int, ...]


def sequence_of(params: SamplingParams, completion: list[int] | None = None) -> Sequence:
    draws = Draws(params.seed or 0)
    return Sequence(0, PROMPT, params, 100, draws, list(completion or COMPLETION))


def verify(logits: np.ndarray, drafts: list[int], sequence: Sequence) -> list[int]:
    """The tokens that a sequence with these drafts takes."""
    drafted = replace(sequence, draft_token_ids=list(drafts))
    return sample_rows(logits, best_tokens(logits), drafted).token_ids


def probabilities(
    logits: list[float], completion: list[int], params: SamplingParams
) -> list[float]:
    """A token's distribution by the definitions of SamplingParams, in plain Python."""
    params, logits = params.resolved({}), list(logits)
    for token in {*PROMPT, *completion}:
        scale = params.repetition_penalty
        logits[token] = logits[token] / scale if logits[token] > 0 else logits[token] * scale
    for token, count in Counter(completion).items():
        logits[token] -= params.presence_penalty + params.frequency_penalty * count
    weights = [math.exp(value / params.temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: params.top_k or None]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for token in order:
        if mass / total < params.top_p and weights[token] >= params.min_p * weights[order[0]]:
            kept.append(token)
        mass += weights[token]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def expected_shares(params: SamplingParams) -> dict[Outcome, float]:
    """How often each run of tokens comes: one where the draft is not drawn, else two."""
    first = probabilities(LOGITS[0].tolist(), COMPLETION, params)
    second = probabilities(LOGITS[1].tolist(), [*COMPLETION, DRAFT], params)
    shares: dict[Outcome, float] = {(i,): p for i, p in enumerate(first) if i != DRAFT}
    shares |= {(DRAFT, i): first[DRAFT] * p for i, p in enumerate(second)}
    return {outcome: share for outcome, share in shares.items() if share > 0.0}


@pytest.fixture
def remembered_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the filters keep of the few rows there are, computed once each: most of a run's time."""
    kept: dict[tuple[tuple[float, ...], SamplingParams], tuple[np.ndarray, np.ndarray]] = {}

    def remember(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        key = (tuple(logits.tolist()), params)
        if key not in kept:
            kept[key] = keep_likely(logits, params)
        return kept[key]

    monkeypatch.setattr(sampler, "keep_likely", remember)


def statistic(run: Verify, params: SamplingParams, count: int) -> tuple[float, int]:
    """Chi-square of so many verified runs, and its degrees of freedom."""
    sequence, shares = sequence_of(params), expected_shares(params)
    observed = Counter(tuple(run(LOGITS, [DRAFT], sequence)) for _ in range(count))
    if not observed.keys() <= shares.keys():
        return math.inf, len(shares) - 1
    terms = ((observed[one] - count * p) ** 2 / (count * p) for one, p in shares.items())
    return sum(terms), len(shares) - 1


def critical(degrees: int) -> float:
    """What chi-square stays under 999 times of 1000 (Wilson and Hilferty, 1931)."""
    spread = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - spread + 3.0902 * math.sqrt(spread)) ** 3


EVERYTHING = {"temperature": 0.8, "top_k": 5, "top_p": 0.95, "min_p": 0.05}
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.5}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 1.0, "top_k": 3},
        EVERYTHING | PENALTIES,
    ],
    ids=["plain", "top-p", "top-k", "everything"],
)
@pytest.mark.usefixtures("remembered_filters")
def test_verified_tokens_follow_the_models_distribution(settings: dict[str, float]) -> None:
    """Over 100,000 runs in all."""
    value, degrees = statistic(verify, SamplingParams(**settings, seed=3), COUNT)
    assert value < critical(degrees)


def rejecting(redraw: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Verify:
    """The published rule spelt out: accept with p(x), else draw from what ``redraw`` leaves."""

    def run(logits: np.ndarray, drafts: list[int], sequence: Sequence) -> list[int]:
        params, draws = sequence.params, sequence.draws
        kept, token_ids = keep_likely(logits[0], params)
        weights = np.exp(kept.astype(np.float64) / params.temperature)
        p, is_draft = weights / weights.sum(), token_ids == drafts[0]
        if draws.next() < p[is_draft].sum():
            return [drafts[0], sample(logits[1], sequence)]
        masses = np.cumsum(redraw(p, is_draft))
        chosen = np.searchsorted(masses, draws.next() * masses[-1], side="right")
        return [int(token_ids[chosen])]

    return run


def without_draft(p: np.ndarray, is_draft: np.ndarray) -> np.ndarray:
    return np.where(is_draft, 0.0, p)


def with_draft(p: np.ndarray, is_draft: np.ndarray) -> np.ndarray:
    return p


@pytest.mark.usefixtures("remembered_filters")
def test_the_published_rule_has_the_same_distribution() -> None:
    params = SamplingParams(temperature=0.6, top_p=0.9, seed=4)
    value, degrees = statistic(rejecting(without_draft), params, COUNT_OF_FAULTS)
    assert value < critical(degrees)


def penalties_without_accepted_drafts(
    logits: np.ndarray, drafts: list[int], sequence: Sequence
) -> list[int]:
    first = sample(logits[0], sequence)
    return [first, sample(logits[1], sequence)] if first == drafts[0] else [first]


def hotter(logits: np.ndarray, drafts: list[int], sequence: Sequence) -> list[int]:
    params = replace(sequence.params, temperature=1.15 * sequence.params.temperature)
    return verify(logits, drafts, replace(sequence, params=params))


@pytest.mark.parametrize(
    ("fault", "settings"),
    [
        (rejecting(with_draft), {"temperature": 0.6, "top_p": 0.9}),
        (penalties_without_accepted_drafts, EVERYTHING | PENALTIES),
        (hotter, EVERYTHING | PENALTIES),
    ],
)
@pytest.mark.usefixtures("remembered_filters")
def test_faults_are_seen(fault: Verify, settings: dict[str, float]) -> None:
    value, degrees = statistic(fault, SamplingParams(**settings, seed=3), COUNT_OF_FAULTS)
    assert value > critical(degrees)


def toy_logits(tokens: list[int]) -> np.ndarray:
    """A model over six tokens whose logits depend on the last three."""
    rng = np.random.default_rng(hash(tuple(tokens[-3:])) % 2**31)
    return 2.0 * rng.standard_normal(VOCAB_SIZE, dtype=np.float32)


def one_by_one(params: SamplingParams, length: int) -> list[int]:
    sequence = sequence_of(params)
    while len(sequence.completion_token_ids) < length:
        sequence.completion_token_ids.append(sample(toy_logits(sequence.tokens(0, 99)), sequence))
    return sequence.completion_token_ids


def by_drafts(params: SamplingParams, length: int, drafts: list[list[int]]) -> list[int]:
    sequence, turn = sequence_of(params), 0
    while len(sequence.completion_token_ids) < length:
        draft = drafts[turn % len(drafts)]
        turn += 1
        before = sequence.tokens(0, 99)
        rows = [toy_logits(before + draft[:count]) for count in range(len(draft) + 1)]
        sequence.completion_token_ids += verify(np.stack(rows), draft, sequence)
    return sequence.completion_token_ids[:length]


@given(
    st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4), min_size=1, max_size=8),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0]),
        top_k=st.sampled_from([0, 2]),
        top_p=st.sampled_from([0.8, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.4]),
        seed=st.integers(0, 1000),
    ),
)
def test_a_seed_gives_the_same_text_with_any_drafts(
    drafts: list[list[int]], params: SamplingParams
) -> None:
    assert by_drafts(params, 16, drafts) == one_by_one(params, 16)


def test_greedy_takes_the_drafts_that_are_most_likely() -> None:
    params = SamplingParams(temperature=0)
    logits = np.eye(4, dtype=np.float32)[[3, 1, 2]]
    assert verify(logits, [3, 1], sequence_of(params)) == [3, 1, 2]
    assert verify(logits, [3, 0], sequence_of(params)) == [3, 1]
    assert verify(logits, [2, 1], sequence_of(params)) == [3]
    assert verify(logits[:1], [], sequence_of(params)) == [3]


def test_the_sequence_is_left_as_it_was() -> None:
    sequence = sequence_of(SamplingParams(seed=1, frequency_penalty=0.5))
    for _ in range(10):
        verify(LOGITS, [DRAFT], sequence)
    assert sequence.completion_token_ids == COMPLETION


def test_a_draft_that_the_filters_leave_out_is_never_accepted() -> None:
    params = SamplingParams(top_k=2, top_p=1.0, temperature=5.0, seed=0)
    for seed in range(200):
        tokens = verify(LOGITS, [3], sequence_of(replace(params, seed=seed)))
        assert len(tokens) == 1
        assert tokens != [3]
