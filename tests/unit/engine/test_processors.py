"""Logits processors: a bias, their order, and that they leave what they are given."""

from typing import Any

import numpy as np
import pytest

from tests.engines import tiny_engine
from thinslice.config import MAX_BIASES, SamplingParams
from thinslice.engine.draws import Draws
from thinslice.engine.processors import Bias, Penalties, processors_for
from thinslice.engine.sampler import sample
from thinslice.engine.sequence import Sequence
from thinslice.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def sequence_of(params: SamplingParams) -> Sequence:
    return Sequence(0, [0, 1], params, 64, Draws(0), completion_token_ids=[2])


def test_a_bias_is_added_to_the_logits_of_its_tokens() -> None:
    row = np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32)
    biased = Bias({3: -2.5, 0: 0.5})(row, sequence_of(GREEDY), [])
    assert biased.tolist() == [1.5, 2.0, 3.0, 1.5]
    assert biased.dtype == np.float32
    assert row.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_penalties_come_before_the_bias() -> None:
    """A bias is a wish about a token, which no penalty weakens."""
    params = SamplingParams(repetition_penalty=2.0, logit_bias={2: 1.0}, temperature=0)
    kinds = [type(one) for one in processors_for(params)]
    assert kinds == [Penalties, Bias]
    logits = np.array([0.0, 0.0, 4.0, 2.9], np.float32)
    assert sample(logits, sequence_of(params)) == 2
    assert sample(logits, sequence_of(SamplingParams(repetition_penalty=2.0, temperature=0))) == 3


def test_a_bias_holds_for_greedy_and_drawn_tokens() -> None:
    logits = np.zeros(50, np.float32)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, top_p=1.0, logit_bias={17: 100})
        assert sample(logits, sequence_of(params)) == 17
    banned = SamplingParams(temperature=1.0, top_p=1.0, logit_bias={17: -100}, seed=1)
    sequence = sequence_of(banned)
    assert 17 not in {sample(logits, sequence) for _ in range(500)}


def test_an_engine_follows_it_and_refuses_ids_that_it_does_not_have() -> None:
    engine = tiny_engine()
    sequence = engine.add_request(
        [1, 2, 3], SamplingParams(temperature=0, max_tokens=4, logit_bias={40: 100})
    )
    while engine.has_work:
        engine.step()
    assert sequence.completion_token_ids == [40] * 4
    with pytest.raises(RequestError, match="token id 64 is outside the vocabulary of 64"):
        engine.add_request([1], SamplingParams(logit_bias={64: 1}))


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({1: 101}, "logit_bias of 1 is 101; expected -100.0..100.0"),
        ({1: float("nan")}, "logit_bias of 1 is nan"),
        ({-1: 1}, "token id is -1"),
        ({"1": 1}, "token id is '1'; expected a number"),
        ({1: "x"}, "logit_bias of 1 is 'x'"),
        ([1, 2], "no mapping"),
        ((1, 2), "something else than pairs"),
        (dict.fromkeys(range(MAX_BIASES + 1), 0.0), "at most 1024"),
    ],
)
def test_what_is_no_bias_is_refused(bias: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(logit_bias=bias)


def test_equal_biases_are_equal_params() -> None:
    first, second = (
        SamplingParams(logit_bias={2: 1, 1: 0.5}),
        SamplingParams(logit_bias={1: 0.5, 2: 1}),
    )
    assert first == second
    assert hash(first) == hash(second)
