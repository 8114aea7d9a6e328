"""Sampling against plain definitions, and its distribution against the probabilities."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from thinslice.config import SamplingParams
from thinslice.engine.sampler import _CANDIDATES, keep_likely, penalize, sample
from thinslice.engine.sequence import Sequence

filters = st.builds(
    SamplingParams,
    top_k=st.sampled_from([0, 1, 3, 50, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)


def sequence_of(
    params: SamplingParams, prompt: tuple[int, ...] = (0,), completion: tuple[int, ...] = ()
) -> Sequence:
    generator = torch.Generator().manual_seed(params.seed or 0)
    return Sequence(0, list(prompt), params, 100, generator, list(completion))


def plainly_kept(logits: torch.Tensor, params: SamplingParams) -> list[int]:
    """The filters one after the other, each by its definition, in plain Python."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if params.top_k:
        order = order[: params.top_k]
    weights = [float(w) for w in logits[order].exp()]
    kept, mass = 0, 0.0
    while kept < len(order) and (kept == 0 or mass / sum(weights) < params.top_p):
        mass += weights[kept]
        kept += 1
    order = order[:kept] if params.top_p < 1.0 else order
    best = float(logits[order[0]].exp())
    return [i for i in order if float(logits[i].exp()) >= params.min_p * best]


@given(filters, st.integers(0, 2**32), st.sampled_from([5, 300, _CANDIDATES + 700]))
def test_filters_keep_what_their_definitions_keep(
    params: SamplingParams, seed: int, size: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(size, dtype=torch.float64) * 2
    logits[torch.randint(size, (3,))] = 1.0  # ties, resolved by id
    kept_logits, token_ids = keep_likely(logits, params)
    assert token_ids.tolist() == plainly_kept(logits, params)
    assert torch.equal(kept_logits, logits[token_ids])


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 20,000 draws; a wrong temperature is seen by the same statistic."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    count = 20_000

    def statistic(temperature: float) -> float:
        sequence = sequence_of(SamplingParams(temperature=temperature, top_p=1.0, seed=11))
        draws = torch.tensor([sample(logits, sequence) for _ in range(count)])
        observed = torch.bincount(draws, minlength=5).double()
        expected = (logits.double() / 0.7).softmax(0) * count
        return float(((observed - expected) ** 2 / expected).sum())

    critical = 18.47  # chi-square with 4 degrees of freedom, p = 0.001
    assert statistic(0.7) < critical
    assert statistic(0.8) > critical


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0])
    assert sample(logits, sequence_of(SamplingParams(temperature=0))) == 1


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.randn(1000) * 10
    for temperature in (1e-300, 1e-8, 1e-3):
        params = SamplingParams(temperature=temperature, top_p=1.0)
        assert sample(logits, sequence_of(params)) == int(logits.argmax())


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = torch.randn(100)
    params = SamplingParams(seed=5, top_p=1.0, temperature=2.0)
    first, second = sequence_of(params), sequence_of(params)
    draws = [sample(logits, first) for _ in range(20)]
    assert draws == [sample(logits, second) for _ in range(20)]
    assert len(set(draws)) > 3


def test_penalties_by_their_definitions() -> None:
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, temperature=1
    )
    logits = torch.tensor([4.0, -4.0, 1.0, 1.0, 1.0])
    sequence = sequence_of(params, prompt=(0, 1), completion=(2, 2, 3))
    expected = torch.tensor([2.0, -8.0, 0.5 - 0.5 - 0.5, 0.5 - 0.5 - 0.25, 1.0])
    torch.testing.assert_close(penalize(logits, sequence), expected)
    assert logits[0] == 4.0, "the row given is left as it was"
