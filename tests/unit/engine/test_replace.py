"""Weights replaced under a model that stays loaded give what a model gives that has them."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.arrays import array_of
from tests.checkpoints import random_tensors, tiny_config, write_safetensors_model
from tests.engines import engine_of, greedy, logits_of, run_all, tiny_engine
from tests.numerics.test_streaming import streamed_engine, write
from tests.speculation import load_small_mtp
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import SamplingParams
from thinslice.engine.replace import loaded_tensors
from thinslice.engine.replace import write as write_in_pieces
from thinslice.engine.sequence import StepOutput
from thinslice.errors import BusyError, ConfigError, RequestError
from thinslice.kernels.arrays import BF16
from thinslice.kernels.native_pack import copy_into
from thinslice.memory.resident import ResidentWeights
from thinslice.plan.tensors import EMBEDDING, HEAD, Room, tensors_of
from thinslice.units import MIB

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = [3, 17, 5, 48, 41, 9, 60, 2, 33, 11, 12, 13]


def others() -> dict[str, torch.Tensor]:
    return random_tensors(tiny_engine().runner.weights.shape, seed=9)


GIVEN: dict[str, Callable[[torch.Tensor], object]] = {
    "array": array_of,
    "float16 array": lambda tensor: array_of(tensor.half()),
    "float64 array": lambda tensor: array_of(tensor.double()),
    "array by columns": lambda tensor: np.asfortranarray(array_of(tensor)),
    "float64 tensor": torch.Tensor.double,
    "bfloat16 tensor": torch.Tensor.bfloat16,
    "tensor by columns": lambda tensor: torch.from_numpy(np.asfortranarray(array_of(tensor))),
    "parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("kind", GIVEN)
def test_the_tokens_are_those_of_the_new_weights(kind: str) -> None:
    """From arrays and tensors of any floats, wherever their numbers lie."""
    engine = tiny_engine()
    old = greedy(engine, PROMPT, 12)
    tensors = {name: GIVEN[kind](one) for name, one in others().items()}
    engine.replace_weights(tensors)
    new = greedy(engine, PROMPT, 12)
    fresh = tiny_engine()
    source = fresh.runner.weights.source
    assert isinstance(source, ResidentWeights)
    for name, one in tensors.items():
        source.write(name, slice(None), array_of(torch.as_tensor(one).float()))
    assert new == greedy(fresh, PROMPT, 12) != old
    assert greedy(engine, PROMPT, 12) == new, "from the cached prefix of the new weights"
    assert engine.metrics.prefix_hit_tokens > 0
    engine.replace_weights(random_tensors(engine.runner.weights.shape, seed=2))
    assert greedy(engine, PROMPT, 12) == old


def test_a_prefix_of_the_old_weights_that_is_used_is_seen() -> None:
    """The planted fault: as if the prefix cache did not know."""
    engine = tiny_engine()
    greedy(engine, PROMPT, 12)
    engine.replace_weights(others())
    engine.scheduler.blocks.weights_version = 0
    fresh = tiny_engine()
    fresh.replace_weights(others())
    expected = greedy(fresh, PROMPT, 12)
    assert greedy(engine, PROMPT, 12) != expected


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.update(x=torch.ones(2)), "x is no weight"),
        (lambda tensors: tensors.update({"\ud800": torch.ones(2)}), r"^\\ud800 is no weight"),
        (lambda tensors: tensors.update({3: torch.ones(2)}), "the name 3; expected text"),
        (lambda tensors: tensors.update({10**5000: torch.ones(2)}), "a int that cannot be written"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"\[3\] is to rep"),
        (lambda tensors: tensors.update({"model.norm.weight": [1.0]}), "expected a tensor"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "a tensor of torch.int8; expected dense floats",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(32, np.int8)}),
            "an array of int8; expected floats",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.full(32, 0x3F80, np.uint16)}),
            "an array of uint16; expected floats",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, device="meta")}),
            "expected an array or a dense tensor of floats",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).to_sparse()}),
            "expected an array or a dense tensor of floats",
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
        engine.replace_weights(tensors)
    assert greedy(engine, PROMPT, 12) == expected


def test_requests_under_way_are_not_changed_under() -> None:
    engine = tiny_engine()
    sequence = engine.add_request(PROMPT, SamplingParams(max_tokens=4))
    with pytest.raises(BusyError, match="some are under way"):
        engine.replace_weights(others())
    engine.abort(sequence)
    engine.replace_weights(others())


def test_weights_that_are_no_numbers_in_memory_are_refused(tmp_path: Path) -> None:
    engine = streamed_engine(write("bf16", tmp_path), 2)
    with pytest.raises(ConfigError, match="can be replaced; load the model with dtype"):
        engine.replace_weights({})
    engine.runner.close()


def test_replacing_that_is_interrupted_leaves_no_model_that_runs() -> None:
    engine, expected = tiny_engine(), tiny_engine()
    expected.replace_weights(others())

    class Interrupting(np.ndarray):
        def __setitem__(self, *_: object) -> None:
            raise KeyboardInterrupt

    tensors = others()
    name, last = [*tensors.items()][-1]
    source = engine.runner.weights.source
    assert isinstance(source, ResidentWeights)
    own = source.tensors[name]
    source.tensors[name] = own.view(Interrupting)
    with pytest.raises(KeyboardInterrupt):
        engine.replace_weights(tensors)
    source.tensors[name] = own
    for run in (lambda: engine.add_request(PROMPT, GREEDY), engine.step):
        with pytest.raises(RequestError, match="weights were replaced in part"):
            run()
    engine.replace_weights(tensors)
    assert last is not own
    assert greedy(engine, PROMPT, 12) == greedy(expected, PROMPT, 12)


def test_a_callback_cannot_replace_weights_within_a_step() -> None:
    engine = tiny_engine()
    expected = greedy(tiny_engine(), PROMPT, 4)
    refused: list[BusyError] = []

    def replace(_: StepOutput) -> None:
        with pytest.raises(BusyError) as caught:
            engine.replace_weights(others())
        refused.append(caught.value)

    sequence = engine.add_request(PROMPT, GREEDY, replace)
    run_all(engine)
    assert len(refused) == 4
    assert sequence.completion_token_ids == expected


def test_a_closed_model_says_so() -> None:
    engine = tiny_engine()
    engine.close()
    with pytest.raises(RequestError, match="this model is closed"):
        engine.replace_weights(others())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_every_weight_is_replaced(
    dtype: str, architecture: str, is_tied: bool, tmp_path: Path
) -> None:
    """By a whole state dict, which has a tied head twice."""
    config = tiny_config(architecture, tie_word_embeddings=is_tied)
    for name, seed in (("old", 1), ("new", 2)):
        (tmp_path / name).mkdir()
        write_safetensors_model(tmp_path / name, config, seed=seed)
    old, new = (engine_of(open_checkpoint(tmp_path / name), dtype) for name in ("old", "new"))
    tensors = random_tensors(old.runner.weights.shape, seed=2, dtype=torch.bfloat16)
    if is_tied:
        tensors[HEAD] = tensors[EMBEDDING].clone()
    expected = logits_of(new, PROMPT)
    assert not np.array_equal(logits_of(old, PROMPT), expected)
    old.replace_weights(tensors)
    assert np.array_equal(logits_of(old, PROMPT), expected)
    if is_tied:
        tensors[HEAD] = tensors[HEAD] + 1
        with pytest.raises(ConfigError, match="are to differ"):
            old.replace_weights(tensors)
        old.replace_weights({HEAD: tensors[EMBEDDING]})
        assert np.array_equal(logits_of(old, PROMPT), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("own", [np.float32, BF16])
def test_a_large_tensor_is_taken_in_pieces(own: Any, order: Any, dtype: str) -> None:
    """Whose last piece is short."""
    numbers = np.random.default_rng(1).normal(size=(4099, 512)).astype(dtype, order)
    source = ResidentWeights({EMBEDDING: np.zeros((4099, 512), own)})
    expected = np.zeros((4099, 512), own)
    copy_into(numbers.astype(np.float32), expected)
    tracemalloc.start()
    write_in_pieces(source, EMBEDDING, numbers)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * MIB, "of 8 MiB in float32"
    assert np.array_equal(source.tensors[EMBEDDING], expected)


def test_prediction_layers_that_are_not_loaded_are_passed_over() -> None:
    weights = load_small_mtp()
    shape = weights.shape
    source = ResidentWeights({name: np.zeros(1) for name in ("model.norm.weight",)})
    tensors = {one.name: np.ones(1) for one in tensors_of(shape)}
    kept = loaded_tensors(tensors, shape, source)
    assert not [name for name in kept if "mtp_layers" in name]
    assert len(kept) == len([one for one in tensors_of(shape) if one.room is not Room.PREDICTION])
