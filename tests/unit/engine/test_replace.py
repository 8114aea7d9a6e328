"""Weights replaced under a model that stays loaded give what a model gives that has them."""

from collections.abc import Callable

import pytest
import torch

from tests.checkpoints import random_tensors
from tests.engines import greedy, tiny_engine
from tests.numerics.test_streaming import streamed_engine, write
from thinslice.config import SamplingParams
from thinslice.engine.replace import replace_weights
from thinslice.errors import BusyError, ConfigError
from thinslice.memory.resident import ResidentWeights

PROMPT = [3, 17, 5, 48, 41, 9, 60, 2, 33, 11, 12, 13]


def others() -> dict[str, torch.Tensor]:
    return random_tensors(tiny_engine().runner.weights.shape, seed=9)


def test_the_tokens_are_those_of_the_new_weights() -> None:
    engine = tiny_engine()
    old = greedy(engine, PROMPT, 12)
    replace_weights(engine, {name: one.double() for name, one in others().items()})
    new = greedy(engine, PROMPT, 12)
    fresh = tiny_engine()
    source = fresh.runner.weights.source
    assert isinstance(source, ResidentWeights)
    source.write(others())
    assert new == greedy(fresh, PROMPT, 12) != old
    assert greedy(engine, PROMPT, 12) == new, "from the cached prefix of the new weights"
    assert engine.metrics.prefix_hit_tokens > 0
    replace_weights(engine, random_tensors(engine.runner.weights.shape, seed=2))
    assert greedy(engine, PROMPT, 12) == old


def test_a_prefix_of_the_old_weights_that_is_used_is_seen() -> None:
    """The planted fault: as if the prefix cache did not know."""
    engine = tiny_engine()
    greedy(engine, PROMPT, 12)
    replace_weights(engine, others())
    engine.scheduler.blocks.weights_version = 0
    fresh = tiny_engine()
    replace_weights(fresh, others())
    expected = greedy(fresh, PROMPT, 12)
    assert greedy(engine, PROMPT, 12) != expected


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.update(x=torch.ones(2)), "x is no weight"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"\[3\] is to rep"),
        (lambda tensors: tensors.update({"model.norm.weight": [1.0]}), "no tensor of floats"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "no tensor of floats",
        ),
    ],
)
def test_what_does_not_fit_replaces_nothing(
    change: Callable[[dict[str, object]], None], told: str
) -> None:
    engine = tiny_engine()
    expected = greedy(engine, PROMPT, 12)
    tensors = others()
    change(tensors)
    with pytest.raises(ConfigError, match=told):
        replace_weights(engine, tensors)
    assert greedy(engine, PROMPT, 12) == expected


def test_requests_under_way_are_not_changed_under() -> None:
    engine = tiny_engine()
    sequence = engine.add_request(PROMPT, SamplingParams(max_tokens=4))
    with pytest.raises(BusyError, match="some are under way"):
        replace_weights(engine, others())
    engine.abort(sequence)
    replace_weights(engine, others())


def test_weights_that_are_no_numbers_in_memory_are_refused(tmp_path: object) -> None:
    engine = streamed_engine(write("bf16", tmp_path), 2)
    with pytest.raises(ConfigError, match="can be replaced; load the model with dtype"):
        replace_weights(engine, {})
    engine.runner.close()
